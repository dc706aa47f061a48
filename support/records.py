"""Read text files that other people and older versions wrote: JSON, JSON lines and CSV.

Every field is checked where it is read, so a bad value is reported with its file and its row before
anything is computed:

    row = Record({"id": 7, "start": "12.5"}, "test_q.json, id 7")
    row.text("id")       -> "7"
    row.number("start")  -> 12.5
    row.text("video")    -> DataError: test_q.json, id 7: has no video.

Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path

from support.errors import DataError

LAYOUT = "correct the file; docs/evaluate.md shows its layout (Benchmarks)."
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
MISSING = ("", "nan", "none", "null")  # how programs write "no number" as text

csv.field_size_limit(2**31 - 1)  # Python's default refuses fields of more than 128 KB


def clean(text: str) -> str:
    r"""Replace unpaired surrogates ("half an emoji"), which no file can encode, and NUL by U+FFFD.

    JSON can write them: json.loads(r'"\ud83d"') is an unpaired surrogate.
    """
    return re.sub(r"[\ud800-\udfff\0]", "\ufffd", text)


@dataclass(frozen=True)
class Record:
    """A row of a file. Its methods read one field each and raise DataError if it is malformed.

    A field is missing if it is absent, null, NaN or, where a number belongs, empty.
    """

    values: dict
    place: str  # the file and the row, which errors begin with
    fix: str = LAYOUT  # what errors suggest

    def fault(self, what: str, why: str) -> DataError:
        """The error that says what is wrong with this row."""
        return DataError(f"{self.place}: {what}", why, self.fix)

    def wrong(self, field: str, wanted: str) -> DataError:
        """The error for a field that is missing or has the wrong type."""
        value = self.values.get(field)
        if is_missing(value):
            fields = reprlib.repr(list(self.values))
            return self.fault(f"has no {field}.", f"{wanted} belongs there; it has {fields}.")
        what = f"{field} is {clean(reprlib.repr(value))}."
        return self.fault(what, f"{wanted} belongs there.")

    def text(self, field: str, default: str | None = None) -> str:
        """A text, also one written as a number: 7 -> "7". A default makes the field optional."""
        value = self.values.get(field)
        empty = is_missing(value) or value == ""
        if empty and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.wrong(field, "a text")
        if empty or value in (math.inf, -math.inf):
            raise self.wrong(field, "a text")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # tables with gaps turn 7 into 7.0
        return clean(str(value))

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts; () if it is missing."""
        values = self.items(field)
        elements = Record(dict(enumerate(values)), f"{self.place}, {field}", self.fix)
        return tuple(elements.text(number) for number in range(len(values)))

    def items(self, field: str) -> list:
        """A list of anything; [] if it is missing."""
        value = self.values.get(field)
        if is_missing(value):
            return []
        if not isinstance(value, list | tuple):
            raise self.wrong(field, "a list")
        return list(value)

    def number(self, field: str) -> float | None:
        """A finite number, also one written as text: "12.5" -> 12.5. None if it is missing."""
        value = self.values.get(field)
        if isinstance(value, str):
            value = value.strip()
            if NUMBER.fullmatch(value):
                value = float(value)
            elif value.lower() in MISSING:
                value = None
        if is_missing(value):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(field, "a number")
        if not -1e300 < value < 1e300:
            raise self.wrong(field, "a finite number")
        return value

    def whole(self, field: str) -> int | None:
        """A whole number, also as text or with .0; None if it is missing."""
        value = self.number(field)
        if value is None:
            return None
        if value != int(value):
            raise self.wrong(field, "a whole number")
        return int(value)

    def numbers(self, field: str) -> tuple[float | None, ...]:
        """A list of finite numbers; () if it is missing."""
        values = self.items(field)
        elements = Record(dict(enumerate(values)), f"{self.place}, {field}", self.fix)
        return tuple(elements.number(number) for number in range(len(values)))

    def flag(self, field: str) -> bool:
        """True or false; false if it is missing."""
        value = self.values.get(field)
        if not isinstance(value, bool | None):
            raise self.wrong(field, "true or false")
        return bool(value)

    def record(self, field: str) -> Record:
        """An object inside this one."""
        return as_record(self.values.get(field), f"{self.place}, {field}", self.fix)


