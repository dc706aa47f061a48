"""Ask a trained MERV the questions of a benchmark and count the right answers (paper 4).

    python eval.py --benchmark miniature-open --data data/miniature/test
    torchrun --nproc-per-node 8 eval.py --checkpoint merv-frozen --benchmark msvd --data DIR
    python eval.py --check --benchmark msvd --data DIR     what is missing, before anything runs
    python eval.py --judge URL --judge-model NAME RUN      an LLM judges the stored answers
    python eval.py --report FILE RUN RUN ...               stored answers as one HTML page
    python eval.py --table efficiency                      the paper's costs, without any weights

A benchmark is a folder with its annotations and the videos, in videos/, found by stem. All
questions of a clip are answered together: it is decoded, encoded and read once. They are on disk
before the next clip is asked about, so a run that was killed goes on where it was.
Read before: merv.py. Read next: train.py.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib import import_module
from pathlib import Path

import jinja2
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch.utils.data import DataLoader

import merv
from data import IMAGE_SUFFIXES, VideoError, load_pixels, load_video, mcq_prompt, progress
from encoders import ENCODERS, UserError
from merv import MERV, choose, option, parse_options

LETTERS = "ABCDEFGHIJ"  # of options
MCQ_RULES = ("parse", "released", "likelihood")
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


class Clips:
    """The clips of a benchmark, each with the questions asked of it, ready for the encoders."""

    def __init__(self, questions: list[Question], folder: str | Path, encoders):
        self.encoders, self.folder = encoders, Path(folder) / "videos"
        self.videos = list_videos(self.folder)
        groups: dict[tuple, list[Question]] = defaultdict(list)
        for question in questions:
            groups[question.video, *question.cut].append(question)
        self.groups = list(groups.values())

    def __getitem__(self, number: int) -> tuple[int, dict, str]:
        """The number, encoder -> pixels, and why there are none if there are none."""
        video, cut = self.groups[number][0].video, self.groups[number][0].cut
        if video not in self.videos:
            return number, {}, f"{self.folder} has no video {video}, whatever the extension."
        try:
            return number, load_pixels(self.videos[video], self.encoders, *cut, FPS), ""
        except VideoError as error:
            return number, {}, str(error)


def check(name: str, folder: str | Path, workers: int) -> int:
    """Print what is missing or cannot be decoded before anything runs; how many clips are bad."""
    questions = load_questions(name, folder)
    clips = Clips(questions, folder, [ENCODERS["siglip"]])
    names = {question.video for question in questions}
    found = f"{len(names & set(clips.videos))}/{len(names)} videos found in {clips.folder}"
    print(f"{len(questions)} questions, {found}")
    bad, total = 0, len(clips.groups)
    loader = DataLoader(clips, None, sampler=range(total), num_workers=workers)
    for number, _, failure in progress(loader, "decode"):
        if failure:
            bad += 1
            print(f"bad  {clips.groups[number][0].video}: {failure.splitlines()[0]}")
    print(f"{total - bad}/{total} clips can be decoded")
    return bad


# ------------------------------------------------------------------------------------------ scoring


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles: "A red Square." -> "red square"."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def parse_letter(reply: str, options: tuple[str, ...]) -> str:
    """The letter that a reply chooses, or "": "B", "(B) red", "The answer is B." and "red" are B.

    FIX: the authors take the first character, so "Both" is B and "The answer is B" is T (F9).
    """
    last = LETTERS[len(options) - 1]
    for pattern in (
        rf"(?!A\s+[a-z])\(?([A-{last}])\)?(?:[.:)]|\s|$)",  # "B", "(B) red", "B: red"; not "A cat"
        rf".*\b(?:answer|option|choice)\b(?:\s+is)?:?\s+\(?([A-{last}])\b",
        rf".*\(([A-{last}])\)",
    ):
        if match := re.match(pattern, reply.strip(), re.DOTALL):
            return match[1]
    same = [i for i, option in enumerate(options) if normalise(option) == normalise(reply)]
    return LETTERS[same[0]] if len(same) == 1 else ""


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of the words: "a red square", "red" -> 2/3."""
    ours, theirs = Counter(normalise(answer).split()), Counter(normalise(expected).split())
    return 2 * (ours & theirs).total() / max(1, ours.total() + theirs.total())


def score(question: Question, rule: str) -> None:
    """Fill in what is right. A failed answer counts as wrong: else failing on hard clips would pay.

    Multiple choice: the letter, parsed or ("released", the authors' rule) the first character.
    Open-ended: the judge's verdict if there is one, else exact match of the words.
    """
    if question.options:
        first, parsed = question.answer[:1], parse_letter(question.answer, question.options)
        question.correct = question.expected == (first if rule == "released" else parsed)
        return
    exact = normalise(question.answer) == normalise(question.expected)
    question.correct = question.verdict == "yes" if question.verdict else exact
    question.correct &= not question.failure
    question.f1 = token_f1(question.answer, question.expected)


