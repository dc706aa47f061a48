"""Read the annotation files of published benchmarks into Questions, and find their videos."""

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

LETTERS = "ABCDEFGHIJ"  # of the options of a multiple-choice question

FPS = (
    3.0  # of videos that are folders of frames: VLEP and TVQA are distributed at 3 frames a second
)

WHOLE = (None, None, None)  # the value of Question.cut for a whole video

TEMPORAL = {  # the classes of appendix B.2.2: played backwards, each looks like another class
    "Approaching something with your camera",
    "Moving away from something with your camera",
    "Moving something away from the camera",
    "Moving something towards the camera",
    "Pulling something from left to right",
    "Pulling something from right to left",
    "Pushing something from left to right",
    "Pushing something from right to left",
    "Turning the camera downwards while filming something",
    "Turning the camera upwards while filming something",
    "Turning the camera left while filming something",
    "Turning the camera right while filming something",
}


def mcq_prompt(question: str, options: list[str]) -> str:
    """The prompt of the paper's evaluation for a multiple-choice question."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    choices = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return (
        f"{question} Select the correct answer from the following options. Write your answer as "
        f"only one of {', '.join(letters)} and nothing else.\n\n    " + "\n".join(choices)
        # QUIRK: only the first option is indented by four spaces, as in the released code
        # (ledger K10).
    )


@dataclass
class Question:
    """A question about a video with its expected answer and, after evaluation, the model's."""

    id: str
    video: str  # file name without extension
    text: str  # without the options
    expected: str  # the right answer in words, or the letter of the right option
    kind: str = ""  # the row of the results table; by default the first word (figure 5)
    options: tuple[str, ...] = ()  # empty if the question is open-ended
    cut: tuple = WHOLE  # start and end in seconds, and the index of the last frame to show
    answer: str = ""
    mixing_weights: tuple[float, ...] = ()  # in the order of the model's encoders
    failure: str = ""  # why there is no answer
    correct: bool = False
    f1: float = 0.0  # word F1 of an open-ended answer
    verdict: str = ""  # the judge's: "yes", "no", "unparsable" or "no reply"
    mark: int = 0  # the judge's score, 0 to 5

    def __post_init__(self):
        self.id = str(self.id)
        if not self.kind:
            self.kind = self.first_word

    @classmethod
    def from_dict(cls, values: dict) -> Question:
        """A question as a result file stores it. Older files say "weights" for mixing_weights."""
        values = dict(values)
        if "weights" in values:
            values["mixing_weights"] = values.pop("weights")
        return cls(**values)

    @property
    def prompt(self) -> str:
        """The text that the model is asked."""
        if self.options:
            return mcq_prompt(self.text, list(self.options))
        return self.text

    @property
    def first_word(self) -> str:
        """The first word in lower case: "What's there?" -> "what"."""
        return re.match(r"\W*(\w*)", self.text)[1].lower()


# ------------------------------------------------------------------------------------------ readers
# One function for each layout of annotation files. Each takes the folder and yields Questions.


def read_pairs(
    folder: Path, questions: str = "test_q.json", answers: str = "test_a.json"
) -> Iterator[Question]:
    """Read the layout of Video-LLaVA, which the paper's authors use for most benchmarks.

    test_q.json: [{"question_id": 7, "video_name": "v1", "question": "who sings?"}, ...]
    test_a.json: [{"question_id": 7, "answer": "a man", "type": 3}, ...]
    Multiple choice adds "options" and perhaps "start", "end" (seconds) or "end_frame" to the
    question, and "answer_id", counted from 0, to the answer.
    """
    answer_of = {}
    for answer in json.loads((folder / answers).read_text()):
        answer_of[answer["question_id"]] = answer
    for row in json.loads((folder / questions).read_text()):
        answer = answer_of[row["question_id"]]
        options = tuple(row.get("options", ()))
        yield Question(
            id=row["question_id"],
            video=row["video_name"],
            text=row["question"],
            expected=LETTERS[answer["answer_id"]] if options else str(answer["answer"]),
            kind=str(answer.get("type", "")),
            options=options,
            cut=(row.get("start"), row.get("end"), row.get("end_frame")),
        )


def read_perception(folder: Path) -> Iterator[Question]:
    """Read Perception Test; a positive number in the second file is the last frame to show.

    mc_question_valid.json: {"v1": {"mc_question": [{"id": 0, "question": "what is it?",
        "options": ["a", "b", "c"], "answer_id": 2, "area": "physics"}, ...]}, ...}
    cut_frame_mapping_valid.json: {"v1": 120, "v2": -1, ...}
    """
    last_frames = json.loads((folder / "cut_frame_mapping_valid.json").read_text())
    videos = json.loads((folder / "mc_question_valid.json").read_text())
    for video, annotation in videos.items():
        last_frame = last_frames.get(video, -1)
        for row in annotation["mc_question"]:
            yield Question(
                id=f"{video}_{row['id']}",
                video=video,
                text=row["question"],
                expected=LETTERS[row["answer_id"]],
                kind=row["area"],
                options=tuple(row["options"]),
                cut=(None, None, last_frame) if last_frame > 0 else WHOLE,
            )


def read_nextqa(folder: Path) -> Iterator[Question]:
    """Read NExT-QA. The first letter of a type says causal, temporal or descriptive.

    val.csv: video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
             4010069381,369,640,480,how do they play,0,6,CH,roll it,sing,jump,run,walk
    """
    kinds = {"C": "causal", "T": "temporal", "D": "descriptive"}
    for row in csv.DictReader(io.StringIO((folder / "val.csv").read_text())):
        yield Question(
            id=f"{row['video']}_{row['qid']}",
            video=row["video"],
            text=row["question"],
            expected=LETTERS[int(row["answer"])],
            kind=kinds[row["type"][0]],
            options=tuple(row[f"a{i}"] for i in range(5)),
        )


