"""The folder of a run under two starts, kills, damaged saves and full disks (support/runs.py)."""

import gc
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from miniature import prepare
from support import files, runs
from support.errors import CheckpointError, UserError
from support.processes import LoadAhead
from train import TrainConfig

ROOT = Path(__file__).parent.parent

HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from support import files
held = files.lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Start a process that locks a file; it is killed at the end of the test."""
    started = []

    def hold(path: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


# --------------------------------------------------------------------------------------- two starts


def test_the_second_start_of_a_command_is_told_who_works_there(tmp_path, monkeypatch, holder):
    """Two starts wrote into one folder: steps were missing or doubled in metrics.jsonl, and both
    ended as if all were well."""
    monkeypatch.chdir(tmp_path)
    first = holder(tmp_path / "runs" / "twice" / "lock")
    with pytest.raises(UserError, match="runs/twice is in use") as caught:
        runs.open_run(TrainConfig(name="twice"))
    assert f"process {first.pid} on {socket.gethostname()}" in str(caught.value)
    assert not (tmp_path / "runs" / "twice" / "config.json").exists(), "nothing was touched"


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path, monkeypatch, holder):
    """The system releases it; the file that is left means only that the run has not ended."""
    monkeypatch.chdir(tmp_path)
    first = holder(tmp_path / "runs" / "killed" / "lock")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert runs.open_run(TrainConfig(name="killed")).folder == Path("runs/killed")


def test_two_evaluations_do_not_share_a_journal(tmp_path, holder):
    """Both would answer the same questions. Another benchmark, or the other processes of the same
    evaluation, are not in the way."""
    holder(tmp_path / "0.lock")
    with pytest.raises(UserError, match="is in use"):
        files.Journal(tmp_path, {})
    files.Journal(tmp_path, {}, rank=1)


def test_the_workers_of_a_run_do_not_keep_its_lock(tmp_path):
    """Processes that decode videos may outlive a killed run for seconds. A flock, which they
    inherit, would refuse the next start that long."""
    held = files.lock(tmp_path / "lock")
    worker = os.fork()
    if worker == 0:
        time.sleep(30)
        os._exit(0)
    try:
        held.close()
        command = [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(tmp_path / "lock")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "held\n"
            process.kill()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_two_starts_do_not_draw_the_miniature_at_once(tmp_path, holder):
    """Both wrote data/miniature.partial, and each deleted the other's clips."""
    first = holder(tmp_path / "miniature.lock")
    with pytest.raises(UserError, match=f"process {first.pid}"):
        prepare(tmp_path / "miniature")


# ----------------------------------------------------------------------- processes without a parent

ORPHAN = """
import sys, time
sys.path.insert(0, {root!r})
from support.processes import end_with_torchrun
end_with_torchrun()
print("works", flush=True)
time.sleep(4)
print("still here", flush=True)
"""
PARENT = "import subprocess, sys; subprocess.run(sys.argv[1:])"


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_killing_torchrun_alone_ends_its_processes(by_torchrun):
    """They worked beside the next start of the command, or slept for half an hour. A run that plain
    `python` started outlives its shell, as `nohup` promises."""
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "test"}
    if not by_torchrun:
        del environment["TORCHELASTIC_RUN_ID"]
    command = [sys.executable, "-c", PARENT, sys.executable, "-c", ORPHAN.format(root=str(ROOT))]
    pipes = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as parent:
        assert parent.stdout.readline() == "works\n"
        parent.kill()
        assert parent.stdout.read() == ("" if by_torchrun else "still here\n")


def test_a_process_whose_torchrun_ended_before_it_began_ends_too():
    """While it was importing, the system made process 1 its parent."""
    adopted = "import os; os.getppid = lambda: 1\n" + ORPHAN.format(root=str(ROOT))
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "test"}
    command = [sys.executable, "-c", adopted]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 1 and done.stdout == b""


# ------------------------------------------------------------------------- ended, or killed near it


