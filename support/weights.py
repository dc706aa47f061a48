"""Files of weights: where they are, how they are read, renamed, checked and written."""

from __future__ import annotations

import json
import mmap
import os
import re
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.serialization import set_default_mmap_options

from support.errors import CheckpointError

FILES = (  # how released weights are called; the first that is there is read
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin",
)  # fmt: skip


HUB_FIXES = {  # an error of huggingface_hub, whose own words say why -> what to do
    hub_errors.GatedRepoError: "accept its licence at huggingface.co/{}, then run `hf auth login`.",
    hub_errors.LocalEntryNotFoundError: "connect, or run `hf download {}` beforehand, online.",
    Exception: "check the name (a local path must exist), the connection and `hf auth whoami`.",
}


def find_file(source: str | Path, names: tuple[str, ...], required: bool = True) -> Path | None:
    """The first of `names` in a folder or hub repository ("owner/name[@revision]"), or that file.

    Downloads go to huggingface_hub's cache; HF_HUB_OFFLINE=1 reads from there only.
    """
    path, wanted = Path(source), " or ".join(names)
    if path.is_file():
        return path
    if path.is_dir():
        if found := [path / name for name in names if (path / name).is_file()]:
            return found[0]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(source)):
        repo, _, revision = str(source).partition("@")
        for name in names:
            try:
                return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision or None))
            except Exception as error:
                problem = error
            if not isinstance(problem, hub_errors.EntryNotFoundError):
                break  # else the next name may be there, or in the cache
        if not isinstance(problem, hub_errors.RemoteEntryNotFoundError):
            why = f"{type(problem).__name__}: {problem}"
            fix = next(fix for kind, fix in HUB_FIXES.items() if isinstance(problem, kind))
            what = f"Cannot download {wanted} of {source}."
            raise CheckpointError(what, why, fix.format(repo)) from problem
    if not required:
        return None
    why = "a source is a folder or a hub id (owner/name) with such a file, or the file itself."
    fix = "check the path or the name, and that the download or copy is complete."
    raise CheckpointError(f"Found no {wanted} at {source}.", why, fix)


def read_json(path: Path) -> dict:
    """The contents of a config.json."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"Cannot read {path}.", str(error), "fetch it again.") from error


def read_tensors(source: str | Path, files: tuple[str, ...]) -> dict[str, Tensor]:
    """name -> tensor of the first of `files`; memory-mapped: read from disk when it is used."""
    path = find_file(source, files)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix != ".json":
            # WHY: a private mapping reserves its size: Linux refuses 27 GB to a machine of 24 GB. A
            # shared one does not, but needs a file one may write. Nobody does: weights are copied.
            shared = os.name == "posix" and os.access(path, os.W_OK)
            with set_default_mmap_options(mmap.MAP_SHARED) if shared else nullcontext():
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except Exception as error:  # every reader has its own zoo of errors for a damaged file
        why = f"{type(error).__name__}: {error}"
        fix = "the file is damaged or no checkpoint; delete it and download it again."
        raise CheckpointError(f"Cannot read {path}.", why, fix) from error
    beside = path.parent if path == Path(source) else source
    return {k: v for shard in shards for k, v in read_tensors(beside, (shard,)).items()}


def save_tensors(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Write a safetensors file under a temporary name, then rename: never a partial file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial)
    # WHY: safetensors lets only the owner read; now whoever may read the folder may read the file.
    partial.chmod(0o644 & path.parent.stat().st_mode)
    partial.replace(path)


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
    # The table holds whole names ("class_token") and modules ("blocks.*.norm") alike.
    module, ending = pattern, ""
    if pattern not in table:
        module, dot, leaf = pattern.rpartition(".")
        ending = dot + leaf
    theirs = table.get(module, module)
    if isinstance(theirs, str):
        theirs = (theirs,)
    names = []
    for name in theirs:
        name = name + ending
        names.append(name.replace("*", number[1]) if number else name)
    return names


def assign_weights(model: nn.Module, tensors, names, skip, what: str, dtype) -> None:
    """Give a model on the meta device its weights, one tensor at a time, cast to `dtype`.

    tensors: theirs by name; names: table of `released_names`; skip: what to leave unread -> why.
    FIX: no random weights are made first and no second copy exists: peak memory is the model's, not
    80 GB, and nothing but tensors is unpickled (ledger F11).
    Strict: raises one CheckpointError that lists all missing, unexpected and mis-shaped names.
    """
    weights, used, problems = {}, set(), []
    for ours, wanted in model.state_dict().items():
        theirs = released_names(ours, names)
        used.update(theirs)
        # WHY: q, k and v of some sources are three matrices; ours is one, which is one matmul.
        shape, parts = [wanted.shape[0] // len(theirs), *wanted.shape[1:]], []
        for name in theirs:
            if name not in tensors:
                problems.append(f"missing     {name}")
            elif (found := list(tensors[name].shape)) != shape:
                problems.append(f"mis-shaped  {name}: {found}, wanted {shape}")
            else:
                parts.append(tensors[name].to(dtype, copy=True))
        if parts:
            weights[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    for name in tensors:
        if name not in used and not any(fnmatch(name, pattern) for pattern in skip):
            problems.append(f"unexpected  {name}")
    if problems:
        what = "\n  ".join([f"The weights do not fit: {what}.", *problems])
        why = "with a tensor missing or misplaced the features would be silently wrong."
        fix = "check that this checkpoint belongs to this configuration, and that it is complete."
        raise CheckpointError(what, why, fix)
    model.load_state_dict(weights, strict=True, assign=True)


def initialise(model: nn.Module, generator: torch.Generator, std: float = 0.02) -> None:
    """Random weights: N(0, std^2) for matrices, tokens, positions; norms and biases neutral."""
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "bias":
            nn.init.zeros_(parameter)
        elif leaf.endswith("_scale") or (leaf == "weight" and parameter.ndim == 1):
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=std, generator=generator)
