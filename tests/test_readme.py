"""The README tells the truth: its map, its tables and its ledger agree with the code."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import merv
from support import cli
from train import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PRODUCT = sorted(f for part in ("", "support/", "miniature/") for f in ROOT.glob(f"{part}*.py"))


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its two header lines."""
    section = README.split(f"\n{heading}\n", 1)[1]
    rows = re.search(r"((?:^\|.*\n)+)", section, re.MULTILINE)[1].strip().splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_file_map_counts_lines_correctly():
    """Each file of the map exists and has as many lines as it says."""
    for name, lines, _ in table("## The files"):
        path = ROOT / name.strip("`")
        files = sorted(path.glob("*.py")) if path.is_dir() else [path]
        assert sum(len(f.read_text().splitlines()) for f in files) == int(lines), name


def test_the_six_files_fit_their_budget():
    """The promise of the mission: everything in under a few thousand lines. cost.py, which only
    counts what the six do, is beside them."""
    modules = {f for f in ROOT.glob("*.py") if f.name != "cost.py"}
    assert {f.stem for f in modules} == {"encoders", "llama", "data", "merv", "train", "eval"}
    six = sum(len(f.read_text().splitlines()) for f in modules)
    small = sum(len(f.read_text().splitlines()) for f in ROOT.glob("miniature/*.py"))
    assert six <= 3500 and small <= 800


@pytest.mark.parametrize("row", table("## From the paper to the code"), ids=lambda row: row[0])
def test_every_idea_of_the_paper_is_where_the_readme_says(row):
    """The named object exists, and its source carries the anchor of the paper."""
    anchor, name, _ = row
    module, _, attribute = name.strip("`").partition(".")
    found = importlib.import_module(module)
    for part in filter(None, attribute.split(".")):
        found = getattr(found, part)
    source = inspect.getsource(found) if callable(found) else (ROOT / f"{module}.py").read_text()
    assert anchor.lower() in source.lower()


def test_every_quirk_and_fix_has_a_row_in_the_ledger():
    """QUIRK and FIX name their row, and every row that says so is tagged in the code."""
    tagged = set()
    for path in PRODUCT:
        pattern = r"(QUIRK|FIX): (?:(?!QUIRK:|FIX:).){,400}"
        for tag in re.finditer(pattern, path.read_text(), re.DOTALL):
            number = re.search(r"\b([KF]\d+)\)", tag[0])
            assert number, f"{path.name}: {tag[0][:60]} names no row of the ledger"
            tagged.add(number[1])
    rows = {row[0]: row for row in table("## Fidelity ledger")}
    assert tagged <= set(rows)
    assert tagged == {number for number, row in rows.items() if "tagged" in row[-1]}


def test_both_commands_come_first_and_stand_alone():
    """The first two bash blocks install what they need: one trains, one tests."""
    first, second = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[:2]
    assert "venv" in first and "torchrun train.py" in first
    assert "venv" in second and "pytest" in second


def test_the_mixer_that_the_readme_adds_is_one(monkeypatch):
    """Another mixer is a class: this one cannot tell how large an encoder's tokens are."""
    monkeypatch.setitem(merv.MIXERS, "one-size", None)  # and take it out afterwards
    block = re.search(r"```python\n(from torch.*?)```", README, re.DOTALL)[1]
    exec(block, {"__name__": "readme"})
    mixer, x = merv.MIXERS["one-size"](12), torch.randn(2, 4, 7, 12)
    torch.nn.init.normal_(mixer.query)
    larger = x * torch.tensor([1, 10, 1, 0.1])[:, None, None]
    torch.testing.assert_close(mixer(larger), mixer(x), rtol=1e-3, atol=1e-4)
    options = re.search(r"train\.main\((\[.*?\])\)", block)[1]
    assert cli.parse_options(TrainConfig, eval(options), "").mixer == "one-size"
