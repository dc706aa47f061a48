"""Files that a killed process cannot leave half written, journals, and locks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from support.errors import UserError
from support.records import Record, as_record, parse_json, read_text

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

MAKE_ROOM = "make room, or make the folder writable; the same command then continues."


def lock(path: Path, protected: Path | None = None) -> TextIO:
    """Lock a file, which is made if it is missing, until the returned file is closed.

    protected: the folder that the lock is for (default: the folder of the file).

    UserError if another process holds the lock; it names the host and the process. The system
    releases a lock when its process ends, however that ends: a file that is left over does not
    block anyone. A process may take a lock that it holds already.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8", errors="replace")
    try:
        if sys.platform == "win32":
            file.seek(2**30)  # on Windows nobody can read the bytes that are locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            # WHY not flock: the workers of a DataLoader would inherit it and keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read(300).strip() or "another process"
            file.close()
            why = f"{holder} has locked {path}, and two at once would spoil each other's files."
            fix = "wait until it has ended, or end it; its work is kept. Or choose another folder."
            raise UserError(f"{protected or path.parent} is in use.", why, fix) from error
        print(f"{path}: {error.strerror}; start this command only once.", file=sys.stderr)
    with writing(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise UserError, which names the path and the remedy, if the disk is full or read-only."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be written.", f"{why}.", MAKE_ROOM) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write in the `with` block, which then becomes `path`.

    Readers see the old file or the new one, never a part. The temporary name contains the process
    id, so several processes may write the same file: the first to finish wins. What killed
    processes left behind is removed. UserError if the disk is full or read-only.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path):
        if not path.parent.is_dir():  # asking is cheaper than trying to create it
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        except FileNotFoundError:
            if not path.exists():  # nobody was first
                raise
        finally:
            partial.unlink(missing_ok=True)
        for name in os.listdir(path.parent):
            if name.startswith(f"{path.name}.") and name.endswith(".partial"):
                (path.parent / name).unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Where to make a folder that replaces `folder` once it is complete.

    WHY renamed before it is deleted: that takes a moment, and deleting takes seconds, in which a
    kill would leave half of it under its name.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    replaced = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    if folder.exists():
        folder.rename(replaced / folder.name)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


class Journal:
    """An append-only log of results: a killed run keeps all of them, and a rerun skips them.

    Each record is a line of JSON in FOLDER/RANK.jsonl. Each process of a run has a file of its own,
    so that no two processes write into each other's lines; FOLDER/RANK.lock keeps a second start of
    the same command away (UserError). FOLDER/settings.json holds whatever the records depend on.
    Opening a journal with other settings raises UserError, because its records belong to another
    run.
    """

    def __init__(self, folder: Path, settings: dict, rank: int = 0):
        self.file = folder / f"{rank}.jsonl"
        self.append_lock = threading.Lock()  # a judge appends from several threads
        self.lock = lock(folder / f"{rank}.lock")
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

    def append(self, *records: dict) -> None:
        """Add records. They are on disk when this returns."""
        with self.append_lock:
            append_lines(self.file, *records)


def append_lines(path: Path, *records: dict) -> None:
    """Add records to a file of JSON lines. They are on disk when this returns."""
    with writing(path), path.open("a") as file:
        for record in records:
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
    """Write a text file as `replacing` does.

    What UTF-8 cannot encode, half an emoji, becomes a question mark.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")
