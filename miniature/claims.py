"""Check the paper's claims in miniature (paper 4 and 5) and write a page about it.

    python -m miniature claims            most tables, into docs/results.md: almost four hours
    python -m miniature claims --more     all tables, into docs/results.md: about three hours more
    python -m miniature claims --quick    one seed of the main table and its controls, 250 steps

Runs train.py and eval.py many times. claims.toml lists the runs, claims.jinja the tables and the
claims, claims.svg.jinja draws the pictures. Finished runs are reused.
"""

import argparse
import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch

import miniature
from miniature.preset import FOLDER
from miniature.world import CLIPS, write_world
from support import statistics
from support.cli import progress
from support.dataset_writer import digest_files
from support.errors import UserError
from support.files import new_folder, write_file
from support.report import read_result
from support.runs import commit, read_log
from support.templates import read_template

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/claims")
RESULT = "eval/miniature-open.json"  # in the folder of a run
PAGE = Path("docs/results.md")
PICTURES = ("kinds", "temporal", "left-out", "curves")  # in docs/results/
STEPS = 500  # of training, unless a row says otherwise; half of them with --quick
# The seeds of each part of claims.toml. A seed decides encoders, initial weights and data's order.
SEEDS = {"main": 5, "singles": 3, "controls": 3, "left_out": 3, "mixers": 5, "others": 3}
SEEDS |= {"half": 3, "curves": 1}
MORE_SEEDS = {"more": 3}  # with --more
QUICK_SEEDS = {"main": 1, "singles": 1, "controls": 1}  # with --quick
MUST_HOLD = "(must hold)"  # marks a claim without which the miniature is broken


def call(script: str, options: str) -> None:
    """Run one of the repository's scripts in one thread."""
    command = [sys.executable, f"{ROOT}/{script}", *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        what = f"{script} {options} fails."
        raise UserError(what, ended.stderr[-2000:], "run it by hand.")


def run(row: str, options: str, seed: int) -> Path:
    """Train and evaluate a row of the tables, unless done before; the folder of the run."""
    train = f"--data {FOLDER}/train --tokenizer {FOLDER}/tokenizer.model --workers 0"
    train += f" --seed {seed} --encoder-seed {seed} --no-evaluate {options}"
    # Other code, data or options are another run, with another digest in its name.
    code = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("support/*.py"))]
    code.append(ROOT / "miniature/preset.py")
    digest = digest_files([*code, FOLDER / "made_by.txt"], train)
    folder = RUNS / f"{row}-{seed}-{digest[:8]}"
    if not (folder / "checkpoint").exists():
        call("train.py", f"{train} --name {RUNS.name}/{folder.name}")
    if not (folder / RESULT).exists():
        test = FOLDER / ("two_kinds/test" if "two_kinds" in options else "test")
        call("eval.py", f"--data {test} --workers 0 --checkpoint {folder}")
    return folder


def mean_losses(folders: list[Path]) -> list[tuple[int, float]]:
    """(step, held-out loss) at each step where it was measured, the mean of these runs."""
    by_step = {}
    for folder in folders:
        for _, metrics in read_log(folder / "metrics.jsonl"):
            loss = metrics.number("held_out_loss")
            if loss is not None:
                by_step.setdefault(metrics.whole("step"), []).append(loss)
    means = []
    for step, losses in sorted(by_step.items()):
        means.append((step, sum(losses) / len(losses)))
    return means


def fill(template: str, **results) -> str:
    """Fill a template of this folder with the results."""
    found = read_template(Path(__file__).with_name(template), escape=False)
    return found.render(MUST_HOLD=MUST_HOLD, statistics=statistics, **results)


def write_page(folders: dict[tuple[str, int], Path], **extent) -> str:
    """Write the page of results and, unless quick, its pictures; returns the page.

    folders: of the run of each row and seed. extent: steps, quick and more, as in `main`.
    """
    answers, by_row = {}, {}
    for (row, seed), folder in folders.items():
        answers[row, seed] = read_result(folder / RESULT)["questions"]
        by_row.setdefault(row, []).append(folder)
    losses = {row: mean_losses(of_row) for row, of_row in by_row.items()}
    results = {"answers": answers, "losses": losses} | extent
    machine = f"{os.cpu_count()} CPU cores ({torch.backends.cpu.get_cpu_capability()})"
    origin = {"machine": machine, "today": date.today(), "commit": commit()}
    page = fill("claims.jinja", verdicts=[], **results, **origin) + "\n"
    write_file(RUNS / "quick.md" if extent["quick"] else PAGE, page)
    if not extent["quick"]:
        for picture in PICTURES:
            drawn = fill("claims.svg.jinja", picture=picture, **results)
            write_file(PAGE.with_suffix("") / f"{picture}.svg", drawn.strip() + "\n")
    return page


def make_data(seeds: int, kinds: list[str]) -> None:
    """Draw the default world, pre-train its encoders of several seeds, and draw other worlds."""
    for seed in range(seeds):
        miniature.prepare(FOLDER, seed)
    for kind in kinds:
        if not (FOLDER / kind).exists():
            with new_folder(FOLDER / kind) as unfinished:
                write_world(unfinished, CLIPS, kind)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and write the page; status 1 if a claim that must hold does not."""
    parser = argparse.ArgumentParser(description="Check the paper's claims in miniature.")
    parser.add_argument("what", choices=["claims"])
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="one seed, half the steps")
    extent.add_argument("--more", action="store_true", help="projectors and recipes too")
    chosen = parser.parse_args(arguments)
    rows = tomllib.loads(Path(__file__).with_name("claims.toml").read_text())
    if chosen.quick:
        seeds = QUICK_SEEDS
    elif chosen.more:
        seeds = SEEDS | MORE_SEEDS
    else:
        seeds = SEEDS
    steps = STEPS // 2 if chosen.quick else STEPS
    jobs = []
    for part, count in seeds.items():
        for row, options in rows[part].items():
            for seed in range(count):
                jobs.append((row, f"--max-steps {steps} {options}", seed))
    folders = {}
    try:
        make_data(seeds["main"], ["shuffled"] if chosen.quick else ["shuffled", "two_kinds"])
        with ThreadPoolExecutor(2) as pool:  # two runs at a time, in processes of one thread each
            ended = pool.map(run, *zip(*jobs, strict=True))
            for job, folder in zip(jobs, progress(ended, "claims", len(jobs)), strict=True):
                row, _, seed = job
                folders[row, seed] = folder
    except UserError as error:
        sys.exit(f"error: {error}")
    page = write_page(folders, steps=steps, quick=chosen.quick, more=chosen.more)
    print(page)
    sys.exit(1 if MUST_HOLD in page else 0)