def test_a_run_that_was_killed_after_its_checkpoint_is_finished_and_not_doubled(
    tmp_path, monkeypatch
):
    """A kill during the final evaluation made the same command train everything again as NAME-2."""
    monkeypatch.chdir(tmp_path)
    run = new_run("late")
    (run.folder / "checkpoint").mkdir()
    again = new_run("late")
    assert again.folder == Path("runs/late")
    runs.close_run(again)
    assert not (again.folder / "lock").exists()
    assert new_run("late").folder == Path("runs/late-2")


def new_run(name: str) -> runs.Run:
    """Open the run of a command, with no process left from before."""
    return runs.open_run(TrainConfig(name=name))


def test_a_run_that_has_its_checkpoint_keeps_all_its_metrics(tmp_path, monkeypatch):
    """Its last save was damaged during the final evaluation, and the last step left the metrics."""
    monkeypatch.chdir(tmp_path)
    run = new_run("late")
    (run.folder / "checkpoint").mkdir()
    lines = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3))
    (run.folder / "metrics.jsonl").write_text(lines)
    assert new_run("late").folder == run.folder
    assert (run.folder / "metrics.jsonl").read_text() == lines


def test_another_command_does_not_take_over_a_run_that_was_killed_late(tmp_path, monkeypatch):
    """Other options are another run."""
    monkeypatch.chdir(tmp_path)
    (new_run("late").folder / "checkpoint").mkdir()
    assert runs.open_run(TrainConfig(name="late", seed=1)).folder == Path("runs/late-2")


def test_the_files_of_a_folder_without_config_stay(tmp_path, monkeypatch):
    """The folder is taken over; what else lies in it, in saves/ too, is not ours to delete."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine/saves").mkdir(parents=True)
    for name in ("notes.txt", "saves/notes.txt", "saves/old"):
        (tmp_path / "runs/mine" / name).write_text("mine")
    assert new_run("mine").folder == Path("runs/mine")
    assert (tmp_path / "runs/mine/saves/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "bad_examples.jsonl"])
def test_a_pipe_in_a_run_does_not_hang(tmp_path, monkeypatch, name):
    """Nor does a device, such as a link to /dev/zero."""
    monkeypatch.chdir(tmp_path)
    run = new_run("foreign")
    (run.folder / name).unlink(missing_ok=True)
    os.mkfifo(run.folder / name)
    with pytest.raises(UserError, match=f"{name}: cannot be read"):
        new_run("foreign")


# -------------------------------------------------------------------------------------------- saves


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run of six steps, saved after 4 and 6 with other weights: model, optimizer, run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    run = new_run("saved")
    log = ""
    for step in range(1, 7):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        log += json.dumps({"step": step, "loss": 1.0, "bias": model.bias.tolist()}) + "\n"
        if step % 2 == 0:
            runs.save_state(model, [optimizer], run, step)
    (run.folder / "metrics.jsonl").write_text(log)
    run.config = TrainConfig(name="saved", keep=None)
    yield model, optimizer, run
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "how", ["flipped", "cut", "hashes", "index", "emptied", ".metadata", "__0_0.distcp"]
)
def test_a_damaged_newest_save_is_named_and_the_one_before_is_taken(trained, capsys, how):
    """Of three flipped bits two gave other weights, silently. A save that lacked a file was passed
    over without a word, or ended in a traceback; the next save of that step could not be written
    beside it."""
    model, optimizer, run = trained
    expected = bias_after(run, 4)
    spoil(runs.save_folder(run, 6), how)
    again = new_run("saved")
    error = capsys.readouterr().err
    assert "00000006 is damaged" in error and "00000004 is used" in error
    assert again.done == 4
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 4
    runs.load_state(model, [optimizer], again)
    assert torch.equal(model.bias, expected)
    runs.save_state(model, [optimizer], again, 6)
    assert new_run("saved").done == 6


def bias_after(run: runs.Run, step: int) -> torch.Tensor:
    """What the log says of the model."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return torch.tensor(json.loads(lines[step - 1])["bias"])


