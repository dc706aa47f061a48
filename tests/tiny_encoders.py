"""Small encoders for tests: 32 channels and a few blocks, otherwise as the released ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from conftest import unit_scale
from torch import Tensor

from encoders import ENCODERS, Encoder, EncoderConfig, load_encoder

FULL_SIZE = ["languagebind", "dinov2", "vivit", "siglip"]


def tiny(name: str, **changes) -> EncoderConfig:
    """The encoder `name` with 32 channels, 3x3 patches and 3 released blocks, else as it is."""
    full = ENCODERS[name]
    shape = {
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "image_size": 12,
        "released_layers": 3,
        "num_layers": 3 - (full.released_layers - full.num_layers),
    }
    return replace(full, **(shape | changes))


def build(config: EncoderConfig, dtype: torch.dtype = torch.float64) -> Encoder:
    return unit_scale(load_encoder(config, dtype=dtype))


def clip(config: EncoderConfig, b: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random frames (b, T, 3, H, W)."""
    shape = (b, config.num_frames, 3, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )
