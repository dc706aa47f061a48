"""lesson/lesson.ipynb: its cells run, and both equations by hand give the same answer."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_merv import *  # noqa: F403 (its fixtures)
from tiny_merv import QUESTIONS, TINY

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "lesson/lesson.ipynb").read_text(encoding="utf-8"))
pytestmark = pytest.mark.usefixtures("one_thread")


def code_cells() -> list[dict]:
    return [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run_cells(settings: dict, changed=lambda source: source) -> dict:
    """Run every code cell, with these settings for the cell that is tagged "parameters"."""
    names = {"__name__": "notebook"}
    for cell in code_cells():
        if "parameters" in cell["metadata"].get("tags", []):
            names |= settings
        else:
            exec(compile(changed("".join(cell["source"])), "cell", "exec"), names)
    return names


@pytest.fixture
def settings(saved, short_clip, monkeypatch) -> dict:
    """A tiny random model and a short clip, in the folder where Jupyter starts."""
    monkeypatch.chdir(ROOT / "lesson")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return {"RUN": str(saved), "VIDEO": str(short_clip), "QUESTION": QUESTIONS[0]}


def test_the_notebook_goes_from_a_clip_to_the_models_own_answer(settings):
    """Its own assertions compare visual tokens, mixing weights and the answer with the code."""
    names = run_cells(settings)
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
        run_cells(settings, lambda source: source.replace(right, wrong))


def test_the_notebook_is_short_and_stored_without_output():
    """About twenty cells. Stored output would go stale, and hide what a reader should run."""
    assert 15 <= len(NOTEBOOK["cells"]) <= 25
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code_cells())
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])


def test_the_settings_name_what_the_first_command_makes():
    """RUN is the checkpoint of the class's commands, and VIDEO the clip of README.md."""
    (cell,) = [cell for cell in code_cells() if cell["metadata"].get("tags") == ["parameters"]]
    values = dict(re.findall(r'(\w+) = "(.*)"', "".join(cell["source"])))
    assert values.keys() == {"RUN", "VIDEO", "QUESTION"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert values["VIDEO"] in readme
    assert values["RUN"] in (ROOT / "lesson/README.md").read_text(encoding="utf-8")
