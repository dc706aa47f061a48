"""A cache of pooled features on disk, so that frozen encoders run once per clip."""

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

    folder/FINGERPRINT/ab/abcdef....safetensors, where FINGERPRINT is a hash of an encoder's
    weights, its preprocessing and the pooled size, and abcdef... a hash of the clip's bytes. If any
    of these changes the path changes, so stale features are never found.
    """

    folder: str | Path
    fingerprints: dict[str, str]  # encoder -> FINGERPRINT

    def paths(self, file: Path) -> dict[str, Path]:
        """Return where the features of a clip belong: encoder -> path, existing or not."""
        content = hashlib.sha256()
        parts = sorted(file.iterdir()) if file.is_dir() else [file]
        for part in parts:
            content.update(part.read_bytes())
        name = content.hexdigest()
        paths = {}
        for encoder, fingerprint in self.fingerprints.items():
            paths[encoder] = Path(self.folder, fingerprint, name[:2], f"{name}.safetensors")
        return paths

    def get(self, file: Path) -> dict[str, Tensor] | None:
        """Load encoder -> (t, h, w, d_e), or None unless all encoders have features of the clip."""
        if not file.exists() or not self.fingerprints:
            return None
        paths = self.paths(file)
        if not all(path.exists() for path in paths.values()):
            return None
        pooled = {}
        for encoder, path in paths.items():
            pooled[encoder] = load_file(path)["features"]
        return pooled

    def put(self, file: Path, pooled: dict[str, Tensor]) -> None:
        """Save encoder -> (t, h, w, d_e) in bfloat16, the dtype in which encoders run on a GPU."""
        paths = self.paths(file)
        for encoder, tensor in pooled.items():
            save_tensors({"features": tensor.bfloat16().cpu().contiguous()}, paths[encoder])
