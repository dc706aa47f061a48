"""Ask a trained MERV the questions of a benchmark and count the right answers (paper 4).

    python eval.py --benchmark miniature-open --data data/miniature/test
    python eval.py --checkpoint runs/NAME --benchmark msvd --data DIR
    python eval.py --table efficiency      parameters and multiply-adds, without any weights

A benchmark is a folder with two JSON lists and the videos, in videos/, found by stem:
    questions  [{"question_id", "video_name", "question"}]     multiple choice: and "options"
    answers    [{"question_id", "answer", "type"}]             multiple choice: "answer_id", from 0
All questions of a video are answered together: it is decoded, encoded and read once.
Read before: merv.py.
"""

from __future__ import annotations

import glob
import json
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import merv
from data import VideoError, load_pixels, mcq_prompt
from encoders import ENCODERS, FAMILIES, UserError
from llama import LLAMAS, Llama
from merv import MERV, MERVConfig, choose, option, parse_options, progress

# ------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Benchmark:
    """Which files of its folder hold a benchmark, and how it is scored."""

    name: str
    kind: str  # "open": the answer in words; "mcq": the letter of an option
    questions: str = "test_q.json"
    answers: str = "test_a.json"


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in [
        Benchmark("msvd", "open"),
        Benchmark("msrvtt", "open"),
        Benchmark("tgif", "open"),
        Benchmark("activitynet", "open"),
        Benchmark("perception", "mcq"),
        Benchmark("miniature-open", "open", "open_q.json", "open_a.json"),
        Benchmark("miniature-mcq", "mcq", "mcq_q.json", "mcq_a.json"),
    ]
}


@dataclass(frozen=True)
class EvalConfig:
    """The command line of eval.py."""

    table: str = option("", "efficiency: print tables 2a, 2c and 8 of the paper, next to ours")
    benchmark: str = option("miniature-open", f"one of {', '.join(BENCHMARKS)}")
    data: str = option("data/miniature/test", "folder with the questions, the answers and videos/")
    checkpoint: str = option("", "a run or checkpoint folder; the latest run if empty")
    max_new_tokens: int = option(64, "longest answer")
    workers: int = option(2, "processes that decode videos ahead of the model")
    device: str = option("auto", "auto, cuda, mps or cpu")


# ---------------------------------------------------------------------------------------- questions


@dataclass
class Question:
    """One question, what is expected, and later what came out."""

    id: str
    video: str  # stem of its file
    text: str  # as asked
    expected: str  # the words, or the letter
    kind: str  # the row of the table it counts in
    options: tuple[str, ...] = ()
    end_frame: int | None = None  # Perception Test: the last frame that may be seen
    answer: str = ""
    correct: bool = False
    failure: str = ""  # why there is no answer
    weights: tuple[float, ...] = ()  # mixing weights, in the order of the config


def load_questions(benchmark: Benchmark, folder: str | Path) -> list[Question]:
    """Join questions and answers by question_id."""
    folder = Path(folder)
    try:
        questions, answers = (
            json.loads((folder / name).read_text())
            for name in (benchmark.questions, benchmark.answers)
        )
        by_id = {answer["question_id"]: answer for answer in answers}
        return [_question(benchmark, q, by_id[q["question_id"]]) for q in questions]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"Cannot read the benchmark {benchmark.name} in {folder}.",
            f"{type(error).__name__}: {error}",
            f"it needs {benchmark.questions} and {benchmark.answers}, see the top of eval.py.",
        ) from error


def _question(benchmark: Benchmark, question: dict, answer: dict) -> Question:
    kind = answer.get("type")
    text, expected = question["question"], str(answer.get("answer", ""))
    options = tuple(question["options"]) if benchmark.kind == "mcq" else ()
    if options:
        expected = chr(ord("A") + answer["answer_id"])
    return Question(
        id=str(question["question_id"]),
        video=question["video_name"],
        text=mcq_prompt(text, list(options)) if options else text,
        expected=expected,
        kind=kind if isinstance(kind, str) else text.split()[0].lower(),
        options=options,
        end_frame=question.get("end_frame"),
    )


def find_video(folder: Path, stem: str) -> Path:
    """videos/STEM with any extension, or a folder of frames. The name may not leave the folder."""
    videos = folder / "videos"
    if Path(stem).name != stem:
        raise VideoError(
            f"{stem}: is no name of a video.",
            "it would leave the video folder.",
            "correct video_name in the question file.",
        )
    found = sorted(p for p in videos.glob(f"{glob.escape(stem)}*") if stem in (p.name, p.stem))
    if not found:
        raise VideoError(
            f"{videos / stem}: no such video.",
            "the question file names it.",
            "put it there; any extension will do.",
        )
    return found[0]


