"""`python data.py DIR`: list the rows that cannot be used, print tokens and labels."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from helpers import (  # noqa: F401  re-exported
    MALFORMED,
    decode_everything,
    numbered_frames,
    talk,
    train_tokenizer,
    write_video,
)
from PIL import Image

from data import IGNORE, TEMPLATES, load_pixels, preprocess, render_prompt, tokenize
from encoders import ENCODERS
from llama import Tokenizer
from support.video import load_video

CASES = REPOSITORY / "tests" / "cases"


def test_check_lists_every_bad_row_of_every_stage_and_fails(damaged):
    """With id, file and reason: a video cut off, a missing one, and wrong roles."""
    folder = damaged.parent
    rows = [{"id": "c", "video": "clip.mp4", "conversations": talk("a", "b")}, *MALFORMED.values()]
    (folder / "stage1.json").write_text(json.dumps(rows))
    (folder / "notes.json").write_text("[7]")  # not a stage, so not read
    done = look_at(folder, "--check")
    assert done.returncode == 1, done.stderr
    captions, instructions = done.stdout.split(f"{len(MALFORMED)} of them cannot be used\n")
    bad = re.findall(r"^row (\d+) ", captions, re.MULTILINE)
    assert bad == [str(row) for row in range(1, 1 + len(MALFORMED))]
    found = re.findall(r"^row (\d+)  id (\S+)  file (\S+)\n(.*)$", instructions, re.MULTILINE)
    assert [(row, name, file) for row, name, file, _ in found] == [
        ("3", "id-3", str(folder / "half.mp4")),
        ("6", "id-6", str(folder / "gone.mp4")),
        ("9", "id-9", str(folder / "clip.mp4")),
    ]
    for (*_, reason), expected in zip(found, ["incomplete", "no such", "['gpt']"], strict=True):
        assert expected in reason
    assert instructions.endswith(f"{damaged}: 30 rows, 3 of them cannot be used\n")
    assert "check stage2.json" in done.stderr and "30/30" in done.stderr  # the bar


def look_at(*arguments: object) -> subprocess.CompletedProcess:
    """Run `python data.py ARGUMENTS` as a user does."""
    script = Path(__file__).parent.parent / "data.py"
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_show_prints_every_token_with_its_label(mixed_folder, llama2_tokenizer, tmp_path):
    """The file, the text, and - for tokens without a loss; captions have no prompt."""
    rows = json.loads((mixed_folder / "rows.json").read_text())
    for stage in ("stage1.json", "stage2.json"):
        (tmp_path / stage).write_text(json.dumps(rows[:2]))
    done = look_at(tmp_path, "--show", 1, "--tokenizer", llama2_tokenizer.path)
    assert done.returncode == 0, done.stderr
    caption, instruction = (part.splitlines() for part in done.stdout.strip().split("\n\n"))
    assert (
        instruction[0] == f"{tmp_path / 'stage2.json'}, row 0  id v  video {tmp_path / 'clip.mp4'}"
    )
    assert instruction[1].split(maxsplit=1) == ["prompt", repr("In: what moves\nOut:")]
    assert instruction[2].split(maxsplit=1) == ["answer", repr("red square")]
    turns = render_prompt(rows[0]["conversations"], TEMPLATES["base"])
    expected = [
        [str(i), llama2_tokenizer.pieces.id_to_piece(i), "-" if label == IGNORE else str(label)]
        for i, label in zip(*tokenize(turns, llama2_tokenizer), strict=True)
    ]
    assert [line.split() for line in instruction[3:]] == [["id", "piece", "label"], *expected]
    labels = [line.split()[-1] for line in caption[4:]]
    assert labels == ["-", *(str(i) for i in [*llama2_tokenizer.encode("red square"), 2])]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--check"], "Cannot read"),
        (["--show", "1"], "Found no tokenizer.model at tokenizer.model"),
    ],
)
def test_a_missing_folder_or_tokenizer_is_explained(tmp_path, arguments, wanted):
    done = look_at(tmp_path / "nowhere", *arguments)
    assert done.returncode != 0 and wanted in done.stderr and "Traceback" not in done.stderr


def test_show_escapes_a_piece_that_is_a_newline(mixed_folder, tmp_path):
    """A tokenizer may have a newline as a piece of its own: each token still takes one line."""
    path = tmp_path / "tokenizer.model"
    train_tokenizer(path, user_defined_symbols=["\n"])
    tokenizer = Tokenizer(path)
    (newline,) = (i for i in range(320) if tokenizer.pieces.id_to_piece(i) == "\n")
    rows = json.loads((mixed_folder / "rows.json").read_text())
    (tmp_path / "stage2.json").write_text(json.dumps(rows[:1]))
    done = look_at(tmp_path, "--show", 1, "--tokenizer", path)
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("label\n")[1].splitlines()
    ids, _ = tokenize(render_prompt(rows[0]["conversations"], TEMPLATES["base"]), tokenizer)
    assert [int(line.split()[0]) for line in table] == ids
    assert table[ids.index(newline)].split() == [str(newline), "\\n", "-"]


def test_show_prints_half_an_emoji_as_a_replacement(mixed_folder, llama2_tokenizer, tmp_path):
    """In the name of a row; it cannot be written to a terminal."""
    rows = json.loads((mixed_folder / "rows.json").read_text())
    (tmp_path / "stage2.json").write_text(json.dumps([rows[0] | {"id": "\ud83d"}]))
    done = look_at(tmp_path, "--show", 1, "--tokenizer", llama2_tokenizer.path)
    assert done.returncode == 0, done.stderr
    assert "row 0  id \N{REPLACEMENT CHARACTER}" in done.stdout


def test_a_malformed_first_row_does_not_stop_the_check(mixed_folder, llama2_tokenizer, tmp_path):
    """--show cannot print it; --check lists it, and the rows of every other file."""
    rows = json.loads((mixed_folder / "rows.json").read_text())
    malformed = [{"id": "7", "conversations": [{"from": "human"}]}, *rows]
    for stage in ("stage1.json", "stage2.json"):
        (tmp_path / stage).write_text(json.dumps(malformed))
    done = look_at(tmp_path, "--check", "--show", 1, "--tokenizer", llama2_tokenizer.path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.count("row 0  id 7") == 2


def test_a_command_without_a_folder_asks_for_one():
    done = look_at("--check")
    assert done.returncode != 0 and "Which folder?" in done.stderr


@pytest.mark.parametrize("name", [file.name for file in CASES.glob("*.*4")])
def test_frames_scaled_one_by_one_are_those_of_the_whole_clip(name):
    """Also of a film that is mirrored, whose frames torch once refused, or decoded twice."""
    encoders = [ENCODERS[f"miniature-{encoder}"] for encoder in ("languagebind", "vivit")]
    frames = load_video(CASES / name, 8)
    pixels = load_pixels(CASES / name, encoders)
    for config in encoders:
        assert torch.equal(pixels[config.name], preprocess(frames, config))


LOAD_BIG = """
import sys
import torch
from data import load_pixels
from encoders import ENCODERS
from tests.fuzz import peak_memory

