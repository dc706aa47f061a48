"""tests/fuzz.py: it sees every kind of bad outcome, and a number repeats a case."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest

from support.errors import UserError
from tests import fuzz
from tests.fuzz import Reader, files_of, run_case
from tests.fuzz_files import MARKER, Kind


def refuse(place: Path, *_) -> None:
    raise UserError(f"{place / 'a.txt'}: is damaged.", "it is.", "mend it.")


def refuse_something(*_) -> None:
    raise UserError("A file is damaged.", "it is.", "mend it.")


READERS = {  # the outcome and a part of the details -> what a reader may do
    ("read", ""): lambda *_: None,
    ("refused", "a.txt: is damaged"): refuse,
    ("bad", "names no file"): refuse_something,
    ("bad", "ZeroDivisionError"): lambda *_: 1 / 0,
    ("bad", "used 0.2 GB"): lambda *_: np.ones(25_000_000),
    ("bad", "ran code"): lambda place, *_: (place.parents[1] / MARKER).mkdir(),
    ("bad", "ended the process with status 3"): lambda *_: os._exit(3),
    ("bad", "took more than 1 s"): lambda *_: [0 for _ in itertools.count() if False],
    ("bad", "waited more than 1 s"): lambda *_: time.sleep(60),
}


@pytest.fixture
def good(tmp_path) -> Path:
    (tmp_path / "good" / "kind" / "unit").mkdir(parents=True)
    (tmp_path / "good" / "kind" / "unit" / "a.txt").write_text("some text " * 9)
    return tmp_path / "good"


@pytest.mark.parametrize(("outcome", "part"), READERS)
def test_each_outcome_is_told_apart(good, monkeypatch, outcome, part):
    """Also of a reader that hangs or ends its process. The next case has a new one."""
    if "took" in part:
        monkeypatch.setattr(fuzz, "SECONDS", 1)
    if "waited" in part:
        monkeypatch.setattr(fuzz, "WAIT", 1)
    monkeypatch.setattr(fuzz, "MEMORY", 0.1)
    monkeypatch.setattr(fuzz, "KINDS", {"kind": Kind(1, None, READERS[outcome, part])})
    reader = Reader(0, good, good.parent / "case")
    for number in range(2):
        kind, found, details = reader.run(number)
        assert (kind, found) == ("kind", outcome)
        assert part in details
    if reader.process is not None:
        reader.close()


def test_a_number_repeats_a_case(good, monkeypatch):
    """The same seed and number make the same damage; others make other damage."""
    monkeypatch.setattr(fuzz, "KINDS", {"kind": Kind(1, None, lambda *_: None)})
    contents = []
    for seed, number in [(0, 7), (0, 7), (0, 8), (1, 7)]:
        run_case(seed, number, good, good.parent / "case")
        (file,) = files_of(good.parent / "case")
        contents.append(file.read_bytes())
    assert contents[0] == contents[1]
    assert len(set(contents)) == 3
