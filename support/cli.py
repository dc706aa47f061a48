"""Command lines, progress bars, devices: what the programs of the project start with.

A frozen dataclass declares a program's options, and an instance of it holds their values:

    @dataclass(frozen=True)
    class CountConfig:
        steps: int = option(10, "how far to count", group="run")
        limit: float | None = option(None, "stop above this number")

    config = parse_options(CountConfig, None, "Count.")     # --steps 20 --limit none
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import field, fields

import torch
from tqdm import tqdm

from support.errors import UserError

DEVICES = ("auto", "cuda", "mps", "cpu")
FIXABLE = (UserError, torch.OutOfMemoryError)  # errors that `explain` explains
DTYPES = ("auto", "float32", "bfloat16", "float16")


# ------------------------------------------------------------------------------------------ options


def option(
    default: object,
    text: str,
    choices: Iterable[str] | None = None,
    group: str | None = None,
    least: float = 0,
):
    """Declare a command-line option as a field of a dataclass.

    text: what `--help` says. choices: the values that are allowed. group: the heading in `--help`
    that begins with this option; None: the heading of the option before it. least: the smallest
    number that is allowed. A field whose default is () collects the arguments without a name.
    """
    about = {"help": text, "choices": choices, "group": group, "positional": default == ()}
    return field(default=default, metadata=about | {"least": least})


def parse_options(
    cls: type,
    arguments: list[str] | None,
    description: str,
    preset: object | None = None,
    moved: dict[str, str] | None = None,
):
    """Read the command line into an instance of the dataclass `cls`.

    arguments: the words of the command line (None: of this process). preset: an instance of `cls`
    with the values to start from (default: those of the class). moved: former option -> where it is
    now. Exits with a message if an option does not exist, naming the nearest one.
    """
    parser = make_parser(cls, description, preset or cls())
    values, unknown = parser.parse_known_args(arguments)
    for word in unknown:
        name = word.partition("=")[0]
        if name in (moved or {}):
            parser.error(f"{name} has moved: {moved[name]}")
    if unknown:
        known = list(parser._option_string_actions)
        nearest = difflib.get_close_matches(unknown[0], known, 1) or ["--help"]
        what = f"unknown option {unknown[0]}; did you mean {nearest[0]}?"
        if not unknown[0].startswith("--") or os.path.exists(unknown[0]):
            what += f" If it is a file, write ./{unknown[0]}."
        parser.error(what)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # print ? for what this terminal cannot show
    settings = vars(values)
    for name, value in settings.items():
        if isinstance(value, list):
            settings[name] = tuple(value)
    return cls(**settings)


def make_parser(cls: type, description: str, preset: object) -> argparse.ArgumentParser:
    """An argument parser with one option for each field, in groups, showing the preset's values."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    title = "options"
    groups = {title: parser}  # argparse has a group of this name, with --help
    for f in fields(cls):
        title = f.metadata["group"] or title
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = getattr(preset, f.name)
        text = f.metadata["help"]
        if not f.metadata["positional"]:
            text += f" (default: {show(default)})"
        how = {"help": text.replace("%", "%%"), "default": default}
        if f.metadata["positional"]:
            groups[title].add_argument(f.name, nargs="*", **how)
            continue
        if hints[f.name] is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["metavar"] = f.name.rstrip("_").upper()
            how |= value_reader(hints[f.name], f.metadata["choices"], f.metadata["least"])
        groups[title].add_argument(option_name(f.name), dest=f.name, **how)
    return parser


def option_name(field_name: str) -> str:
    """How a field is written on a command line: max_steps -> --max-steps, from_ -> --from.

    A field that would be a keyword of Python ends in an underscore.
    """
    return "--" + field_name.rstrip("_").replace("_", "-")


def allows(option_field, value: object) -> bool:
    """Whether a field of a dataclass of options may have this value, which a file holds.

    `float | None` allows 0.5, 2 and None; `tuple[int, ...]` allows (1, 2) and not (). A number is
    not below the option's least one, and a choice is one of its choices.
    """
    # The annotation is text, because of `from __future__ import annotations`.
    kind, _, optional = option_field.type.partition(" | ")
    if value is None:
        return optional == "None"
    element = kind.removeprefix("tuple[").removesuffix(", ...]")
    values = value if element != kind else [value]
    if not isinstance(values, list | tuple) or not values:
        return False
    choices = option_field.metadata["choices"]
    for each in values:
        accepted = {"int": int, "float": int | float, "bool": bool, "str": str}[element]
        if not isinstance(each, accepted) or isinstance(each, bool) != (element == "bool"):
            return False
        if element != "str" and not in_range(each, option_field.metadata["least"]):
            return False
        if choices is not None and each not in choices:
            return False
    return True


def in_range(number: float, least: float) -> bool:
    """Whether a number is finite and at least `least`. NaN is neither."""
    return least <= number < 2**63


