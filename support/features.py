"""A cache of pooled features on disk, so that frozen encoders run once per clip."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from support.errors import CheckpointError, UserError
from support.files import write_file
from support.weights import save_tensors

MAX_STEPS = 10_000  # time steps of a clip; a damaged number could fill the memory


def own_code(module: nn.Module) -> list[str]:
    """The code of a module's class, if it is not of this repository; else [].

    WHY not that of ours: a comment that changes there would make every cache useless.
    """
    cls = type(module)
    if cls.__module__ in ("encoders", "merv", "support.variants"):
        return []
    try:
        return [inspect.getsource(cls)]
    except (OSError, TypeError) as error:
        why = "features are cached, and found again only as long as it stays the same."
        fix = "write the class into a file, or train with --cache-features none."
        raise UserError(f"The code of {cls.__name__} cannot be read.", why, fix) from error


@dataclass
class FeatureCache:
    """Pooled features of clips on disk, so that frozen encoders run once per clip, not per epoch.

    folder/FINGERPRINT/ab/abcdef....safetensors, where FINGERPRINT is a hash of an encoder's
    weights, its preprocessing, the frames that are loaded, the pooling and the code of a class of
    the user's own, and abcdef... a hash of the clip's bytes. If any of these changes, so does the
    path, and old features are not found.
    """

    folder: str | Path
    fingerprints: dict[str, str]  # encoder -> FINGERPRINT

    def paths(self, file: Path) -> dict[str, Path]:
        """Return where the features of a clip belong: encoder -> path, existing or not."""
        name = self.hash_of(file)
        paths = {}
        for encoder, fingerprint in self.fingerprints.items():
            paths[encoder] = Path(self.folder, fingerprint, name[:2], f"{name}.safetensors")
        return paths

    def hash_of(self, clip: Path) -> str:
        """The hash of a clip's bytes: of a video file, of an image, or of all files of a folder of
        images and their names.

        WHY: a clip is often as large as its features, so reading it to find them would double the
        work. Its hash is kept in folder/hashes, for as long as its files keep path, size and time
        of the last change.
        """
        memory = self.memory_of(clip)
        if memory.is_file():
            stored = memory.read_text(errors="replace")
            if re.fullmatch(r"[0-9a-f]{64}", stored):
                return stored
        content = hashlib.sha256()
        for part in parts_of(clip):
            if part != clip:  # the names decide the order of the frames
                content.update(os.fsencode(part.name) + b"\0")
            content.update(part.read_bytes())
        write_file(memory, content.hexdigest())
        return content.hexdigest()

    def memory_of(self, clip: Path) -> Path:
        """The file that keeps the hash of a clip in its present state."""
        # Of a folder of images, older versions hashed only the bytes, not the names.
        known_by = hashlib.sha256(b"names and bytes")
        for part in parts_of(clip):
            about = part.stat()
            state = (os.path.abspath(part), about.st_size, about.st_mtime_ns)
            known_by.update(repr(state).encode(errors="surrogateescape"))
        key = known_by.hexdigest()
        return Path(self.folder, "hashes", key[:2], key)

    def find(self, file: Path) -> dict[str, Path]:
        """The files with the features of a clip: encoder -> path, or {} if one is missing."""
        readable = file.is_file() or file.is_dir()  # reading a pipe could wait for ever
        if not readable:
            return {}
        try:
            paths = self.paths(file)
        except OSError:  # load_pixels will say why it cannot be read
            return {}
        return paths if all(path.exists() for path in paths.values()) else {}

    def get(self, file: Path) -> dict[str, Tensor] | None:
        """Load encoder -> (t, h, w, d_e), or None unless all encoders have features of the clip.

        Raises CheckpointError if a file of them is damaged.
        """
        paths = self.find(file)
        if not paths:
            return None
        return {encoder: read_features(path) for encoder, path in paths.items()}

    def put(self, file: Path, pooled: dict[str, Tensor]) -> None:
        """Save encoder -> (t, h, w, d_e) in bfloat16, the dtype in which encoders run on a GPU.

        Of a still, whose time steps are all alike, only the first is stored.
        """
        paths = self.paths(file)
        for encoder, tensor in pooled.items():
            steps = {}
            if torch.equal(tensor, tensor[:1].expand_as(tensor)):
                steps["steps"] = torch.tensor(len(tensor))
                tensor = tensor[:1]
            features = tensor.bfloat16().cpu().contiguous()
            save_tensors({"features": features, **steps}, paths[encoder])


def parts_of(clip: Path) -> list[Path]:
    """The files that a clip consists of: itself, or all files of a folder of pictures."""
    if not clip.is_dir():
        return [clip]
    return sorted(part for part in clip.iterdir() if part.is_file())


def read_features(path: Path) -> Tensor:
    """Read the pooled features (t, h, w, d_e) that `FeatureCache.put` wrote for one encoder."""
    try:
        # WHY not load_file: it maps the file into memory, which takes longer for small ones.
        stored = load(path.read_bytes())
        features = stored["features"]
        if features.ndim != 4 or not features.is_floating_point():
            raise ValueError(f"it holds {features.dtype} {list(features.shape)}")
        if not math.isfinite(features.sum(dtype=torch.float32)):  # so one of them is not
            raise ValueError("it holds numbers that are infinite or not a number")
        if "steps" in stored:  # of a still
            steps = int(stored["steps"])
            if not 1 <= steps <= MAX_STEPS:
                raise ValueError(f"it has {steps} time steps")
            features = features.expand(steps, -1, -1, -1)
    except Exception as error:  # safetensors and torch have errors of their own
        what = f"Cannot read the cached features in {path}."
        fix = "delete this file, and they are computed again."
        raise CheckpointError(what, f"{type(error).__name__}: {error}", fix) from error
    return features
