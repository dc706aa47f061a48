"""`python -m miniature claims`: every number comes from a run, and no run is made twice."""

import itertools
import json
import random
import re
import shutil
import subprocess
import tomllib
import xml.etree.ElementTree
from pathlib import Path

import pytest

import eval
import miniature
from encoders import load_encoder, save_encoder
from miniature import claims
from miniature.specialists import RECIPES
from miniature.world import REVERSED, draw_clip, facts, write_world
from support import benchmarks, statistics
from support.cli import parse_options
from support.report import read_result
from train import TrainConfig

ROOT = Path(__file__).parent.parent


# -------------------------------------------------------------------------------------- statistics


def test_a_row_is_compared_on_the_same_questions():
    """The comparison is paired: questions that both rows answer alike add no noise."""
    same = answers({("a", 0): "1 0 1 0 1 1", ("b", 0): "1 0 1 0 1 1"})
    assert statistics.compare(same, "a", "b") == (0, 0)
    better = answers({("a", 0): "1 1 1 1", ("b", 0): "1 0 1 0"})
    difference, error = statistics.compare(better, "a", "b")
    assert difference == 0.5
    assert error == pytest.approx((4 * 0.25 / 3 / 4) ** 0.5)  # the differences are 0 1 0 1


def test_a_clip_counts_once_however_much_is_asked_about_it():
    """Ten answers about one clip are no more evidence than one, if they are all alike."""
    once = answers({("a", 0): "1 0 1 0 1"})
    tenfold = answers({("a", 0): " ".join(10 * mark for mark in "10101")})
    assert statistics.compare(tenfold, "a") == pytest.approx(statistics.compare(once, "a"))


def test_seeds_that_disagree_make_the_error_large():
    """One seed is all right and one all wrong: 50 ± 50 %, although clips do not differ at all."""
    runs = answers({("a", 0): "1 1 1 1", ("a", 1): "0 0 0 0"})
    assert statistics.compare(runs, "a") == pytest.approx((0.5, 0.5))


def test_a_row_with_one_seed_gets_the_variance_of_the_rows_with_several():
    """It cannot show how much seeds differ. The seeds of a and b differ by 0.25, MERV's by 0."""
    marks = {"MERV": ("1111", "1111"), "a": ("1110", "1100"), "b": ("1000", "1010"), "c": ("0000",)}
    runs = {(row, seed): " ".join(m) for row, both in marks.items() for seed, m in enumerate(both)}
    variance = 0.25**2 / 2  # sample variance of two numbers that are 0.25 apart
    difference = statistics.compare(answers(runs), "MERV", "c")
    assert difference == pytest.approx((1, variance**0.5))  # of a and b, minus MERV
    alone = statistics.compare(answers(runs), "c")
    assert alone == pytest.approx((0, (2 * variance / 3) ** 0.5))  # of all three rows


def test_only_seeds_that_both_rows_have_are_compared():
    """Another seed has other encoders, so the difference would mix two causes."""
    runs = answers({("MERV", 0): "1 1 0", ("MERV", 1): "0 0 0", ("a", 0): "1 1 0"})
    assert statistics.compare(runs, "MERV", "a") == (0, 0)


@pytest.mark.parametrize(
    ("difference", "error", "bounds", "expected"),
    [
        (0.031, 0.01, {}, "holds"),
        (0.029, 0.01, {}, "undecided"),
        (-0.029, 0.01, {}, "undecided"),
        (-0.031, 0.01, {}, "does not hold"),
        (0.25, 0.01, {"low": 0.2}, "holds"),
        (0.15, 0.01, {"low": 0.2}, "does not hold"),
        (0.0, 0.005, {"low": -0.03, "high": 0.03}, "holds"),  # equal within 3 points
        (0.0, 0.02, {"low": -0.03, "high": 0.03}, "undecided"),
        (0.1, 0.02, {"low": -0.03, "high": 0.03}, "does not hold"),
        (0.009, 0.005, {}, "tie"),  # less than 2 points with two standard errors to spare
        (-0.009, 0.005, {}, "tie"),
        (0.011, 0.005, {}, "undecided"),
        (0.009, 0.002, {}, "holds"),  # small, but surely above 0
    ],
)
def test_a_claim_holds_three_standard_errors_away(difference, error, bounds, expected):
    """The interval of three standard errors lies inside the bounds, outside, or across one. If it
    crosses 0, it is a tie where even two standard errors cannot make the difference matter."""
    assert statistics.verdict(difference, error, **bounds) == expected