# -------------------------------------------------------------------------------------- answering


class Journal:
    """Records on disk as they come, one JSON line each: a kill loses none, a rerun repeats none.

    One file a process, so that processes never write into each other's lines. settings: of the run;
    a journal of other settings is refused, because its answers are not this run's.
    """

    def __init__(self, folder: Path, settings: dict, rank: int = 0):
        self.file, known = folder / f"{rank}.jsonl", folder / "settings.json"
        if known.exists() and json.loads(known.read_text()) != settings:
            what = f"{folder} holds the answers of another run."
            why = f"it was made with {known.read_text()}, this is {json.dumps(settings)}."
            raise UserError(what, why, "give another --output, or delete that folder.")
        write_file(known, json.dumps(settings))
        write_file(self.file, "".join(whole_lines(self.file)))

    def records(self) -> Iterator[dict]:
        """Everything any process has written."""
        for path in sorted(self.file.parent.glob("*.jsonl")):
            yield from map(json.loads, whole_lines(path))

    def append(self, record: dict) -> None:
        """On disk when this returns."""
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """Without the last line, if a kill has cut it short or it is being written."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def write_file(path: Path, text: str) -> None:
    """A text file, complete or as it was; also if several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial_path.write_text(text)
    partial_path.replace(path)


def evaluate(model: MERV, name: str, folder, output, config=None) -> list[Question] | None:
    """Answer the questions of a benchmark that are not answered yet and write OUTPUT/NAME.json.

    Under torchrun each process takes its share of the clips; the one that finds all answers there
    writes the result and gives the questions, the others give None.
    FIX: the authors never merge the results once a single video has failed (ledger F10).
    """
    config = config or EvalConfig()
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    questions, output = load_questions(name, folder), Path(output)
    trained = [*model.projectors.parameters(), *model.mixer.parameters()]
    digest = hashlib.sha256(b"".join(p.detach().float().cpu().numpy().tobytes() for p in trained))
    likelihood = config.mcq_rule == "likelihood" and bool(questions[0].options)
    settings = {"benchmark": name, "data": str(folder), "weights": digest.hexdigest()[:16]}
    settings |= {"max_new_tokens": config.max_new_tokens, "likelihood": likelihood}
    settings["encoders"] = [encoder.name for encoder in model.config.encoders]
    journal = Journal(output / f"{name}.answers", settings, rank)
    done = {id for record in journal.records() for id in record["answers"]}
    clips = Clips(questions, folder, model.config.encoders)
    mine = [n for n, g in enumerate(clips.groups) if n % world == rank and g[0].id not in done]
    loader = DataLoader(clips, None, sampler=mine, num_workers=config.workers)
    for number, pixels, failure in progress(loader, name):
        asked, answers, weights = clips.groups[number], [""] * len(clips.groups[number]), []
        if not failure:
            prompts = [question.prompt for question in asked]
            if likelihood:
                letters = [list(LETTERS[: len(q.options)]) for q in asked]
                scores = model.likelihoods(pixels, prompts, letters)
                answers = [LETTERS[int(row.argmax())] for row in scores]
            else:
                replies = model.answer(pixels, prompts, config.max_new_tokens)
                answers, weights = [r.text for r in replies], replies[0].weights.tolist()
        answers = dict(zip((question.id for question in asked), answers, strict=True))
        journal.append({"answers": answers, "weights": weights, "failure": failure})
    outcome = {id: record for record in journal.records() for id in record["answers"]}
    if len(outcome) < len(questions) or not (mine or rank == 0):
        return None
    for question in questions:
        record = outcome[question.id]
        question.answer, question.failure = record["answers"][question.id], record["failure"]
        question.weights = tuple(record["weights"])
    write_results(output / f"{name}.json", settings, questions, config.mcq_rule)
    return questions


# -------------------------------------------------------------------------------------------- judge

JUDGE_PROMPT = """\
You grade answers to questions about a video. Compare the given answer with the correct one: they \
agree if they mean the same, whatever the wording; synonyms and paraphrases count.

Question: {text}
Correct answer: {expected}
Given answer: {answer}

Reply with one JSON object and nothing else: {{"pred": "yes" or "no", "score": a whole number from \
0 (unrelated) to 5 (the same meaning)}}. Example: {{"pred": "yes", "score": 4}}"""


