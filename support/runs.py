"""The folder of a training run: options, metrics, saves, resuming, bad rows, the loss curve."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import reprlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from enum import Enum, EnumMeta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import StorageMeta

from support import files
from support.cli import allows, option_name, show
from support.errors import CheckpointError, DataError, UserError
from support.records import Record, as_record, clean, parse_json, read_object
from support.templates import read_template
from support.weights import find_file

ROOT = Path(__file__).parents[1]

# Frozen parameters are not saved: encoders are read from their own files.
TRAINED = sharded.StateDictOptions(ignore_frozen_params=True)

# The options that --resume may change: how a run is computed, not what it computes.
RESUME_MAY_CHANGE = {
    "resume",
    "micro_batch",
    "workers",
    "activation_checkpointing",
    "replicas",
    "place_encoders",
    "save_every",
    "keep",
    "max_bad",
    "evaluate",
    "device",
    "held_out_every",
}

# The options that --from fixes: they describe the model, which is that of the checkpoint.
FIXED_BY_FROM = ("model", "encoders", "projector", "mixer", "pooled_side", "llm", "template")


HASHES = "hashes.json"  # in a save: name of each of its files -> SHA-256 of its bytes

_LOCKS: list[TextIO] = []  # of the runs of this process; closing a file would unlock it


@dataclass
class Run:
    """A run while it is under way."""

    config: object  # the options, a train.TrainConfig
    folder: Path
    done: int  # steps, over all stages, up to the save that it resumes from
    bad: int  # rows that could not be used so far, over all processes
    seen: int = 0  # rows so far, over all processes
    stop: bool = False  # whether SIGTERM has been received
    board: object = None  # TensorBoard's writer


def latest_run(folder: str | Path = "runs") -> Path:
    """The run whose checkpoint was written last."""
    runs = sorted(Path(folder).glob("*/checkpoint/config.json"), key=lambda f: f.stat().st_mtime)
    if not runs:
        fix = "run `torchrun train.py` first, or name a checkpoint with --checkpoint."
        raise CheckpointError(f"No trained run under {folder}/.", "none was trained here.", fix)
    return runs[-1].parent.parent


# --------------------------------------------------------------------------------- begin and resume


def open_run(config) -> Run:
    """On rank 0: the folder of a new run, or of one to resume, with its logs cut to the last save.

    A run is resumed if --resume names it, or if the same options and the same code began it and it
    has not ended. So a command that is given again, by hand or by torchrun --max-restarts, resumes.
    The folder is locked until this process ends; UserError if another one has locked it.
    """
    saved = describe(config)
    folder, resuming = find_folder(config, saved)
    lock = files.lock(folder / "lock")
    # Another start may have begun this run, or ended it, before it was locked.
    if find_folder(config, saved) != (folder, resuming):
        lock.close()
        return open_run(config)
    _LOCKS.append(lock)
    if not resuming:
        files.write_file(folder / "config.json", json.dumps(saved, indent=2))
    for unfinished in folder.glob("saves/*.partial"):
        shutil.rmtree(unfinished)
    done = newest_save(folder)
    # Once the checkpoint is written all steps stand, even if the last save has been damaged since.
    kept = sys.maxsize if (folder / "checkpoint").exists() else done
    cut_log(folder / "metrics.jsonl", kept)
    bad = cut_log(folder / "bad_examples.jsonl", kept)
    print(f"{folder}, from step {done}; its options are in config.json", flush=True)
    return Run(config, folder, done, bad)


def close_run(run: Run) -> None:
    """Mark a run that is complete, evaluation included, as ended: its lock is removed."""
    while _LOCKS:
        _LOCKS.pop().close()  # WHY first: Windows cannot remove an open file
    (run.folder / "lock").unlink(missing_ok=True)


def has_ended(folder: Path) -> bool:
    """Whether the run of a folder is complete. One that was killed has left its lock file."""
    return (folder / "checkpoint").exists() and not (folder / "lock").exists()


def numbered_saves(folder: Path) -> list[Path]:
    """The folders of eight digits in saves/, the oldest first. Other names are left alone."""
    return sorted(folder.glob("saves/" + 8 * "[0-9]"))


def saves_of(folder: Path) -> list[Path]:
    """The complete saves of a run, the oldest first."""
    return [save for save in numbered_saves(folder) if (save / ".metadata").is_file()]


def newest_save(folder: Path) -> int:
    """The step of the newest save of a run that is intact; 0 if the run has no saves.

    Damaged ones are named and renamed to NUMBER.damaged. CheckpointError if no save is intact.
    """
    intact = None
    damaged = []
    for save in reversed(numbered_saves(folder)):
        fault = fault_of(save)
        if not fault:
            intact = save
            break
        damaged.append(save)
        print(f"{save} is damaged: {fault}.", file=sys.stderr)
    if intact is None and not damaged:
        return 0
    if intact is None:
        why = f"files of {', '.join(save.name for save in damaged)} are missing or changed."
        fix = f"restore {folder / 'saves'}, or delete it: the run then begins at step 1."
        raise CheckpointError(f"No save of {folder} is intact.", why, fix)
    for save in damaged:
        moved = save.with_suffix(".damaged")
        shutil.rmtree(moved, ignore_errors=True)
        save.rename(moved)
        print(f"it is now {moved}, and {intact} is used.", file=sys.stderr)
    return int(intact.name)


def fault_of(save: Path) -> str:
    """What is wrong with a save: "__0_0.distcp is missing or has changed"; "" if it is intact.

    Older versions wrote no hashes; of their saves only the index must be there.
    """
    there = {file.name: file for file in save.glob("*") if file.is_file()}
    if ".metadata" not in there:
        return ".metadata is missing"
    if HASHES not in there:
        return ""
    try:
        hashes = read_object(there[HASHES]).values
    except DataError:
        return f"{HASHES} has changed"
    found = hash_files([there[name] for name in hashes if name in there])
    for name, wanted in hashes.items():
        if found.get(name) != wanted:
            return f"{name} is missing or has changed"
    return ""


def hash_files(paths: list[Path]) -> dict[str, str]:
    """Name of each file -> SHA-256 of its bytes; several at once, because they are large."""

    def hash_of(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip([path.name for path in paths], pool.map(hash_of, paths), strict=True))


def check_steps(run: Run, steps: int) -> None:
    """CheckpointError if the save that the run resumed from is beyond its last step, `steps`."""
    if run.done > steps:
        save = save_folder(run, run.done)
        fix = f"delete {save}, and restore the saves of this run."
        raise CheckpointError(f"{save} is of another run.", f"this one has {steps} steps.", fix)


def commit() -> str:
    """The commit of this code, with "-dirty" if files have changed since; "" without git."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # git is not installed
        return ""