def is_missing(value: object) -> bool:
    """Whether a field has no value: null, or NaN, which tables have in place of it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_record(value: object, place: str, fix: str = LAYOUT) -> Record:
    """Wrap a JSON value, which must be an object."""
    if not isinstance(value, dict):
        why = f"an object {{...}} belongs there, but it is {clean(reprlib.repr(value))}."
        raise DataError(f"{place}: is not an object.", why, fix)
    return Record(value, place, fix)


def as_records(rows: list, place: str, key: str) -> list[Record]:
    """Wrap a list of JSON values, each named after its field `key`, or else by its number."""
    records = []
    for number, row in enumerate(rows, 1):
        name = f"record {number}"
        if isinstance(row, dict) and isinstance(row.get(key), str | int):
            name = clean(f"{key} {row[key]}"[:100])
        records.append(as_record(row, f"{place}, {name}"))
    return records


def read_text(path: Path, fix: str = LAYOUT) -> str:
    """The text of a UTF-8 file, without a byte order mark and with its line breaks unchanged."""
    if path.exists() and not path.is_file():
        why = "it is a folder, a pipe or a device."
        raise DataError(f"{path}: cannot be read.", why, fix)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read.", f"{error.strerror}.", fix) from error
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not UTF-8 text."
        raise DataError(f"{path}: cannot be read.", why, "save it as UTF-8.") from error


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Build a JSON object. Of two values for one key, json would silently take the last."""
    values = {}
    for key, value in pairs:
        if clean(key) in values:
            raise ValueError(f"the key {clean(key)[:100]!r} stands twice in one object")
        values[clean(key)] = value
    return values


def parse_json(text: str, place: str, fix: str = LAYOUT) -> object:
    """Parse JSON; an error names the place. Nesting that Python cannot follow is an error too."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise DataError(f"{place}: cannot be read.", "it is nested too deeply.", fix) from error
    except ValueError as error:
        raise DataError(f"{place}: is not JSON.", f"{error}.", fix) from error


def read_object(path: Path, fix: str = LAYOUT) -> Record:
    """Read a JSON file that holds one object."""
    return as_record(parse_json(read_text(path, fix), str(path), fix), str(path), fix)


def read_rows(path: Path, key: str) -> list[Record]:
    """Read a JSON file that holds a list of objects; errors name an object by its field `key`."""
    rows = parse_json(read_text(path), str(path))
    if not isinstance(rows, list):
        why = f"a list [...] belongs there, but it is {clean(reprlib.repr(rows))}."
        raise DataError(f"{path}: is not a list.", why, LAYOUT)
    return as_records(rows, str(path), key)


def read_lines(path: Path, key: str) -> list[Record]:
    r"""Read a JSON lines file. Lines end at "\n" only: text may contain U+2028 and its like."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            rows.append(parse_json(line, f"{path}, line {number}"))
    return as_records(rows, str(path), key)


def read_csv(path: Path, key: str) -> list[Record]:
    """Read a CSV file with a header. Blank rows are skipped; a row with extra cells is an error."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    rows = []
    try:
        names = [name for name in reader.fieldnames or [] if name]  # empty columns are not read
        if len(set(names)) < len(names):
            why = f"its header is {', '.join(map(repr, names))}."
            raise DataError(f"{path}: two columns have one name.", why, LAYOUT)
        for row in reader:
            if None in row:
                why = f"its header names {len(reader.fieldnames)} cells; is a comma not in quotes?"
                raise DataError(f"{path}, line {reader.line_num}: has too many cells.", why, LAYOUT)
            if any(row.values()):
                rows.append(row)
    except csv.Error as error:
        place = f"{path}, line {reader.line_num}"
        raise DataError(f"{place}: is not CSV.", f"{error}.", LAYOUT) from error
    return as_records(rows, str(path), key)
