"""A dataclass is a command line; progress bars; the device."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable
from dataclasses import field, fields

import torch
from tqdm import tqdm

from support.errors import UserError


def progress(items: Iterable, what: str, total: int | None = None) -> tqdm:
    """Go through `items` with a bar and the time left on stderr; in a log a line every 10 s."""
    every = 0.1 if sys.stderr.isatty() else 10
    return tqdm(items, what, total, mininterval=every, ascii=" #", dynamic_ncols=True)


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto": CUDA or MPS, else the CPU. Each process has its own GPU."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else "cpu"
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def option(default: object, text: str, choices: Iterable[str] | None = None):
    """A field of a dataclass that is a command line."""
    return field(default=default, metadata={"help": text, "choices": choices})


def parse_options(cls: type, arguments: list[str] | None, description: str):
    """Fill the dataclass `cls` from the command line: --field-name VALUE for each field.

    Flags are --name and --no-name; a tuple takes what has no name. Typing errors are explained.
    """
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    for f in fields(cls):
        name = "--" + f.name.replace("_", "-")
        how = {"type": type(f.default), "choices": f.metadata["choices"]}
        if isinstance(f.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(f.default, tuple):
            name, how = f.name, {"nargs": "*"}
        parser.add_argument(name, default=f.default, help=f.metadata["help"], **how)
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = difflib.get_close_matches(unknown[0], parser._option_string_actions, 1) or ["--help"]
        parser.error(f"unknown option {unknown[0]}; did you mean {near[0]}?")
    return cls(**vars(values))


def choose(table: dict, name: str, what: str):
    """The entry of a table of presets."""
    if name not in table:
        raise UserError(f"No {what} {name}.", "there is none.", f"choose of {', '.join(table)}.")
    return table[name]


def leave(status: int = 0) -> None:
    """End this process.

    WHY: DTensor's caches keep the process group, so gloo's threads outlive its destruction. One
    that drops a tensor while Python takes itself down aborts ("terminate called without an active
    exception", pytorch issue 190489). All files are closed here, so nothing need be taken down.
    """
    sys.stdout.flush()
    os._exit(status)
