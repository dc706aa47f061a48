"""Find, read, rename, check and write files of weights.

A source is a file, a folder or a hub id such as "google/vivit-b-16x2-kinetics400".
`find_file` finds a file of it, downloaded if need be; `read_tensors` maps its tensors into memory;
`assign_weights` gives them to a model.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import reprlib
import zipfile
from contextlib import nullcontext
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.serialization import set_default_mmap_options

from support.errors import CheckpointError, UserError
from support.files import replacing

FILES = (  # names of released weights; the first that exists is read
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin",
)  # fmt: skip

HUB_ID = r"[\w.-]+/[\w.-]+(@[\w./-]+)?"  # owner/name or owner/name@revision

# ------------------------------------------------------------------------------------ finding files


def find_file(source: str | Path, names: tuple[str, ...], required: bool = True) -> Path | None:
    """Return the first of `names` that a folder or hub repository has. A file is returned itself.

    Without such a file: CheckpointError, or None if it is not required.
    """
    path = Path(source)
    if path.is_file():
        return path
    found = None
    if path.is_dir():
        existing = [path / name for name in names if (path / name).is_file()]
        found = existing[0] if existing else None
    elif path.suffix != ".safetensors" and re.fullmatch(HUB_ID, str(source)):
        found = download(str(source), names)
    if found is None and required:
        what = f"Found no {' or '.join(names)} at {source}."
        why = "a source is a file, or a folder or hub id (owner/name) that has one of these files."
        fix = "check the path or the name, and that the download or copy is complete."
        raise CheckpointError(what, why, fix)
    return found


def download(hub_id: str, names: tuple[str, ...]) -> Path | None:
    """Return the first of `names` that a hub repository has, or None if it has none of them.

    Files are downloaded once, to huggingface_hub's cache. With HF_HUB_OFFLINE=1 they come from the
    cache only. Raises CheckpointError if the hub refuses or cannot be reached.
    """
    repository, _, revision = hub_id.partition("@")
    not_found = None
    for name in names:
        try:
            return Path(
                huggingface_hub.hf_hub_download(repository, name, revision=revision or None)
            )
        except hub_errors.EntryNotFoundError as error:
            not_found = error  # the hub or the cache has no such file: try the next name
        except Exception as error:
            raise download_error(hub_id, names, error) from error
    if isinstance(not_found, hub_errors.RemoteEntryNotFoundError):
        return None
    # Only the cache was searched, so the repository may have the file after all.
    raise download_error(hub_id, names, not_found) from not_found


def download_error(hub_id: str, names: tuple[str, ...], error: Exception) -> CheckpointError:
    """Explain an error of huggingface_hub: its own words say why, and we say how to fix it."""
    repository = hub_id.partition("@")[0]
    if isinstance(error, hub_errors.GatedRepoError):
        fix = f"accept its licence at huggingface.co/{repository}, then run `hf auth login`."
    elif isinstance(error, hub_errors.LocalEntryNotFoundError):
        fix = f"connect to the internet, or run `hf download {repository}` while you are online."
    else:
        fix = "check the name (a local path must exist), the connection and `hf auth whoami`."
    what = f"Cannot download {' or '.join(names)} of {hub_id}."
    return CheckpointError(what, f"{type(error).__name__}: {error}", fix)


# ------------------------------------------------------------------------------ reading and writing


def read_json(path: Path) -> dict:
    """Read a config.json or an index. CheckpointError if it is damaged or holds no object."""
    refuse_pointer(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object {{...}}.")
    except (OSError, ValueError, RecursionError) as error:
        fix = "the file is damaged; delete it and download or copy it again."
        raise CheckpointError(f"Cannot read {path}.", str(error), fix) from error
    return values


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError if a file is empty, or a Git LFS pointer: what `git clone` leaves in
    place of a large file if Git LFS is not installed."""
    try:
        with path.open("rb") as file:
            beginning = file.read(40)
    except OSError as error:
        fix = "check that it is a file, and its permissions."
        raise CheckpointError(f"Cannot read {path}.", f"{error.strerror}.", fix) from error
    if not beginning:
        fix = "delete it and download or copy it again."
        raise CheckpointError(f"Cannot read {path}.", "the file is empty.", fix)
    if beginning.startswith(b"version https://git-lfs"):
        why = "it is a Git LFS pointer, which only names the real file."
        raise CheckpointError(f"Cannot read {path}.", why, "run `git lfs pull` in its repository.")


