"""What the paper claims, checked in miniature (paper 4 and 5).

    python -m miniature claims            all of it
    python -m miniature claims --quick    one seed, the main table and the controls

train.py and eval.py, many times. claims.toml has the runs, claims.md the claims, fixed beforehand.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import jinja2
import numpy as np

import miniature
from miniature.world import CLIPS, REVERSED, write_world
from support.benchmarks import Question
from support.cli import progress
from support.errors import UserError
from support.files import write_file
from train import MINIATURE

ROOT, RUNS = Path(__file__).parents[1], Path("runs/claims")
STEPS = 300  # of training, where a row does not say otherwise
SEEDS = 3  # of key rows; each has its own encoders, new weights and order of the data
ERRORS = 3  # standard errors between what is measured and what would refute a claim


def run(row: str, options: str, seed: int) -> list[Question]:
    """The test's questions as a run answered them; it is trained and asked first if need be."""
    test = MINIATURE / ("two_kinds/test" if row.startswith("split") else "test")
    train = f"train.py --data {MINIATURE}/train --tokenizer {MINIATURE}/tokenizer.model --workers 0"
    train += f" --seed {seed} --encoder-seed {seed} --max-steps {STEPS} --no-evaluate {options}"
    made_by = [*sorted(ROOT.glob("*.py")), MINIATURE / "made_by.txt"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in made_by) + train.encode())
    folder = RUNS / f"{row}-{seed}-{digest.hexdigest()[:8]}"  # other code or options: another run
    answers = folder / "eval/miniature-open.json"
    commands = {f"{train} --name {RUNS.name}/{folder.name}": folder / "checkpoint"}
    commands[f"eval.py --data {test} --workers 0 --checkpoint {folder}"] = answers
    how = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    for command in (command for command, result in commands.items() if not result.exists()):
        ended = subprocess.run([sys.executable, *f"{ROOT}/{command}".split()], **how)
        if ended.returncode:
            raise UserError(f"{command} fails.", ended.stderr[-2000:], "run it by hand.")
    return [Question(**question) for question in json.loads(answers.read_text())["questions"]]


def inside(question: Question, subset: str) -> bool:
    """Is it among "all", "temporal", a kind, a first word or a text?"""
    own = ("all", question.kind, question.first_word, question.text)
    return question.expected in REVERSED if subset == "temporal" else subset in own


def gaps(answers: dict, one: str, other: str, subset: str) -> np.ndarray:
    """(seeds, questions): how right a row is, minus how right the other is, if one is named."""
    seeds = [seed for row, seed in answers if row == one and (other or one, seed) in answers]
    asked = [i for i, q in enumerate(answers[one, 0]) if inside(q, subset)]
    right = [[[answers[r, s][i].correct for i in asked] for s in seeds] for r in (one, other) if r]
    return np.array(right[0], float) - (right[1] if other else 0)


def compare(answers, one, other="", subset="all", most=SEEDS) -> tuple[float, float]:
    """Accuracy of a row, minus that of another on the same questions, over `most` seeds at most;
    standard error: over clips, as questions about one depend on each other, or over seeds, pooled
    over all rows that have several, whichever is larger."""
    found = gaps(answers, one, other, subset)[:most]
    videos = [q.video for q in answers[one, 0] if inside(q, subset)]
    off = np.bincount(np.unique(videos, return_inverse=True)[1], found.mean(0) - found.mean())
    over_clips = off.std(ddof=1) * len(off) ** 0.5 / len(videos)
    several = {row for row, seed in answers if seed == 1} - {"MERV" if other else ""}
    spread = [gaps(answers, row, other and "MERV", subset).mean(1).var(ddof=1) for row in several]
    return found.mean(), max(over_clips, (np.mean(spread or 0) / len(found)) ** 0.5)


def verdict(difference: float, error: float, low: float = 0, high: float = 1) -> str:
    """Does the difference lie between low and high, ERRORS standard errors off as well?"""
    least, most = difference - ERRORS * error, difference + ERRORS * error
    outside = most < low or least > high
    return "holds" if low < least and most < high else "does not hold" if outside else "undecided"


def mixture(answers: dict, row: str, subset: str = "all") -> list[tuple[float, float]]:
    """Each encoder's weight: mean over clips and standard deviation between them; first seed."""
    clips = {q.video: q.weights for q in answers[row, 0] if inside(q, subset)}
    return [(np.mean(of), np.std(of)) for of in zip(*clips.values(), strict=True)]


def render(answers: dict, quick: bool) -> str:
    """claims.md, filled in."""
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    template = jinja2.Template(Path(__file__).with_name("claims.md").read_text(), **options)
    return template.render(globals(), answers=answers, quick=quick, today=date.today())


def main(arguments: list[str] | None = None) -> None:
    """Run what is not there yet, fill in claims.md; status 1 if what must hold does not."""
    parser = argparse.ArgumentParser(description="Check the paper's claims in miniature.")
    parser.add_argument("what", choices=["claims"])
    parser.add_argument("--quick", action="store_true", help="one seed, main table, controls")
    quick, answers = parser.parse_args(arguments).quick, {}
    rows = tomllib.loads(Path(__file__).with_name("claims.toml").read_text())
    seeds = {"main": 1} if quick else {"main": SEEDS, "key": SEEDS, "more": 1}
    jobs = [(*row, n) for part in seeds for row in rows[part].items() for n in range(seeds[part])]
    try:
        for seed in range(seeds["main"]):
            miniature.prepare(MINIATURE, seed)
        for kind in ("shuffled", "two_kinds")[: 1 if quick else 2]:
            if not (MINIATURE / kind).exists():
                with miniature.new_folder(MINIATURE / kind) as partial:
                    write_world(partial, CLIPS, kind)
        with ThreadPoolExecutor(2) as pool:
            asked = pool.map(run, *zip(*jobs, strict=True))
            for job, questions in zip(jobs, progress(asked, "claims", len(jobs)), strict=True):
                answers[job[0], job[2]] = questions
    except UserError as error:
        sys.exit(f"error: {error}")
    text = render(answers, quick)
    write_file(RUNS / ("quick.md" if quick else "claims.md"), text)
    print(text)
    sys.exit("must hold" in text)


if __name__ == "__main__":
    main()
