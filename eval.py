"""Measure how well a MERV answers the questions of a benchmark (paper, section 4).

    python eval.py --benchmark miniature-open --data data/miniature/test
    torchrun --nproc-per-node 8 eval.py --checkpoint merv-frozen --benchmark msvd --data DIR
    python eval.py --check --benchmark msvd --data DIR     list missing and damaged videos, and stop
    python eval.py --judge URL --judge-model NAME RUN      let an LLM judge the stored answers
    python eval.py --report FILE RUN RUN ...               show the stored answers as an HTML page

Questions -> answers -> scores -> a table. The data folder holds the annotation files and the
videos, in its subfolder videos/. All questions about a clip are answered together, so each clip is
decoded, encoded and read by the LLM once, and several clips share a batch. Answers are on disk
before the next batch starts: after a kill, the same command continues.
Read before: merv.py. Read next: train.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data import load_pixels, stack
from encoders import ENCODERS, EncoderConfig
from merv import MERV
from support import cli
from support.benchmarks import BENCHMARKS, FPS, LETTERS, Question, list_videos, load_questions
from support.cli import DTYPES, option, parse_options, pick_device, pick_dtype, progress
from support.errors import DataError, UserError, VideoError
from support.files import Journal, write_file
from support.judge import Judge, judge_answers, keep_verdicts
from support.processes import LoadAhead, cores_left_to, end_with_torchrun
from support.replies import named_letters
from support.report import read_result, result_files, write_report
from support.runs import latest_run

MCQ_RULES = ("parse", "released", "likelihood")


# ---------------------------------------------------------------------------------------- questions


class Clips:
    """The clips of a benchmark as a torch dataset; item n is decoded for the encoders.

    A clip is a video, or the part of it that a question is about (`Question.cut`). `groups[n]` are
    the questions about clip n. Worker processes decode clips while the model answers.
    """

    def __init__(self, questions: list[Question], folder, encoders: list[EncoderConfig]):
        self.encoders = encoders
        self.folder = Path(folder) / "videos"
        self.videos = list_videos(self.folder)
        by_clip: dict[tuple, list[Question]] = defaultdict(list)
        for question in questions:
            by_clip[question.video, *question.cut].append(question)
        self.groups = list(by_clip.values())

    def __getitem__(self, number: int) -> tuple[int, dict[str, Tensor], str]:
        """(number, encoder -> pixels (T_e, 3, side, side), ""), or (number, {}, the error)."""
        question = self.groups[number][0]
        try:
            path = self.videos.find(question.video)
            return number, load_pixels(path, self.encoders, *question.cut, FPS), ""
        except VideoError as error:
            return number, {}, str(error)


def stack_clips(items: list[tuple[int, dict, str]]) -> tuple[list[int], list[str], dict]:
    """Collate items of `Clips`: their numbers, their failures, and the pixels of those without one,
    encoder -> (v, T_e, 3, side, side).

    WHY: a tensor takes 0.4 ms to travel from a worker, so a batch has one for each encoder.
    """
    numbers, pixels, failures = zip(*items, strict=True)
    readable = list(filter(None, pixels))
    return list(numbers), list(failures), stack(readable)


def check_benchmark(name: str, folder: str | Path, workers: int) -> int:
    """Print which clips are missing or cannot be decoded. Returns how many; needs no model."""
    questions = load_questions(name, folder)
    clips = Clips(questions, folder, [ENCODERS["vivit"]])  # it sees the most frames
    expected = {question.video for question in questions}
    found = 0
    for video in expected:
        if clips.videos.candidates(video):
            found += 1
    print(f"{len(questions)} questions, {found}/{len(expected)} videos found in {clips.folder}")
    total = len(clips.groups)
    bad = 0
    loader = LoadAhead(clips, workers, stack_clips, sampler=range(total))
    for numbers, failures, _ in progress(loader, "decode"):
        for number, failure in zip(numbers, failures, strict=True):
            if failure:
                bad += 1
                print(f"bad  {clips.groups[number][0].video}: {failure.splitlines()[0]}")
    print(f"{total - bad}/{total} clips can be decoded")
    return bad


# ------------------------------------------------------------------------------------------ answers


def evaluate(
    model: MERV,
    name: str,  # of the benchmark
    folder: str | Path,  # of its annotation files and videos/
    output: str | Path,
    config: EvalConfig | None = None,
) -> list[Question] | None:
    """Answer the questions that have no stored answer yet, and write OUTPUT/NAME.json.

    Under torchrun each process answers its share of the clips. The process that finds all answers
    on disk writes the result and returns the questions; the others return None.
    FIX: the released code never merges the results once a single video has failed (ledger F10).
    Here a failure is stored like an answer, so it cannot hold up the rest.
    """
    config = config or EvalConfig()
    output = Path(output)
    rank = int(os.environ.get("RANK", 0))
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    questions = load_questions(name, folder)
    require_room(model, questions, config)
    settings = {
        "benchmark": name,
        "data": str(folder),
        "weights": trained_digest(model),  # the key that older journals have
        "max_new_tokens": config.max_new_tokens,
        "likelihood": config.mcq_rule == "likelihood" and bool(questions[0].options),
        "encoders": [encoder.name for encoder in model.config.encoders],
    }
    journal = Journal(output / f"{name}.answers", settings, rank)
    done = stored_answers(journal, questions)

    # This process answers every num_processes-th clip, unless its answers are stored already.
    clips = Clips(questions, folder, model.config.encoders)
    mine = []
    for number in range(rank, len(clips.groups), num_processes):
        if unanswered(clips.groups[number], done):
            mine.append(number)
    # WHY sorted: MERV.reply pads clips with fewer questions, so a batch should have equally many.
    mine.sort(key=lambda number: len(clips.groups[number]))
    size = clips_at_once(model, max(map(len, clips.groups)), config)
    batches = {"batch_size": size, "sampler": mine}
    loader = LoadAhead(clips, config.workers, stack_clips, **batches)
    with cores_left_to(config.workers):
        for batch in progress(loader, f"{name}, batches of {size}"):
            journal.append(*answer_batch(model, batch, clips, config))

    # Other processes may still be at work. The last one to finish sees all answers; if there was
    # nothing left to do for anyone, process 0 writes the result.
    done = stored_answers(journal, questions)
    if unanswered(questions, done) or not (mine or rank == 0):
        return None
    for question in questions:
        record = done[question.id]
        question.answer = record["answer"]
        question.failure = record["failure"]
        question.mixing_weights = record["mixing_weights"]
    result = output / f"{name}.json"
    write_results(result, keep_verdicts(result, settings, questions), questions, config.mcq_rule)
    return questions


def require_room(model: MERV, questions: list[Question], config: EvalConfig) -> None:
    """Raise DataError that names the first question too long to be read with its answer."""
    positions = model.config.llm.max_positions
    room = positions - 1 - model.config.num_visual - config.max_new_tokens  # 1: [BOS]
    for question in questions:
        length = len(model.prompt_ids(question.prompt))
        if length > room:
            what = f"Question {question.id!r} has {length} tokens."
            why = f"beside a video and its answer, the LLM's {positions} positions leave {room}."
            raise DataError(what, why, "shorten or remove it, or lower --max-new-tokens.")


def trained_digest(model: MERV) -> str:
    """A fingerprint of the projectors and the mixer, to recognise answers of another model."""
    digest = hashlib.sha256()
    for parameter in [*model.projectors.parameters(), *model.mixer.parameters()]:
        values = parameter.detach().float().cpu().numpy()
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]


def asked(questions: list[Question]) -> dict[str, str]:
    """Question id -> a hash of what the model is asked: the part of a video, and the prompt."""
    hashes = {}
    for question in questions:
        what = json.dumps([question.video, question.cut, question.prompt])
        hashes[question.id] = hashlib.sha256(what.encode()).hexdigest()[:16]
    return hashes


def stored_answers(journal: Journal, questions: Sequence[Question] = ()) -> dict[str, dict]:
    """Question id -> its answer, mixing weights and failure, from all processes.

    An answer is left out if its question in `questions` has changed since, so that it is asked
    again. Older journals do not say what was asked, and say "weights" for mixing_weights. A damaged
    record raises DataError.
    """
    asked_now = asked(questions)
    found, older, changed = {}, {}, set()
    for record in journal.records():
        answers = record.record("answers")
        asked_then = {}
        if "asked" in record.values:
            asked_then = record.record("asked").values
        mixing_weights = record.numbers("mixing_weights") or record.numbers("weights")
        failure = record.text("failure", "")
        for id in answers.values:
            answer = {"answer": answers.text(id, ""), "failure": failure}
            answer["mixing_weights"] = mixing_weights
            if id not in asked_then:
                older[id] = answer
            elif id not in asked_now or asked_then[id] == asked_now[id]:
                found[id] = answer
            else:
                changed.add(id)
    for id, answer in older.items():
        if id not in changed:
            found.setdefault(id, answer)
    return found


def unanswered(questions: list[Question], done: dict[str, dict]) -> list[Question]:
    """The questions that have no stored answer."""
    return [question for question in questions if question.id not in done]


def clips_at_once(model: MERV, most_questions: int, config: EvalConfig) -> int:
    """How many clips to answer together: --batch-videos, else up to 16, as long as the KV cache
    stays below 4 GB.

    most_questions: the largest number of questions about one clip; MERV.reply pads others to it.
    Small models gain most, because single rows leave the processor idle between small operations.
    With 7B and 5 questions about a clip, the cache of one clip takes 0.9 GB.
    """
    if config.batch_videos is not None:
        return config.batch_videos
    llm = model.config.llm
    element = model.llm.embed_tokens.weight.element_size()
    bytes_per_token = 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * element
    tokens_per_question = 64 + config.max_new_tokens  # 64: a long question
    tokens_per_clip = model.config.num_visual + most_questions * tokens_per_question
    fitting = int(4e9) // (bytes_per_token * tokens_per_clip)
    return min(16, max(1, fitting))


def answer_batch(model: MERV, batch: tuple, clips: Clips, config: EvalConfig) -> list[dict]:
    """Answer all questions about several clips; batch: what `stack_clips` returns.

    Returns a record of the journal for each clip: question id -> answer, the mixing weights and the
    failure. There is one set of mixing weights for all questions, because the mixer sees the clip
    and never the question (equation 2).
    """
    records = []
    readable, pixels, prompts = [], [], []
    numbers, failures, stacked = batch
    row = 0
    for number, failure in zip(numbers, failures, strict=True):
        questions = clips.groups[number]
        answers = {question.id: "" for question in questions}
        record = {"answers": answers, "mixing_weights": [], "failure": failure}
        records.append(record | {"asked": asked(questions)})
        if failure:
            continue
        clip = {name: frames[row] for name, frames in stacked.items()}
        row += 1
        if config.mcq_rule == "likelihood" and questions[0].options:
            answers.update(likely_letters(model, clip, questions))
            continue
        readable.append(records[-1])
        pixels.append(clip)
        prompts.append([question.prompt for question in questions])
    replies_of_clips = model.answer(pixels, prompts, config.max_new_tokens)
    for record, replies in zip(readable, replies_of_clips, strict=True):
        texts = [reply.text for reply in replies]
        record["answers"] = dict(zip(record["answers"], texts, strict=True))
        record["mixing_weights"] = replies[0].weights.tolist()
    return records


def likely_letters(model: MERV, pixels: dict[str, Tensor], asked: list[Question]) -> dict[str, str]:
    """Question id -> the option letter that the LLM would most likely write first.

    Rule "likelihood" generates nothing, and stores no mixing weights.
    """
    prompts = [question.prompt for question in asked]
    letters = [list(LETTERS[: len(question.options)]) for question in asked]
    chosen = {}
    for question, row in zip(asked, model.likelihoods(pixels, prompts, letters), strict=True):
        chosen[question.id] = LETTERS[int(row.argmax())]
    return chosen


# ------------------------------------------------------------------------------------------- scores


def normalise(text: str) -> str:
    """Lower case without punctuation and articles: "A red Square." -> "red square".

    Articles stay if there are no other words, and punctuation if there are no words: "A." -> "a".
    """
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words) or text.strip().lower()


def parse_letter(reply: str, options: tuple[str, ...]) -> str:
    """The letter that a reply to a multiple-choice question chooses, or "" if there is none.

    Of the options "red", "blue", "two (A)", "a cat":

        "B"  "B."  "b)"  "(B)"  "**B**"  "B: blue"  "(b) blue"    B     a letter at the start
        "The answer is B."  "Answer: **B**"  "option b"           B     a letter after such a word
        "I think (B)."  "It is [B]"                               B     a letter in brackets
        "Not (A). The answer is B"  "B: it is not (A)"            B     the first of these rules
        "blue"  "Blue."                                           B     the words of one option
        "A cat"  "a cat"                                          D     ("A" is the article)
        "b"  "E"  "Both"  "A man opens a door"  "I think a"  ""   none  no letter that is meant
        "B is on the board"  "C major is played"                  none  a word of a sentence
        "A or B"  "B; C"  "(A) or maybe (B)"  "Options A and B"   none  two letters
        "A. red B. blue"  "The answer is A. Answer: B"            none  two letters

    FIX: the released code takes the first character: "Both" is B, "The answer is B" is T (ledger
    F9). `--mcq-rule released` does the same.
    """
    for letters in named_letters(reply, options):
        if len(letters) == 1:
            return letters.pop()
        if letters:
            return ""
    words = [normalise(option) for option in options]
    chosen = normalise(reply)
    if chosen and words.count(chosen) == 1:
        return LETTERS[words.index(chosen)]
    return ""


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of the precision and recall of words: "a red square", "red" -> 2/3."""
    ours = Counter(normalise(answer).split())
    theirs = Counter(normalise(expected).split())
    shared = (ours & theirs).total()
    return 2 * shared / max(1, ours.total() + theirs.total())


def score(question: Question, rule: str) -> None:
    """Fill in `correct` and, for open-ended questions, `f1`.

    Multiple choice compares letters: the parsed one, or with rule "released" the first character.
    Open-ended: the judge's verdict if there is one, otherwise exact match of the words. A failed
    answer is wrong; leaving it out would reward a model that fails on hard clips.
    """
    if question.options:
        if rule == "released":
            letter = question.answer[:1]
        else:
            letter = parse_letter(question.answer, question.options)
        question.correct = letter == question.expected and not question.failure
        return
    if question.failure:
        question.correct = False
    elif question.verdict:
        question.correct = question.verdict == "yes"
    else:
        question.correct = normalise(question.answer) == normalise(question.expected)
    question.f1 = token_f1(question.answer, question.expected)


# ------------------------------------------------------------------------------------------ a table


class Row(NamedTuple):
    """A row of the results table: one kind of question."""

    accuracy: float | None  # right answers / expected questions, failures included
    answered: int  # questions with an answer
    expected: int  # all questions
    baseline: float  # accuracy of always giving the most common right answer


def summarise(questions: list[Question], by: str = "kind") -> dict[str, Row]:
    """Turn scored questions into the rows of a table: kind -> Row; the last row is "all".

    by: the attribute of Question that is the kind, such as "first_word".

    Answers without a readable verdict of the judge do not count towards the accuracy, which is None
    if no reply of the judge was readable.
    """
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[getattr(question, by)].append(question)
    hits = baseline_hits(groups)
    rows = {}
    for kind, group in [*sorted(groups.items()), ("all", questions)]:
        # The judge may have failed on an answer; that says nothing about the answer.
        verdicts = Counter(question.verdict for question in group)
        counted = verdicts["yes"] + verdicts["no"] + verdicts[""]
        if counted == verdicts[""] and counted < len(group):
            accuracy = None
        else:
            accuracy = sum(question.correct for question in group) / counted
        answered = sum(not question.failure for question in group)
        same = sum(hits.values()) if group is questions else hits[kind]
        expected = len(group)
        rows[kind] = Row(accuracy, answered, expected, same / expected)
    return rows


