"""Rows of a data set as text in one array: the same rows, and no copy in each worker."""

import os
from pathlib import Path

import pytest

from support.rows import Rows

ROWS = [{"id": 7}, {"id": "é", "conversations": [{"from": "human", "value": "\ud83d"}]}, {}]


def test_rows_come_back_as_they_were():
    """By number, from the end, as a slice and in a loop; half an emoji included."""
    rows = Rows(ROWS)
    assert len(rows) == 3
    assert list(rows) == ROWS
    assert rows[-1] == {}
    assert rows[:2] == ROWS[:2]
    with pytest.raises(IndexError):
        rows[3]


def test_files_are_joined_in_order():
    """The offsets of a later file move behind those of the earlier ones."""
    joined = Rows.join([Rows(ROWS), Rows([]), Rows([{"id": 1}])])
    assert list(joined) == [*ROWS, {"id": 1}]


def own_memory() -> int:
    """Bytes that this process does not share with its parent (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) * 1024


def growth_in_a_fork(rows) -> int:
    """How much memory a forked process needs to read every row."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        before = own_memory()
        for row in rows:
            assert row["id"] >= 0
        os.write(write_end, str(own_memory() - before).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        growth = int(answer.read())
    os.wait()
    return growth


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc").exists(), reason="Linux only")
def test_a_worker_that_reads_all_rows_copies_none():
    """Python writes to an object's count of references when it reads it, so a forked process gets
    a copy of every page of a list of dictionaries. The list is measured too."""
    plain = [{"id": n, "conversations": ["x" * 50, {"y": n}]} for n in range(50_000)]
    rows = Rows(plain)
    assert growth_in_a_fork(plain) > 8e6
    assert growth_in_a_fork(rows) < 4e6