class Clips(Dataset):
    """The videos of a benchmark, each with the questions asked of it, ready for the encoders."""

    def __init__(self, questions: list[Question], folder: str | Path, config: MERVConfig):
        self.folder, self.config = Path(folder), config
        groups: dict[tuple[str, int | None], list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            groups[question.video, question.end_frame].append(index)
        self.groups = list(groups.items())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> tuple[list[int], dict, str]:
        """Numbers of the questions, encoder -> pixels, and why there are none if there are none."""
        (video, end_frame), indices = self.groups[number]
        try:
            path = find_video(self.folder, video)
            return indices, load_pixels(path, self.config.encoders, end_frame=end_frame), ""
        except VideoError as error:
            return indices, {}, str(error)


# ------------------------------------------------------------------------------------------ scoring


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles: "A red Square." -> "red square"."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def parse_letter(reply: str, options: tuple[str, ...]) -> str:
    """The letter that a reply chooses, or "": "B", "(B) red", "The answer is B." and "red" are B.

    FIX: the authors take the first character, so "Both" is B and "The answer is B" is T (F9).
    """
    last = chr(ord("A") + len(options) - 1)
    reply = reply.strip()
    patterns = (
        rf"\(?([A-{last}])\)?(?:[.:)]|\s|$)",  # at the start: "B", "B.", "(B) red", "B: red"
        rf".*\b(?:answer|option|choice)\b(?:\s+is)?:?\s+\(?([A-{last}])\b",
        rf".*\(([A-{last}])\)",
    )
    for pattern in patterns:
        match = re.match(pattern, reply, re.DOTALL)
        # "A cat" begins with an article, not with option A, unless the option says so.
        article = pattern is patterns[0] and re.match(r"A\s+[a-z]", reply)
        if match and not (article and normalise(options[0]) not in normalise(reply)):
            return match[1]
    same = [i for i, option in enumerate(options) if normalise(option) == normalise(reply)]
    return chr(ord("A") + same[0]) if len(same) == 1 else ""


def is_correct(question: Question) -> bool:
    """Exact match of the words after `normalise`, or the right letter."""
    if question.options:
        return parse_letter(question.answer, question.options) == question.expected
    return normalise(question.answer) == normalise(question.expected)


# --------------------------------------------------------------------------------------- evaluation


def evaluate(
    model: MERV,
    benchmark: Benchmark,
    folder: str | Path,
    max_new_tokens: int = 64,
    workers: int = 2,
) -> list[Question]:
    """Answer every question; a video that cannot be read is a failed answer with its reason.

    FIX: the authors never merge the results once a single video has failed (ledger F10).
    """
    questions = load_questions(benchmark, folder)
    clips = Clips(questions, folder, model.config)
    loader = DataLoader(clips, batch_size=None, num_workers=workers)
    for done, (indices, pixels, failure) in enumerate(loader, start=1):
        asked = [questions[index] for index in indices]
        if failure:
            for question in asked:
                question.failure = failure
            continue
        answers = model.answer(pixels, [q.text for q in asked], max_new_tokens)
        for question, answer in zip(asked, answers, strict=True):
            question.answer = answer.text
            question.weights = tuple(answer.weights.tolist())
            question.correct = is_correct(question)
        progress(f"{benchmark.name}", done, len(clips))
    return questions


def summarise(questions: list[Question]) -> dict[str, tuple[float, int, int]]:
    """kind -> (accuracy over expected questions, answered, expected); "all" is the last row.

    A failed answer counts as wrong: leaving it out would reward failing on hard videos.
    """
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.kind].append(question)
    rows = {**dict(sorted(groups.items())), "all": questions}
    return {
        kind: (
            sum(q.correct for q in group) / max(1, len(group)),
            sum(not q.failure for q in group),
            len(group),
        )
        for kind, group in rows.items()
    }


def print_table(title: str, questions: list[Question]) -> None:
    """Accuracy by kind of question, and how many were answered."""
    print(f"\n{title:<28} {'accuracy':>8}  {'answered/expected':>18}")
    for kind, (accuracy, answered, expected) in summarise(questions).items():
        print(f"  {kind:<26} {100 * accuracy:>7.1f}%  {f'{answered}/{expected}':>18}")