def test_the_commonest_answer_of_a_kind_is_what_a_guess_is_worth():
    """Two of three questions about colour are answered "red", and one in five of all."""
    asked = []
    for number, (kind, answer) in enumerate(
        [("colour", "red"), ("colour", "red"), ("colour", "blue"), ("shape", "x"), ("shape", "y")]
    ):
        asked.append(benchmarks.Question(str(number), "clip", "What?", answer, kind))
    assert statistics.commonest_share({("a", 0): asked}, "colour") == pytest.approx(2 / 3)
    assert statistics.commonest_share({("a", 0): asked}) == pytest.approx(2 / 5)


def test_subsets_are_kinds_first_words_and_texts():
    """Each claim is about one of these subsets, or about all questions."""
    question = benchmarks.Question("1", "clip", "What happens?", "moves left", "temporal")
    for subset in ("all", "temporal", "what", "What happens?"):
        assert statistics.inside(question, subset), subset
    for subset in ("where", "what happens", "What", "not temporal"):
        assert not statistics.inside(question, subset), subset
    assert statistics.inside(question, "not where")


def test_temporal_questions_are_those_whose_answer_changes_when_the_clip_is_reversed():
    """The kind of a question about the drawn world says it."""
    for seed in range(100):
        scene, _ = draw_clip(seed)
        for fact in facts(scene):
            assert (fact.kind == "temporal") == (fact.answer in REVERSED)


def test_the_mixture_counts_each_clip_once():
    """Two questions about the first clip, one about the second."""
    runs = answers({("a", 0): "11 1"})
    for question, weight in zip(runs["a", 0], (0.2, 0.2, 0.6), strict=True):
        question.mixing_weights = (weight, 1 - weight)
    ((mean, spread), (other, _)) = statistics.mean_mixing_weights(runs, "a")
    assert (mean, spread, other) == pytest.approx((0.4, 0.2, 0.6))


def answers(right: dict[tuple[str, int], str]) -> dict:
    """(row, seed) -> questions. "110 1": three questions about one clip, one about another."""
    made = {}
    for run, marks in right.items():
        made[run] = [
            benchmarks.Question(f"{clip}{number}", f"clip_{clip}", "What?", "", correct=mark == "1")
            for clip, group in enumerate(marks.split())
            for number, mark in enumerate(group)
        ]
    return made


# ------------------------------------------------------------------------------------- the command


