"""data.ConversationDataset: rows of a JSON file, and what happens to rows that cannot be used."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MALFORMED, SMALL, dataset_of, load_dataset, talk
from PIL import Image

from data import IGNORE, TEMPLATES, ConversationDataset, Example, GroupedBatchSampler, preprocess
from data import main as run_command
from support.errors import DataError, VideoError
from support.features import FeatureCache
from support.video import load_video

ROOT = Path(__file__).parent.parent

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
    visual = isinstance(row, dict) and bool(row.get("video"))
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


# ------------------------------------------------------------------------------- what a row names


@pytest.mark.parametrize("nothing", ['""', "null", "NaN", "[]", '[""]', "[null]", '" "'])
@pytest.mark.parametrize("key", ["video", "image"])
def test_empty_media_are_none(mixed_folder, tiny_tokenizer, key, nothing):
    """`"video": ""` used to name the data folder itself, whose pictures were trained on."""
    row = f'[{{"{key}": {nothing}, "conversations": {json.dumps(talk("left", "right"))}}}]'
    (mixed_folder / "empty.json").write_text(row)
    data = load_dataset(mixed_folder / "empty.json", tiny_tokenizer)
    assert data.modalities == ["text"]
    assert data.media(data.rows[0]) == ("text", None)
    assert data.read(0).pixels == {}
    assert data.find_fault(0) is None


def test_a_list_of_one_video_is_that_video(mixed_folder, tiny_tokenizer):
    """Beside an image that is null, as tables write it."""
    row = {"video": ["clip.mp4"], "image": None, "conversations": talk("<video>\nwhat", "left")}
    (mixed_folder / "list.json").write_text(json.dumps([row]))
    data = load_dataset(mixed_folder / "list.json", tiny_tokenizer)
    assert data.media(data.rows[0]) == ("video", mixed_folder / "clip.mp4")
    assert data.read(0).pixels


BAD_MEDIA = {
    "two videos": ({"video": ["clip.mp4", "clip.mp4"]}, "2 videos or images"),
    "a video and an image": ({"video": "clip.mp4", "image": "still.png"}, "2 videos or images"),
    "true": ({"image": True}, "its image is True"),
    "an object": ({"image": {"path": "still.png"}}, "its image is {'path'"),
    "the data folder": ({"video": "."}, "the data folder itself"),
    "a name that is too long": ({"video": "x" * 5000}, "cannot be looked up"),
    "a name with NUL": ({"video": "clip\0.mp4"}, "cannot be looked up"),
    "half an emoji": ({"video": "\ud83d.mp4"}, "cannot be looked up"),
    "another key": ({"images": ["still.png"]}, "a placeholder, but it names no video or image"),
}


@pytest.mark.parametrize("kind", BAD_MEDIA)
@pytest.mark.parametrize("with_cache", [False, True])
def test_media_that_cannot_be_meant_make_a_bad_row(mixed_folder, tiny_tokenizer, kind, with_cache):
    """Each was once read as a text row, as another file or as a traceback."""
    media, wanted = BAD_MEDIA[kind]
    row = {"id": 5, **media, "conversations": talk("<image>\nwhat", "left")}
    (mixed_folder / "bad.json").write_text(json.dumps([row]))
    data = load_dataset(mixed_folder / "bad.json", tiny_tokenizer)
    if with_cache:
        data.cache = FeatureCache(mixed_folder / "cache", {c.name: c.name for c in SMALL})
    with pytest.raises(DataError, match="row 0") as caught:
        data.read(0)
    assert wanted in str(caught.value)
    assert wanted in data.find_fault(0)["reason"]
    assert data.media(data.rows[0]) == ("text", None)  # a cache is filled without it


@pytest.mark.parametrize(
    "question",
    ["<image>\nwhat is it?", "<image> What is it?", "What?\n<video>", "What is it? <video>",
     "<video>", "<image>\n<image>\nwhich", "<image><image> Which?", "<image> describe the picture",
     "<video>what happens?"],
)  # fmt: skip
def test_a_placeholder_without_a_file_makes_a_bad_row(tmp_path, tiny_tokenizer, question):
    """In the first question or a later one."""
    turns = talk(question, "a")
    rows = [{"conversations": turns}, {"conversations": talk("Hi", "Hello") + turns}]
    data = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows))
    for row in (0, 1):
        with pytest.raises(DataError, match="placeholder"):
            data.read(row)


@pytest.mark.parametrize("key", ["images", "videos", "image_path", "Video"])
def test_a_file_under_another_key_makes_a_bad_row(tmp_path, tiny_tokenizer, key):
    """Without a placeholder it was trained on as text. An empty key is nothing."""
    talking = talk("what is it?", "a cat")
    rows = [{key: name, "conversations": talking} for name in (["a.png"], "a.png", [], None, "")]
    data = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows))
    assert [data.find_fault(row) is None for row in range(5)] == [False, False, True, True, True]
    assert f"its '{key}' is ['a.png']" in data.find_fault(0)["reason"]


@pytest.mark.parametrize(
    "question",
    ["What does the <video> tag do?", "<video> is a tag of HTML.", "Explain the tag <video>",
     "<video>\n<source src='a.mp4'>\n</video>\nWhy is it dark?", "Say <image>, then <video>."],
)  # fmt: skip
def test_a_placeholder_in_a_sentence_of_a_text_row_is_text(tmp_path, tiny_tokenizer, question):
    """A question about HTML lost its subject: "What does the tag do?"."""
    rows = [{"conversations": talk(question, "see <video>.")}]
    data = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows))
    turns, path = data.parse(0)
    assert path is None
    assert turns == [(f"In: {question}\nOut:", False), ("see <video>.", True)]


@pytest.mark.parametrize("lead", [["gpt"], ["system"], ["system", "gpt"]])
def test_turns_before_the_first_human_one_are_dropped(tmp_path, tiny_tokenizer, lead):
    """ShareGPT's rows often begin with a greeting; LLaVA drops it."""
    said = [{"from": role, "value": "hello"} for role in lead] + talk("left", "right")
    data = dataset_of(tmp_path, tiny_tokenizer, json.dumps([{"conversations": said}]))
    assert data.parse(0)[0] == [("In: left\nOut:", False), ("right", True)]
    assert data.rows[0]["conversations"] == talk("left", "right")