def baseline_hits(groups: dict[str, list[Question]]) -> dict[str, int]:
    """How many questions of each kind its most common right answer would answer correctly.

    The most common answer is counted on the asked questions themselves; for multiple choice it is a
    letter. If the kinds are the answers, as in ssv2-open, it is the most common one of all kinds.
    """
    counts: dict[str, Counter] = {}
    for kind, group in groups.items():
        counts[kind] = Counter()
        for question in group:
            right = question.expected
            if not question.options:
                right = normalise(right)
            counts[kind][right] += 1
    # Otherwise each row of ssv2-open would have a baseline of 100 %.
    if all(set(count) == {normalise(kind)} for kind, count in counts.items()):
        favourite, _ = sum(counts.values(), Counter()).most_common(1)[0]
        return {kind: count[favourite] for kind, count in counts.items()}
    return {kind: max(count.values()) for kind, count in counts.items()}


def write_results(path: Path, settings: dict, questions: list[Question], rule: str) -> None:
    """Score the answers; write settings, accuracy of each kind and all questions to a JSON file."""
    for question in questions:
        score(question, rule)
    result = {
        "settings": settings,
        "rule": rule,
        "accuracy": {kind: row.accuracy for kind, row in summarise(questions).items()},
        "questions": [vars(question) for question in questions],
    }
    write_file(path, json.dumps(result, indent=1))


