"""data.ConversationDataset: rows of a JSON file, and what happens to rows that cannot be used."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from helpers import MALFORMED, SMALL, dataset_of, load_dataset, talk

from data import TEMPLATES, ConversationDataset, Example, GroupedBatchSampler, preprocess
from support.errors import DataError, VideoError
from support.features import FeatureCache
from support.video import load_video

# --------------------------------------------------------------------------------------------- rows


def test_a_video_row_holds_the_pixels_of_each_encoder(mixed, clip):
    example = mixed[0]
    frames = load_video(clip, max(config.num_frames for config in SMALL))
    for config in SMALL:
        assert torch.equal(example.pixels[config.name], preprocess(frames, config))


def test_a_long_conversation_is_cut(mixed_folder, tiny_tokenizer):
    long = ConversationDataset(
        mixed_folder / "rows.json", tiny_tokenizer, TEMPLATES["base"], SMALL, max_length=5
    )
    assert long[1].input_ids.shape == long[1].labels.shape == (5,)


@pytest.mark.parametrize("content", ["", "[{", "{'id': 1}"])
def test_malformed_json_names_the_file(tmp_path, tiny_tokenizer, content):
    with pytest.raises(DataError) as caught:
        dataset_of(tmp_path, tiny_tokenizer, content)
    assert str(tmp_path / "rows.json") in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_a_missing_dataset_names_the_file(tmp_path, tiny_tokenizer):
    with pytest.raises(DataError, match="absent"):
        ConversationDataset(tmp_path / "absent.json", tiny_tokenizer, TEMPLATES["base"], SMALL)


def test_wrong_roles_name_the_file_and_the_row(tmp_path, tiny_tokenizer):
    rows = [{"id": "bad-7", "conversations": [{"from": "gpt", "value": "red"}]}]
    with pytest.raises(DataError) as caught:
        dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows))[0]
    for part in (str(tmp_path / "rows.json"), "row 0", "bad-7", "['gpt']", "Why: ", "Fix: "):
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_row_fails_only_when_it_is_read(tmp_path, tiny_tokenizer, kind):
    """The sampler still gets its length and modality; the error names the file or the row."""
    row = MALFORMED[kind]
    data = dataset_of(tmp_path, tiny_tokenizer, json.dumps([row]))
    visual = isinstance(row, dict) and "video" in row
    assert data.modalities == ["video" if visual else "text"]
    assert len(data.lengths) == 1
    assert [*GroupedBatchSampler(data, 1, 1)] == [[0]]
    with pytest.raises(DataError) as caught:
        data[0]
    what, why, fix = caught.value.args
    assert str(tmp_path) in what
    assert visual or "row 0" in what
    assert why
    assert fix


@pytest.mark.parametrize("content", ['{"id": 1}', "7", "null", '"rows"'])
def test_a_file_that_holds_no_list_is_an_error_at_once(tmp_path, tiny_tokenizer, content):
    with pytest.raises(DataError, match="no list") as caught:
        dataset_of(tmp_path, tiny_tokenizer, content)
    assert str(tmp_path / "rows.json") in str(caught.value)


@pytest.mark.parametrize("with_cache", [False, True])
def test_a_missing_video_of_a_row_is_a_video_error(tmp_path, tiny_tokenizer, with_cache):
    """The error has the same class with and without a feature cache."""
    rows = [{"id": 1, "video": "gone.mp4", "conversations": talk("left", "right")}]
    cache = FeatureCache(tmp_path / "cache", {c.name: c.name for c in SMALL})
    data = dataset_of(
        tmp_path, tiny_tokenizer, json.dumps(rows), cache=cache if with_cache else None
    )
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        data[0]


# ----------------------------------------------------------------------------------------- bad rows


def test_a_bad_row_is_replaced_by_one_of_its_modality_and_recorded(damaged, tiny_tokenizer):
    """FIX F4: the record has row, id, file and reason; the replacement is a usable video."""
    data = load_dataset(damaged, tiny_tokenizer)
    reasons = {3: "half.mp4: has no frames, or incomplete", 6: "gone.mp4: no such video", 9: "gpt"}
    good = {tuple(data.read(i).input_ids.tolist()): i for i in range(0, 30, 3) if i not in reasons}
    for row, reason in reasons.items():
        example = data[row]
        assert example.pixels.keys() == {config.name for config in SMALL}
        assert tuple(example.input_ids.tolist()) in good
        first = example.bad[0]
        file = {3: "half.mp4", 6: "gone.mp4", 9: "clip.mp4"}[row]
        assert (first["row"], first["id"]) == (row, f"id-{row}")
        assert first["file"] == str(damaged.parent / file)
        assert reason in first["reason"]
        assert {failure["row"] for failure in example.bad} <= set(reasons)
    assert json.loads(json.dumps(first)) == first  # the training loop writes it to a file


def test_a_good_row_is_not_replaced_and_nothing_is_recorded(damaged, tiny_tokenizer):
    data = load_dataset(damaged, tiny_tokenizer)
    for row in (0, 1, 12):
        assert data[row].bad == []
        assert torch.equal(data[row].input_ids, data.read(row).input_ids)


def test_the_replacement_of_a_bad_row_depends_on_its_index_alone(damaged, tiny_tokenizer):
    """A resumed run sees the same rows as an uninterrupted one, for any state of the RNGs."""
    first, second = load_dataset(damaged, tiny_tokenizer), load_dataset(damaged, tiny_tokenizer)
    expected = [first[row] for row in (3, 6, 9)]
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    state = random.getstate(), torch.get_rng_state()
    for row, example in reversed(list(zip((3, 6, 9), expected, strict=True))):
        again = second[np.int64(row)]
        assert torch.equal(again.input_ids, example.input_ids)
        assert again.bad == example.bad
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_different_bad_rows_get_different_replacements(tmp_path, tiny_tokenizer):
    """Neighbours often use the same broken clip, so the next row would be a poor choice."""
    rows = [{"conversations": talk(f"what {number}", "left")} for number in range(60)]
    rows[:20] = [{"id": number} for number in range(20)]
    data = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows))
    chosen = {tuple(data[number].input_ids.tolist()) for number in range(20)}
    assert len(chosen) > 8


@pytest.mark.parametrize(("count", "tried"), [(30, 8), (8, 8), (3, 3), (1, 1)])
def test_if_every_row_is_bad_the_first_error_is_raised_after_eight_tries(
    tmp_path, tiny_tokenizer, monkeypatch, count, tried
):
    """Bounded, unlike the released code; no row is tried twice, and no text row is used."""
    rows = [
        {"id": i, "video": f"gone_{i}.mp4", "conversations": talk("a", "b")} for i in range(count)
    ]
    rows.append({"id": "text", "conversations": talk("left", "right")})
    data, seen = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows)), []
    read = data.read

    def read_and_note(index: int) -> Example:
        seen.append(index)
        return read(index)

    monkeypatch.setattr(data, "read", read_and_note)
    with pytest.raises(VideoError, match=r"gone_0\.mp4"):
        data[0]
    assert seen[0] == 0
    assert len(seen) == len(set(seen)) == tried
    assert count not in seen


def test_an_index_beyond_the_end_is_an_index_error(mixed):
    """Python iterates over a sequence until IndexError."""
    assert len(list(mixed)) == 4
