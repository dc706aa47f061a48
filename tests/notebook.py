"""Run the cells of lesson/lesson.ipynb in order, and store what they show.

    python -m tests.notebook       run it on the model that `torchrun train.py` trained

It needs no Jupyter: like Jupyter, it shows what a cell prints and the value of its last expression.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

FILE = Path(__file__).resolve().parents[1] / "lesson/lesson.ipynb"


def read_notebook() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_lines(text: str) -> list[str]:
    """As a notebook stores text: a list of lines with their line breaks."""
    return text.splitlines(keepends=True)


def run_cell(source: str, names: dict) -> list[dict]:
    """Run one cell among these names; its outputs, as a notebook stores them."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        if last:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    outputs = []
    if printed.getvalue():
        text = text_lines(printed.getvalue())
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if value is not None:
        data = {"text/plain": text_lines(repr(value))}
        if isinstance(value, Image.Image):
            file = io.BytesIO()
            value.save(file, "PNG")
            size = "x".join(str(side) for side in value.size)
            data = {
                "image/png": base64.b64encode(file.getvalue()).decode(),
                "text/plain": [f"<image of {size} pixels>"],
            }
        outputs.append({"data": data, "metadata": {}, "output_type": "execute_result"})
    return outputs


def run(settings: dict, changed: Callable[[str], str] = lambda source: source) -> tuple:
    """Run all cells; their names, and the outputs of each.

    settings: names that replace those of the cell that is tagged "parameters". changed: what to do
    with the source of a cell before it is run.
    """
    names, outputs = {"__name__": "notebook"}, []
    for cell in code_cells(read_notebook()):
        outputs.append(run_cell(changed("".join(cell["source"])), names))
        if "parameters" in cell["metadata"].get("tags", []):
            names |= settings
    return names, outputs


def main() -> None:
    """Run the notebook as it is, and write its outputs into it."""
    _, outputs = run({})
    notebook = read_notebook()
    for number, (cell, shown) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        cell["execution_count"] = number
        for output in shown:
            if output["output_type"] == "execute_result":
                output["execution_count"] = number
        cell["outputs"] = shown
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
