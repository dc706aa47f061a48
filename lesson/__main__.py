"""The commands of the lesson.

    python -m lesson figures                         draw docs/figures/ from the run trained last
    python -m lesson figures --checkpoint RUN --video FILE --output FOLDER
    python -m lesson check 1                         check your answer to exercise 1

Pictures are described in figures.py, exercises in exercises/.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lesson import figures
from merv import MERV
from support.benchmarks import list_videos
from support.cli import DTYPES, option, parse_options, pick_device, pick_dtype
from support.errors import UserError
from support.runs import latest_run

ROOT = Path(__file__).parents[1]
USAGE = "python -m lesson figures, or check N"


@dataclass(frozen=True)
class LessonConfig:
    """The command line of the lesson."""

    command: tuple[str, ...] = option((), "figures, or check N", positional=True)
    checkpoint: str | None = option(None, "a run, a folder or a released name; none: latest run")
    video: str | None = option(None, "the clip to draw; none: the first one of --data")
    ask: tuple[str, ...] = option(
        ("What happens?", "How many objects are there?"), "questions about the clip", group="clip"
    )
    data: str | None = option("data/miniature/test", "folder of a benchmark, or none", group="clip")
    benchmark: str = option("miniature-open", "the benchmark", group="clip")
    clips: int = option(60, "clips of the benchmark, for figures 5 and 6", group="clip")
    output: str = option("docs/figures", "folder for the pictures")
    device: str = option("auto", "auto, cuda, mps or cpu", group="machine")
    dtype: str = option("auto", "to compute in", DTYPES, group="machine")


def draw_figures(config: LessonConfig) -> None:
    """`figures`: load the checkpoint and the clip, and draw what can be drawn."""
    checkpoint = config.checkpoint or latest_run()
    device = pick_device(config.device)
    model = MERV.from_pretrained(checkpoint, pick_dtype(config.dtype, device), device)
    video = config.video
    if video is None:
        if config.data is None:
            raise UserError("Which clip?", "--video and --data are none.", "give --video FILE.")
        video = min(list_videos(Path(config.data) / "videos").values())
    lab = figures.open_lab(model, video, list(config.ask), checkpoint)
    if config.data is not None:
        lab.clips = figures.read_clips(model, config.benchmark, config.data, config.clips)
    print("\n".join(figures.write_figures(lab, Path(config.output))))


def check(number: str) -> None:
    """`check N`: run the tests of exercise N on its stub; exits with their status."""
    exercises = [file.stem for file in sorted(ROOT.glob("lesson/exercises/e*.py"))]
    if not any(name.startswith(f"e{number}_") for name in exercises):
        what = f"There is no exercise {number}."
        raise UserError(what, "exercises have numbers.", f"choose among {', '.join(exercises)}.")
    if find_spec("pytest") is None:
        fix = "pip install -r requirements-dev.txt"
        raise UserError("pytest is missing.", "the checks of an exercise are tests.", fix)
    command = [sys.executable, "-m", "pytest", "-v", "-n", "0", "--no-header", "--tb=short"]
    # --runxfail: the test suite expects that stubs fail; here a failure is a failure.
    command += ["--runxfail", "-k", f"stub and test_{number}_"]
    file = "tests/test_lesson_exercises.py"
    sys.exit(subprocess.call([*command, file], cwd=ROOT))


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an error that the user can fix is printed without a traceback."""
    config = parse_options(LessonConfig, arguments, "Pictures and exercises for a class.")
    try:
        match config.command:
            case ("figures",):
                draw_figures(config)
            case ("check", number):
                check(number)
            case _:
                raise UserError("Which command?", "the first word is none of them.", USAGE)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
