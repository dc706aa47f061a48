"""python -m miniature claims: no number without a run, no run twice."""

import itertools
import json
import random
import re
import shutil
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import eval
import miniature
from encoders import load_encoder, save_encoder
from merv import FOUR
from miniature import __main__ as claims
from miniature.world import REVERSED, write_world
from support import benchmarks
from support.cli import parse_options
from train import TrainConfig

ROOT = Path(__file__).parent.parent


def answers(right: dict[tuple[str, int], str]) -> dict:
    """Rows and seeds -> answers; "110 1" are those to three questions about a clip and one more."""
    made = {}
    for run, marks in right.items():
        made[run] = [
            benchmarks.Question(f"{clip}{number}", f"clip_{clip}", "What?", "", correct=mark == "1")
            for clip, group in enumerate(marks.split())
            for number, mark in enumerate(group)
        ]
    return made


# -------------------------------------------------------------------------------------- statistics


def test_a_row_is_compared_on_the_same_questions():
    """The difference is paired: where both are right or both are wrong, there is no noise."""
    same = answers({("a", 0): "1 0 1 0 1 1", ("b", 0): "1 0 1 0 1 1"})
    assert claims.compare(same, "a", "b") == (0, 0)
    better = answers({("a", 0): "1 1 1 1", ("b", 0): "1 0 1 0"})
    difference, error = claims.compare(better, "a", "b")
    assert difference == 0.5
    assert error == pytest.approx((4 * 0.25 / 3 / 4) ** 0.5)  # of the differences 0 1 0 1


def test_a_clip_counts_once_however_much_is_asked_about_it():
    """Ten answers to one question are no more evidence than one."""
    once = answers({("a", 0): "1 0 1 0 1"})
    tenfold = answers({("a", 0): " ".join(10 * mark for mark in "10101")})
    assert claims.compare(tenfold, "a") == pytest.approx(claims.compare(once, "a"))


def test_seeds_that_disagree_make_the_error_large():
    """Two seeds, one all right and one all wrong: 50 ± 50 %, though clips do not differ at all."""
    runs = answers({("a", 0): "1 1 1 1", ("a", 1): "0 0 0 0"})
    assert claims.compare(runs, "a") == pytest.approx((0.5, 0.5))


def test_a_row_of_one_seed_varies_as_those_of_several_do():
    """It cannot say how much seeds differ: a and b do by 0.25 each, and MERV not at all."""
    marks = {"MERV": ("1111", "1111"), "a": ("1110", "1100"), "b": ("1000", "1010"), "c": ("0000",)}
    runs = {(row, seed): " ".join(m) for row, both in marks.items() for seed, m in enumerate(both)}
    variance = 0.25**2 / 2  # of two numbers that are 0.25 apart
    difference = claims.compare(answers(runs), "MERV", "c")
    assert difference == pytest.approx((1, variance**0.5))  # a's and b's, from MERV
    alone = claims.compare(answers(runs), "c")
    assert alone == pytest.approx((0, (2 * variance / 3) ** 0.5))  # all three rows'


def test_of_many_seeds_as_many_count_as_asked_for():
    """Tables of one seed show the first one in every row."""
    runs = answers({("a", 0): "1 1 1 1", ("a", 1): "0 0 0 0"})
    assert claims.compare(runs, "a", most=1)[0] == 1


def test_only_seeds_that_both_rows_have_are_compared():
    """Another seed has other encoders: its difference would be theirs."""
    runs = answers({("MERV", 0): "1 1 0", ("MERV", 1): "0 0 0", ("a", 0): "1 1 0"})
    assert claims.compare(runs, "MERV", "a") == (0, 0)


@pytest.mark.parametrize(
    ("difference", "error", "bounds", "expected"),
    [
        (0.031, 0.01, {}, "holds"),
        (0.029, 0.01, {}, "undecided"),
        (-0.029, 0.01, {}, "undecided"),
        (-0.031, 0.01, {}, "does not hold"),
        (0.25, 0.01, {"low": 0.2}, "holds"),
        (0.15, 0.01, {"low": 0.2}, "does not hold"),
        (0.0, 0.005, {"low": -0.03, "high": 0.03}, "holds"),  # two are equal, within 3 points
        (0.0, 0.02, {"low": -0.03, "high": 0.03}, "undecided"),
        (0.1, 0.02, {"low": -0.03, "high": 0.03}, "does not hold"),
    ],
)
def test_a_claim_holds_three_standard_errors_away(difference, error, bounds, expected):
    """Three errors on either side are inside the bounds, outside of them, or across one."""
    assert claims.verdict(difference, error, **bounds) == expected


def test_subsets_are_kinds_first_words_and_the_direction_of_time():
    """Temporal is what would be answered otherwise if the clip were played backwards."""
    question = benchmarks.Question(
        "1", "clip", "What happens?", next(iter(REVERSED)), "what happens"
    )
    for subset in ("all", "temporal", "what happens", "what", "What happens?"):
        assert claims.inside(question, subset), subset
    assert not claims.inside(question, "where")
    assert not claims.inside(replace(question, expected="shakes"), "temporal")


def test_the_mixture_counts_each_clip_once():
    """Two questions about the first clip, one about the second."""
    runs = answers({("a", 0): "11 1"})
    for question, weight in zip(runs["a", 0], (0.2, 0.2, 0.6), strict=True):
        question.weights = (weight, 1 - weight)
    ((mean, spread), (other, _)) = claims.mixture(runs, "a")
    assert (mean, spread, other) == pytest.approx((0.4, 0.2, 0.6))