def parse_verdict(reply: str | None) -> tuple[str, int]:
    """A judge's reply -> ("yes" or "no", 0..5), else ("unparsable" or "no reply", 0): no guess."""
    if reply is None:
        return "no reply", 0
    try:
        pred, mark = (json.loads(reply)[key] for key in ("pred", "score"))
        fits = pred in ("yes", "no") and type(mark) is int and 0 <= mark <= 5
    except (ValueError, TypeError, KeyError):  # no JSON, no object, or without these keys
        fits = False
    return (pred, mark) if fits else ("unparsable", 0)


def ask_judge(question: Question, client: InferenceClient, config: EvalConfig) -> str | None:
    """The raw reply, or None if there is none after some retries, each after a longer wait."""
    messages = [{"role": "user", "content": JUDGE_PROMPT.format(**vars(question))}]
    how = {"model": config.judge_model, "max_tokens": 64, "temperature": 0}
    for attempt in range(config.judge_retries + 1):
        if attempt:
            time.sleep(min(60, 0.5 * 2**attempt) * random.uniform(0.5, 1))
        try:
            return client.chat_completion(messages, **how).choices[0].message.content or ""
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status < 500 and status not in (408, 429):
                fix = "check --judge, --judge-model and the key in JUDGE_API_KEY."
                raise UserError(f"The judge refuses: {error}", "it always would.", fix) from error
        except Exception as error:  # time-outs, cut connections, replies that are no JSON
            print(f"judge: {type(error).__name__}: {error}", file=sys.stderr)
    return None


def judge(path: Path, config: EvalConfig) -> None:
    """Have an LLM judge the open-ended answers in a result file: yes or no, and 0 to 5 (paper 4).

    Raw replies are kept beside it, so a rerun asks only about those that are not judged yet.
    """
    result = json.loads(path.read_text())
    questions = [Question(**q) for q in result["questions"] if not q["options"]]
    if not questions:
        return
    prompt = {"model": config.judge_model, "prompt": JUDGE_PROMPT}
    journal = Journal(path.with_suffix(".judge"), prompt)
    replies = {(r["id"], r["answer"]): r for r in journal.records()}
    todo = [q for q in questions if not q.failure and (q.id, q.answer) not in replies]
    key = os.environ.get("JUDGE_API_KEY", "none")
    client = InferenceClient(base_url=config.judge, api_key=key, timeout=60)

    def ask(question: Question) -> None:
        if (reply := ask_judge(question, client, config)) is not None:
            asked = {"id": question.id, "answer": question.answer}
            record = {**asked, "reply": reply, "date": date.today().isoformat()}
            journal.append(record)
            replies[question.id, question.answer] = record

    with ThreadPoolExecutor(config.judge_parallel) as pool:
        for _ in progress(pool.map(ask, todo), "judge", len(todo)):
            pass  # a refusal cancels the rest
    for question in questions:
        if not question.failure:
            record = replies.get((question.id, question.answer), {"reply": None})
            question.verdict, question.mark = parse_verdict(record["reply"])
    dates = sorted({record["date"] for record in replies.values()})
    result["settings"]["judge"] = {**prompt, "url": config.judge, "dates": dates}
    write_results(path, result["settings"], questions, result["rule"])
    print_table(path.stem, questions)


# ------------------------------------------------------------------------------------------ results


def write_results(path: Path, settings: dict, questions: list[Question], rule: str) -> None:
    """Score, then write one JSON file with the table and every answer."""
    for question in questions:
        score(question, rule)
    table = {kind: row[0] for kind, row in summarise(questions).items()}
    result = {"settings": settings, "rule": rule, "accuracy": table}
    result["questions"] = [asdict(question) for question in questions]
    write_file(path, json.dumps(result, indent=1))


def summarise(questions: list[Question], by: str = "kind") -> dict[str, tuple]:
    """kind -> (accuracy over expected questions, answered, expected); "all" is the last row.

    Answers that a judge has not given a verdict on count in neither number.
    """
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[getattr(question, by)].append(question)
    rows = {}
    for kind, group in [*sorted(groups.items()), ("all", questions)]:
        judged = [q for q in group if q.verdict not in ("unparsable", "no reply")]
        right = sum(q.correct for q in judged)
        rows[kind] = (right / max(1, len(judged)), sum(not q.failure for q in group), len(group))
    return rows


def print_table(title: str, questions: list[Question]) -> None:
    """Accuracy by kind of question, how many were answered, and what the judge said."""
    print(f"\n{title:<28} {'accuracy':>8}  {'answered/expected':>18}")
    for kind, (accuracy, answered, expected) in summarise(questions).items():
        print(f"  {kind:<26} {100 * accuracy:>7.1f}%  {f'{answered}/{expected}':>18}")
    if not questions[0].options:
        print(f"  {'word F1':<26} {100 * sum(q.f1 for q in questions) / len(questions):>7.1f}%")
    if verdicts := Counter(q.verdict for q in questions if q.verdict):
        marks = [q.mark for q in questions if q.verdict in ("yes", "no")]
        print(f"  judged {dict(verdicts)}, mean score {sum(marks) / max(1, len(marks)):.2f} of 5")


