"""The rows of a data set: what a row names, and all rows in a form that many processes share."""

from __future__ import annotations

import itertools
import json
import os
import re
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from support.errors import DataError
from support.records import clean, is_missing

MEDIA = ("video", "image")  # the keys under which a row may name a file
OTHER_KEYS = "(?i)(image|video)s?(_?(path|file|name|url)s?)?"  # under which other data sets do
NAME_ONE = 'name one file under "video" or "image"; other keys, such as "images", are not read.'
# Words that make "<video>" before them a word: "<video> is a tag", "<video> and <image>"
TAG_WORDS = r"(?:(?:is|are|was|has|does|can|should|must|will|and|or|in|tags?|elements?)\b)"

# ----------------------------------------------------------------------------------------- one row


def tidy(row: object) -> dict:
    """Remove the turns before the first human one, as LLaVA does: a system prompt or a greeting.

    A row that is not an object becomes {}. Anything else is left for `data.render_prompt` to judge.
    """
    if not isinstance(row, dict):
        return {}
    turns = row.get("conversations")
    if isinstance(turns, list):
        kept = list(itertools.dropwhile(comes_before_human, turns))
        if kept:
            row["conversations"] = kept
    return row


def comes_before_human(turn: object) -> bool:
    """Whether a turn is one that may open a conversation but is not part of it."""
    return isinstance(turn, dict) and turn.get("from") in ("gpt", "system")


def names_of(row: dict, kind: str) -> list:
    """What a row names under "video" or "image": [] if that is missing or empty text."""
    values = row.get(kind)
    if not isinstance(values, list):
        values = [values]
    return [value for value in values if not is_missing(value) and str(value).strip()]


def modality_of(row: dict) -> str:
    """ "video", "image" or "text", also of a row that turns out to be malformed."""
    for kind in MEDIA:
        if names_of(row, kind):
            return kind
    return "text"


def find_media(row: dict, folder: Path, allow_outside: bool) -> Path | None:
    """Return the file or folder of frames that a row names, or None for a text row.

    folder: what names are relative to. allow_outside: whether a name may lead out of it. Whether
    the file exists and can be decoded is for load_video to say. Raises DataError if the row names
    several files or something that is not a file.
    """
    names = names_of(row, "video") + names_of(row, "image")
    if not names:
        return None
    if len(names) > 1:
        what = f"it names {len(names)} videos or images."
        raise DataError(what, "the model sees one of them at a time.", "keep one in each row.")
    if isinstance(names[0], bool) or not isinstance(names[0], str | int | float):
        what = f"its {modality_of(row)} is {clean(reprlib.repr(names[0]))}."
        raise DataError(what, "the name of a file belongs there.", "write its name.")
    path = folder / str(names[0])
    try:
        check_place(path, folder, allow_outside)
    except (OSError, ValueError) as error:  # a name that is too long, or has NUL in it
        if isinstance(error, DataError):
            raise
        what = f"its {modality_of(row)} {clean(reprlib.repr(names[0]))} cannot be looked up."
        raise DataError(what, f"{error}.", "correct the name.") from error
    return path


def require_text(row: dict) -> None:
    r"""Raise DataError if a row without a file asks about one, or has one under another key.

    The question of a human turn asks about one if it begins or ends with <image> or <video>, and
    that is not a word of a sentence. Without this check, the row would be trained on as text.

        <image>\nwhat is it?     <image> what is it?     What is it?\n<video>       an error
        What is the <video> tag?     <video> is a tag.     <video>\n</video>      text, here HTML
    """
    marks = r"(?:<(?:image|video)>\s*)+"
    for turn in row["conversations"][::2]:
        question = turn["value"]
        begins = re.match(rf"\s*{marks}(?:$|(?<=[\n>])[\w\"(]|(?!{TAG_WORDS})[\w\"(])", question)
        # WHY its last part: the time of this search grows with the square of the length.
        ends = re.search(rf"[\n.?!]\s*{marks}$", question.rstrip()[-500:])
        if (begins or ends) and not re.search("</(image|video)>", question):
            what = "its question has a placeholder, but it names no video or image."
            why = "visual tokens take the place of <image> and <video>."
            raise DataError(what, why, NAME_ONE)
    for key, value in row.items():
        if re.fullmatch(OTHER_KEYS, key) and value != {} and names_of(row, key):
            what = f"its {clean(reprlib.repr(key))} is {clean(reprlib.repr(value))}."
            why = "that key is not read, so the row would be trained on as text."
            raise DataError(what, why, NAME_ONE)


def check_place(path: Path, folder: Path, allow_outside: bool) -> None:
    """Raise DataError if a path, with all links followed, is the data folder or leads out of it.

    allow_outside: it may lead out. Pipes and devices are refused too, because reading one may never
    end. In a folder of frames each link is followed.
    """
    links = [path]
    if path.is_dir():
        links += [Path(entry.path) for entry in os.scandir(path) if entry.is_symlink()]
    root = os.path.realpath(folder)
    for link in links:
        target = Path(os.path.realpath(link))
        if target == Path(root):
            fix = "name a video, an image or a folder of frames."
            raise DataError(f"{link} is the data folder itself.", "it is not a single clip.", fix)
        if not allow_outside and not target.is_relative_to(root):
            why = f"it leads to {target}, and a data set of others could name any file that way."
            fix = "use --allow-outside if you trust it: in many data sets, files are links."
            raise DataError(f"{link} is outside the data folder.", why, fix)
        if target.exists() and not target.is_file() and not target.is_dir():
            why = "it is a pipe or a device."
            raise DataError(f"{link} is not a file.", why, "save the video as a file.")


# ------------------------------------------------------------------------------------- all the rows


class Rows(Sequence):
    """Rows of a JSON file, kept as text in one array of bytes and parsed when they are used.

    WHY: Python counts references inside every object, so a worker that only reads a list of
    dictionaries gets a copy of it page by page: 3.7 GB for 765,000 conversations. A forked worker
    shares one array without copying it.

        rows    {"id": 7}    {"id": 12}
        text    {"id": 7}{"id": 12}
        ends    9, 19        where the text of each row ends
    """

    def __init__(self, rows: Iterable[dict]):
        text = bytearray()
        ends = []
        for row in rows:
            text += json.dumps(row).encode()
            ends.append(len(text))
        self.text = np.frombuffer(text, dtype=np.uint8)
        self.ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        chosen = range(len(self))[index]  # also checks the bounds and counts from the end
        if isinstance(index, slice):
            return list(map(self.parse, chosen))
        return self.parse(chosen)

    def parse(self, number: int) -> dict:
        """Row `number`, 0 or more."""
        begin = 0
        if number > 0:
            begin = self.ends[number - 1]
        text = self.text[begin : self.ends[number]]
        return json.loads(text.tobytes())
