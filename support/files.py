"""Text files and journals that a killed process cannot leave half written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from support.errors import UserError
from support.records import Record, as_record, parse_json, read_text


class Journal:
    """An append-only log of results: a killed run keeps all of them, and a rerun skips them.

    Each record is a line of JSON in FOLDER/RANK.jsonl. Each process of a run has a file of its own,
    so that no two processes write into each other's lines. FOLDER/settings.json holds whatever the
    records depend on. Opening a journal with other settings raises UserError, because its records
    belong to another run.
    """

    def __init__(self, folder: Path, settings: dict, rank: int = 0):
        self.file = folder / f"{rank}.jsonl"
        settings_file = folder / "settings.json"
        if settings_file.exists():
            fix = f"delete {folder}; the same command asks its questions again."
            stored = read_text(settings_file, fix)
            if parse_json(stored, str(settings_file), fix) != settings:
                what = f"{folder} holds the answers of another run."
                why = f"it was made with {stored}, but this run has {json.dumps(settings)}."
                raise UserError(what, why, "choose another --output, or delete that folder.")
        write_file(settings_file, json.dumps(settings))
        # Remove a last line that a kill cut short, so that the next record starts a new line.
        write_file(self.file, "".join(whole_lines(self.file)))

    def records(self) -> Iterator[Record]:
        """Read the records of all processes. A damaged line raises DataError, which names it."""
        fix = "delete this line; the same command asks its questions again."
        for path in sorted(self.file.parent.glob("*.jsonl")):
            for number, line in enumerate(whole_lines(path), 1):
                place = f"{path}, line {number}"
                yield as_record(parse_json(line, place, fix), place, fix)

    def append(self, record: dict) -> None:
        """Add a record. It is on disk when this returns."""
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """The complete lines of a file, with their line breaks; none if there is no such file.

    A last line without a line break is left out: it was cut short, or is being written right now.
    """
    if not path.exists():
        return []
    lines = read_text(path, "delete it.").split("\n")
    return [f"{line}\n" for line in lines[:-1]]


def write_file(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old text or the new one, never a part.

    The name of the temporary file contains the process id, so that several processes may write the
    same file. What UTF-8 cannot encode, half an emoji, becomes a question mark.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial_path.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    partial_path.replace(path)
