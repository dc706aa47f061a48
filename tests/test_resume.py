"""A run that is killed, stopped or goes wrong: it goes on bit for bit, or says what was wrong."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import ROOT, losses, run, workplace  # noqa: F401  (workplace is a fixture)

from data import Batch

STEPS = ("--global-batch", "4", "--epochs", "2", "--cache-features", "none", "--save-every", "2")
DATA = ("--data", "data/miniature/train", "--tokenizer", "data/miniature/tokenizer.model")


def curve(workplace: Path, name: str) -> list[tuple]:  # noqa: F811
    """What a run logged, without the times."""
    lines = (workplace / "runs" / name / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "loss", "lr", "gradient_norm", "weights")
    return [tuple(json.loads(line)[key] for key in keys) for line in lines]


def assert_same_run(workplace: Path, name: str, other: str) -> None:  # noqa: F811
    """The same curve, step for step, and the same weights, bit for bit."""
    assert curve(workplace, name) == curve(workplace, other)
    first, second = (
        load_file(workplace / "runs" / one / "checkpoint" / "model.safetensors")
        for one in (name, other)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def start(workplace: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:  # noqa: F811
    """train.py on two processes under torchrun, in the background.

    WHY: output to a file, as a pipe that nobody reads fills up and stops the run.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [*launcher, str(ROOT / "train.py"), "--workers", "0", *DATA, *options]
    with (workplace / "output.txt").open("w") as output:
        return subprocess.Popen(command, cwd=workplace, stdout=output, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, workplace: Path) -> str:  # noqa: F811
    """What the run printed; it must end well."""
    process.wait(timeout=300)
    output = (workplace / "output.txt").read_text()
    assert process.returncode == 0, output
    return output


def ranks(parent: int) -> list[int]:
    """The processes that a torchrun has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def wait_for_steps(process: subprocess.Popen, log: Path, steps: int) -> None:
    """Until so many steps are logged; fails if the run ends before that."""
    limit = time.monotonic() + 240
    while not log.exists() or len(log.read_text().splitlines()) < steps:
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(workplace):  # noqa: F811
    """A run of ten steps that nobody disturbs; Muon and AdamW, all its saves kept."""
    options = ("--micro-batch", "1", "--keep", "0")
    done = run(workplace, "straight", *STEPS, *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert len(losses(workplace, "straight")) == 10
    return "straight"


def copy_until(workplace: Path, straight: str, name: str, step: int) -> None:  # noqa: F811
    """A run as it is when it is killed in the middle of the save after `step` + 2."""
    home = workplace / "runs" / name
    shutil.copytree(workplace / "runs" / straight, home)
    shutil.rmtree(home / "checkpoint")
    for save in (home / "resume").iterdir():
        if int(save.name) > step + 2:
            shutil.rmtree(save)
    (home / "resume" / f"{step + 2:08d}").rename(home / "resume" / f"{step + 2:08d}.partial")


def test_after_a_kill_torchrun_starts_the_run_again_and_it_ends_bit_for_bit(workplace, straight):  # noqa: F811
    """One rank dies by SIGKILL between two saves; --max-restarts is all that is needed."""
    options = (*STEPS, "--micro-batch", "1", "--name", "restarted")
    process = start(workplace, *options, launcher=("--max-restarts", "2"))
    wait_for_steps(process, workplace / "runs" / "restarted" / "metrics.jsonl", 5)
    os.kill(ranks(process.pid)[-1], signal.SIGKILL)
    output = finish(process, workplace)
    resumed = re.findall(r"runs/restarted, from step (\d+)", output)
    assert resumed[0] == "0" and int(resumed[1]) in (4, 6, 8)  # saved every second step
    assert not (workplace / "runs" / "restarted-2").exists()
    assert_same_run(workplace, "restarted", straight)
    kept = sorted(f.name for f in (workplace / "runs" / "restarted" / "resume").iterdir())
    assert kept == ["00000008", "00000010"]


def test_sigterm_saves_and_resume_goes_on_bit_for_bit(workplace, straight):  # noqa: F811
    """What a cluster sends before it takes its machines back: leave at once, lose no step."""
    options = (*STEPS, "--micro-batch", "1", "--name", "stopped", "--save-every", "0")
    process = start(workplace, *options)
    wait_for_steps(process, workplace / "runs" / "stopped" / "metrics.jsonl", 3)
    for rank in ranks(process.pid):
        os.kill(rank, signal.SIGTERM)
        time.sleep(0.05)  # not all ranks hear of it in the same step
    output = finish(process, workplace)
    stopped_at = len(losses(workplace, "stopped"))
    assert f"Stopped after step {stopped_at}: --resume runs/stopped goes on." in output
    assert [f.name for f in (workplace / "runs" / "stopped" / "resume").iterdir()] == [
        f"{stopped_at:08d}"
    ]
    resumed = start(workplace, "--resume", "runs/stopped")
    finish(resumed, workplace)
    assert_same_run(workplace, "stopped", straight)


def test_a_run_goes_on_with_another_number_of_processes(workplace, straight):  # noqa: F811
    """Saved by two, read by one: the same curve to rounding. A half-written save is passed over."""
    copy_until(workplace, straight, "alone", 4)
    command = [sys.executable, str(ROOT / "train.py"), "--resume", "runs/alone"]
    done = subprocess.run(
        [*command, "--micro-batch", "4"], cwd=workplace, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "from step 4" in done.stdout and "5/10" in done.stderr
    assert losses(workplace, "alone")[:4] == losses(workplace, straight)[:4]
    assert losses(workplace, "alone") == pytest.approx(losses(workplace, straight), rel=1e-3)
    partials = list((workplace / "runs" / "alone" / "resume").glob("*.partial"))
    assert not partials


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--resume", "runs/nowhere"], "No run at runs/nowhere"),
        (["--resume", "runs/straight", "--lr", "0.5"], "--lr 0.5 contradicts"),
    ],
)
def test_a_resume_that_cannot_be_is_explained(workplace, straight, options, wanted):  # noqa: F811
    """No traceback, and the run that is there stays as it was."""
    before = curve(workplace, straight)
    command = [sys.executable, str(ROOT / "train.py"), *options]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert wanted in done.stderr and "Traceback" not in done.stderr
    assert curve(workplace, straight) == before


SPOILED = """
import sys
sys.path.insert(0, {root!r})
import data, train
from functools import partial
whole = data.collate
def spoil(examples):
    batch = whole(examples)
    {spoil}
    return batch