def test_a_row_without_a_label_is_listed_but_can_be_read(tmp_path, tiny_tokenizer):
    """A question without an answer, and an answer behind more text than is read."""
    rows = [{"conversations": talk("left")}, {"conversations": talk("left " * 50, "right")}]
    data = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows), max_length=20)
    for row in (0, 1):
        assert "has no label" in data.find_fault(row)["reason"]
        assert (data[row].labels == IGNORE).all()
        assert data[row].bad == []


# ----------------------------------------------------------------------------- the data folder only


WAYS = ("an absolute path", "two dots", "a link", "a folder that is a link", "a folder of links")


@pytest.mark.parametrize("way", WAYS)
def test_a_path_out_of_the_data_folder_is_refused_unless_allowed(
    tmp_path, tiny_tokenizer, clip, way
):
    """A data set from elsewhere could otherwise make training read any file of its user."""
    name = outside_of(tmp_path, clip)[way]
    rows = [{"video": name, "conversations": talk("what", "left")}]
    data = dataset_of(tmp_path / "data", tiny_tokenizer, json.dumps(rows))
    with pytest.raises(DataError, match="outside the data folder") as caught:
        data.read(0)
    assert "--allow-outside" in str(caught.value)
    assert data.media(data.rows[0]) == ("text", None)
    folder = tmp_path / "data"
    allowed = dataset_of(folder, tiny_tokenizer, json.dumps(rows), allow_outside=True)
    assert allowed.read(0).pixels


