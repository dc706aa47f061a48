"""Bring the numbers that follow from the code into README.md and docs/: line counts, line anchors.

    python -m tests.refresh_docs        run after lines have moved; test_docs.py says when

A link such as [`merv.MERV`](merv.py#L80) names a definition. Its line number is looked up in the
syntax tree of the file.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
DEFINITION_LINK = re.compile(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L(\d+)\)")
FILE_ROW = re.compile(r"^\| `([\w./]+)` \| (\d+) \|", re.MULTILINE)


def definition_line(path: Path, name: str) -> int:
    """The line on which `name`, such as "project" or "MERV.encode", is defined in a file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    line = 0
    for part in name.split("."):
        for node in body:
            target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
            if part in (getattr(node, "name", None), getattr(target, "id", None)):
                line = node.lineno
                body = getattr(node, "body", [])
                break
        else:
            raise LookupError(f"{path.name} does not define {name}")
    return line


def linked_name(link: re.Match) -> str:
    """The name inside its module: `merv.MERV.encode` in merv.py -> "MERV.encode"."""
    module = Path(link[2]).stem
    return link[1].removeprefix(f"{module}.")


def line_count(name: str) -> int:
    """Lines of a Python file, or of all Python files directly in a folder."""
    path = ROOT / name
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def refresh(page: Path) -> str:
    """The text of a page with every line count and line anchor brought up to date."""

    def anchor(link: re.Match) -> str:
        line = definition_line(page.parent / link[2], linked_name(link))
        return f"[`{link[1]}`]({link[2]}#L{line})"

    def row(found: re.Match) -> str:
        return f"| `{found[1]}` | {line_count(found[1])} |"

    text = DEFINITION_LINK.sub(anchor, page.read_text(encoding="utf-8"))
    return FILE_ROW.sub(row, text) if page.parent == ROOT else text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(refresh(page), encoding="utf-8")