def describe(config) -> dict:
    """What config.json holds: a hash of the code, the commit, the version of torch, the options."""
    code = hashlib.sha256()
    for file in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("support/*.py"))]:
        code.update(file.read_bytes())
    saved = {"code": code.hexdigest()[:16], "commit": commit(), "torch": torch.__version__}
    options = json.loads(json.dumps(asdict(config)))  # as JSON gives them back: lists, not tuples
    return saved | options


def find_folder(config, saved: dict) -> tuple[Path, bool]:
    """The run's folder, NAME or else the first free NAME-2, NAME-3 ..., and whether it resumes."""
    if config.resume:
        return Path(config.resume), True
    number = 1
    folder = Path("runs") / config.name
    while folder.exists():
        file = folder / "config.json"
        trained = (folder / "checkpoint").exists()
        if not file.exists() and not trained and not saves_of(folder):
            return folder, False  # killed before it began
        if file.exists() and not has_ended(folder):
            began = read_object(file, f"delete {folder}, or choose another --name.").values
            if began | {"commit": saved["commit"]} == saved:
                return folder, True
        number += 1
        folder = Path("runs") / f"{config.name}-{number}"
    return folder, False


def cut_log(file: Path, done: int) -> int:
    """Drop the lines of a log that belong to steps after `done`; return how many stay."""
    kept = []
    for line, record in read_log(file):
        if record.whole("step") <= done:
            kept.append(line)
    files.write_file(file, "".join(kept))
    return len(kept)


def read_log(file: Path) -> Iterator[tuple[str, Record]]:
    """The lines of a log, as they are and as records whose "step" and "loss" are numbers.

    Raises DataError, which names the file and the line, if a line is not of a run.
    """
    needed = ["step", "loss"] if file.name == "metrics.jsonl" else ["step"]
    for number, line in enumerate(files.whole_lines(file), 1):
        fix = f"delete this line of {file.name}."
        place = f"{file}, line {number}"
        record = as_record(parse_json(line, place, fix), place, fix)
        for name in needed:
            if record.number(name) is None:
                raise record.wrong(name, "a number")
        yield line, record


