"""Write stored results as one HTML page; report.jinja, beside this file, is the page."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.benchmarks import FPS, LETTERS, TEMPORAL, Question, list_videos
from support.errors import UserError, VideoError
from support.files import write_file
from support.records import as_record, read_object
from support.templates import read_template
from support.video import load_frames

MOST_BARS = 16  # with more answers than this, a chart by answer is too long to read


def write_report(
    runs: list[str], output: Path, summarise: Callable, data: Path | None = None
) -> None:
    """Write one HTML page about the stored results of some runs; it needs no model and no network.

    summarise: `eval.summarise`, which turns questions into rows of a table. data: the folder of a
    benchmark, whose clips are shown; without it there are no pictures. The page has the analyses of
    the paper's section 5. Jinja escapes all text from annotations, models and judges.
    """
    if output.is_dir():
        why = "the report is one HTML page."
        raise UserError(f"{output} is a folder.", why, "name a file, such as report.html.")
    results = []
    for run, name in zip(runs, short_names(runs), strict=True):
        for result in read_results(Path(run)):
            results.append(result | {"run": name})
    for folder in {result["settings"]["data"] for result in results}:
        if not same_folder(folder, data):
            print(f"The clips in {folder!r} are not shown; --data names the folder to show.")
    page = read_template(Path(__file__).with_name("report.jinja"))
    html = page.render(
        results=results,
        temporal=TEMPORAL | {"temporal"},
        letters=LETTERS,
        summarise=summarise,
        film_strip=partial(film_strip, data=data),
        by_clip=by_clip,
        mixing_by_content=mixing_by_content,
        quartiles=quartiles,
    )
    write_file(output, html)
    print(f"report: {output}")


def short_names(runs: list[str]) -> list[str]:
    """What the page calls each run: the name of its folder, or all of the path if two share it."""
    paths = [Path(run).resolve() for run in runs]
    names = Counter(path.name for path in paths)
    return [path.name if names[path.name] == 1 else str(path) for path in paths]


def result_files(run: Path) -> list[Path]:
    """The result files of a run, as eval.py writes them; UserError if there are none."""
    files = sorted(run.glob("eval/*.json"))
    if not files:
        fix = "run `python eval.py --checkpoint RUN --benchmark NAME --data DIR` first."
        raise UserError(f"{run} has no results.", f"there is no {run}/eval/*.json.", fix)
    return files


def read_results(run: Path) -> list[dict]:
    """The contents of a run's result files, with their questions as Questions."""
    return [read_result(file) for file in result_files(run)]


def read_result(path: Path) -> dict:
    """A result file as eval.write_results writes it, with its questions as Questions.

    Raises DataError, which names the file and the remedy, if the file is cut off, is not a result,
    or comes from a version that this one does not understand.
    """
    fix = "delete it and run eval.py again: the stored answers are reused."
    result = read_object(path, fix)
    settings = result.record("settings")
    encoders = settings.texts("encoders")
    checked = {
        "benchmark": settings.text("benchmark"),
        "data": settings.text("data"),
        "encoders": list(encoders),
    }
    if "judge" in settings.values:
        judge = settings.record("judge")
        if "replies" in judge.values:
            judge.record("replies")
    questions = []
    for number, values in enumerate(result.items("questions"), 1):
        row = as_record(values, f"{path}, question {number}", fix)
        question = Question.from_dict(row.values, row.place, fix)
        if len(question.mixing_weights) not in (0, len(encoders)):
            what = f"has {len(question.mixing_weights)} mixing weights."
            raise row.fault(what, f"the model has {len(encoders)} encoders.")
        questions.append(question)
    if not questions:
        raise result.fault("has no questions.", "every benchmark has some.")
    found = {"settings": settings.values | checked, "rule": result.text("rule")}
    return result.values | found | {"questions": questions}


def same_folder(stored: str, data: Path | None) -> bool:
    """Whether the folder that a result file names is the one that the user names, if any."""
    return data is not None and os.path.abspath(stored) == os.path.abspath(data)


def film_strip(question: Question, settings: dict, data: Path | None, num_frames: int = 6) -> str:
    """Frames of a question's clip side by side, as a data: URL of a JPEG; "" if it is missing.

    WHY only from `data`, which the user names: a result file from elsewhere could name any folder
    of this machine, and show its pictures to whoever reads the page.
    """
    if not same_folder(settings["data"], data):
        return ""
    videos = list_videos(data / "videos")

    def scale_down(frame: np.ndarray, places: list[int]) -> Image.Image:
        """WHY while the video is read: whole frames of a large one take gigabytes."""
        picture = Image.fromarray(frame)
        picture.thumbnail((160, 120))
        return picture

    try:
        path = videos.find(question.video)
        pictures = load_frames(path, num_frames, scale_down, *question.cut, fps=FPS)
    except VideoError:
        return ""
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * num_frames, height))
    for place in range(num_frames):
        # A still picture has one frame, which stands in all places.
        strip.paste(pictures[place % len(pictures)], (place * width, 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def mixing_by_content(questions: list[Question]) -> dict:
    """Mean mixing weights of the clips that show the same: {"question": text, "rows": [...]}.

    What a clip shows is the right answer to a question that most clips are asked, in the same words
    and once a clip. Of several such questions the one with the most distinct answers is taken, up
    to MOST_BARS. A row is (answer, number of clips, mean of each encoder). If there is no such
    question, the text is "" and there are no rows.
    """
    clips = by_clip(questions)
    shown: dict[str, dict[tuple, str]] = defaultdict(dict)  # text -> clip -> right answer
    asked: Counter = Counter()
    for question in questions:
        clip = (question.video, *question.cut)
        if clip in clips:
            asked[question.text] += 1
            shown[question.text][clip] = expected_words(question)
    # Find the question that tells the clips apart best and still fits into a chart.
    best = ""
    most = 1  # one answer for all clips tells nothing apart
    for text, answers in shown.items():
        distinct = len(set(answers.values()))
        once = asked[text] == len(answers)
        if once and len(answers) > len(clips) / 2 and most < distinct <= MOST_BARS:
            best = text
            most = distinct
    groups: dict[str, list[Question]] = defaultdict(list)
    for clip, answer in shown[best].items():
        groups[answer].append(clips[clip])
    rows = []
    for answer, group in sorted(groups.items()):
        weights = torch.tensor([question.mixing_weights for question in group])
        rows.append((answer, len(group), weights.mean(0).tolist()))
    return {"question": best, "rows": rows}


def quartiles(questions: list[Question]) -> list[list[float]]:
    """Smallest, 25 %, median, 75 % and largest mixing weight over clips, for each encoder."""
    clips = by_clip(questions).values()
    weights = torch.tensor([question.mixing_weights for question in clips])  # (clips, encoders)
    points = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    return weights.quantile(points, dim=0).T.tolist()


def by_clip(questions: list[Question]) -> dict[tuple, Question]:
    """Clip -> one of its questions with mixing weights; all questions of a clip have the same."""
    clips = {}
    for question in questions:
        if question.mixing_weights:
            clips[question.video, *question.cut] = question
    return clips


def expected_words(question: Question) -> str:
    """The right answer in words, also for multiple choice."""
    if question.options:
        return question.options[LETTERS.index(question.expected)]
    return question.expected
