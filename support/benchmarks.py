"""The annotation layouts of published benchmarks, read into Questions."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.cli import choose
from support.errors import UserError
from support.video import IMAGE_SUFFIXES


def mcq_prompt(question: str, options: list[str]) -> str:
    """The multiple-choice prompt of the paper's evaluation."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    choices = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return (
        f"{question} Select the correct answer from the following options. Write your answer as "
        f"only one of {', '.join(letters)} and nothing else.\n\n    " + "\n".join(choices)
        # QUIRK: the four blanks before the first option are the released prompt's (ledger K10).
    )


LETTERS = "ABCDEFGHIJ"  # of options


FPS = 3.0  # of videos that are folders of frames, as VLEP and TVQA come


TEMPORAL = {  # appendix B.2.2: played backwards, each looks like another class
    "Approaching something with your camera", "Moving away from something with your camera",
    "Moving something away from the camera", "Moving something towards the camera",
    "Pulling something from left to right", "Pulling something from right to left",
    "Pushing something from left to right", "Pushing something from right to left",
    *(f"Turning the camera {where} while filming something" for where in
      ("downwards", "upwards", "left", "right")),
}  # fmt: skip


@dataclass
class Question:
    """One question, what is expected, and later what came out."""

    id: str
    video: str  # stem of its file
    text: str  # without the options
    expected: str  # the words, or the letter
    kind: str = ""  # the row of the table it counts in; "": its first word, a WH-word (figure 5)
    options: tuple[str, ...] = ()  # of multiple choice
    cut: tuple = (None, None, None)  # start and end in seconds; the last frame that may be seen
    answer: str = ""
    weights: tuple[float, ...] = ()  # mixing weights, in the order of the encoders
    failure: str = ""  # why there is no answer
    correct: bool = False
    f1: float = 0.0  # of the words, where the answer is open
    verdict: str = ""  # a judge's: "yes", "no", "unparsable" or "no reply"; its mark, 0 to 5, below
    mark: int = 0

    def __post_init__(self):
        self.id, self.kind = str(self.id), self.kind or self.first_word

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return mcq_prompt(self.text, list(self.options)) if self.options else self.text

    @property
    def first_word(self) -> str:
        """ "What's there?" -> "what"."""
        return re.match(r"\W*(\w*)", self.text)[1].lower()


def read_pairs(folder: Path, questions: str = "test_q.json", answers: str = "test_a.json"):
    """Most sets, as Video-LLaVA and the paper's authors ship them: two lists, joined by id."""
    by_id = {a["question_id"]: a for a in json.loads((folder / answers).read_text())}
    for q in json.loads((folder / questions).read_text()):
        a, options = by_id[q["question_id"]], tuple(q.get("options", ()))
        right = LETTERS[a["answer_id"]] if options else str(a["answer"])
        asked, kind = (q["question_id"], q["video_name"], q["question"]), str(a.get("type", ""))
        cut = tuple(q.get(key) for key in ("start", "end", "end_frame"))
        yield Question(*asked, right, kind, options, cut)


def read_perception(folder: Path) -> Iterator[Question]:
    """Perception Test; a positive number among the cuts is the last frame to be seen."""
    cuts = json.loads((folder / "cut_frame_mapping_valid.json").read_text())
    for video, found in json.loads((folder / "mc_question_valid.json").read_text()).items():
        cut = (None, None, cuts[video] if cuts.get(video, -1) > 0 else None)
        for q in found["mc_question"]:
            right, asked = LETTERS[q["answer_id"]], (f"{video}_{q['id']}", video, q["question"])
            yield Question(*asked, right, q["area"], tuple(q["options"]), cut)


def read_nextqa(folder: Path) -> Iterator[Question]:
    """NExT-QA, multiple choice. A type's first letter: causal, temporal or descriptive."""
    for q in csv.DictReader(io.StringIO((folder / "val.csv").read_text())):
        kind = {"C": "causal", "T": "temporal", "D": "descriptive"}[q["type"][0]]
        right, options = LETTERS[int(q["answer"])], tuple(q[f"a{i}"] for i in range(5))
        yield Question(f"{q['video']}_{q['qid']}", q["video"], q["question"], right, kind, options)