def write_results(path: Path, benchmark: Benchmark, questions: list[Question], model: MERV) -> None:
    """One JSON file with the table and every answer, complete or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": benchmark.name,
        "encoders": [encoder.name for encoder in model.config.encoders],
        "accuracy": {kind: row[0] for kind, row in summarise(questions).items()},
        "questions": [asdict(question) for question in questions],
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(path)


# ----------------------------------------------------------------------------------------- on paper

TEXT = (
    880  # text tokens; the paper took a random string for each row, so the last three rows differ
)
PAPER = (  # row, encoders, visual tokens, M parameters (table 8), T multiply-adds (tables 2c and 8)
    ("MERV", merv.FOUR, 1024, 7686, 17.19),
    ("LanguageBind alone", merv.FOUR[:1], 16 * 257, 7147, 41.3),
    ("DINOv2 alone", merv.FOUR[1:2], 16 * 257, 7046, 40.88),
    ("SigLIP alone", merv.FOUR[3:], 16 * 196, 6834, 31.08),
    ("concat (sequence)", merv.FOUR, 4 * 1024, 0, 43.09),
    ("ViViT alone", merv.FOUR[2:3], 16 * 196, 6830, 27.12),
    ("concat (channel)", merv.FOUR, 1024, 0, 16.29),
    ("learnable W", merv.FOUR, 1024, 0, 16.24),
)
# Table 2a, M parameters before the final Linear.
PAPER_PROJECTORS = {"avg2d": 0, "avg3d": 0, "attn2d": 12.7, "conv2d": 237, "conv3d": 113}
# Released parameters that nobody runs: final norms, SigLIP's pooling head, the fusion module.
UNUSED = {"languagebind": 2048, "dinov2": 2048, "vivit": 0, "siglip": 1536 + 12 * 768**2 + 14 * 768}
FUSION = 3072 * (1 + 3072 + 2 * 4096 + 3 + 3072 + 1)


def count(module: torch.nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(function, *inputs: torch.Tensor) -> int:
    """Of a forward pass on the meta device: of Linears, convolutions and attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() // 2


def efficiency(names: tuple[str, ...], visual: int) -> tuple[float, float, float, float]:
    """Millions of parameters and tera multiply-adds of one video + TEXT tokens: as released (all
    blocks, unused parts, logits everywhere), then as here (blocks that are run, the last logits).
    """
    llama = replace(LLAMAS["llama2-7b"], vocab_size=32064)
    with torch.device("meta"):
        llm, embeds = Llama(llama), torch.empty(1, visual + TEXT, llama.hidden_size)
        work = multiply_adds(llm.hidden_states, None, embeds)
        released = [
            count(llm) + FUSION * (len(names) > 1),
            work + multiply_adds(llm.logits, embeds),
        ]
        ours = [
            count(llm) + 4096 * (len(names) > 1),
            work + multiply_adds(llm.logits, embeds[0, :1]),
        ]
        for config in (ENCODERS[name] for name in names):
            frames = torch.empty(1, config.num_frames, 3, 224, 224)
            linear = torch.nn.Linear(config.hidden_size, llama.hidden_size)
            tokens = visual // len(names) if visual == 4096 else visual
            for row, layers in (released, config.released_layers), (ours, config.num_layers):
                encoder = FAMILIES[config.family](replace(config, num_layers=layers))
                row[0] += count(encoder) + count(linear)
                row[1] += multiply_adds(encoder, frames) + tokens * linear.weight.numel()
            released[0] += UNUSED[config.name]
    return released[0] / 1e6, released[1] / 1e12, ours[0] / 1e6, ours[1] / 1e12


def print_efficiency() -> None:
    """Tables 8, 2c and 2a: the paper's figures and ours."""
    print(f"One video + {TEXT} text tokens: the paper, counted in the released form, done here\n")
    print(f"{'':<20} M: paper counted    here    T: paper counted (off)          here")
    for name, encoders, visual, millions, tera in PAPER:
        counted_m, counted_t, ours_m, ours_t = efficiency(encoders, visual)
        known = f"{millions:>8}{int(counted_m):>8}" if millions else f"{'':>16}"
        off = f"({100 * (counted_t / tera - 1):+.1f} %)"
        print(
            f"{name:<20}{known}{ours_m:>8.0f}{tera:>12.2f}{counted_t:>8.2f} {off:<11}{ours_t:>8.2f}"
        )
    print("\nM parameters of projectors before the final Linear (LanguageBind, width 4096)")
    with torch.device("meta"):
        for name, millions in PAPER_PROJECTORS.items():
            projector = merv.PROJECTORS[name](1024, 4096, 8)
            print(
                f"{name:<20}{millions:>8}{(count(projector) - count(projector.linear)) / 1e6:>8.1f}"
            )


def main(arguments: list[str] | None = None) -> None:
    """`eval.py`: score a checkpoint on a benchmark."""
    config = parse_options(EvalConfig, arguments, "Score a trained MERV on a benchmark.")
    try:
        if config.table:
            return choose({"efficiency": print_efficiency}, config.table, "table")()
        benchmark = choose(BENCHMARKS, config.benchmark, "benchmark")
        checkpoint = Path(config.checkpoint) if config.checkpoint else merv.latest_run()
        model = MERV.from_pretrained(checkpoint, device=merv.pick_device(config.device))
        questions = evaluate(model, benchmark, config.data, config.max_new_tokens, config.workers)
    except UserError as error:
        sys.exit(f"error: {error}")
    output = checkpoint / "eval" / f"{benchmark.name}.json"
    write_results(output, benchmark, questions, model)
    print_table(benchmark.name, questions)
    print(f"\nevery answer: {output}")


if __name__ == "__main__":
    main()