def value_reader(hint: object, choices: Iterable[str] | None, least: float) -> dict:
    """How argparse reads values of a type: `int`, `float | None`, `tuple[float, ...]` and so on.

    Numbers below `least` are rejected, and so are NaN and infinity.
    """
    how: dict = {}
    kind = hint
    optional = False
    if typing.get_origin(hint) is types.UnionType:
        kind = typing.get_args(hint)[0]
        optional = True
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
        how["nargs"] = "+"

    def read(word: str):
        if optional and word == "none":
            return None
        value = kind(word)
        if kind is not str and not in_range(value, least):
            raise argparse.ArgumentTypeError(f"must be a number of at least {least}, not {word}")
        return value

    read.__name__ = kind.__name__  # argparse names it in "invalid float value"
    how["type"] = read
    if choices is not None:
        how["choices"] = list(choices)
        how["metavar"] = "{" + ",".join(choices) + "}"
    return how


def show(value: object) -> str:
    """A value as one would type it: None -> none, (0.001, 2e-05) -> 0.001 2e-05."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(show(part) for part in value)
    return str(value)


def choose(table: dict, name: str, what: str):
    """The entry `name` of a table of `what`; UserError lists the names that exist."""
    if name not in table:
        why = "names are those of the table in the code."
        raise UserError(f"There is no {what} {name}.", why, f"choose one of {', '.join(table)}.")
    return table[name]


# ----------------------------------------------------------------------------------------- progress


class LogLines(tqdm):
    """A progress bar for a log: each update is a line of its own."""

    @staticmethod
    def status_printer(file) -> Callable[[str], None]:
        """How tqdm writes its status: here with a line break instead of a carriage return."""

        def write(status: str) -> None:
            file.write(status.strip() + "\n")
            file.flush()

        return write


def progress(items: Iterable, what: str, total: int | None = None, show: bool = True) -> tqdm:
    """Go through `items` with a bar and the time left on stderr; in a log, a line every 10 s.

    show: whether this process shows the bar, as one of several processes should.
    """
    if sys.stderr.isatty():
        return tqdm(items, what, total, ascii=" #", dynamic_ncols=True, disable=not show)
    # miniters=1: look at the clock at each item.
    pace = {"mininterval": 10, "miniters": 1}
    return LogLines(items, what, total, ascii=" #", ncols=80, disable=not show, **pace)


# ------------------------------------------------------------------------------------------ machine


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name. "auto" is CUDA if there is a card, else the CPU.

    Under torchrun each process takes the card of its LOCAL_RANK.
    WHY "auto" never means MPS: torch up to 2.13 can multiply matrices wrongly there in float32
    (pytorch issue 193487), so Apple's GPU is used only if asked for.
    """
    if name not in DEVICES:
        why = "this program runs on CUDA cards, Apple GPUs and CPUs."
        raise UserError(f"There is no device {name}.", why, f"choose one of {', '.join(DEVICES)}.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            why = f"torch {torch.__version__} sees no CUDA card."
            fix = "install a CUDA build of torch and its driver, or use --device cpu."
            raise UserError("--device cuda cannot be used.", why, fix)
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if name == "mps":
        if not torch.backends.mps.is_available():
            why = "torch sees no Apple GPU."
            raise UserError("--device mps cannot be used.", why, "use --device cpu.")
        print("MPS: torch up to 2.13 can multiply wrongly in float32 here.", file=sys.stderr)
    return torch.device(name)


def require_card(device: torch.device) -> None:
    """Raise UserError if torchrun started more processes on this machine than it has CUDA cards."""
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        what = f"There is no CUDA card for process {device.index + 1} of this machine."
        why = f"torch sees {torch.cuda.device_count()} of them."
        raise UserError(what, why, "lower --nproc-per-node.")


def make_deterministic() -> None:
    """Let CUDA compute the same bits in every run, more slowly. Call it before anything runs there.

    An operation that has no such form raises a RuntimeError.
    """
    # cuBLAS reads this when it starts; without it, sums may be split differently in each run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # cuDNN's attention adds up gradients in any order; flash attention can keep an order.
    torch.backends.cuda.enable_cudnn_sdp(False)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name. "auto" is bfloat16 on CUDA cards that compute in it, float16 on older
    cards (T4, V100), and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    # Cards before compute capability 8 emulate bfloat16, slowly.
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if modern else torch.float16


def explain(error: Exception, fix: str) -> str:
    """The message for an error that the user can fix.

    fix: what to change if the GPU had too little memory; a UserError says by itself.
    """
    if isinstance(error, torch.OutOfMemoryError):
        # torch says more, such as "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."
        why = ". ".join(str(error).split(". ")[:2]) + "."
        error = UserError("The GPU has too little memory.", why, fix)
    return f"error: {error}"


def exit_now(status: int = 0) -> typing.NoReturn:
    """End this process without Python's own shutdown.

    WHY: DTensor's caches keep the process group alive, and with it gloo's threads. One that drops a
    tensor while Python shuts down aborts ("terminate called without an active exception", pytorch
    issue 190489). All files are closed by now, so nothing is lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
