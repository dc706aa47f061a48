"""Disturb training runs at random: each must end like the run that nobody disturbed, bit for bit.

    python -m tests.soak --minutes 20 [--seed 0] [--folder DIR]

A run trains a tiny MERV for twelve steps, saves after each, and answers questions about four clips.
It is disturbed one to four times and started again after each time. Afterwards metrics (without
times), weights and answers must be those of the undisturbed run, and nothing may be left over.

    all       SIGKILL to torchrun and its processes
    worker    SIGKILL to one process
    agent     SIGKILL to torchrun alone: its processes must end within five seconds
    stop      SIGTERM to all processes
    second    the same command a second time: it must be told that the run is in use
    full      no file of one process may grow any more: the run must end with a clear error
    damaged   as all; then a bit of the newest save is flipped, and the one before must be used

Prints how often each happened, and exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from encoders import load_encoder, save_encoder
from merv import FOUR, MERVS
from miniature.world import write_world
from support.runs import has_ended

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 180  # seconds after which anything is a hang
KINDS = ("all", "worker", "agent", "stop", "second", "full", "damaged")
MOMENTS = ("any time", "a save", "evaluation")
OPTIONS = ("--global-batch", "4", "--epochs", "4", "--micro-batch", "2", "--save-every", "1")
OPTIONS += ("--cache-features", "none", "--workers", "0", "--device", "cpu")

# train.py with narrower layers, and with data that are there already.
TRAIN = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import train
from support.cli import exit_now
from tests.soak import NARROW
train.MERVS["miniature"] = NARROW
train.miniature.prepare = lambda folder, *_: folder
train.main()
exit_now()
"""

NARROW = replace(
    MERVS["miniature"],
    encoders=tuple(replace(e, hidden_size=8, num_heads=2) for e in MERVS["miniature"].encoders),
    llm=replace(
        MERVS["miniature"].llm, hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=2
    ),
)


class Wrong(Exception):
    """What a disturbed run did that it may not do."""


def make_workplace(folder: Path) -> None:
    """The data, the encoders and the script of all runs."""
    world = folder / "data" / "miniature"
    write_world(world, {"train": 10, "val": 4, "test": 4})
    for name, config in zip(FOUR, NARROW.encoders, strict=True):
        save_encoder(load_encoder(config), world / "encoders-0" / f"{name}.safetensors")
    (folder / "tiny_train.py").write_text(TRAIN)