def print_table(title: str, questions: list[Question]) -> None:
    """Print accuracy and baseline of each kind, and a summary of the judge's verdicts."""
    print(f"\n{title:<28} {'accuracy':>8} {'baseline':>9}  {'answered/expected':>18}")
    for kind, row in summarise(questions).items():
        accuracy = "-"
        if row.accuracy is not None:
            accuracy = f"{100 * row.accuracy:.1f}%"
        answered = f"{row.answered}/{row.expected}"
        print(f"  {kind:<26} {accuracy:>8} {100 * row.baseline:>8.1f}%  {answered:>18}")
    if not questions[0].options:
        mean_f1 = sum(question.f1 for question in questions) / len(questions)
        print(f"  {'word F1':<26} {100 * mean_f1:>7.1f}%")
    if verdicts := Counter(question.verdict for question in questions if question.verdict):
        marks = [q.mark for q in questions if q.verdict in ("yes", "no")]
        print(f"  judged {dict(verdicts)}, mean score {sum(marks) / max(1, len(marks)):.2f} of 5")


def judge_results(path: Path, judge: Judge) -> None:
    """Let an LLM judge the answers in a result file, then score and write it again.

    Multiple-choice results are left as they are: their letters need no judge.
    """
    result = read_result(path)
    questions = result["questions"]
    if questions[0].options:
        return
    judged_by = judge_answers(questions, judge, path.with_suffix(".judge"))
    settings = result["settings"] | {"judge": judged_by}
    write_results(path, settings, questions, result["rule"])
    print_table(path.stem, questions)
    print(f"  the judge's replies: {judged_by['replies']}")


