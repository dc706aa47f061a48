"""Pooled features of clips on disk, so that frozen encoders run once per clip."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from support.weights import save_tensors


@dataclass
class FeatureCache:
    """Pooled features of clips on disk, so that frozen encoders run once per clip, not per epoch.

    An entry is named by hashes of the file's bytes, the encoder's weights and preprocessing and the
    pooled size, so a stale one is never found.
    """

    folder: str | Path
    fingerprints: dict[str, str]  # encoder -> hash

    def paths(self, file: Path) -> dict[str, Path]:
        """encoder -> where its features of one file lie, or would lie."""
        content = hashlib.sha256()
        for part in sorted(file.iterdir()) if file.is_dir() else [file]:
            content.update(part.read_bytes())
        name = content.hexdigest()
        entry = f"{name[:2]}/{name}.safetensors"
        return {e: Path(self.folder, h, entry) for e, h in self.fingerprints.items()}

    def get(self, file: Path) -> dict[str, Tensor] | None:
        """encoder -> (t, h, w, d_e), or None if any, or the file itself, is missing."""
        paths = self.paths(file) if file.exists() else {}
        if paths and all(path.exists() for path in paths.values()):
            return {encoder: load_file(path)["features"] for encoder, path in paths.items()}

    def put(self, file: Path, features: dict[str, Tensor]) -> None:
        """Store encoder -> (t, h, w, d_e) in bfloat16."""
        paths = self.paths(file)
        for encoder, tensor in features.items():
            save_tensors({"features": tensor.bfloat16().cpu().contiguous()}, paths[encoder])
