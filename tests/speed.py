"""Compare the speed of this code with that of commit 07e06b2, side by side in one run.

    python -m tests.speed [TURNS]     some minutes on two cores

It measures a training step, the evaluation of test clips, and the other stages of the first
command: drawing a clip, a pre-training step of each encoder, and encoding a clip. It prints the
milliseconds of both versions and their ratio, which is above 1 where this code is faster, and exits
with 1 if the losses of the two differ by more than rounding.

How the comparison is kept fair:

- Each version runs its own functions from its own folder, in a process of its own with two threads.
  tests/speed_worker.py is the script of both processes.
- The two processes take turns, so a machine that is slow for a while slows down both. For each
  version the fastest turn counts.
- Commit 07e06b2 draws clips and trains a small model on them. Both versions train this checkpoint
  further and evaluate it: sizes, weights, tokenizer, clips, cached features, batches and options
  are the same.
- Only drawing and pre-training use each version's own world, with the same number of clips in a
  batch. Each draws as its first command does: commit 07e06b2 in one process, today on all cores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "07e06b2"
THREADS = 2  # of torch, for the two cores of the README
WANTED = {  # what is measured, and the ratio that this code is meant to reach
    "training step": 1.5,
    "evaluating a clip": 3.0,
    "drawing a clip": 1.0,
    "pre-training step, siglip": 1.0,
    "pre-training step, languagebind": 1.0,
    "pre-training step, dinov2": 1.0,
    "pre-training step, vivit": 1.0,
    "encoding a clip": 1.0,
}
MEASUREMENTS = ("train", "evaluate", "draw", "pretrain", "encode")  # functions of the worker
LOSSES = 10  # of the first steps are compared, because rounding errors grow with each step
TOLERANCE = 1e-4  # between two losses of the same step, in nats a token


def unpack(folder: Path) -> None:
    """Unpack the files of COMMIT, which is in every clone that has the whole history."""
    folder.mkdir()
    packed = folder / "code.zip"
    subprocess.run(["git", "archive", "--output", packed, COMMIT], cwd=ROOT, check=True)
    shutil.unpack_archive(packed, folder)


def start(task: str, code: Path, folder: Path) -> subprocess.Popen:
    """Start the worker with the modules in `code`; task: prepare, or the version to measure."""
    command = [sys.executable, ROOT / "tests" / "speed_worker.py", task, folder]
    settings = {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(code)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **settings}, **pipes)


def run_turn(workers: dict[str, subprocess.Popen], backwards: bool) -> dict[str, dict]:
    """Measure everything once; returns version -> {what is measured: milliseconds, ...}."""
    versions = list(workers)
    if backwards:
        versions.reverse()
    results = {version: {} for version in versions}
    for name in MEASUREMENTS:
        for version in versions:
            print(name, file=workers[version].stdin, flush=True)
            reply = workers[version].stdout.readline()
            if not reply:
                sys.exit(f"The process of {version} has ended; its error is above.")
            results[version] |= json.loads(reply)
    return results


def measure(turns: int) -> list[dict[str, dict]]:
    """Prepare the clips and the checkpoint, start both processes, and let them take turns."""
    with TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        old = folder / COMMIT
        unpack(old)
        print(f"{COMMIT} draws clips and trains a model on them.", flush=True)
        with start("prepare", old, folder) as preparing:
            preparing.communicate()
        if preparing.returncode:
            sys.exit(f"{COMMIT} could not prepare the data; its error is above.")
        workers = {COMMIT: start(COMMIT, old, folder), "today": start("today", ROOT, folder)}
        for worker in workers.values():
            stack.enter_context(worker)
        results = []
        for turn in range(turns):
            print(f"turn {turn + 1} of {turns}", flush=True)
            results.append(run_turn(workers, backwards=turn % 2 == 1))
        return results


def print_times(results: list[dict[str, dict]]) -> None:
    """Print a line for each measurement: the fastest turns, their ratio, and the ratio by turn."""
    print(f"{'milliseconds':32} {COMMIT:>8} {'today':>8} {'ratio':>6} {'wanted':>7}   by turn")
    for what, wanted in WANTED.items():
        old = [turn[COMMIT][what] for turn in results]
        today = [turn["today"][what] for turn in results]
        ratio = min(old) / min(today)
        by_turn = [f"{a / b:.2f}" for a, b in zip(old, today, strict=True)]
        line = f"{what:32} {min(old):8.2f} {min(today):8.2f} {ratio:6.2f} {wanted:7.1f}   "
        print(line + " ".join(by_turn))


def compare_values(old: dict, today: dict) -> float:
    """Print how far answers and losses differ; returns the largest difference of two losses."""
    differing = sum(a != b for a, b in zip(old["answers"], today["answers"], strict=True))
    print(f"{differing} of {len(old['answers'])} answers differ.")
    differences = [abs(a - b) for a, b in zip(old["losses"], today["losses"], strict=True)]
    largest = max(differences[:LOSSES])
    print(f"The losses of the first {LOSSES} steps differ by at most {largest:.1e} nats a token.")
    return largest


def main(turns: int = 4) -> None:
    """Measure both versions, and print the table."""
    results = measure(turns)
    print_times(results)
    largest = compare_values(results[0][COMMIT], results[0]["today"])
    if not largest <= TOLERANCE:
        sys.exit("That is more than rounding: the two did not compute the same.")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