torch.set_num_threads(1)
encoders = [ENCODERS[name] for name in ("languagebind", "dinov2", "vivit", "siglip")]
load_pixels(sys.argv[1], encoders)
peak_memory()
before = peak_memory()
load_pixels(sys.argv[2], encoders)
print(peak_memory() - before)
"""


@pytest.mark.parametrize(
    "name", ["photo.png", *(pytest.param(n, marks=pytest.mark.slow) for n in ("a.png", "8k.mp4"))]
)
def test_the_largest_frames_are_loaded_in_a_gigabyte(tmp_path, name):
    """A photo of 64 million pixels, a transparent one, and 32 frames of a film in 8K.

    All frames were once in memory together and scaled as floats: 4 frames of 8K took 5 GB.
    """
    Image.new("RGB", (48, 32)).save(tmp_path / "small.png")
    if name == "8k.mp4":
        frame = np.zeros((4320, 7680, 3), np.uint8)
        frame[::7] = 200
        frames = [np.roll(frame, 3 * number, 0) for number in range(4)]
        write_video(tmp_path / name, frames, preset="ultrafast")
    else:
        mode = "RGBA" if name == "a.png" else "RGB"
        Image.new(mode, (8000, 8000), "red").save(tmp_path / name, compress_level=1)
    command = [sys.executable, "-c", LOAD_BIG, tmp_path / "small.png", tmp_path / name]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1
