"""Feed damaged and hostile files to everything that reads files, and watch what happens.

    python -m tests.fuzz --minutes 5              a table of what was read, refused and bad
    python -m tests.fuzz --seed 0 --case 1234     one case again, in this process

*Fuzzing* is to take a good file, damage it at random and read it. Nobody has to think of the
damage beforehand, so it finds what nobody thought of. Three ideas make it useful:

1. A case is a number. All its random choices come from Random("SEED NUMBER"), so the number is
   enough to repeat it.
2. A child process reads the files (`child`), because a decoder may crash, hang or fill the memory.
   The parent only waits, and starts another child after one that had to be killed (`Reader`).
3. Two outcomes are right: the file is read, or a UserError names it. Everything else is bad: other
   exceptions, more than SECONDS, more than MEMORY, a dead process, code of a pickle that ran.

Bad cases are kept in a folder, and then the exit status is 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

from support.errors import UserError
from tests.fuzz_files import KINDS, MARKER, damage, make_good_files

SECONDS = 20  # of computing for one case. The time on a clock depends on what else is running
WAIT = 200  # seconds on the clock, for a case that waits and does not compute
MEMORY = 1.0  # GB that one case may add to its process
STEPS = ("read", "refused", "bad")


def run_case(seed: int, number: int, good: Path, place: Path) -> tuple[str, str, str]:
    """Make a damaged file in `place` and read it: (kind, "read", "refused" or "bad", details)."""
    rng = random.Random(f"{seed} {number}")
    kind = kind_of(rng)
    units = sorted((good / kind).iterdir())
    place = place / rng.choice(units).name
    shutil.rmtree(place.parent, ignore_errors=True)
    shutil.copytree(good / kind / place.name, place)
    file = rng.choice(files_of(place))
    damage(file, rng.choice(files_of(good / kind)), rng)
    before = peak_memory()
    outcome, details = "read", ""
    try:
        KINDS[kind].read(place, file, rng)
    except UserError as error:
        outcome, details = "refused", str(error)
        if str(place) not in details:
            outcome = "bad"
            details = f"names no file: {details}"
        elif "MemoryError" in details:
            outcome = "bad"
    except Exception:
        outcome, details = "bad", traceback.format_exc()
    used = peak_memory() - before
    if used > MEMORY:
        outcome, details = "bad", f"used {used:.1f} GB. {details}"
    marker = good.parent / MARKER
    if marker.exists():
        marker.rmdir()
        outcome, details = "bad", f"the file ran code. {details}"
    return kind, outcome, details


def kind_of(rng: random.Random) -> str:
    """The first random choice of each case."""
    return rng.choices(list(KINDS), [kind.share for kind in KINDS.values()])[0]


def files_of(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, in an order that is always the same."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def peak_memory() -> float:
    """The most memory of this process since the last call, in GB."""
    peak = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            peak = int(line.split()[1])
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    return peak / 1e6


# ------------------------------------------------------------------------------------ two processes


def child(pipe, seed: int, good: Path, place: Path) -> None:
    """Run the cases whose numbers come through the pipe, and send back the outcomes."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # decoders write about each damage that they find
    os.dup2(quiet, 2)
    while True:
        number = pipe.recv()
        end = int(time.process_time()) + 1 + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))  # SIGXCPU then
        pipe.send(run_case(seed, number, good, place))


class Reader:
    """A child process that is replaced when it has died or hangs."""

    def __init__(self, seed: int, good: Path, place: Path):
        self.arguments = seed, good, place
        self.process = None

    def run(self, number: int) -> tuple[str, str, str]:
        """The outcome of one case; see `run_case`."""
        if self.process is None:
            self.pipe, theirs = multiprocessing.Pipe()
            arguments = (theirs, *self.arguments)
            self.process = multiprocessing.Process(target=child, args=arguments, daemon=True)
            self.process.start()
            theirs.close()  # so that the pipe ends when the child does
        self.pipe.send(number)
        what = f"waited more than {WAIT} s"
        if self.pipe.poll(WAIT):
            try:
                return self.pipe.recv()
            except EOFError:
                self.process.join()
                what = f"ended the process with status {self.process.exitcode}"
                if self.process.exitcode == -signal.SIGXCPU:
                    what = f"took more than {SECONDS} s"
        self.close()
        return kind_of(random.Random(f"{self.arguments[0]} {number}")), "bad", what

    def close(self) -> None:
        """End the child."""
        self.process.kill()
        self.process.join()
        self.process = None


def fuzz(seed: int, minutes: float, folder: Path) -> dict[str, Counter]:
    """Run cases 0, 1, 2 ... for some minutes: kind -> how many were read, refused and bad."""
    counts = {kind: Counter() for kind in KINDS}
    place = folder / "case"
    reader = Reader(seed, folder / "good", place)
    end = time.monotonic() + 60 * minutes
    number = 0
    while time.monotonic() < end:
        kind, outcome, details = reader.run(number)
        counts[kind][outcome] += 1
        if outcome == "bad":
            kept = folder / f"bad-{seed}-{number}"
            shutil.copytree(place, kept, dirs_exist_ok=True)
            print(f"bad  --seed {seed} --case {number}  {kind}, kept in {kept}\n{details}\n")
        number += 1
    if reader.process is not None:
        reader.close()
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run only this case, and show its traceback")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about damage that was concealed
    folder = Path(tempfile.mkdtemp(prefix="merv-fuzz-"))
    maker = multiprocessing.Process(target=make_good_files, args=(folder / "good",))
    maker.start()  # WHY: this process must not have threads when it starts children
    maker.join()
    if maker.exitcode:
        sys.exit("a good file is not read")
    if options.case is not None:
        found = run_case(options.seed, options.case, folder / "good", folder / "case")
        print(*found, folder / "case", sep="\n")
        sys.exit(found[1] == "bad")
    counts = fuzz(options.seed, options.minutes, folder)
    print(f"{'':<12}" + "".join(f"{step:>10}" for step in STEPS))
    for kind, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{kind:<12}" + "".join(f"{found[step]:>10}" for step in STEPS))
    bad = sum(found["bad"] for found in counts.values())
    if not bad:
        shutil.rmtree(folder)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