# Field of a configuration -> its least and its largest value. WHY an upper bound: a layer count of
# 10^9 would build layers for days before any weight is missed.
BOUNDS = {
    "vocab_size": (1, 10**7), "hidden_size": (1, 10**6), "intermediate_size": (1, 10**7),
    "num_layers": (1, 1000), "released_layers": (1, 1000), "num_heads": (1, 10**4),
    "num_kv_heads": (1, 10**4), "max_positions": (1, 10**8), "patch_size": (1, 10**4),
    "image_size": (1, 10**5), "num_frames": (1, 10**5), "tubelet_frames": (1, 1000),
    "temporal_window": (0, 10**5), "num_registers": (0, 10**5), "pooled_side": (1, 1000),
    "mlp_size": (1, 10**7), "norm_eps": (1e-30, 0.1), "rope_theta": (1.0, 1e15),
}  # fmt: skip
BLOCKS = ("num_layers", "released_layers")  # an encoder may have none
MULTIPLES = (  # the first must be a multiple of the second, unless that is 0
    ("hidden_size", "num_heads"), ("num_heads", "num_kv_heads"),
    ("num_frames", "tubelet_frames"), ("num_frames", "temporal_window"),
)  # fmt: skip
FLAGS = ("tie_word_embeddings", "rope_bf16", "class_token", "layer_scale")
TEXTS = ("name", "source", "label")
MAX_NAME = 255  # bytes in the name of a file; systems raise an error for longer ones


def check_fields(
    values: object, place: str, choices: dict | None = None, names: dict | None = None
) -> None:
    """Check a configuration, and all that is nested in it, field by field.

    values: what JSON gives; place: its file, for errors; choices: field -> the names it may have;
    names: field -> what the file calls it, if that differs. Fields that are not in these tables are
    left to others. Raises CheckpointError, which names the file and the field.
    """
    if isinstance(values, list):
        for value in values:
            check_fields(value, place, choices)
    if not isinstance(values, dict):
        return
    for field, value in values.items():
        wanted = None
        if field in BOUNDS and (field, value) != ("mlp_size", None):
            least, most = BOUNDS[field]
            if field in BLOCKS and "family" in values:  # of an encoder
                least = 0
            kinds = int if isinstance(least, int) else (int, float)
            right = isinstance(value, kinds) and not isinstance(value, bool)
            if not right or not least <= value <= most:
                number = "whole number" if kinds is int else "number"
                wanted = f"a {number} from {least} to {most}"
        elif field in FLAGS and not isinstance(value, bool):
            wanted = "true or false"
        elif field in TEXTS and not is_short_text(value):
            wanted = f"a text of at most {MAX_NAME} bytes"
        elif field == "pixel_mean" and not is_colour(value, 0):
            wanted = "a list of three numbers from 0 to 255"
        elif field == "pixel_std" and not is_colour(value, 1e-3):
            wanted = "a list of three numbers from 0.001 to 255"
        elif field == "encoders" and not value:
            wanted = "a list of at least one encoder"
        elif field in (choices or {}) and value not in list(choices[field]):
            wanted = f"one of {', '.join(choices[field])}"
            if field == "family":
                wanted += ", or that of a class of yours whose file has been imported"
        if wanted:
            raise field_error(place, (names or {}).get(field, field), value, wanted)
        check_fields(value, place, choices)
    names = names or {}
    for whole, part in MULTIPLES:
        first, second = values.get(whole), values.get(part)
        if first and second and first % second:
            wanted = f"a multiple of {names.get(part, part)}, which is {second},"
            raise field_error(place, names.get(whole, whole), first, wanted)
    check_clips(values.get("encoders"), place)


ADDED_LATER = ("label", "mlp_size")  # fields that older versions did not write


def require_fields(values: dict, config: type, place: str) -> None:
    """Raise CheckpointError unless each field of a dataclass is stated, ADDED_LATER excepted.

    WHY: a default such as the interpolation of another encoder would give other answers unnoticed.
    """
    for field in fields(config):
        if field.name not in values and field.name not in ADDED_LATER:
            raise field_error(place, field.name, None, "the value of this model")