SMALL = {"train": 16, "test": 16}
RUNS = tomllib.loads((ROOT / "miniature" / "claims.toml").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a very small world."""
    folder = tmp_path_factory.mktemp("claims")
    home = folder / "data" / "miniature"
    write_world(home, SMALL)
    (home / "made_by.txt").write_text("a test")
    return folder


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A folder to run in, with a copy of that world; nothing has to be prepared."""
    shutil.copytree(world / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "CLIPS", SMALL)
    monkeypatch.setattr(miniature, "prepare", lambda folder, seed: folder)
    return tmp_path


@pytest.fixture
def scripts(place, monkeypatch):
    """The commands that were run. Dice answer instead of a model; MERV's are the best dice."""
    asked = []

    really_run = subprocess.run

    def dice(script, **how):
        if script[0] == "git":
            return really_run(script, **how)
        asked.append(" ".join(script[1:]))
        options = dict(itertools.pairwise(script))
        if "train.py" in script[1]:
            folder = Path("runs") / options["--name"]
            (folder / "checkpoint").mkdir(parents=True)
            losses = {"step": 9, "loss": 0.4, "held_out_loss": 0.3 + 0.1 * int(options["--seed"])}
            (folder / "metrics.jsonl").write_text(
                '{"step": 1, "loss": 2}\n' + json.dumps(losses) + "\n"
            )
            return subprocess.CompletedProcess(script, 0, "", "")
        folder = Path(options["--checkpoint"])
        questions = benchmarks.load_questions("miniature-open", options["--data"])
        roll = random.Random(folder.name)
        for question in questions:
            good = roll.random() < (0.9 if folder.name.startswith("MERV-") else 0.5)
            question.answer = question.expected if good else "nothing"
            question.mixing_weights = (0.1, 0.2, 0.3, 0.4)
        settings = {"benchmark": "miniature-open", "data": "test", "encoders": ["a", "b", "c", "d"]}
        eval.write_results(folder / "eval/miniature-open.json", settings, questions, "parse")
        return subprocess.CompletedProcess(script, 0, "", "")

    monkeypatch.setattr(subprocess, "run", dice)
    return asked


def run(*arguments: str) -> int:
    """Run the command and return its exit status."""
    with pytest.raises(SystemExit) as end:
        claims.main(["claims", *arguments])
    return int(end.value.code)


@pytest.mark.parametrize("arguments", [[], ["--more"]])
def test_everything_printed_or_drawn_comes_from_the_runs(arguments, place, scripts, capsys):
    """MERV's accuracy is the mean of its five stored results, and every run has its cell."""
    run(*arguments)
    text = (place / "docs/results.md").read_text()
    assert text in capsys.readouterr().out
    stored = [
        json.loads((folder / "eval/miniature-open.json").read_text())
        for folder in (place / "runs/claims").glob("MERV-?-*")
    ]
    mean = sum(result["accuracy"]["all"] for result in stored) / len(stored)
    assert f"\n| MERV | {100 * mean:.1f} ± " in text
    assert "\n| MERV | 0.500 |\n" in text  # the mean held-out loss of five seeds
    assert len(stored) == claims.SEEDS["main"]
    parts = claims.SEEDS | (claims.MORE_SEEDS if arguments else {})
    for name in (name for part in parts for name in RUNS[part]):
        # These rows have a column for each length.
        named = re.sub(r"^([A-Z]\w+)-250-steps$", r"\1", name)
        assert f"| {named} | " in text, f"{name} is run and not shown"
    assert "nan" not in text
    claimed = [line for line in text.splitlines() if " − " in line]
    held = sum("**holds**" in line for line in claimed)
    assert f"Of {len(claimed)} claims, {held} hold, " in text
    assert len(claimed) > (34 if arguments else 20) and 0 < held < len(claimed)
    # The pictures: each dot stands for a number of the tables.
    shown = re.findall(r"!\[.+\]\((.+)\)", text)
    assert len(shown) == len(claims.PICTURES) == 4
    for name in shown:
        xml.etree.ElementTree.parse(place / "docs" / name)
    kinds = (place / "docs/results/kinds.svg").read_text()
    dot = re.search(r'data-row="all" data-name="MERV" data-value="([\d.]+)"', kinds)
    assert f"\n| MERV | {dot[1]} ± " in text
    costs = (place / "docs/results/left-out.svg").read_text()
    dot = re.search(r'data-row="all" data-name="ViViT" data-value="([\d.]+)"', costs)
    assert f"MERV − without-ViViT: +{dot[1]} ± " in text


def test_finished_runs_are_reused(place, scripts):
    """After the end and after a kill; but runs of other code or other data are made again."""
    run("--quick")
    assert len(scripts) == 2 * 7  # seven rows are trained and evaluated
    run("--quick")
    assert len(scripts) == 2 * 7
    (killed,) = (place / "runs/claims").glob("ViViT-0-*")
    shutil.rmtree(killed / "eval")  # trained, not yet evaluated
    run("--quick")
    assert [script.split()[0].rpartition("/")[2] for script in scripts[14:]] == ["eval.py"]
    (place / "data/miniature/made_by.txt").write_text("other code")
    run("--quick")
    assert len(scripts) == 2 * 7 + 1 + 2 * 7


def test_the_exit_status_is_1_if_a_claim_that_must_hold_does_not(place, scripts, monkeypatch):
    """The dice favour only MERV, so ViViT is not above the other single encoders."""
    assert run("--quick") == 1
    assert "(must hold)" in (place / "runs/claims/quick.md").read_text()
    monkeypatch.setattr(statistics, "verdict", lambda *_: "holds")
    assert run("--quick") == 0


def test_a_run_that_fails_stops_the_command_with_its_error(place, monkeypatch):
    """The error shows the end of what the run printed, and how to run it by hand."""

    def broken(script, **_):
        return subprocess.CompletedProcess(script, 1, "", "the disk is full")

    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(SystemExit, match=r"(?s)train\.py .*the disk is full"):
        claims.main(["claims", "--quick"])


def test_train_py_knows_the_options_of_every_run():
    """Otherwise a wrong option would be found only an hour after the start."""
    for part in RUNS.values():
        for name, options in part.items():
            assert parse_options(TrainConfig, options.split(), ""), name


@pytest.mark.slow
def test_the_real_scripts_train_and_evaluate_a_row(place):
    """With two steps instead of 500: the options of a row override those that all runs share."""
    for name in RECIPES:
        encoder, file = load_encoder(f"miniature-{name}"), f"encoders-0/{name}.safetensors"
        save_encoder(encoder, place / "data/miniature" / file)
    write_world(place / "data/miniature/shuffled", SMALL, "shuffled")
    for name in ("MERV", "shuffled-clips"):
        options = (RUNS["main"] | RUNS["controls"])[name]
        folder = claims.run(name, f"{options} --epochs 2 --max-steps 2", 0)
        questions = read_result(folder / claims.RESULT)["questions"]
        assert len(questions) > 16 and not any(question.failure for question in questions)
        assert folder.name.startswith(f"{name}-0-")
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
