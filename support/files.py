"""Text files and journals that a kill cannot leave half written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from support.errors import UserError


class Journal:
    """Records on disk as they come, one JSON line each: a kill loses none, a rerun repeats none.

    One file a process, so that processes never write into each other's lines. settings: of the run;
    a journal of other settings is refused, because its answers are not this run's.
    """

    def __init__(self, folder: Path, settings: dict, rank: int = 0):
        self.file, known = folder / f"{rank}.jsonl", folder / "settings.json"
        if known.exists() and json.loads(known.read_text()) != settings:
            what = f"{folder} holds the answers of another run."
            why = f"it was made with {known.read_text()}, this is {json.dumps(settings)}."
            raise UserError(what, why, "give another --output, or delete that folder.")
        write_file(known, json.dumps(settings))
        write_file(self.file, "".join(whole_lines(self.file)))

    def records(self) -> Iterator[dict]:
        """Everything any process has written."""
        for path in sorted(self.file.parent.glob("*.jsonl")):
            yield from map(json.loads, whole_lines(path))

    def append(self, record: dict) -> None:
        """On disk when this returns."""
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """Without the last line, if a kill has cut it short or it is being written."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def write_file(path: Path, text: str) -> None:
    """A text file, complete or as it was; also if several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial_path.write_text(text)
    partial_path.replace(path)