def read_vlep(folder: Path) -> Iterator[Question]:
    """VLEP: which of two events is likelier to follow what happens from ts[0] to ts[1]?"""
    for q in map(json.loads, (folder / "vlep_dev_release.jsonl").read_text().splitlines()):
        asked = q["example_id"], q["vid_name"], "Which of these is more likely to happen next?"
        right, events = LETTERS[q["answer"]], tuple(q["events"])
        yield Question(*asked, right, "all", events, (*q["ts"], None))


def read_tvqa(folder: Path) -> Iterator[Question]:
    """TVQA: five answers, a stretch of the clip; "nan-nan" is the whole clip."""
    for q in map(json.loads, (folder / "tvqa_val.jsonl").read_text().splitlines()):
        times = (None if math.isnan(t) else t for t in map(float, q["ts"].split("-")))
        right, options = LETTERS[int(q["answer_idx"])], tuple(q[f"a{i}"] for i in range(5))
        yield Question(q["qid"], q["vid_name"], q["q"], right, "", options, (*times, None))


def read_ssv2(folder: Path, num_options: int, temporal: bool = False) -> Iterator[Question]:
    """Something-Something v2 as questions (appendix B.2): the class in words, or one of five."""
    classes = json.loads((folder / "labels.json").read_text())
    for row in json.loads((folder / "validation.json").read_text()):
        name = row["template"].replace("[", "").replace("]", "")
        asked = row["id"], row["id"], "How is the object in the video being interacted with?"
        draw = random.Random(f"MERV {row['id']}")  # the same wrong options on every machine
        options = [name, *draw.sample(sorted(set(classes) - {name}), num_options)]
        draw.shuffle(options)
        if not num_options:
            yield Question(*asked, name, name)
        elif name in TEMPORAL or not temporal:
            yield Question(*asked, LETTERS[options.index(name)], name, tuple(options))


BENCHMARKS: dict[str, Callable[[Path], Iterator[Question]]] = {
    **dict.fromkeys(("msvd", "msrvtt", "tgif", "activitynet"), read_pairs),
    "perception": read_perception, "nextqa": read_nextqa, "vlep": read_vlep, "tvqa": read_tvqa,
    "ssv2-open": partial(read_ssv2, num_options=0),
    "ssv2-mcq": partial(read_ssv2, num_options=4),
    "ssv2-temporal": partial(read_ssv2, num_options=4, temporal=True),
    "miniature-open": partial(read_pairs, questions="open_q.json", answers="open_a.json"),
    "miniature-mcq": partial(read_pairs, questions="mcq_q.json", answers="mcq_a.json"),
}  # fmt: skip


def load_questions(name: str, folder: str | Path) -> list[Question]:
    """The questions of a benchmark, as it was published or, if there is one, as `read_pairs`."""
    folder, read = Path(folder), choose(BENCHMARKS, name, "benchmark")
    if (folder / "test_q.json").exists():
        read = read_pairs
    try:
        questions = list(read(folder))
        if twice := [id for id, n in Counter(q.id for q in questions).items() if n > 1]:
            raise ValueError(f"more than one question has the id {twice[0]}")
        return questions
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        what, why = f"Cannot read {name} in {folder}.", f"{type(error).__name__}: {error}"
        raise UserError(what, why, "lay it out as the README shows (Evaluate).") from error


def list_videos(folder: Path) -> dict[str, Path]:
    """Stem -> file, or folder of frames, in a folder and the folders in it.

    WHY: names in annotations are only looked up here, so none can lead out of the folder.
    """
    found: dict[str, Path] = {}
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        images = any(Path(file).suffix.lower() in IMAGE_SUFFIXES for file in files)
        if images and Path(place) != folder:
            found[Path(place).name] = Path(place)
        else:
            found |= {Path(file).stem: Path(place, file) for file in sorted(files)}
    return found
