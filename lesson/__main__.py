"""The commands of the lesson.

    python -m lesson figures                         draw runs/figures/ from the run trained last
    python -m lesson figures --checkpoint RUN --video FILE --output FOLDER
    python -m lesson page RUN VIDEO "question" ...   write an HTML page about one clip
    python -m lesson check 1                         check your answer to exercise 1

figures.py describes the pictures, exercises/ the exercises.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from lesson import figures, views
from merv import MERV
from support.benchmarks import list_videos
from support.cli import DTYPES, option, parse_options, pick_device, pick_dtype
from support.errors import UserError
from support.files import write_file
from support.runs import latest_run

ROOT = Path(__file__).parents[1]
USAGE = "python -m lesson figures, page RUN VIDEO, or check N"


@dataclass(frozen=True)
class LessonConfig:
    """The command line of the lesson."""

    command: tuple[str, ...] = option((), "figures, page RUN VIDEO, or check N")
    checkpoint: str | None = option(None, "a run, a folder or a released name; none: latest run")
    video: str | None = option(None, "the clip to draw; none: the first one of --data")
    claims: str = option("runs/claims", "runs of `python -m miniature claims`, for figures 6, 10")
    output: str | None = option(None, "folder of the figures or file of the page")
    ask: tuple[str, ...] = option(
        ("What happens?", "How many objects are there?"), "questions about the clip", group="clip"
    )
    data: str | None = option("data/miniature/test", "folder of a benchmark, or none")
    benchmark: str = option("miniature-open", "the benchmark")
    clips: int = option(60, "clips of the benchmark, for figures 5 and 6", least=1)
    device: str = option("auto", "auto, cuda, mps or cpu", group="machine")
    dtype: str = option("auto", "to compute in", DTYPES)


def open_lab(config: LessonConfig, run: str | Path, video: str | Path) -> figures.Lab:
    """Load a checkpoint and a clip."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model = MERV.from_pretrained(run, dtype, device)
    return figures.open_lab(model, video, list(config.ask))


def draw_figures(config: LessonConfig) -> None:
    """`figures`: draw what can be drawn from a checkpoint and a clip."""
    video = config.video
    if video is None:
        videos = list_videos(Path(config.data or "") / "videos")
        if not videos:
            raise UserError("Which clip?", "--data has none.", "give --video FILE --data none.")
        video = min(videos.values())
    lab = open_lab(config, config.checkpoint or latest_run(), video)
    if config.data is not None:
        lab.clips = figures.read_clips(lab.model, config.benchmark, config.data, config.clips)
    lab.claims = figures.read_claims(config.claims, config.benchmark)
    folder = Path(config.output or "runs/figures")
    print("\n".join(figures.write_figures(lab, folder)))


def write_page(config: LessonConfig, run: str, video: Path) -> None:
    """`page`: write a self-contained HTML page about one clip.

    To deceive an encoder, it shows it the clip before it in its folder, backwards; the first
    or only clip is shown the last one.
    """
    lab = open_lab(config, run, video)
    clips = sorted(video.parent.glob(f"*{video.suffix}"))
    other = clips[clips.index(video) - 1]
    pixels = lab.model.pixels(other)
    deceit = views.look_both_ways(lab.model, pixels, []).backwards
    numbers = figures.page_numbers(lab, deceit)
    names = {"model": lab.model.config.name, "video": video.name, "other": other.name}
    numbers["questions"] = lab.questions
    page, _ = figures.fill("page", numbers | names)
    file = Path(config.output or "report-clip.html")
    write_file(file, page)
    print(f"wrote {file}")


def check(number: str) -> None:
    """`check N`: run the tests of exercise N on its stub; exits with their status."""
    exercises = [file.stem for file in sorted(ROOT.glob("lesson/exercises/e*.py"))]
    if not any(name.startswith(f"e{number}_") for name in exercises):
        what = f"There is no exercise {number}."
        raise UserError(what, "exercises have numbers.", f"choose among {', '.join(exercises)}.")
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
            case ("page", run, video, *questions):
                if questions:
                    config = replace(config, ask=tuple(questions))
                write_page(config, run, Path(video))
            case ("check", number):
                check(number)
            case _:
                raise UserError("Which command?", "the first word is none of them.", USAGE)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