def saved_options(folder: str, cls: type, preset: Callable):
    """The options that a run began with, as an instance of `cls`. preset: see train.preset."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(f"No run at {folder}.", f"{file} is missing.", "check the path.")
    fix = "restore the file, or begin a new run."
    saved = read_object(file, fix).values
    try:
        options = asdict(preset(saved["model"], saved["recipe"]))
        if "muon_lr" in saved:
            saved = translate_legacy(saved)
    except (KeyError, TypeError) as error:
        why = f"it is of another program or version: {error!r}."
        raise UserError(f"{file} does not describe a run.", why, fix) from error
    # What Muon did before there were these options.
    saved.setdefault("muon_parts", "llm")
    saved.setdefault("muon_weight_decay", 0.0)
    for field in fields(cls):
        # An option that is younger than the run has its usual value.
        value = saved.get(field.name, options[field.name])
        if isinstance(value, list):
            value = tuple(value)
        if not allows(field, value):
            why = f"{field.name} is {clean(reprlib.repr(value))}, which that option cannot be."
            raise UserError(f"{file} does not describe a run.", why, fix)
        options[field.name] = value
    return cls(**options)


def translate_legacy(saved: dict) -> dict:
    """Options as commit 07e06b2 wrote them -> today's. Where they said 0, -1 or "" for the usual
    value, the preset has it, and the option is left out here."""
    options = dict(saved)
    for name in ("encoders", "pooled_side", "tokenizer", "lr", "global_batch", "resume"):
        if not saved[name]:
            del options[name]
    if saved["model"] == "miniature":
        options.setdefault("pooled_side", 2)  # as it was then
    for name in ("max_steps", "save_every", "keep"):
        options[name] = saved[name] or None
    if "lr" in options:
        options["learning_rate"] = (saved["lr"],)
    if "global_batch" in options:
        options["global_batch"] = (saved["global_batch"],)
    options["optimizer"] = "adamw"
    if saved["muon_lr"] > 0:
        options["optimizer"] = "muon"
        options["muon_learning_rate"] = saved["muon_lr"]
    if saved["cache_features"] == "none":
        options["cache_features"] = None
    options["held_out"] = None  # did not exist
    return options


def check_resumed(config, began) -> None:
    """UserError if the command line changes an option that decides what the run computes."""
    for name, value in asdict(config).items():
        if value != getattr(began, name) and name not in RESUME_MAY_CHANGE:
            option = option_name(name)
            what = f"{option} contradicts {config.resume}/config.json."
            first = show(getattr(began, name))
            why = f"the run began with {first}, and a resumed run stays the same."
            allowed = ", ".join(sorted(RESUME_MAY_CHANGE))
            raise UserError(what, why, f"leave {option} out; these may change: {allowed}.")


def check_from(config, began, folder: Path) -> None:
    """UserError if the command line changes the model of the checkpoint that --from names.

    began: the options that describe the checkpoint. folder: its folder, which may hold encoders and
    a tokenizer.
    """
    fixed = FIXED_BY_FROM
    if (folder / "encoders").is_dir():
        fixed += ("encoder_files", "encoder_seed")
    for name in fixed:
        value = getattr(config, name)
        if value != getattr(began, name):
            option = option_name(name)
            what = f"{option} {show(value)} contradicts --from {config.from_}."
            why = f"that model has {show(getattr(began, name))}, and its weights fit nothing else."
            if name not in FIXED_BY_FROM:
                why = "that model comes with its encoders, and was trained on their features."
            raise UserError(what, why, f"leave {option} out.")
    own_tokenizer = folder / "tokenizer.model"
    if config.tokenizer is None or not own_tokenizer.is_file():
        return
    named = find_file(config.tokenizer, ("tokenizer.model",))
    if named.read_bytes() != own_tokenizer.read_bytes():
        what = f"--tokenizer {config.tokenizer} contradicts --from {config.from_}."
        why = f"that model was trained with {own_tokenizer}, in which other ids stand for a text."
        raise UserError(what, why, "leave --tokenizer out.")


def save_folder(run: Run, number: int) -> Path:
    """Where the save after step `number` is."""
    return run.folder / "saves" / f"{number:08d}"


def save_state(model, optimizers: list, run: Run, number: int) -> None:
    """Write saves/NUMBER, the shards of every process after that step, atomically.

    FIX: the authors save the optimizer state of rank 0 only (ledger F6). Data order and learning
    rate follow from the step, and nothing is random, so nothing else is needed.
    WHY: not in the background. At 7B on 8 GPUs it is 10 GB each, some seconds every 500 steps.
    """
    folder = save_folder(run, number)
    partial = folder.with_suffix(".partial")
    weights, moments = sharded.get_state_dict(model, optimizers, options=TRAINED)
    write_shards({"model": weights, "optimizers": moments}, partial)
    mine = sorted(partial.glob(f"__{dist.get_rank()}_*"))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, hash_files(mine))
    if dist.get_rank() == 0:
        hashes = hash_files([partial / ".metadata"])
        for of_one in everyone:
            hashes |= of_one
        files.write_file(partial / HASHES, json.dumps(hashes, indent=1))
        with files.writing(folder):
            partial.rename(folder)
            if run.config.keep is not None:
                for old in saves_of(run.folder)[: -run.config.keep]:
                    # Renamed first, so that a kill never leaves half a save under its name.
                    shutil.rmtree(old.rename(old.with_suffix(".partial")))
    dist.barrier()


def write_shards(state: dict, folder: Path) -> None:
    """Write every process's share of a state. If one cannot, all of them raise UserError."""
    try:
        dcp.save(state, checkpoint_id=folder)
    except CheckpointException as error:
        shutil.rmtree(folder, ignore_errors=True)
        first, _ = next(iter(error.failures.values()))
        raise UserError(f"{folder} cannot be written.", f"{first}.", files.MAKE_ROOM) from error


