"""Read the annotation files of published benchmarks into Questions, and find their videos."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from support.cli import choose
from support.errors import DataError, VideoError
from support.records import Record, as_records, read_csv, read_lines, read_object, read_rows
from support.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_visible

LETTERS = "ABCDEFGHIJ"  # of the options of a multiple-choice question

# Of videos that are folders of frames: VLEP and TVQA are distributed at 3 frames a second.
FPS = 3.0

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
    video: str  # its name in the annotations; Videos.find knows which file that is
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
    verdict: str = ""  # the judge's: "yes", "no", "unparsable", "refused" or "no reply"
    mark: int = 0  # the judge's score, 0 to 5

    def __post_init__(self):
        self.id = str(self.id)
        if not self.kind:
            self.kind = self.first_word

    @classmethod
    def from_dict(cls, values: dict, place: str = "a result", fix: str = "") -> Question:
        """A question as a result file stores it. Older files say "weights" for mixing_weights.

        Raises DataError, which begins with `place` and suggests `fix`, for malformed values.
        """
        values = dict(values)
        if "weights" in values:
            values["mixing_weights"] = values.pop("weights")
        row = Record(values, place, fix)
        if unknown := set(values) - {field.name for field in fields(cls)}:
            raise row.fault(f"has unknown fields {sorted(unknown)}.", "another version wrote it.")
        question = cls(
            id=row.text("id"),
            video=row.text("video"),
            text=row.text("text"),
            expected=row.text("expected"),
            kind=row.text("kind", ""),
            options=row.texts("options"),
            cut=row.numbers("cut") or WHOLE,
            answer=row.text("answer", ""),
            mixing_weights=row.numbers("mixing_weights"),
            failure=row.text("failure", ""),
            correct=row.flag("correct"),
            f1=row.number("f1") or 0.0,
            verdict=row.text("verdict", ""),
            mark=row.whole("mark") or 0,
        )
        letters = tuple(LETTERS[: len(question.options)])
        if letters and question.expected not in letters:
            raise row.fault(f"expects {question.expected}.", "it has no option of that letter.")
        if len(question.cut) != len(WHOLE) or None in question.mixing_weights:
            raise row.fault("is incomplete.", "a number is missing in cut or mixing_weights.")
        return question

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
# Record checks every field, and the three functions here check what several layouts share.


def read_answer(row: Record, field: str, options: tuple[str, ...]) -> str:
    """The letter of the right option, from its number, which counts from 0."""
    if not 1 < len(options) <= len(LETTERS):
        why = f"a question has 2 to {len(LETTERS)}, for the letters {LETTERS}."
        raise row.fault(f"has {len(options)} options.", why)
    number = row.whole(field)
    if number is None:
        raise row.wrong(field, "the number of the right option")
    if not 0 <= number < len(options):
        why = f"the {len(options)} options are numbered from 0."
        raise row.fault(f"{field} is {number}.", why)
    return LETTERS[number]


def read_numbered_options(row: Record) -> tuple[str, ...]:
    """The five options that NExT-QA and TVQA keep in fields of their own, a0 to a4."""
    return tuple(row.text(f"a{number}") for number in range(5))


def read_span(row: Record, field: str) -> tuple:
    """The cut of a clip from "ts": [10.5, 13.5], "10.5-13.5", or no times for the whole video."""
    if field not in row.values:
        raise row.wrong(field, "start and end")
    times = row.values[field]
    if isinstance(times, str):
        times = re.split(r"(?<=[^-])-", times.strip())
    times = Record({field: times}, row.place).numbers(field)
    if len(times) not in (0, 2):
        raise row.wrong(field, "start and end")
    return (*times, None) if times else WHOLE


def read_pairs(
    folder: Path, questions: str = "test_q.json", answers: str = "test_a.json"
) -> Iterator[Question]:
    """Read the layout of Video-LLaVA, which the paper's authors use for most benchmarks.

    test_q.json: [{"question_id": 7, "video_name": "v1", "question": "who sings?"}, ...]
    test_a.json: [{"question_id": 7, "answer": "a man", "type": 3}, ...]
    Multiple choice adds "options" and perhaps "start", "end" (seconds) or "end_frame" to the
    question, and "answer_id", counted from 0, to the answer.
    """
    answer_of: dict[str, Record] = {}
    for answer in read_rows(folder / answers, "question_id"):
        first = answer_of.setdefault(answer.text("question_id"), answer)
        if first.values != answer.values:
            raise answer.fault("contradicts an earlier answer.", "a question has one answer.")
    for row in read_rows(folder / questions, "question_id"):
        id = row.text("question_id")
        if id not in answer_of:
            raise row.fault(f"has no answer in {answers}.", f"KeyError: no question_id is {id}.")
        answer = answer_of[id]
        options = row.texts("options")
        expected = read_answer(answer, "answer_id", options) if options else answer.text("answer")
        last_frame = row.whole("end_frame")
        if last_frame is not None and last_frame < 0:
            last_frame = None  # as Perception Test writes the whole video
        yield Question(
            id=id,
            video=row.text("video_name"),
            text=row.text("question"),
            expected=expected,
            kind=answer.text("type", ""),
            options=options,
            cut=(row.number("start"), row.number("end"), last_frame),
        )


def read_perception(folder: Path) -> Iterator[Question]:
    """Read Perception Test; a positive number in the second file is the last frame to show.

    mc_question_valid.json: {"v1": {"mc_question": [{"id": 0, "question": "what is it?",
        "options": ["a", "b", "c"], "answer_id": 2, "area": "physics"}, ...]}, ...}
    cut_frame_mapping_valid.json: {"v1": 120, "v2": -1, ...}
    """
    last_frames = read_object(folder / "cut_frame_mapping_valid.json")
    videos = read_object(folder / "mc_question_valid.json")
    for video in videos.values:
        annotation = videos.record(video)
        if "mc_question" not in annotation.values:
            raise annotation.wrong("mc_question", "a list of questions")
        last_frame = -1
        for name in (video, f"{video}.mp4", video.removesuffix(".mp4")):
            if name in last_frames.values:
                last_frame = last_frames.whole(name) or -1
        for row in as_records(annotation.items("mc_question"), annotation.place, "id"):
            options = row.texts("options")
            yield Question(
                id=f"{video}_{row.text('id')}",
                video=video,
                text=row.text("question"),
                expected=read_answer(row, "answer_id", options),
                kind=row.text("area", ""),
                options=options,
                cut=(None, None, last_frame) if last_frame > 0 else WHOLE,
            )


def read_nextqa(folder: Path) -> Iterator[Question]:
    """Read NExT-QA. The first letter of a type says causal, temporal or descriptive.

    val.csv: video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
             4010069381,369,640,480,how do they play,0,6,CH,roll it,sing,jump,run,walk
    """
    kinds = {"C": "causal", "T": "temporal", "D": "descriptive"}
    for row in read_csv(folder / "val.csv", "qid"):
        letter = row.text("type")[0]
        if letter not in kinds:
            raise row.wrong("type", "a word that begins with C, T or D")
        options = read_numbered_options(row)
        video = row.text("video")
        yield Question(
            id=f"{video}_{row.text('qid')}",
            video=video,
            text=row.text("question"),
            expected=read_answer(row, "answer", options),
            kind=kinds[letter],
            options=options,
        )


def read_vlep(folder: Path) -> Iterator[Question]:
    """Read VLEP: which of two events is more likely to follow the clip from ts[0] to ts[1]?

    vlep_dev_release.jsonl: {"example_id": 1, "vid_name": "friends_s01e01_ep", "ts": [10.5, 13.5],
        "events": ["He eats.", "He leaves."], "answer": 1}, one object a line
    """
    for row in read_lines(folder / "vlep_dev_release.jsonl", "example_id"):
        options = row.texts("events")
        yield Question(
            id=row.text("example_id"),
            video=row.text("vid_name"),
            text="Which of these is more likely to happen next?",
            expected=read_answer(row, "answer", options),
            kind="all",
            options=options,
            cut=read_span(row, "ts"),
        )


def read_tvqa(folder: Path) -> Iterator[Question]:
    """Read TVQA. "ts" is the part of the clip to show, in seconds; "nan-nan" is the whole clip.

    tvqa_val.jsonl: {"qid": 1, "q": "Who is it?", "a0": "Ann", ..., "a4": "Eve", "answer_idx": 1,
        "ts": "76.01-84.2", "vid_name": "castle_s01e02_seg02_clip_09"}, one object a line
    """
    for row in read_lines(folder / "tvqa_val.jsonl", "qid"):
        options = read_numbered_options(row)
        yield Question(
            id=row.text("qid"),
            video=row.text("vid_name"),
            text=row.text("q"),
            expected=read_answer(row, "answer_idx", options),
            options=options,
            cut=read_span(row, "ts"),
        )


def read_ssv2(folder: Path, wrong_options: int, temporal_only: bool = False) -> Iterator[Question]:
    """Turn Something-Something v2 into questions (appendix B.2): which class does a video show?

    labels.json:     {"Holding something": "0", "Moving something up": "1", ...}
    validation.json: [{"id": "74225", "template": "Holding [something]"}, ...]
    wrong_options: how many other classes stand beside the right one; 0 asks for the class in words.
    """
    classes = read_object(folder / "labels.json")
    for row in read_rows(folder / "validation.json", "id"):
        name = row.text("template").replace("[", "").replace("]", "")
        if temporal_only and name not in TEMPORAL:
            continue
        id = row.text("id")
        expected = name
        options = []
        if wrong_options:
            draw = random.Random(f"MERV {id}")  # the same wrong options on every machine
            others = sorted(set(classes.values) - {name})
            if len(others) < wrong_options:
                why = f"{wrong_options} wrong ones stand beside the right one."
                raise classes.fault(f"has only {len(others)} other classes.", why)
            options = [name, *draw.sample(others, wrong_options)]
            draw.shuffle(options)
            expected = LETTERS[options.index(name)]
        text = "How is the object in the video being interacted with?"
        yield Question(id, id, text, expected, name, tuple(options))


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

    A file test_q.json in the folder means the latter. Raises DataError, which names the file and
    the question, if the files cannot be read or do not have this layout.
    """
    folder = Path(folder)
    read = choose(BENCHMARKS, name, "benchmark")
    if (folder / "test_q.json").exists():
        read = read_pairs
    questions = list(read(folder))
    what = f"Cannot read {name} in {folder}."
    fix = "arrange the files as docs/evaluate.md shows (Benchmarks)."
    if not questions:
        raise DataError(what, "there are no questions.", fix)
    for id, count in Counter(question.id for question in questions).items():
        if count > 1:
            raise DataError(what, f"more than one question has the id {id}.", fix)
    for question in questions:
        if bool(question.options) != bool(questions[0].options):
            why = f"questions {questions[0].id} and {question.id}: only one of them has options."
            raise DataError(what, why, fix)
    return questions