# ------------------------------------------------------------------------------------------- report


def film_strip(question: Question, settings: dict, num_frames: int = 6) -> str:
    """Frames of a question's clip side by side, as the address of an embedded JPEG; "" if gone."""
    videos = list_videos(Path(settings["data"]) / "videos")
    try:
        frames = load_video(videos[question.video], num_frames, *question.cut, FPS)
    except (KeyError, VideoError):
        return ""
    strip = Image.fromarray(torch.cat(list(frames), dim=2).permute(1, 2, 0).numpy())
    strip.thumbnail((num_frames * 160, 120))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def write_report(runs: list[str], output: Path) -> None:
    """One HTML page of the stored results of some runs: no network, no script, no model needed.

    report.jinja says what is shown: the analyses of the paper's section 5. Jinja escapes whatever
    comes from annotations, models and judges.
    """
    results = []
    for run in runs:
        files = sorted(Path(run).glob("eval/*.json"))
        if not files:
            fix = "run `python eval.py --checkpoint RUN --benchmark NAME --data DIR` first."
            raise UserError(f"{run} has no results.", "there is no RUN/eval/*.json.", fix)
        for result in (json.loads(file.read_text()) for file in files):
            questions = [Question(**q) for q in result["questions"]]
            results.append(result | {"run": Path(run).name, "questions": questions})
    source = Path(__file__).with_name("report.jinja").read_text()
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    page = jinja2.Template(source, undefined=jinja2.StrictUndefined, **options)
    shown = {"results": results, "temporal": TEMPORAL | {"temporal"}}
    write_file(output, page.render(shown, summarise=summarise, film_strip=film_strip))
    print(f"report: {output}")


@dataclass(frozen=True)
class EvalConfig:
    """The command line of eval.py."""

    benchmark: str = option("miniature-open", "which questions", BENCHMARKS)
    data: str = option("data/miniature/test", "folder with the annotations and videos/")
    checkpoint: str = option("", "a run, a checkpoint folder or a released name; '': latest run")
    output: str = option("", "where results go; '': eval/ in the run, or runs/NAME/eval")
    check: bool = option(False, "list what is missing or cannot be decoded, and stop")
    mcq_rule: str = option("parse", "how a reply becomes a letter", MCQ_RULES)
    max_new_tokens: int = option(64, "longest answer")
    workers: int = option(2, "processes that decode videos ahead of the model")
    device: str = option("auto", "auto, cuda, mps or cpu")
    dtype: str = option("float32", "of weights and activations", ("float32", "bfloat16"))
    tokenizer: str = option("", "tokenizer.model, where the checkpoint has none")
    judge: str = option("", "base URL of an OpenAI-compatible endpoint: judge the results of RUNS")
    judge_model: str = option("", "name of the judging model")
    judge_parallel: int = option(8, "questions that the judge is asked at once")
    judge_retries: int = option(6, "times that it is asked again, later and later")
    report: str = option("", "write stored results of RUNS to this HTML file")
    table: str = option("", "print tables 2a, 2c and 8 of the paper, next to ours", ("efficiency",))
    runs: tuple[str, ...] = option((), "runs for --judge and --report")


def main(arguments: list[str] | None = None) -> None:
    """`eval.py`: score a checkpoint on a benchmark, or look at results that are stored."""
    config = parse_options(EvalConfig, arguments, "Score a trained MERV on a benchmark.")
    try:
        if config.table:
            return import_module("cost").print_efficiency()  # cost.py imports this module
        if config.check:
            sys.exit(bool(check(config.benchmark, config.data, config.workers)))
        runs = config.runs or (str(config.checkpoint or merv.latest_run()),)
        if config.judge:
            for path in [path for run in runs for path in sorted(Path(run).glob("eval/*.json"))]:
                judge(path, config)
        elif config.report:
            write_report(list(runs), Path(config.report))
        else:
            device, dtype = merv.pick_device(config.device), getattr(torch, config.dtype)
            checkpoint = config.checkpoint or merv.latest_run()
            model = MERV.from_pretrained(checkpoint, dtype, device, config.tokenizer or None)
            base = Path(checkpoint) if Path(checkpoint).is_dir() else Path("runs") / checkpoint
            output = Path(config.output or base / "eval")
            if questions := evaluate(model, config.benchmark, config.data, output, config):
                print_table(config.benchmark, questions)
                print(f"\nevery answer: {output / config.benchmark}.json")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