def outside_of(folder: Path, clip: Path) -> dict[str, str]:
    """Ways to leave a data set's folder: what the way is -> the name in the row."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "clip.mp4").write_bytes(clip.read_bytes())
    Image.new("RGB", (30, 20)).save(elsewhere / "0.png")
    data = folder / "data"
    (data / "frames").mkdir(parents=True)
    (data / "frames" / "0.png").symlink_to(elsewhere / "0.png")
    (data / "link.mp4").symlink_to(elsewhere / "clip.mp4")
    (data / "videos").symlink_to(elsewhere)
    return {
        "an absolute path": str(elsewhere / "clip.mp4"),
        "two dots": "../elsewhere/clip.mp4",
        "a link": "link.mp4",
        "a folder that is a link": "videos/clip.mp4",
        "a folder of links": "frames",
    }


def test_the_command_takes_allow_outside(tmp_path, clip):
    """`data.py --check` names the option that a data set of links needs."""
    names = outside_of(tmp_path, clip).values()
    rows = [{"video": name, "conversations": talk("what", "left")} for name in names]
    (tmp_path / "data" / "stage2.json").write_text(json.dumps(rows))
    command = [sys.executable, "data.py", str(tmp_path / "data"), "--check", "--workers", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout.count("use --allow-outside") == len(rows)
    command.append("--allow-outside")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("stages", [("stage1",), ("stage2",), ("stage1", "stage2"), ()])
def test_the_command_checks_the_stages_that_a_folder_has(tmp_path, capsys, stages):
    """Recipe frozen needs no stage1.json, and align no stage2.json."""
    rows = [{"video": "missing.mp4", "conversations": talk("what", "left")}]
    for stage in stages:
        (tmp_path / f"{stage}.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit) as ended:
        run_command([str(tmp_path), "--check", "--workers", "0"])
    if stages:
        assert ended.value.code == 1
        printed = capsys.readouterr().out
        for stage in ("stage1", "stage2"):
            line = f"{stage}.json: 1 rows, 1 of them cannot be used"
            assert (line in printed) == (stage in stages)
    else:
        assert "stage2.json" in ended.value.code


def test_paths_and_links_inside_the_data_folder_are_followed(tmp_path, tiny_tokenizer, clip):
    """The folder itself may be reached through a link."""
    (tmp_path / "real" / "videos").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "videos" / "clip.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "real" / "link.mp4").symlink_to("videos/clip.mp4")
    names = ["link.mp4", "videos/../link.mp4", str(tmp_path / "real" / "link.mp4")]
    rows = [{"video": name, "conversations": talk("what", "left")} for name in names]
    data = dataset_of(tmp_path / "data", tiny_tokenizer, json.dumps(rows))
    assert all(data.read(row).pixels for row in range(3))


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder with a pipe"])
@pytest.mark.parametrize("with_cache", [False, True])
def test_what_is_no_file_never_makes_training_wait(tmp_path, tiny_tokenizer, kind, with_cache):
    """Opening a pipe waits for a writer; the cache, which hashes files, once did."""
    file = tmp_path / "clip.mp4"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "loop":
        file.symlink_to(file)
    else:
        file.mkdir()
        os.mkfifo(file / "0.png")
    rows = [{"video": "clip.mp4", "conversations": talk("what", "left")}]
    data = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows), allow_outside=True)
    if with_cache:
        data.cache = FeatureCache(tmp_path / "cache", {c.name: c.name for c in SMALL})
        assert not data.cache.find(file)
    with pytest.raises(DataError):
        data.read(0)


def test_a_file_without_rows_is_not_a_dataset(tmp_path, tiny_tokenizer):
    """Training on it would take no step and save an untrained model."""
    with pytest.raises(DataError, match="it holds no rows"):
        dataset_of(tmp_path, tiny_tokenizer, "[]")


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
