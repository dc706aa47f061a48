"""A cache of pooled features on disk, so that frozen encoders run once per clip."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from support.files import write_file
from support.weights import save_tensors


@dataclass
class FeatureCache:
    """Pooled features of clips on disk, so that frozen encoders run once per clip, not per epoch.

    folder/FINGERPRINT/ab/abcdef....safetensors, where FINGERPRINT is a hash of an encoder's
    weights, its preprocessing and the pooled size, and abcdef... a hash of the clip's bytes. If any
    of these changes the path changes, so stale features are never found.
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
        """The hash of a clip's bytes: a video file, an image, or all files of a folder of images.

        WHY: a clip is often as large as its features, so reading it to find them would double the
        work. Its hash is kept in folder/hashes, for as long as its files keep path, size and time
        of the last change.
        """
        parts = [clip]
        if clip.is_dir():
            parts = sorted(part for part in clip.iterdir() if part.is_file())
        known_by = hashlib.sha256()
        for part in parts:
            about = part.stat()
            state = (os.path.abspath(part), about.st_size, about.st_mtime_ns)
            known_by.update(repr(state).encode(errors="surrogateescape"))
        key = known_by.hexdigest()
        memory = Path(self.folder, "hashes", key[:2], key)
        if memory.is_file():
            return memory.read_text()
        content = hashlib.sha256()
        for part in parts:
            content.update(part.read_bytes())
        write_file(memory, content.hexdigest())
        return content.hexdigest()

    def has(self, file: Path) -> bool:
        """Whether all encoders have features of a clip."""
        readable = file.is_file() or file.is_dir()  # reading a pipe could wait for ever
        if not readable or not self.fingerprints:
            return False
        return all(path.exists() for path in self.paths(file).values())

    def get(self, file: Path) -> dict[str, Tensor] | None:
        """Load encoder -> (t, h, w, d_e), or None unless all encoders have features of the clip."""
        if not self.has(file):
            return None
        pooled = {}
        for encoder, path in self.paths(file).items():
            stored = load_file(path)
            pooled[encoder] = stored["features"]
            if "steps" in stored:  # absent from older files
                pooled[encoder] = stored["features"].expand(int(stored["steps"]), -1, -1, -1)
        return pooled

    def put(self, file: Path, pooled: dict[str, Tensor]) -> None:
        """Save encoder -> (t, h, w, d_e) in bfloat16, the dtype in which encoders run on a GPU.

        Of a still, whose time steps are all alike, only the first is stored.
        """
        paths = self.paths(file)
        for encoder, tensor in pooled.items():
            steps = torch.tensor(len(tensor))
            if torch.equal(tensor, tensor[:1].expand_as(tensor)):
                tensor = tensor[:1]
            features = tensor.bfloat16().cpu().contiguous()
            save_tensors({"features": features, "steps": steps}, paths[encoder])