def spoil(save: Path, how: str) -> None:
    """Damage a save."""
    if how == "flipped":
        part = save / "__0_0.distcp"
        content = bytearray(part.read_bytes())
        content[len(content) // 3] ^= 1
        part.write_bytes(content)
    elif how == "cut":
        part = save / "__0_0.distcp"
        part.write_bytes(part.read_bytes()[:-1])
    elif how == "hashes":
        (save / "hashes.json").write_text("{")
    elif how == "index":
        (save / ".metadata").write_bytes(b"")
    elif how == "emptied":
        shutil.rmtree(save)
        save.mkdir()
    else:
        (save / how).unlink()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_pipe_in_a_save_does_not_hang(trained, name):
    """A run folder from elsewhere may hold one; without hashes, too."""
    model, optimizer, run = trained
    save = runs.save_folder(run, 6)
    (save / "hashes.json").unlink()
    (save / name).unlink()
    os.mkfifo(save / name)
    if name == ".metadata":
        assert new_run("saved").done == 4
    else:
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp, which is missing"):
            runs.load_state(model, [optimizer], new_run("saved"))


def test_a_save_after_the_last_step_is_of_another_run(trained):
    """It was never loaded, and the checkpoint was that of an untrained model."""
    _, _, run = trained
    runs.save_folder(run, 6).rename(runs.save_folder(run, 99))
    again = new_run("saved")
    runs.check_steps(again, 99)
    with pytest.raises(CheckpointError, match="00000099 is of another run"):
        runs.check_steps(again, 6)


def test_intact_saves_are_taken_without_a_word(trained, capsys):
    """All files are listed with the SHA-256 of their bytes, the index too."""
    _, _, run = trained
    listed = json.loads((runs.save_folder(run, 6) / "hashes.json").read_text())
    assert set(listed) == {".metadata", "__0_0.distcp"}
    assert new_run("saved").done == 6
    assert capsys.readouterr().err == ""


def test_a_save_of_an_older_version_has_no_hashes_and_is_taken(trained):
    _, _, run = trained
    (runs.save_folder(run, 6) / "hashes.json").unlink()
    assert new_run("saved").done == 6


def test_a_run_without_an_intact_save_is_not_begun_again_by_itself(trained):
    """The user may have a copy of the saves; nothing is renamed or deleted."""
    _, _, run = trained
    for step in (4, 6):
        spoil(runs.save_folder(run, step), "flipped")
    with pytest.raises(CheckpointError, match="No save of runs/saved is intact"):
        new_run("saved")
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 6
    assert [save.name for save in runs.saves_of(run.folder)] == ["00000004", "00000006"]


# --------------------------------------------------------------------------------------- full disks


@pytest.fixture
def full_disk():
    """Call it to let no file of this process grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_a_save_with_a_clear_error_and_nothing_is_lost(trained, full_disk):
    """The half-written save is removed, so that its room is free again; the same command resumes
    from the save before."""
    model, optimizer, run = trained
    full_disk(500)
    with pytest.raises(UserError, match=r"00000008.partial cannot be written") as caught:
        runs.save_state(model, [optimizer], run, 8)
    assert "Fix: make room" in str(caught.value)
    full_disk(resource.RLIM_INFINITY)
    assert not list(run.folder.rglob("*.partial"))
    assert new_run("saved").done == 6
    runs.save_state(model, [optimizer], run, 8)
    assert new_run("saved").done == 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's own
@pytest.mark.parametrize("size", [0, 100])  # no room for the queues, or none for a batch
def test_full_shared_memory_ends_loading_with_a_clear_error(full_disk, size):
    """torch alone loses the batch in a background thread, and waits for it for ever."""
    rows = [torch.ones(1000)] * 4
    batches = LoadAhead(rows, 1, torch.stack, batch_size=2, timeout=60)
    assert [batch.shape for batch in batches] == [(2, 1000)] * 2
    full_disk(size)
    with pytest.raises(UserError, match="cannot be written to shared memory") as caught:
        list(batches)
    assert "--shm-size" in str(caught.value)
    del caught
    gc.collect()  # torch's half-made iterator complains now, and not during another test


ENDS = """
import sys
sys.path.insert(0, {root!r})
import torch
from support.processes import LoadAhead
batches = iter(LoadAhead([torch.ones(9)] * 40, 2, torch.stack, batch_size=1))
next(batches)
{end}
"""


@pytest.mark.parametrize("end", ["raise ValueError('odd')", "sys.exit(1)", "batches = 1 / 0"])
def test_a_program_that_ends_early_does_not_wait_for_its_workers(end):
    """They ignore SIGTERM, by which Python would end them before it waits for them."""
    words = [sys.executable, "-c", ENDS.format(root=str(ROOT), end=end)]
    done = subprocess.run(words, capture_output=True, timeout=60, text=True)
    assert done.returncode == 1, done.stderr


WORK = """
import sys, time
sys.path.insert(0, {root!r})
from support.processes import LoadAhead, run_on_all_cores

def load(items):
    print("works", flush=True)
    time.sleep(60)

if {pool}:
    for _ in run_on_all_cores(time.sleep, [0] * 50 + [60] * 450):
        print("works", flush=True)
else:
    list(LoadAhead([0, 1], 1, load, batch_size=1))
"""


@pytest.mark.parametrize("pool", [False, True])
def test_workers_end_with_a_main_process_that_is_killed(pool):
    """Those of a loader ignore SIGTERM, so some stayed until the machine was switched off."""
    words = [sys.executable, "-c", WORK.format(root=str(ROOT), pool=pool)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout.readline() == "works\n"
        main.kill()
        begun = time.monotonic()
        main.stdout.read()  # ends when all workers have, which hold copies of the pipe
    assert time.monotonic() - begun < 30


def test_a_full_disk_never_shortens_a_file(tmp_path, full_disk):
    """The old text stays until the new one is complete, and no temporary file is left."""
    file, journal = tmp_path / "result.json", files.Journal(tmp_path / "answers", {})
    files.write_file(file, "old")
    journal.append({"id": 1})
    full_disk(20)
    for write in (
        lambda: files.write_file(file, "n" * 100),
        lambda: journal.append({"id": "2" * 99}),
    ):
        with pytest.raises(UserError, match=r"cannot be written.\nWhy: File too large"):
            write()
    full_disk(resource.RLIM_INFINITY)
    assert file.read_text() == "old" and not list(tmp_path.rglob("*.partial"))
    again = files.Journal(tmp_path / "answers", {})
    again.append({"id": 2})
    assert [record.values for record in again.records()] == [{"id": 1}, {"id": 2}]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    """The names have process ids, so no later process replaced them, and they stayed for ever."""
    (tmp_path / "table.json.123.partial").write_text("half")
    (tmp_path / "table.json.bak").write_text("mine")
    files.write_file(tmp_path / "table.json", "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["table.json", "table.json.bak"]


def test_of_two_processes_that_write_one_file_the_first_wins(tmp_path):
    """The second finds its temporary file gone, and a complete file in place of it."""
    path = tmp_path / "table.json"
    with files.replacing(path) as partial:
        partial.write_text("second")
        (tmp_path / "table.json.1.partial").write_text("first")
        partial.unlink()
        (tmp_path / "table.json.1.partial").replace(path)
    assert path.read_text() == "first"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """Here a file is where a folder belongs; a read-only disk takes the same way."""
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written.\nWhy: Not a directory"):
        files.lock(tmp_path / "runs" / "name" / "lock")


def test_a_metric_without_a_value_is_not_sent_to_tensorboard(tmp_path):
    """On Windows memory_gb is None; the first step of a run then ended in a traceback."""
    sent = []

    class Board:
        def add_scalar(self, name, value, step):
            sent.append((name, value, step))

    run = runs.Run(TrainConfig(), tmp_path, done=0, bad=0)
    run.board = Board()
    metrics = {"step": 3, "loss": 1.5, "memory_gb": None, "mixing_weights": [0.5, 0.5]}
    runs.log(run, metrics)
    assert sent == [("loss", 1.5, 3)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == metrics