class Start:
    """One start of the command, with what it printed so far."""

    def __init__(self, workplace: Path, name: str, world: int):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", "--monitor-interval", "0.1", "tiny_train.py"]
        command += ["--name", name, *OPTIONS]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.agent = subprocess.Popen(
            command, cwd=workplace, env=environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Keep reading: a full pipe would stop who writes."""
        for line in self.agent.stdout:
            self.lines.append(line)

    def output(self) -> str:
        """Wait for the end, and return all that was printed."""
        try:
            self.agent.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise Wrong("hangs:\n" + "".join(self.lines)) from None
        self.reader.join(10)
        return "".join(self.lines)

    def workers(self) -> list[int]:
        """The processes that torchrun has started."""
        file = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children")
        try:
            return [int(pid) for pid in file.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            return []

    def kill_all(self) -> None:
        """Nothing of this start is alive afterwards."""
        workers = self.workers()
        self.agent.kill()
        self.agent.wait()
        for pid in workers:
            send(pid, signal.SIGKILL)
        wait_until_gone(workers, 5)


def send(pid: int, number: int) -> bool:
    """Send a signal; False if the process has ended already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may still wait for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_of(name: str, workplace: Path) -> list[int]:
    """All processes of a run, data loader workers included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if name.encode() in words and (folder / "cwd").samefile(workplace):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def wait_until_gone(pids: list[int], seconds: float) -> None:
    """Wrong if one of these processes is alive after so many seconds."""
    limit = time.monotonic() + seconds
    for pid in pids:
        while alive(pid) and time.monotonic() < limit:
            time.sleep(0.02)
        if alive(pid):
            send(pid, signal.SIGKILL)
            raise Wrong(f"process {pid} is alive {seconds} s after its torchrun was killed")


# ------------------------------------------------------------------------------------- disturbances


class Soak:
    """Runs in one workplace, and what happened to them."""

    def __init__(self, workplace: Path, seed: int):
        self.workplace = workplace
        self.dice = random.Random(seed)
        self.counts: Counter = Counter()
        self.expected: dict[int, dict] = {}  # processes -> what the undisturbed run left

    def undisturbed(self, world: int) -> dict:
        """What a run on so many processes leaves if nobody disturbs it."""
        if world not in self.expected:
            name = f"undisturbed-{world}"
            start = Start(self.workplace, name, world)
            output = start.output()
            if start.agent.returncode:
                raise Wrong(output)
            self.expected[world] = self.left_by(name)
        return self.expected[world]

    def left_by(self, name: str) -> dict:
        """Metrics without times, weights and answers of a run; Wrong if it left something over."""
        home = self.workplace / "runs" / name
        doubled = list(home.parent.glob(f"{name}-*"))
        left_over = [*home.rglob("*.partial"), *home.glob("lock"), *doubled]
        if left_over:
            raise Wrong(f"left over: {[str(path) for path in left_over]}")
        metrics = []
        for line in (home / "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            for timed in ("tokens_per_second", "data_wait", "memory_gb"):
                del values[timed]
            metrics.append(values)
        weights = (home / "checkpoint" / "model.safetensors").read_bytes()
        result = json.loads((home / "eval" / "miniature-open.json").read_text())
        return {"metrics": metrics, "weights": weights, "answers": result}

    def episode(self, number: int) -> None:
        """One run, disturbed some times; Wrong if it does not end like the undisturbed one."""
        world = self.dice.choice((1, 2))
        expected = self.undisturbed(world)
        name = f"run{number}"
        home = self.workplace / "runs" / name
        for _ in range(self.dice.randint(1, 4)):
            self.disturb(name, world)
            if has_ended(home):  # before it could be disturbed
                self.counts["disturbed too late"] += 1
                break
        else:
            start = Start(self.workplace, name, world)
            output = start.output()
            if start.agent.returncode:
                raise Wrong(f"the last start ended with {start.agent.returncode}:\n{output}")
        wait_until_gone(processes_of(name, self.workplace), 5)
        left = self.left_by(name)
        for part, value in expected.items():
            if left[part] != value:
                raise Wrong(f"other {part} than the undisturbed run")
        shutil.rmtree(home)

    def disturb(self, name: str, world: int) -> None:
        """Start the run, and disturb it at a random moment."""
        kind = self.dice.choice(KINDS)
        start = Start(self.workplace, name, world)
        try:
            moment = self.wait_for_moment(start, name)
            workers = start.workers()
            if start.agent.poll() is not None:
                raise Wrong(f"ended by itself before {moment}:\n{start.output()}")
            print(f"  {name}, {world} processes: {kind} at {moment}", flush=True)
            getattr(self, kind)(start, workers, name, world)
            self.counts[kind] += 1
            self.counts[f"at {moment}"] += 1
        finally:
            start.kill_all()

    def wait_for_moment(self, start: Start, name: str) -> str:
        """Wait for a moment of the run, or at most until shortly before its end."""
        home = self.workplace / "runs" / name
        moment = self.dice.choices(MOMENTS, (4, 4, 1))[0]
        pattern = {"a save": "saves/*.partial", "evaluation": "eval/*.answers"}.get(moment)
        pause = self.dice.uniform(0, 10 if pattern is None else 0.03)
        steps = self.dice.randint(1, 11)
        limit = time.monotonic() + PATIENCE
        while pattern and start.agent.poll() is None and time.monotonic() < limit:
            log = home / "metrics.jsonl"
            reached = log.exists() and log.read_text().count("\n") >= steps
            if any(home.glob(pattern)) and (reached or moment == "evaluation"):
                break
            if (home / "checkpoint").exists() and moment == "a save":
                return "its end"
            time.sleep(0.001)
        ending = time.monotonic() + pause
        while time.monotonic() < ending and not (home / "checkpoint").exists():
            time.sleep(0.005)
        return moment

    def all(self, start: Start, workers: list[int], name: str, world: int) -> None:
        """The machine goes away."""
        start.kill_all()

    def worker(self, start: Start, workers: list[int], name: str, world: int) -> None:
        """One process dies; torchrun ends the others."""
        if workers:
            send(self.dice.choice(workers), signal.SIGKILL)
            start.output()
            wait_until_gone(workers, 5)

    def agent(self, start: Start, workers: list[int], name: str, world: int) -> None:
        """Torchrun dies; nobody ends the others."""
        start.agent.kill()
        start.agent.wait()
        # A process that is still importing notices at the end of that.
        wait_until_gone(workers, 5 if any("from step" in line for line in start.lines) else 60)

    def stop(self, start: Start, workers: list[int], name: str, world: int) -> None:
        """A cluster takes its machines back."""
        for pid in workers:
            send(pid, signal.SIGTERM)
        start.output()

    def second(self, start: Start, workers: list[int], name: str, world: int) -> None:
        """Somebody types the command again."""
        other = Start(self.workplace, name, world)
        both = [start, other]
        while all(each.agent.poll() is None for each in both):
            time.sleep(0.05)
        ended = [each for each in both if each.agent.poll() is not None]
        output = ended[0].output()
        if ended[0].agent.returncode and "is in use" not in output:
            other.kill_all()
            raise Wrong(f"of two starts one ended with another error:\n{output}")
        self.counts["second, refused"] += "is in use" in output
        other.kill_all()
        if has_ended(self.workplace / "runs" / name):  # the second start was too late
            shutil.rmtree(self.workplace / "runs" / f"{name}-2", ignore_errors=True)

    def full(self, start: Start, workers: list[int], name: str, world: int) -> None:
        """The disk is full for what one process writes."""
        if not workers:
            return
        size = self.dice.choice((0, 500, 5000, 50_000))
        try:
            resource.prlimit(workers[0], resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        except ProcessLookupError:
            return
        output = start.output()
        if start.agent.returncode and "cannot be written" not in output:
            raise Wrong(f"a full disk ended otherwise:\n{output}")
        self.counts["full, explained"] += "cannot be written" in output

    def damaged(self, start: Start, workers: list[int], name: str, world: int) -> None:
        """A disk forgets a bit."""
        start.kill_all()
        saves = sorted((self.workplace / "runs" / name / "saves").glob("????????"))
        if len(saves) < 2:
            return
        file = self.dice.choice(sorted(saves[-1].iterdir()))
        content = bytearray(file.read_bytes())
        content[self.dice.randrange(len(content))] ^= 1 << self.dice.randrange(8)
        file.write_bytes(content)
        self.counts["bits flipped"] += 1


def main() -> None:
    """Run episodes until the time is over, and print what happened."""
    parser = argparse.ArgumentParser(description="Disturb training runs at random.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the runs are kept if something is wrong")
    options = parser.parse_args()
    workplace = Path(options.folder or tempfile.mkdtemp(prefix="soak-"))
    make_workplace(workplace)
    soak = Soak(workplace, options.seed)
    limit = time.monotonic() + 60 * options.minutes
    number, wrong = 0, 0
    while time.monotonic() < limit:
        number += 1
        try:
            soak.episode(number)
        except Wrong as error:
            wrong += 1
            print(f"WRONG, {workplace}/runs/run{number}: {error}", flush=True)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(soak.counts.items()))
    print(f"{number} runs, seed {options.seed}: {wrong} wrong. {counts}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
