"""Rows of a data set as text in one array: the same rows, and no copy in each worker."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import dataset_of, talk

from data import collate
from merv import MERV, MERVS, Answer
from support.errors import DataError
from support.held_out import HeldOut
from support.rows import Rows, require_text

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


def test_a_question_of_many_lines_is_read_in_no_time():
    """40,000 line breaks took half a minute; a placeholder after them is still seen."""
    lines = "a" + "\n" * 200_000
    require_text({"conversations": [{"from": "human", "value": lines + "b"}]})
    with pytest.raises(DataError, match="names no video or image"):
        require_text({"conversations": [{"from": "human", "value": lines + "<video>\n"}]})


def test_empty_media_under_another_key_mean_none():
    """Of every type."""
    for empty in ([], {}, None, ""):
        require_text({"conversations": [{"from": "human", "value": "b"}], "images": empty})


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc").exists(), reason="Linux only")
def test_a_worker_that_reads_all_rows_copies_none():
    """Python writes to an object's count of references when it reads it, so a forked process gets
    a copy of every page of a list of dictionaries. The list is measured too."""
    plain = [{"id": n, "conversations": ["x" * 50, {"y": n}]} for n in range(50_000)]
    rows = Rows(plain)
    assert growth_in_a_fork(plain) > 8e6
    assert growth_in_a_fork(rows) < 4e6


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


def own_memory() -> int:
    """Bytes that this process does not share with its parent (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) * 1024


def test_held_out_rows_without_answers_have_no_loss(tmp_path, tiny_tokenizer, monkeypatch):
    """The loss was NaN, and a malformed row ended the run that had begun to evaluate it."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda totals: None)
    rows = [{"conversations": talk("what")}, {"video": 7}, {"conversations": talk("what", "red")}]
    dataset = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows))
    batch = collate([dataset.encode([("what", False)])])

    class Model:
        device = "cpu"
        eval = train = unshard = reshard = lambda self: self

        def __call__(self, batch, join):
            return torch.zeros(()), None

        def answer(self, video, question, max_new_tokens):
            return [Answer(f"{question} {video}", torch.zeros(0))]

    held_out = HeldOut(dataset, [batch], [0, 1, 2], join=False)
    assert held_out.loss(Model()) == 0
    assert held_out.answers(Model()) == [("what", "what None", "red")]


def test_a_question_about_a_tag_is_asked_as_it_was_trained_on(tmp_path, tiny_tokenizer):
    """Without a clip, <video> is a word of the question."""
    rows = [{"conversations": talk("What is the <video> tag?", "HTML")}]
    dataset = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows))
    asked = []

    class Model:
        eval = train = unshard = reshard = lambda self: self

        def answer(self, video, question, max_new_tokens):
            asked.append(question)
            return [Answer("HTML", torch.zeros(0))]

    HeldOut(dataset, [], [0], join=False).answers(Model())
    assert asked == ["What is the <video> tag?"]


def test_a_held_out_question_that_is_too_long_is_not_asked(tmp_path, tiny_tokenizer):
    """Its loss can be measured, because rows are cut. It ended the run, again at each resume."""
    rows = [{"conversations": talk("why " * 1500, "so")}, {"conversations": talk("what", "red")}]
    dataset = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows))
    model = MERV.create(MERVS["miniature"], tiny_tokenizer)
    model.unshard = model.reshard = lambda: None  # of FSDP
    questions = [question for question, _, _ in HeldOut(dataset, [], [0, 1], False).answers(model)]
    assert questions == ["what"]