# ------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class EvalConfig:
    """The options of eval.py. The command line accepts `none` where a value may be None."""

    # What is asked.
    benchmark: str = option("miniature-open", "the benchmark", BENCHMARKS, group="questions")
    data: str = option("data/miniature/test", "folder of annotations, videos/")
    check: bool = option(False, "only list missing and damaged videos")
    checkpoint: str | None = option(
        None, "run, folder or released name; none: latest run", group="model"
    )
    tokenizer: str | None = option(None, "tokenizer.model, if it has none")
    device: str = option("auto", "auto, cuda, mps or cpu")
    dtype: str = option("auto", "to compute in; auto: 16 bits on CUDA, else float32", DTYPES)
    # How, and where the results go: by default to eval/ in the run, or to runs/NAME/eval.
    max_new_tokens: int = option(64, "longest answer, in tokens", group="answers", least=1)
    mcq_rule: str = option("parse", "how a reply becomes a letter", MCQ_RULES)
    batch_videos: int | None = option(
        None, "clips at once; none: what 4 GB of KV cache hold, up to 16", least=1
    )
    workers: int = option(2, "processes that decode videos ahead of the model")
    output: str | None = option(None, "folder for results; else eval/ in the run")
    # Stored results: `runs` are folders of train.py, or others with eval/*.json.
    runs: tuple[str, ...] = option((), "runs for --judge and --report", group="stored results")
    report: str | None = option(None, "write RUNS to this HTML page")
    judge: str | None = option(None, "base URL of an LLM that judges RUNS")
    judge_model: str | None = option(None, "name of the judging model")
    judge_parallel: int = option(8, "requests at once", least=1)
    judge_retries: int = option(6, "attempts after a failed request")