def read_vlep(folder: Path) -> Iterator[Question]:
    """Read VLEP: which of two events is more likely to follow the clip from ts[0] to ts[1]?

    vlep_dev_release.jsonl: {"example_id": 1, "vid_name": "friends_s01e01_ep", "ts": [10.5, 13.5],
        "events": ["He eats.", "He leaves."], "answer": 1}, one object a line
    """
    for line in (folder / "vlep_dev_release.jsonl").read_text().splitlines():
        row = json.loads(line)
        start, end = row["ts"]
        yield Question(
            id=row["example_id"],
            video=row["vid_name"],
            text="Which of these is more likely to happen next?",
            expected=LETTERS[row["answer"]],
            kind="all",
            options=tuple(row["events"]),
            cut=(start, end, None),
        )


def read_tvqa(folder: Path) -> Iterator[Question]:
    """Read TVQA. "ts" is the part of the clip to show, in seconds; "nan-nan" is the whole clip.

    tvqa_val.jsonl: {"qid": 1, "q": "Who is it?", "a0": "Ann", ..., "a4": "Eve", "answer_idx": 1,
        "ts": "76.01-84.2", "vid_name": "castle_s01e02_seg02_clip_09"}, one object a line
    """
    for line in (folder / "tvqa_val.jsonl").read_text().splitlines():
        row = json.loads(line)
        start, end = (float(time) for time in row["ts"].split("-"))
        yield Question(
            id=row["qid"],
            video=row["vid_name"],
            text=row["q"],
            expected=LETTERS[int(row["answer_idx"])],
            options=tuple(row[f"a{i}"] for i in range(5)),
            cut=(None if math.isnan(start) else start, None if math.isnan(end) else end, None),
        )


def read_ssv2(folder: Path, wrong_options: int, temporal_only: bool = False) -> Iterator[Question]:
    """Turn Something-Something v2 into questions (appendix B.2): which class does a video show?

    labels.json:     {"Holding something": "0", "Moving something up": "1", ...}
    validation.json: [{"id": "74225", "template": "Holding [something]"}, ...]
    wrong_options: how many other classes stand beside the right one; 0 asks for the class in words.
    """
    classes = json.loads((folder / "labels.json").read_text())
    for row in json.loads((folder / "validation.json").read_text()):
        name = row["template"].replace("[", "").replace("]", "")
        if temporal_only and name not in TEMPORAL:
            continue
        expected = name
        options = []
        if wrong_options:
            draw = random.Random(f"MERV {row['id']}")  # the same wrong options on every machine
            others = sorted(set(classes) - {name})
            options = [name, *draw.sample(others, wrong_options)]
            draw.shuffle(options)
            expected = LETTERS[options.index(name)]
        text = "How is the object in the video being interacted with?"
        yield Question(row["id"], row["id"], text, expected, name, tuple(options))


BENCHMARKS: dict[str, Callable[[Path], Iterator[Question]]] = {
    "msvd": read_pairs,
    "msrvtt": read_pairs,
    "tgif": read_pairs,
    "activitynet": read_pairs,
    "perception": read_perception,
    "nextqa": read_nextqa,
    "vlep": read_vlep,
    "tvqa": read_tvqa,
    "ssv2-open": partial(read_ssv2, wrong_options=0),
    "ssv2-mcq": partial(read_ssv2, wrong_options=4),
    "ssv2-temporal": partial(read_ssv2, wrong_options=4, temporal_only=True),
    "miniature-open": partial(read_pairs, questions="open_q.json", answers="open_a.json"),
    "miniature-mcq": partial(read_pairs, questions="mcq_q.json", answers="mcq_a.json"),
}


def load_questions(name: str, folder: str | Path) -> list[Question]:
    """The questions of a benchmark, from its published layout or that of `read_pairs`.

    A file test_q.json in the folder means the latter. Raises UserError if the files cannot be read.
    """
    folder = Path(folder)
    read = choose(BENCHMARKS, name, "benchmark")
    if (folder / "test_q.json").exists():
        read = read_pairs
    try:
        questions = list(read(folder))
        for id, count in Counter(question.id for question in questions).items():
            if count > 1:
                raise ValueError(f"more than one question has the id {id}")
        return questions
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        what = f"Cannot read {name} in {folder}."
        why = f"{type(error).__name__}: {error}"
        fix = "arrange the files as docs/evaluate.md shows (Benchmarks)."
        raise UserError(what, why, fix) from error


def list_videos(folder: Path) -> dict[str, Path]:
    """Find the videos in a folder and its subfolders: name without extension -> path.

    A subfolder with pictures in it is one video. WHY: names from annotation files are only looked
    up in this table, so a name such as "../secret" cannot open a file outside the folder.
    """
    found: dict[str, Path] = {}
    for place, subfolders, files in os.walk(folder, followlinks=True):
        subfolders.sort()  # os.walk visits them in this order
        has_pictures = any(Path(file).suffix.lower() in IMAGE_SUFFIXES for file in files)
        if has_pictures and Path(place) != folder:
            found[Path(place).name] = Path(place)
            continue
        for file in sorted(files):
            found[Path(file).stem] = Path(place, file)
    return found
