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

import hashlib
import json
import os
import re
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from importlib import import_module
from pathlib import Path

import torch
from huggingface_hub import InferenceClient
from torch.utils.data import DataLoader

from data import load_pixels
from encoders import ENCODERS
from merv import MERV
from support import cli
from support.benchmarks import BENCHMARKS, FPS, LETTERS, Question, list_videos, load_questions
from support.cli import option, parse_options, progress
from support.errors import UserError, VideoError
from support.files import Journal, write_file
from support.judge import JUDGE_PROMPT, ask_judge, parse_verdict
from support.report import write_report
from support.runs import latest_run

MCQ_RULES = ("parse", "released", "likelihood")


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
        runs = config.runs or (str(config.checkpoint or latest_run()),)
        if config.judge:
            for path in [path for run in runs for path in sorted(Path(run).glob("eval/*.json"))]:
                judge(path, config)
        elif config.report:
            write_report(list(runs), Path(config.report), summarise)
        else:
            device, dtype = cli.pick_device(config.device), getattr(torch, config.dtype)
            checkpoint = config.checkpoint or latest_run()
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