data.collate = spoil
train.main(sys.argv[1:])
train.leave()
"""


def run_spoiled(workplace: Path, name: str, spoil: str, *options: str):  # noqa: F811
    """train.py on two processes, with something done to every batch."""
    script = workplace / f"{name}.py"
    script.write_text(SPOILED.format(root=str(ROOT), spoil=spoil))
    return run(workplace, name, *STEPS, *options, processes=2, script=str(script))


def test_unusable_rows_are_written_down_once_and_stop_the_run_when_too_many(workplace):  # noqa: F811
    """One bad row on each of two ranks in every step of four rows: the tenth is one too many."""
    spoil = 'batch.bad = [{"row": 3, "id": "x", "file": "x.mp4", "reason": "no frames"}]'
    done = run_spoiled(workplace, "bad", spoil, "--micro-batch", "2")
    assert done.returncode != 0
    assert "error: 10 of the 20 rows so far could not be used." in done.stderr
    lines = (workplace / "runs" / "bad" / "bad_examples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert json.loads(lines[0])["reason"] == "no frames"


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_what_reproduces_it(workplace):  # noqa: F811
    """The error names the step and the rows; weights, batches and rows are in a folder."""
    spoil = "batch.pixels = {k: v * float('nan') for k, v in batch.pixels.items()}"
    done = run_spoiled(workplace, "nan", spoil, "--micro-batch", "2")
    assert done.returncode != 0
    folder = next((workplace / "runs" / "nan").glob("failure-step-*"))
    assert f"error: {folder.name}: the loss is nan" in done.stderr
    dumps = [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]
    ids = [[row["id"] for row in dump["rows"]] for dump in dumps]
    assert str(ids) in done.stderr and sum(map(len, ids)) == 4
    pixels = [v for dump in dumps for b in dump["batches"] for v in b["pixels"].values()]
    assert any(not clip.isfinite().all() for clip in pixels)
    again = Batch(**dumps[0]["batches"][0])
    assert again.num_labels > 0 and len(again.lengths) == 2
    assert (folder / ".metadata").exists()  # the weights


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(workplace):  # noqa: F811
    """A save after every step, so kills hit loads, steps and saves alike; torchrun restarts it."""
    options = ["--global-batch", "4", "--epochs", "8", "--cache-features", "none"]
    options += ["--micro-batch", "2", "--save-every", "1"]
    done = run(workplace, "undisturbed", *options, processes=2)
    assert done.returncode == 0, done.stderr
    launcher = ("--max-restarts", "30", "--monitor-interval", "0.1")
    process = start(workplace, *options, "--name", "soak", launcher=launcher)
    log, chance = workplace / "runs" / "soak" / "metrics.jsonl", random.Random(0)
    steps = len(losses(workplace, "undisturbed"))
    for kill in range(20):
        wait_for_steps(process, log, min(steps - 4, kill + 1))
        time.sleep(chance.uniform(0, 0.6))  # it loads, steps, saves
        opened = log.stat().st_ino
        os.kill(chance.choice(ranks(process.pid)), signal.SIGKILL)
        limit = time.monotonic() + 120
        while log.stat().st_ino == opened:  # until the new processes have opened the run
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
    finish(process, workplace)
    assert_same_run(workplace, "soak", "undisturbed")
