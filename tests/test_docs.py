"""README.md and docs/ tell the truth: links, line numbers, commands, tables and the ledger."""

import importlib
import inspect
import re
import shlex

import pytest
import torch
from refresh_docs import DEFINITION_LINK, PAGES, ROOT, definition_line, linked_name, refresh

import cost
import data
import eval
import merv
import train
from support import lora

README = (ROOT / "README.md").read_text(encoding="utf-8")
LEDGER = (ROOT / "docs/fidelity.md").read_text(encoding="utf-8")
PRODUCT = sorted(f for part in ("", "support/", "miniature/") for f in ROOT.glob(f"{part}*.py"))
page_names = [str(page.relative_to(ROOT)) for page in PAGES]


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its two header lines."""
    section = f"\n{text}".split(f"\n{heading}\n", 1)[1]
    rows = re.search(r"((?:^\|.*\n)+)", section, re.MULTILINE)[1].strip().splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_line_counts_and_line_anchors_are_up_to_date(page):
    """`python -m tests.refresh_docs` would change nothing."""
    assert page.read_text(encoding="utf-8") == refresh(page)


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_every_relative_link_resolves(page):
    """The file exists, and a heading or line that the link names is in it."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links or page.name == "glossary.md"
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if re.fullmatch(r"L\d+", anchor):
            lines = len(target.read_text(encoding="utf-8").splitlines())
            assert 0 < int(anchor[1:]) <= lines, link
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{page.name} links to {link}; headings: {slugs}"


def test_equation_2_is_two_clicks_away():
    """README links the lines of both equations and of the model before its first command."""
    opening = README.split("```bash")[0]
    linked = {link[1] for link in DEFINITION_LINK.finditer(opening)}
    assert {"merv.project", "merv.CrossAttentionMixer", "merv.MERV"} <= linked


def test_the_equations_open_merv():
    """Equation 1 stands within 100 lines of merv.py, equation 2 within 40 more, then class MERV."""
    first = definition_line(ROOT / "merv.py", "project")
    second = definition_line(ROOT / "merv.py", "CrossAttentionMixer")
    assert first <= 100
    assert first < second <= first + 40
    assert second < definition_line(ROOT / "merv.py", "MERV") <= second + 25


@pytest.mark.parametrize("row", table(README, "## From the paper to the code"), ids=lambda r: r[0])
def test_every_idea_of_the_paper_is_where_the_readme_says(row):
    """The linked definition exists, and its file carries the anchor of the paper."""
    anchor, link, _ = row
    found = DEFINITION_LINK.fullmatch(link)
    path = ROOT / found[2]
    module = importlib.import_module(path.stem)
    assert hasattr(module, linked_name(found).split(".")[0])
    source = path.read_text(encoding="utf-8").lower()
    for part in re.split(r" and |, ", anchor):
        number = part.split()[-1]
        assert re.search(rf"\b{re.escape(number)}\b", source), f"{path.name} never says {anchor}"


def test_every_quirk_and_fix_has_a_row_in_the_ledger():
    """QUIRK and FIX name their row, and every row marked "tagged" has a tag in the code."""
    tagged = set()
    pattern = re.compile(r"(QUIRK|FIX): (?:(?!QUIRK:|FIX:).){,500}", re.DOTALL)
    for path in PRODUCT:
        for tag in pattern.finditer(path.read_text(encoding="utf-8")):
            number = re.search(r"\b([KF]\d+)\)", tag[0])
            assert number, f"{path.name}: {tag[0][:60]} names no row of the ledger"
            tagged.add(number[1])
    rows = {row[0]: row for row in table(LEDGER, "# Fidelity ledger")}
    assert tagged <= set(rows)
    assert tagged == {number for number, row in rows.items() if "tagged" in row[-1]}


def test_the_two_commands_come_first_and_stand_alone():
    """The first two bash blocks install what they need: one trains, one tests."""
    first, second = bash_blocks(README)[:2]
    assert "venv" in first and "torchrun train.py" in first
    assert "venv" in second and "pytest" in second


def bash_blocks(text: str) -> list[str]:
    """The fenced blocks of shell commands, in order."""
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


OPTIONS = {"train.py": train.read_options, "eval.py": eval.read_options}
OPTIONS |= {"merv.py": merv.read_options, "cost.py": cost.read_options}
OPTIONS |= {"data.py": data.read_options}


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_every_command_on_the_pages_has_options_that_exist(page):
    """Each command line in a bash block is accepted by the parser of its program."""
    for block in bash_blocks(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            programs = [word for word in words if word in OPTIONS]
            if programs:
                arguments = words[words.index(programs[0]) + 1 :]
                OPTIONS[programs[0]](arguments)


def test_the_mixer_on_the_experiments_page_is_one(monkeypatch):
    """Adding a mixer takes one class: this one cannot tell how large an encoder's tokens are."""
    monkeypatch.setitem(merv.MIXERS, "one-size", None)  # taken out again after the test
    page = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    exec(block, {"__name__": "page"})
    mixer = merv.MIXERS["one-size"](12, 4)
    x_bend = torch.randn(2, 4, 7, 12)
    torch.nn.init.normal_(mixer.query)
    larger = x_bend * torch.tensor([1, 10, 1, 0.1])[:, None, None]
    torch.testing.assert_close(mixer(larger), mixer(x_bend), rtol=1e-3, atol=1e-4)
    arguments = re.search(r"train\.main\((\[.*?\])\)", block)[1]
    assert train.read_options(eval_list(arguments)).mixer == "one-size"


def eval_list(text: str) -> list[str]:
    """'["--mixer", "x"]' -> ["--mixer", "x"]."""
    return re.findall(r'"([^"]*)"', text)


@pytest.mark.slow
def test_the_cost_table_on_the_page_is_what_the_command_prints(capsys):
    """docs/released.md shows the output of `python cost.py table`, line by line."""
    cost.print_table()
    page = (ROOT / "docs/released.md").read_text(encoding="utf-8")
    for line in capsys.readouterr().out.splitlines():
        assert line.rstrip() in page


def test_glossary_entries_point_at_code_that_exists():
    """Every name in the last column of the glossary is a definition, a file or a command."""
    page = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    modules = {
        name: importlib.import_module(name)
        for name in ("encoders", "llama", "data", "merv", "train")
    }
    modules |= {"MERV": merv.MERV, "EncoderConfig": merv.EncoderConfig}
    modules |= {"load_encoder": merv, "lora": lora}
    for row in table(page, "# Glossary"):
        for name in re.findall(r"`([\w.]+)`", row[-1]):
            first, _, rest = name.partition(".")
            if first in modules and rest:
                found = modules[first]
                for part in rest.split("."):
                    found = inspect.getattr_static(found, part)