# ------------------------------------------------------------------------------------- the command


SMALL = {"train": 16, "test": 16}
RUNS = tomllib.loads((ROOT / "miniature" / "claims.toml").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a very small world in it."""
    folder = tmp_path_factory.mktemp("claims")
    home = folder / "data" / "miniature"
    write_world(home, SMALL)
    (home / "made_by.txt").write_text("a test")
    return folder


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """An empty folder to run in, with that world and nothing to prepare."""
    shutil.copytree(world / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "CLIPS", SMALL)
    monkeypatch.setattr(miniature, "prepare", lambda folder, seed: folder)
    return tmp_path


@pytest.fixture
def scripts(place, monkeypatch):
    """The commands that are run; instead of a model, dice answer, worse for all but MERV."""
    asked = []

    def dice(script, **_):
        asked.append(" ".join(script[1:]))
        options = dict(itertools.pairwise(script))
        if "train.py" in script[1]:
            (Path("runs") / options["--name"] / "checkpoint").mkdir(parents=True)
            return subprocess.CompletedProcess(script, 0, "", "")
        folder = Path(options["--checkpoint"])
        questions = benchmarks.load_questions("miniature-open", options["--data"])
        roll = random.Random(folder.name)
        for question in questions:
            good = roll.random() < (0.9 if folder.name.startswith("MERV-") else 0.5)
            question.answer = question.expected if good else "nothing"
            question.weights = (0.1, 0.2, 0.3, 0.4)
        eval.write_results(folder / "eval/miniature-open.json", {}, questions, "parse")
        return subprocess.CompletedProcess(script, 0, "", "")

    monkeypatch.setattr(subprocess, "run", dice)
    return asked


def run(*arguments: str) -> int:
    """The command's status."""
    with pytest.raises(SystemExit) as end:
        claims.main(["claims", *arguments])
    return int(end.value.code)


def test_everything_printed_comes_from_the_runs(place, scripts, capsys):
    """Each row of the main table is the mean of its three stored results; no cell is left empty."""
    run()
    text = (place / "runs/claims/claims.md").read_text()
    assert text in capsys.readouterr().out
    stored = [
        json.loads((folder / "eval/miniature-open.json").read_text())
        for folder in (place / "runs/claims").glob("MERV-?-*")
    ]
    mean = sum(result["accuracy"]["all"] for result in stored) / len(stored)
    assert f"\n| MERV | {100 * mean:.1f} ± " in text
    assert len(stored) == claims.SEEDS
    recipes = text.partition("## Recipes")[2]  # its other rows have one seed
    first = json.loads(next(place.glob("runs/claims/MERV-0-*/eval/*.json")).read_text())
    assert f"\n| MERV | {100 * first['accuracy']['all']:.1f} ± " in recipes
    for name in (name for part in RUNS.values() for name in part):
        named = re.sub(r"-\d+-steps$", "", name)  # learning curves have a column for each
        assert f"| {named} | " in text, f"{name} is run and not shown"
    assert "nan" not in text
    assert text.count("**holds**") and text.count("**undecided**")


def test_what_is_done_is_not_repeated(place, scripts):
    """Neither after the end nor after a kill; but what was made by other code or options is."""
    run("--quick")
    assert len(scripts) == 2 * 8  # eight rows are trained and asked
    run("--quick")
    assert len(scripts) == 2 * 8
    (killed,) = (place / "runs/claims").glob("ViViT-0-*")
    shutil.rmtree(killed / "eval")  # trained, not yet asked
    run("--quick")
    assert [script.split()[0].rpartition("/")[2] for script in scripts[16:]] == ["eval.py"]
    (place / "data/miniature/made_by.txt").write_text("other code")
    run("--quick")
    assert len(scripts) == 2 * 8 + 1 + 2 * 8


def test_the_status_tells_whether_the_robust_claims_hold(place, scripts, monkeypatch):
    """Dice favour nobody but MERV, so ViViT is not above the other single encoders."""
    assert run("--quick") == 1
    assert "(must hold)" in (place / "runs/claims/quick.md").read_text()
    monkeypatch.setattr(claims, "verdict", lambda *_: "holds")
    assert run("--quick") == 0


def test_a_run_that_fails_stops_it_and_says_why(place, monkeypatch):
    """The end of what it printed is shown, with the command to run by hand."""

    def broken(script, **_):
        return subprocess.CompletedProcess(script, 1, "", "the disk is full")

    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(SystemExit, match=r"(?s)train\.py .*the disk is full"):
        claims.main(["claims", "--quick"])


def test_every_run_is_a_command_that_train_py_takes():
    """An option that train.py does not know would only be found an hour later."""
    for part in RUNS.values():
        for name, options in part.items():
            assert parse_options(TrainConfig, options.split(), ""), name


@pytest.mark.slow
def test_a_row_is_trained_and_asked_by_the_real_scripts(place):
    """Two steps instead of 300: a row's own options come last and count."""
    for name in FOUR:
        encoder, file = load_encoder(f"miniature-{name}"), f"encoders-0/{name}.safetensors"
        save_encoder(encoder, place / "data/miniature" / file)
    write_world(place / "data/miniature/shuffled", SMALL, "shuffled")
    for name in ("MERV", "shuffled-clips"):
        options = RUNS["main"][name]
        questions = claims.run(name, f"{options} --max-steps 2", 0)
        assert len(questions) > 16 and not any(question.failure for question in questions)
        (folder,) = (place / "runs/claims").glob(f"{name}-0-*")
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
