"""The rows of a data set in a form that many processes share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np


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

    @classmethod
    def join(cls, parts: Iterable[Rows]) -> Rows:
        """The rows of several files, one after the other."""
        joined = cls([])
        for part in parts:
            shifted = part.ends + len(joined.text)
            joined.ends = np.concatenate([joined.ends, shifted])
            joined.text = np.concatenate([joined.text, part.text])
        return joined

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
