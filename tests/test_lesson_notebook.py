"""lesson/lesson.ipynb: its cells run, and both equations by hand give the same answer."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import notebook
import pytest
import torch
from tiny_merv import *  # noqa: F403 (its fixtures)
from tiny_merv import QUESTIONS, TINY

from merv import MERVS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = notebook.read_notebook()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(saved, short_clip, monkeypatch) -> dict:
    """A tiny random model and a short clip, in the folder where Jupyter starts."""
    monkeypatch.chdir(ROOT / "lesson")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return {"RUN": str(saved), "VIDEO": str(short_clip), "QUESTION": QUESTIONS[0]}


def test_the_notebook_goes_from_a_clip_to_the_models_own_answer(settings):
    """Its own assertions compare visual tokens, mixing weights and the answer with the code."""
    names, _ = notebook.run(settings)
    assert names["x_bend"].shape == (1, len(TINY.encoders), TINY.num_visual, 32)
    torch.testing.assert_close(names["weight_be"].sum(), torch.tensor(1.0))
    assert names["by_hand"] == names["by_model"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("math.sqrt(len(query))", "1.0"), (".softmax(-1)", ".softmax(-1).roll(1, -1)")],
)
def test_a_mistake_in_equation_2_is_noticed(settings, right, wrong):
    """Otherwise the comparison in the notebook would be an ornament."""
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        notebook.run(settings, lambda source: source.replace(right, wrong))


def test_the_notebook_is_short_and_has_stored_output(settings):
    """About twenty cells, and each shows what it shows when it is run: text, a value, an image.

    So it can be read where nothing can be run. The shapes are those of today's miniature; if they
    have changed, `python -m tests.notebook` runs it anew.
    """
    assert 15 <= len(NOTEBOOK["cells"]) <= 25
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    cells = notebook.code_cells(NOTEBOOK)
    _, outputs = notebook.run(settings)
    shown = ""
    for number, (cell, output) in enumerate(zip(cells, outputs, strict=True), start=1):
        assert cell["execution_count"] == number
        kinds = [(o["output_type"], list(o.get("data", []))) for o in cell["outputs"]]
        assert kinds == [(o["output_type"], list(o.get("data", []))) for o in output]
        for stored in cell["outputs"]:
            shown += "".join(stored.get("text", []) or stored["data"]["text/plain"]) + "\n"
    small = MERVS["miniature"]
    tokens = (1, len(small.encoders), small.num_visual, small.llm.hidden_size)
    assert f"torch.Size({list(tokens)})" in shown
    for encoder in small.encoders:
        assert re.search(rf"{encoder.name} +{re.escape(str((1, *encoder.grid)))[:-2]}", shown)
    assert cells[-1]["outputs"][0]["data"] == cells[-2]["outputs"][0]["data"], "the same answer"


def test_the_settings_name_what_the_first_command_makes():
    """RUN is the checkpoint of the class's commands, and VIDEO the clip of README.md."""
    (cell,) = [
        cell
        for cell in notebook.code_cells(NOTEBOOK)
        if cell["metadata"].get("tags") == ["parameters"]
    ]
    values = dict(re.findall(r'(\w+) = "(.*)"', "".join(cell["source"])))
    assert values.keys() == {"RUN", "VIDEO", "QUESTION"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert values["VIDEO"] in readme
    assert values["RUN"] in (ROOT / "lesson/README.md").read_text(encoding="utf-8")