def check_clips(encoders: object, place: str) -> None:
    """Raise CheckpointError unless the encoders of a model see the same moments of a clip.

    Their frames are taken from those of the encoder with the most, and their features are mixed
    moment by moment (merv.py, equation 1).
    """
    if not isinstance(encoders, list):
        return
    counts = [encoder["num_frames"] for encoder in encoders]
    moments = {encoder["num_frames"] // encoder["tubelet_frames"] for encoder in encoders}
    if len(moments) > 1 or any(max(counts) % count for count in counts):
        raise field_error(place, "num_frames", counts, "the same moments for all encoders")


def is_short_text(value: object) -> bool:
    """Whether a value is a text that may be the name of a file."""
    return isinstance(value, str) and len(value.encode(errors="replace")) <= MAX_NAME


def is_colour(value: object, least: float) -> bool:
    """Whether a value is a list of three numbers, for red, green and blue, from `least` to 255."""
    if not isinstance(value, list) or len(value) != 3:
        return False
    return all(type(number) in (int, float) and least <= number <= 255 for number in value)


def require_replaceable(folder: Path) -> None:
    """Raise UserError if a folder is neither missing, nor empty, nor a checkpoint of ours alone."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file.", "a model is saved as a folder.", "name another.")
    config = folder / "config.json"
    folders = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    is_checkpoint = config.is_file() and "merv" in read_json(config)
    if any(folder.iterdir()) and not (is_checkpoint and folders <= {"encoders"}):
        why = "saving replaces a whole folder, and this one holds more than a checkpoint."
        raise UserError(f"{folder} is not empty.", why, "name a new folder.")


def field_error(place: str, field: str, value: object, wanted: str) -> CheckpointError:
    """The error for one field of a configuration."""
    what = f"{place}: {field} is {reprlib.repr(value)}."
    fix = "download the file again, or correct the field."
    return CheckpointError(what, f"{wanted} belongs there.", fix)


class Mapped(dict[str, Tensor]):
    """Tensors of safetensors files, mapped into memory: name -> tensor.

    They take no memory of their own until they are changed, which changes a private copy and never
    the file. So a model may keep them. Tensors of pickles are not safe in this way (read_pickle).
    """


def read_tensors(source: str | Path, files: tuple[str, ...]) -> dict[str, Tensor]:
    """Read name -> tensor from the first of `files` that the source has.

    The tensors are memory-mapped: their bytes are read from disk when they are used. The index of
    a sharded checkpoint (*.index.json) stands for all its shards.
    """
    path = find_file(source, files)
    refuse_pointer(path)
    if path.suffix == ".json":
        folder = path.parent if path == Path(source) else source
        shards = read_index(path)
        tensors = read_tensors(folder, (shards[0],))
        for shard in shards[1:]:
            more = read_tensors(folder, (shard,))
            if not isinstance(more, Mapped):
                tensors = dict(tensors)
            tensors |= more
        return tensors
    try:
        if path.suffix == ".safetensors":
            return Mapped(load_file(path))
        tensors = read_pickle(path)
        if not isinstance(tensors, dict):
            raise TypeError(f"it holds a {type(tensors).__name__} instead of named tensors")
    except Exception as error:  # each reader has its own errors for a damaged file
        raise CheckpointError(
            f"Cannot read {path}.",
            f"{type(error).__name__}: {error}",
            "the file is damaged or is not a checkpoint; delete it and download it again.",
        ) from error
    return tensors


def read_index(path: Path) -> list[str]:
    """The names of the shards in an index, which stand beside it. Raises CheckpointError."""
    fix = "the file is damaged or foreign; delete it and download it again."
    where = read_json(path).get("weight_map")  # tensor -> its file
    if not where or not isinstance(where, dict):
        raise CheckpointError(f"Cannot read {path}.", "it has no weight_map.", fix)
    for shard in where.values():
        if not isinstance(shard, str) or Path(shard).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"Cannot read {path}.", f"{shard!r} holds no weights.", fix)
        if Path(shard).name != shard or "\\" in shard or not is_short_text(shard):
            why = f"{reprlib.repr(shard)} is not beside it."
            raise CheckpointError(f"Cannot read {path}.", why, fix)
    return sorted(set(where.values()))


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file that torch.save wrote; code inside the file is never run."""
    # WHY: Linux reserves memory for a private mapping, so a 27 GB file fails on a 24 GB machine. A
    # shared mapping reserves none but needs a writable file. A write to such a tensor would change
    # the file, so `assign_weights` copies each of them.
    mapping = nullcontext()
    if os.name == "posix" and os.access(path, os.W_OK):
        mapping = set_default_mmap_options(mmap.MAP_SHARED)
    # Files that torch wrote before 1.6 are not zip archives and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    with mapping:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)


def save_tensors(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Write a safetensors file atomically; UserError if the disk is full or read-only."""
    path = Path(path)
    with replacing(path) as partial:
        save_file(tensors, partial)
        # WHY: safetensors makes the file readable by its owner only. Whoever may read the folder
        # may read the file.
        partial.chmod(0o644 & path.parent.stat().st_mode)


# ------------------------------------------------------------------------------- weights of a model


def released_names(ours: str, table: dict[str, str | tuple[str, ...]] | None) -> list[str]:
    """Translate our tensor name by a table of support/released.py; several if theirs are stacked.

    {"blocks.*.up_proj": "layers.*.fc1"}: "blocks.3.up_proj.bias" -> ["layers.3.fc1.bias"]
    A name that is not in the table stays as it is.
    """
    table = table or {}
    number = re.search(r"\.(\d+)\.", ours)  # of the block
    pattern = ours
    if number:
        pattern = ours.replace(number[0], ".*.", 1)
    # The table has parameters ("class_token") and modules, which cover their weight and bias.
    module, ending = pattern, ""
    if pattern not in table:
        module, dot, leaf = pattern.rpartition(".")
        ending = dot + leaf
    theirs = table.get(module, module)
    if isinstance(theirs, str):
        theirs = (theirs,)
    block = number[1] if number else "*"
    return [name.replace("*", block) + ending for name in theirs]


def assign_weights(
    model: nn.Module, tensors, names, skip, what: str, dtype: torch.dtype | None, device=None
) -> None:
    """Fill a model that is on the meta device, one tensor at a time, on `device` (None: as read).

    tensors: their name -> tensor; names: a table for `released_names`; skip: pattern of names that
    may stay unread -> why; what: the model and its source, for the error. dtype: what to cast to;
    None keeps the dtype of the file and, on a CPU, leaves tensors of safetensors files mapped.
    Strict: one CheckpointError lists every name that is missing, unexpected or has a `fault_of`.
    FIX: nothing is initialised at random or copied as a whole first. Peak memory is that of the
    model, not 80 GB, and only tensors are unpickled (ledger F11).
    """
    stay_mapped = dtype is None and isinstance(tensors, Mapped)
    weights = {}
    used = set()
    problems = []
    for ours, parameter in model.state_dict().items():
        theirs = released_names(ours, names)
        used.update(theirs)
        # WHY: some sources have q, k and v as three matrices. Ours is one, for one matmul.
        shape = [parameter.shape[0] // len(theirs), *parameter.shape[1:]]
        parts = []
        for name in theirs:
            fault = fault_of(name, tensors, shape)
            if fault:
                problems.append(fault)
            else:
                tensor = tensors[name]
                parts.append(tensor.to(device, dtype or tensor.dtype, copy=not stay_mapped))
        if len(parts) == 1:
            weights[ours] = parts[0]
        elif parts:
            weights[ours] = torch.cat(parts)
    for name in tensors:
        if name not in used and not any(fnmatch(name, pattern) for pattern in skip):
            problems.append(f"unexpected  {name}")
    if problems:
        raise CheckpointError(
            "\n  ".join([f"The weights do not fit: {what}.", *problems]),
            "with a tensor missing or in the wrong place, the results would be silently wrong.",
            "check that this checkpoint belongs to this configuration and is complete.",
        )
    model.load_state_dict(weights, strict=True, assign=True)


SAMPLES = 256  # numbers of a matrix that are looked at; all of a 7B would take a minute


def fault_of(name: str, tensors: dict[str, Tensor], shape: list[int]) -> str | None:
    """What is wrong with a tensor: missing, its shape, its dtype, or NaN and infinite numbers.

    Vectors are checked as a whole, of a matrix only SAMPLES numbers, spread evenly.
    """
    tensor = tensors.get(name)
    if tensor is None:
        return f"missing     {name}"
    if not isinstance(tensor, Tensor):
        return f"no tensor   {name}: a {type(tensor).__name__}"
    if list(tensor.shape) != shape:
        return f"mis-shaped  {name}: {list(tensor.shape)}, wanted {shape}"
    if not tensor.is_floating_point():
        return f"mis-typed   {name}: {tensor.dtype}, wanted floating point (not quantised)"
    some = tensor.reshape(-1)
    if tensor.ndim > 1:
        some = some[:: max(1, some.numel() // SAMPLES)]
    if not tensor.is_meta and not some.float().isfinite().all():
        return f"not finite  {name}: has NaN or infinite numbers"
    return None


def initialise(model: nn.Module, generator: torch.Generator, std: float = 0.02) -> None:
    """Draw random weights: matrices, tokens and positions from N(0, std^2).

    Norms and LayerScale start at 1, biases at 0.
    """
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "bias":
            nn.init.zeros_(parameter)
        elif leaf.endswith("_scale") or (leaf == "weight" and parameter.ndim == 1):
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=std, generator=generator)
