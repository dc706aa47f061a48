"""A run that is killed, stopped or goes wrong: it resumes bit for bit, or says what was wrong."""

import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import ROOT, also_as_on_cuda, losses, run, workplace  # noqa: F401  (fixture)
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from support import runs
from support.errors import CheckpointError, UserError
from train import TrainConfig, preset

STEPS = ("--global-batch", "4", "--epochs", "2", "--cache-features", "none", "--save-every", "2")
DATA = ("--data", "data/miniature/train", "--tokenizer", "data/miniature/tokenizer.model")


@pytest.fixture(scope="module")
def straight(workplace):  # noqa: F811
    """A run of ten steps that nobody disturbs; Muon and AdamW, all its saves kept."""
    options = ("--micro-batch", "1", "--keep", "none")
    done = run(workplace, "straight", *STEPS, *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert len(losses(workplace, "straight")) == 10
    return "straight"


@pytest.mark.slow
@also_as_on_cuda
def test_after_a_kill_torchrun_starts_the_run_again_and_it_ends_bit_for_bit(workplace, straight):  # noqa: F811
    """One rank dies by SIGKILL between two saves; --max-restarts is all that is needed."""
    options = (*STEPS, "--micro-batch", "1", "--name", "restarted")
    process = start(workplace, *options, launcher=("--max-restarts", "2"))
    wait_for_steps(process, workplace / "runs" / "restarted" / "metrics.jsonl", 5)
    os.kill(ranks(process.pid)[-1], signal.SIGKILL)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "runs/restarted, from step 4" in output  # saved every second step
    assert not (workplace / "runs" / "restarted-2").exists()
    assert_same_run(workplace, "restarted", straight)
    kept = sorted(f.name for f in (workplace / "runs" / "restarted" / "saves").iterdir())
    assert kept == ["00000008", "00000010"]


def start(workplace: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:  # noqa: F811
    """train.py on two processes under torchrun, in the background; into a file, because a pipe that
    nobody reads fills up and stops who writes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [*launcher, str(ROOT / "train.py"), "--workers", "0", *DATA, *options]
    command += ["--dtype", workplace.name]
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
    process = subprocess.Popen(command, cwd=workplace, stdout=output, stderr=subprocess.STDOUT)
    process.stdout = output
    return process


def wait_for_steps(process: subprocess.Popen, log: Path, steps: int) -> None:
    """Until so many steps are logged; fails if the run ends before that."""
    limit = time.monotonic() + 240
    while not log.exists() or len(log.read_text().splitlines()) < steps:
        assert process.poll() is None, output_of(process)
        assert time.monotonic() < limit
        time.sleep(0.02)


def output_of(process: subprocess.Popen) -> str:
    """All that it printed until its end."""
    process.wait(timeout=300)
    process.stdout.seek(0)
    return process.stdout.read()


def ranks(parent: int) -> list[int]:
    """The processes that a torchrun has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def assert_same_run(workplace: Path, name: str, other: str) -> None:  # noqa: F811
    """The same curve, step for step, and the same weights, bit for bit."""
    assert curve(workplace, name) == curve(workplace, other)
    first, second = (
        load_file(workplace / "runs" / one / "checkpoint" / "model.safetensors")
        for one in (name, other)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def curve(workplace: Path, name: str) -> list[tuple]:  # noqa: F811
    """What a run logged, without the times."""
    lines = (workplace / "runs" / name / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "loss", "learning_rate", "gradient_norm", "mixing_weights")
    return [tuple(json.loads(line)[key] for key in keys) for line in lines]


@pytest.mark.slow
@also_as_on_cuda
def test_sigterm_saves_and_resume_goes_on_bit_for_bit(workplace, straight):  # noqa: F811
    """What a cluster sends before it takes its machines back: leave at once, lose no step."""
    options = (*STEPS, "--micro-batch", "1", "--name", "stopped", "--save-every", "none")
    process = start(workplace, *options)
    wait_for_steps(process, workplace / "runs" / "stopped" / "metrics.jsonl", 3)
    for rank in ranks(process.pid):
        os.kill(rank, signal.SIGTERM)
        time.sleep(0.05)  # not all ranks hear of it in the same step
    output = output_of(process)
    assert process.returncode == 0, output
    stopped_at = len(losses(workplace, "stopped"))
    assert f"Stopped after step {stopped_at}; the same command resumes the run." in output
    assert [f.name for f in (workplace / "runs" / "stopped" / "saves").iterdir()] == [
        f"{stopped_at:08d}"
    ]
    resumed = start(workplace, "--resume", "runs/stopped")
    output = output_of(resumed)
    assert resumed.returncode == 0, output
    assert_same_run(workplace, "stopped", straight)


@pytest.mark.slow
@also_as_on_cuda
def test_a_run_goes_on_with_another_number_of_processes(workplace, straight):  # noqa: F811
    """Saved by two, read by one: the same curve to rounding. A half-written save is passed over."""
    copy_until(workplace, straight, "alone", 4)
    command = [sys.executable, str(ROOT / "train.py"), "--resume", "runs/alone"]
    done = subprocess.run(
        [*command, "--micro-batch", "4"], cwd=workplace, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "from step 4" in done.stdout and "6/6" in done.stderr
    assert losses(workplace, "alone")[:4] == losses(workplace, straight)[:4]
    rounding = {"float32": 1e-3, "bfloat16": 2e-2}[workplace.name]
    # A loss of 0.05 is a small difference of logits, so rounding is a larger share of it.
    expected = pytest.approx(losses(workplace, straight), rel=rounding, abs=rounding / 4)
    assert losses(workplace, "alone") == expected
    partials = list((workplace / "runs" / "alone" / "saves").glob("*.partial"))
    assert not partials


def copy_until(workplace: Path, straight: str, name: str, step: int) -> None:  # noqa: F811
    """A run as it is when it is killed in the middle of the save after `step` + 2."""
    home = workplace / "runs" / name
    shutil.copytree(workplace / "runs" / straight, home)
    shutil.rmtree(home / "checkpoint")
    for save in (home / "saves").iterdir():
        if int(save.name) > step + 2:
            shutil.rmtree(save)
    (home / "saves" / f"{step + 2:08d}").rename(home / "saves" / f"{step + 2:08d}.partial")


@pytest.mark.slow
@also_as_on_cuda
def test_a_commit_in_between_does_not_begin_another_run(workplace, straight):  # noqa: F811
    """Options and code decide what a run is; a README that was corrected meanwhile does not."""
    copy_until(workplace, straight, "committed", 6)
    file = workplace / "runs" / "committed" / "config.json"
    began = json.loads(file.read_text()) | {"name": "committed", "commit": "another"}
    file.write_text(json.dumps(began))
    done = run(workplace, "committed", *STEPS, "--micro-batch", "1", "--keep", "none", processes=2)
    assert done.returncode == 0, done.stderr
    assert "runs/committed, from step 6" in done.stdout
    assert not (workplace / "runs" / "committed-2").exists()
    assert_same_run(workplace, "committed", straight)


def test_a_run_goes_on_from_a_save_of_stage_1(workplace):  # noqa: F811
    """There Muon trains all matrices, so AdamW has vectors alone: torch refused to read its state.
    TensorBoard has each step once."""
    options = (*STEPS, "--recipe", "align", "--save-every", "1", "--keep", "none")
    done = run(workplace, "aligned", *options, "--max-steps", "3")
    assert done.returncode == 0, done.stderr
    folder = workplace / "runs" / "aligned"
    before, curve = losses(workplace, "aligned"), (folder / "checkpoint" / "model.safetensors")
    wanted = load_file(curve)
    shutil.rmtree(folder / "checkpoint")
    shutil.rmtree(folder / "saves" / "00000003")
    shutil.rmtree(folder / "saves" / "00000002")
    again = run(workplace, "aligned", *options, "--max-steps", "3")
    assert again.returncode == 0, again.stderr
    assert "runs/aligned, from step 1" in again.stdout
    assert losses(workplace, "aligned") == before
    found = load_file(curve)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    board = EventAccumulator(str(folder)).Reload()
    assert [scalar.step for scalar in board.Scalars("loss")] == [1, 2, 3]


def test_a_run_to_resume_that_is_not_there_is_explained(tmp_path):
    assert "No run at runs/nowhere" in resume(tmp_path, "runs/nowhere")


def resume(workplace: Path, *options: str) -> str:  # noqa: F811
    """Errors of `train.py --resume OPTIONS`, which must fail without a traceback."""
    command = [sys.executable, str(ROOT / "train.py"), "--resume", *options]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.slow
def test_a_resume_with_another_learning_rate_is_explained(workplace, straight):  # noqa: F811
    """The run that is there stays as it was."""
    before = curve(workplace, straight)
    error = resume(workplace, "runs/straight", "--learning-rate", "0.5")
    assert "--learning-rate contradicts" in error
    assert curve(workplace, straight) == before


# ---------------------------------------------------------------------- stored files from elsewhere


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model and its optimizer, saved as a run saves them, in a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    run_ = runs.Run(TrainConfig(keep=2), tmp_path, done=2, bad=0)
    runs.save_state(model, [optimizer], run_, 2)
    yield model, optimizer, run_
    dist.destroy_process_group()


class Dangerous:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_save_is_read_back_exactly(saved):
    """Weights, moments and learning rate, through the readers that run no code."""
    model, optimizer, run_ = saved
    expected = model.weight.detach().clone()
    moment = optimizer.state[model.weight]["exp_avg"].clone()
    nn.init.zeros_(model.weight)
    optimizer.state[model.weight]["exp_avg"].zero_()
    optimizer.param_groups[0]["lr"] = 0.1
    runs.load_state(model, [optimizer], run_)
    assert torch.equal(model.weight, expected)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moment)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_code_in_the_index_of_a_save_never_runs(saved):
    """torch unpickles saves/NUMBER/.metadata without any limit; a run folder may come from the
    internet."""
    model, optimizer, run_ = saved
    index = runs.save_folder(run_, 2) / ".metadata"
    index.write_bytes(pickle.dumps(Dangerous(run_.folder / "owned")))
    with pytest.raises(CheckpointError, match=r"open does not belong in a save"):
        runs.load_state(model, [optimizer], run_)
    assert not (run_.folder / "owned").exists()


def test_code_in_a_value_of_a_save_never_runs(saved):
    """Learning rates and the like are pickles of their own, which torch loads without a limit."""
    model, optimizer, run_ = saved
    folder = runs.save_folder(run_, 2)
    optimizer.param_groups[0]["lr"] = Dangerous(run_.folder / "owned")
    shutil.rmtree(folder)
    runs.save_state(model, [optimizer], run_, 2)
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(CheckpointError, match="Cannot read the save"):
        runs.load_state(model, [optimizer], run_)
    assert not (run_.folder / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps(None)])
def test_a_damaged_index_of_a_save_is_named(saved, content):
    model, optimizer, run_ = saved
    (runs.save_folder(run_, 2) / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="00000002") as caught:
        runs.load_state(model, [optimizer], run_)
    assert "resumes from an earlier save" in str(caught.value)


def test_other_names_among_the_saves_are_left_alone(tmp_path):
    """A note, a copy or a folder of the system in saves/ ended in a traceback."""
    for name in ("00000002", "00000004", "notes.txt", "00000004-copy", ".ipynb_checkpoints"):
        (tmp_path / "saves" / name).mkdir(parents=True)
        (tmp_path / "saves" / name / ".metadata").touch()
    (tmp_path / "saves" / "00000009").mkdir()  # without an index: not complete
    assert [save.name for save in runs.saves_of(tmp_path)] == ["00000002", "00000004"]


def test_a_folder_without_config_is_taken_over_and_not_doubled(tmp_path, monkeypatch):
    """A run that was killed before its first line left runs/NAME, and the next one was NAME-2."""
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(name="killed")
    (tmp_path / "runs" / "killed").mkdir(parents=True)
    assert runs.open_run(config).folder == Path("runs/killed")
    assert (tmp_path / "runs" / "killed" / "config.json").is_file()
    assert runs.open_run(config).folder == Path("runs/killed"), "and now resumed"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", '{"model": "merv"}', '{"model": "clip", "recipe": "frozen"}',
     '{"model": [], "recipe": "frozen"}', '{"muon_lr": 0, "model": "merv", "recipe": "frozen"}',
     '{"model": "merv", "recipe": "frozen", "micro_batch": "many"}',
     '{"model": "merv", "recipe": "frozen", "micro_batch": true}',
     '{"model": "merv", "recipe": "frozen", "encoders": null}',
     '{"model": "merv", "recipe": "frozen", "max_steps": "x"}',
     '{"model": "merv", "recipe": "frozen", "learning_rate": []}',
     '{"model": "merv", "recipe": "frozen", "learning_rate": [null]}',
     '{"model": "merv", "recipe": "frozen", "clip": Infinity}',
     '{"model": "merv", "recipe": "frozen", "optimizer": "sgd"}'],
)  # fmt: skip
def test_a_foreign_config_of_a_run_is_explained(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        runs.saved_options(str(tmp_path), TrainConfig, preset)
    assert "\nFix: restore the file" in str(caught.value)


def test_an_option_that_is_younger_than_a_run_has_its_usual_value(tmp_path):
    """config.json of a run that began before --allow-outside existed."""
    stored = asdict(preset("merv", "frozen")) | {"seed": 5}
    del stored["allow_outside"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    options = runs.saved_options(str(tmp_path), TrainConfig, preset)
    assert options == replace(preset("merv", "frozen"), seed=5)


def test_a_damaged_index_of_a_save_takes_no_memory():
    """Seven bytes that store None under the number 2^24: pickle in C makes room for all numbers
    below it, 270 MB, and 20 GB for the largest number."""
    content = b"\x80\x04Nr" + (2**24).to_bytes(4, "little") + b"."
    tracemalloc.start()
    assert runs.SaveUnpickler(io.BytesIO(content)).load() is None
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1e6


def test_an_index_may_name_the_members_of_its_enumerations_and_nothing_else_by_getattr():
    """Python 3.11.2, which Debian 12 has, stores a member as getattr(class, name)."""
    pickled = b"cbuiltins\ngetattr\n(c%s\nV%s\ntR."
    enumeration = b"torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING"
    content = pickled % (enumeration, b"TORCH_PRESERVE_FORMAT")
    member = runs.SaveUnpickler(io.BytesIO(content)).load()
    assert member is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    for foreign in (pickled % (b"pathlib\nPath", b"home"), pickled % (enumeration, b"__class__")):
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            runs.SaveUnpickler(io.BytesIO(foreign)).load()


def test_an_index_of_any_python_may_hold_paths():
    """Python 3.13 calls the module of paths pathlib._local."""
    for module in (b"pathlib", b"pathlib._local"):
        content = b"c%s\nPurePosixPath\n(Vsaves\ntR." % module
        assert runs.SaveUnpickler(io.BytesIO(content)).load() == PurePosixPath("saves")


@pytest.mark.parametrize("line", ["{", "7", "{}", '{"step": "two", "loss": 1}', '{"step": 1}'])
def test_a_foreign_line_of_a_log_is_named(tmp_path, line):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2") as caught:
        runs.cut_log(log, 5)
    assert "Fix: delete this line" in str(caught.value)


@pytest.mark.parametrize("value", ["[1]", '"low"', "{}", "true"])
def test_a_held_out_loss_that_is_no_number_is_named(tmp_path, value):
    """The curve was drawn from values that nobody had checked."""
    line = f'{{"step": 1, "loss": "2.5", "held_out_loss": {value}}}'
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: held_out_loss"):
        runs.draw_loss(tmp_path)


def test_the_loss_curve_of_rows_without_labels_can_be_drawn(tmp_path):
    """A loss of 0 at every step was divided by."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0}\n{"step": 2, "loss": 0.0}\n')
    runs.draw_loss(tmp_path)
    assert "<svg" in (tmp_path / "loss.svg").read_text()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(workplace):  # noqa: F811
    """A save after every step, so kills hit steps, saves, loads and the start alike."""
    options = ["--global-batch", "4", "--epochs", "8", "--cache-features", "none"]
    options += ["--micro-batch", "2", "--save-every", "1"]
    done = run(workplace, "undisturbed", *options, processes=2)
    assert done.returncode == 0, done.stderr
    launcher = ("--max-restarts", "30", "--monitor-interval", "0.1")
    process = start(workplace, *options, "--name", "soak", launcher=launcher)
    log, chance = workplace / "runs" / "soak" / "metrics.jsonl", random.Random(0)
    steps = len(losses(workplace, "undisturbed"))
    wait_for_steps(process, log, 1)
    for kill in range(20):
        victims = ranks(process.pid)
        os.kill(chance.choice(victims), signal.SIGKILL)
        while process.poll() is None and set(ranks(process.pid)) & set(victims):
            time.sleep(0.02)
        if kill % 4 == 0:  # while it starts or loads
            time.sleep(chance.uniform(1, 6))
        else:  # at a moment of the next two steps and their saves
            wait_for_steps(process, log, min(steps - 3, kill + 2))
            time.sleep(chance.uniform(0, 0.6))
        while not ranks(process.pid):
            time.sleep(0.02)
    output = output_of(process)
    assert process.returncode == 0, output
    assert_same_run(workplace, "soak", "undisturbed")