# ------------------------------------------------------------------------------------------- videos


class Videos(dict):
    """The videos in a folder: name without extension -> path. `find` looks a name up.

    `rivals` has the names that several files have: name -> their paths.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.rivals: dict[str, list[Path]] = {}

    def candidates(self, name: str) -> list[Path]:
        """The videos that a name in an annotation may mean; [] if there are none.

        A name may have a suffix or folders in front, which choose between several videos, and
        ActivityNet's prefix: "v1", "v1.mp4", "test/v1", "v_v1". Tables with gaps turn 7 into "7.0".
        """
        parts = tuple(name.replace("\\", "/").split("/"))
        stem = parts[-1]
        if Path(stem).suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            stem = Path(stem).stem
        whole_number = re.sub(r"^(\d+)\.0$", r"\1", stem)
        bare_names = (stem, f"v_{stem}", stem.removeprefix("v_"), whole_number)
        for known_as in (name, parts[-1], *bare_names):
            if known_as in self:
                paths = self.rivals.get(known_as, [self[known_as]])
                length = len(parts)
                whole = [path for path in paths if path.parts[-length:] == parts]
                bare = [path for path in paths if path.with_suffix("").parts[-length:] == parts]
                return whole or bare or paths
        return []

    def find(self, name: str) -> Path:
        """The video that a name in an annotation means.

        WHY: names are only looked up in this table, so a name such as "../secret" cannot open a
        file outside the folder. Raises VideoError if there is no such video, or more than one.
        """
        paths = self.candidates(name)
        if len(paths) == 1:
            return paths[0]
        if paths:
            what = f"{name} may be {' or '.join(str(path) for path in paths)}."
            raise VideoError(what, "nothing says which is meant.", "keep only one of them.")
        what = f"{self.folder} has no video {name}, with any extension."
        fix = "add it; eval.py --check lists what is missing."
        raise VideoError(what, "only videos, pictures and folders of pictures count.", fix)


def list_videos(folder: Path) -> Videos:
    """Find the videos in a folder and its subfolders.

    A subfolder of pictures is one video, and a file without a suffix may be one; a file with the
    suffix of a video is preferred to both. Pictures beside videos are thumbnails and left out, like
    hidden files, sound, subtitles and notes. Pictures alone in `folder` itself are stills.
    """
    ranked: dict[str, list[tuple[int, Path]]] = {}
    seen = set()
    for place, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(filter(is_visible, subfolders))
        if os.path.realpath(place) in seen:  # reached through a link as well
            subfolders.clear()
            continue
        seen.add(os.path.realpath(place))
        paths = [Path(place, name) for name in sorted(filter(is_visible, files))]
        suffixes = {path.suffix.lower() for path in paths}
        pictures = bool(suffixes & IMAGE_SUFFIXES) and not suffixes & VIDEO_SUFFIXES
        if pictures and Path(place) != folder:
            ranked.setdefault(Path(place).name, []).append((1, Path(place)))
            continue
        for path in paths:
            suffix = path.suffix.lower()
            if suffix in VIDEO_SUFFIXES:
                ranked.setdefault(path.stem, []).append((0, path))
            elif not suffix or (suffix in IMAGE_SUFFIXES and pictures):
                ranked.setdefault(path.stem, []).append((2, path))
    videos = Videos(folder)
    for name, candidates in ranked.items():
        best = min(rank for rank, _ in candidates)
        rivals = [path for rank, path in candidates if rank == best]
        videos[name] = rivals[0]
        if len({path.resolve() for path in rivals}) > 1:
            videos.rivals[name] = rivals
    return videos