def load_state(model, optimizers: list, run: Run) -> None:
    """Restore everything as it was after step run.done, however many processes saved it."""
    weights, moments = sharded.get_state_dict(model, optimizers, options=TRAINED)
    state = {"model": weights, "optimizers": moments}  # the weights are the model's own tensors
    folder = save_folder(run, run.done)
    try:
        dcp.load(state, storage_reader=SafeReader(folder), planner=SafePlanner())
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))  # of the first process that failed
        fix = f"delete {folder}; the same command then resumes from an earlier save."
        raise CheckpointError(f"Cannot read the save {folder}.", f"{first}.", fix) from error
    sharded.set_optimizer_state_dict(model, optimizers, state["optimizers"], options=TRAINED)


MAY_BE_UNPICKLED = {  # what the index of a save consists of; none of it does more than hold values
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorProperties",
        "TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
}  # fmt: skip


def enum_member(enumeration: type, name: str) -> Enum:
    """A member of an enumeration; anything else is refused."""
    if not isinstance(enumeration, EnumMeta):
        raise pickle.UnpicklingError(f"getattr of {enumeration} does not belong in a save")
    return enumeration[name]


class SaveUnpickler(pickle._Unpickler):
    """Unpickle the index of a save, which may come from elsewhere: plain values, no code.

    torch writes the index, saves/NUMBER/.metadata, as a pickle and loads it without any limit.
    WHY _Unpickler: it is pickle in Python. The one in C reserves as much memory as a damaged file
    asks for; a few bytes can make it fill 20 GB.
    """

    def find_class(self, module: str, name: str):
        """Look up a class of MAY_BE_UNPICKLED or a dtype; UnpicklingError for anything else."""
        if (module, name) == ("builtins", "getattr"):
            # Python 3.11.2 stores a member of an enumeration as getattr(class, name).
            return enum_member
        if module == "pathlib._local":  # the name of pathlib in Python 3.13
            module = "pathlib"
        allowed = name in MAY_BE_UNPICKLED.get(module, ())
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            allowed = True
        if allowed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a save")


class SafeReader(dcp.FileSystemReader):
    """torch's reader of a save, with `SaveUnpickler` in place of pickle.

    An index that names a file outside the save's folder is refused as well.
    """

    def read_metadata(self, *args, **kwargs) -> dcp.Metadata:
        """Read the index of the save."""
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                index = SaveUnpickler(file).load()
            for place in index.storage_data.values():
                if Path(place.relative_path).name != place.relative_path:
                    raise ValueError(f"it names {place.relative_path}, which is elsewhere")
                if not Path(self.path, place.relative_path).is_file():
                    raise ValueError(f"it names {place.relative_path}, which is missing")
            index.storage_meta = index.storage_meta or StorageMeta()
            index.storage_meta.load_id = self.load_id
        # WHY: a damaged pickle raises errors of many classes.
        except Exception as error:
            raise OSError(f"its index .metadata is damaged or foreign: {error}") from error
        return index