def read_options(arguments: list[str] | None = None) -> EvalConfig:
    """Read the command line; for an option that has moved, the error names the new command."""
    moved = {"--table": "python cost.py table"}
    return parse_options(EvalConfig, arguments, "Evaluate a trained MERV.", moved=moved)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that the user can fix is printed without a traceback."""
    config = read_options(arguments)
    end_with_torchrun()
    try:
        run_command(config)
    except cli.FIXABLE as error:
        sys.exit(cli.explain(error, "use --dtype bfloat16, or a GPU with more memory."))


def run_command(config: EvalConfig) -> None:
    """Check a benchmark, judge or report stored results, or evaluate a checkpoint."""
    if config.runs and not (config.judge or config.report):
        what = f"{config.runs[0]} is given without --judge or --report."
        fix = f"to answer questions, use --checkpoint {config.runs[0]}."
        raise UserError(what, "only these two read a RUN.", fix)
    if config.check:
        bad = check_benchmark(config.benchmark, config.data, config.workers)
        sys.exit(1 if bad else 0)
    runs = list(config.runs) or [config.checkpoint or str(latest_run())]
    if config.judge:
        if config.judge_model is None:
            why = "an endpoint usually serves several models."
            raise UserError("--judge needs a model.", why, "add --judge-model NAME.")
        judge = Judge(config.judge, config.judge_model, config.judge_parallel, config.judge_retries)
        for run in runs:
            for path in result_files(Path(run)):
                judge_results(path, judge)
    if config.report:
        write_report(runs, Path(config.report), summarise, Path(config.data))
    if not (config.judge or config.report):
        evaluate_checkpoint(config, runs[0])


def evaluate_checkpoint(config: EvalConfig, checkpoint: str) -> None:
    """Load a checkpoint, answer the benchmark's questions and print the table."""
    device = pick_device(config.device)
    cli.require_card(device)
    dtype = pick_dtype(config.dtype, device)
    model = MERV.from_pretrained(checkpoint, dtype, device, config.tokenizer)
    if config.output is not None:
        output = Path(config.output)
    elif Path(checkpoint).is_dir():
        output = Path(checkpoint) / "eval"
    else:  # a released name
        output = Path("runs") / checkpoint / "eval"
    questions = evaluate(model, config.benchmark, config.data, output, config)
    if questions:
        print_table(config.benchmark, questions)
        print(f"\nevery answer: {output / config.benchmark}.json")


if __name__ == "__main__":
    main()