class SafePlanner(DefaultLoadPlanner):
    """torch's plan of what is loaded; what is not a tensor is unpickled without running code."""

    def load_bytes(self, read_item, value) -> None:
        """Check a value, such as the step of an optimizer; then load it as torch does."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


# ------------------------------------------------------------------------------------ write and log


def open_board(run: Run) -> None:
    """Log to TensorBoard too, if it is installed."""
    if find_spec("tensorboard"):
        board = import_module("torch.utils.tensorboard")
        run.board = board.SummaryWriter(run.folder, purge_step=run.done + 1)


def log(run: Run, metrics: dict) -> None:
    """Append one line to metrics.jsonl, and its numbers to TensorBoard."""
    path = run.folder / "metrics.jsonl"
    with files.writing(path):
        with path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if run.board is None:
            return
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float):
                run.board.add_scalar(name, value, metrics["step"])


def peak_memory(device: torch.device) -> float | None:
    """The most memory held at once, in GB: of the GPU, else of this process (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if not find_spec("resource"):
        return None
    usage = import_module("resource")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    return usage.getrusage(usage.RUSAGE_SELF).ru_maxrss * unit / 1e9


def report_bad(batches: list, total: int, run: Run, step: int) -> None:
    """Log the rows of a step that could not be used; UserError if they are too many by now.

    FIX: the authors replace them silently (ledger F4).
    """
    if total == 0:
        return
    mine = []
    for batch in batches:
        mine += [{"step": step, **row} for row in batch.bad]
    records: list = [None] * dist.get_world_size()
    dist.all_gather_object(records, mine)
    file = run.folder / "bad_examples.jsonl"
    if dist.get_rank() == 0:
        files.append_lines(file, *itertools.chain.from_iterable(records))
    run.bad += total
    if run.bad >= 10 and run.bad > run.config.max_bad * run.seen:
        what = f"{run.bad} of the {run.seen} rows so far could not be used."
        why = f"that is more than --max-bad {run.config.max_bad}, so the dataset is probably wrong."
        raise UserError(what, why, f"repair the rows that {file} lists.")


def dump_and_raise(model, batches: list, rows: list, run: Run, number: int, what: str) -> None:
    """Write what reproduces a step (weights, batches, rows) to a folder, then raise UserError."""
    folder = run.folder / f"failure-step-{number}"
    write_shards(sharded.get_model_state_dict(model, options=TRAINED), folder)
    step = {"batches": [vars(batch) for batch in batches], "rows": rows}
    with files.writing(folder):
        torch.save(step, folder / f"rank-{dist.get_rank()}.pt")
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [row.get("id") for row in rows])
    why = f"the cause is among the rows with these ids, one list per process: {everyone}."
    fix = f"see {folder} (weights, batches, rows); a smaller --learning-rate may help."
    raise UserError(f"{folder.name}: {what}.", why, fix)


# ----------------------------------------------------------------------------------- the loss curve

BETA = 0.95  # of the running average: about the last 20 steps


def running_average(losses: list[float]) -> list[float]:
    """Exponential average. Dividing by 1 - BETA^step removes the pull of its start at 0."""
    averages = []
    total = 0.0
    for step, loss in enumerate(losses, start=1):
        total = BETA * total + (1 - BETA) * loss
        averages.append(total / (1 - BETA**step))
    return averages


def draw_loss(folder: Path) -> None:
    """Write loss.svg: loss of each step, running average, held-out loss. loss.jinja draws it."""
    each_step, held_out = [], []
    for _, metrics in read_log(folder / "metrics.jsonl"):
        step = metrics.number("step")
        each_step.append((step, metrics.number("loss")))
        held_out_loss = metrics.number("held_out_loss")
        if held_out_loss is not None:
            held_out.append((step, held_out_loss))
    if not each_step:
        return
    steps, losses = zip(*each_step, strict=True)
    average = list(zip(steps, running_average(losses), strict=True))
    curves = {"each step": each_step, "running average": average}
    if held_out:
        curves["held-out rows"] = held_out
    template = read_template(Path(__file__).with_name("loss.jinja"))
    files.write_file(folder / "loss.svg", template.render(curves=curves).strip() + "\n")
