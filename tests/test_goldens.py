"""DINOv2 and SigLIP compared with timm, and pixels with Pillow, by stored outputs ("goldens").

timm need not be installed: goldens/make_goldens.py ran it once, and states the versions it used.
The weights are random, 32 wide and 3 blocks deep; names and architecture are the released ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import preprocess
from encoders import ENCODERS, EncoderConfig, load_encoder
from support.released import resize_positions

GOLDENS = REPOSITORY / "tests" / "goldens"
BOTH = pytest.mark.parametrize("name", ["dinov2", "siglip"])
EACH_SHAPE = pytest.mark.parametrize("shape", ["37x401", "331x61", "57x93"])


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """The outputs of timm; make_goldens.py explains their names."""
    return load_file(GOLDENS / "expected.safetensors")


@pytest.fixture(scope="module")
def frames(expected) -> Tensor:
    """(1, 2, 3, 224, 224): a frame and its mirror image; exact in float32."""
    frame = expected["frame"]
    return ((torch.stack([frame, frame.flip(-1)]).float() - 128) / 64)[None]


# ----------------------------------------------------------------------------------------- features


@BOTH
@torch.no_grad()
def test_features_equal_those_of_timm_from_timms_own_file(name, frames, expected):
    """The strict loader accepts timm's file and resizes DINOv2's 37x37 positions; the features are
    the output of the block that timm calls `blocks[-2]`."""
    encoder = load_encoder(small(name), GOLDENS / f"{name}.safetensors")
    assert len(encoder.blocks) == 2
    features = encoder(frames)[0]
    side = {"dinov2": 16, "siglip": 14}[name]
    assert features.shape == (2, side, side, 32)
    assert relative_error(features, expected[f"{name}.float32"]) < 1e-5


def small(name: str) -> EncoderConfig:
    """The released encoder with the depth, width and heads of the goldens."""
    return replace(
        ENCODERS[name], hidden_size=32, num_heads=4, released_layers=3, num_layers=2, num_frames=2
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert theirs.std() > 0.3, "without unit scale the tolerance means little"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@BOTH
@torch.no_grad()
def test_in_float64_the_features_equal_those_of_timm_to_twelve_digits(
    name, frames, expected, tmp_path
):
    """Float64 leaves no rounding to hide a mistake. timm resizes positions in float32, so this test
    takes them from timm; the next test compares the resizing."""
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    if name == "dinov2":
        tensors["pos_embed"] = expected["dinov2.positions"]
    save_file(tensors, tmp_path / "model.safetensors")
    encoder = load_encoder(small(name), tmp_path, dtype=torch.float64)
    features = encoder(frames[:, :1].double())[0]
    assert relative_error(features, expected[f"{name}.float64"]) < 1e-12


def test_positions_are_resized_as_timm_resizes_them_at_load(expected):
    """37x37 for 518 pixels -> 16x16 for 224, bicubic with antialiasing, in float32."""
    positions = load_file(GOLDENS / "dinov2.safetensors")["pos_embed"]
    assert positions.shape == (1, 37 * 37, 32)
    assert relative_error(resize_positions(positions, 16, 16), expected["dinov2.positions"]) < 2e-6


@BOTH
@torch.no_grad()
def test_every_tensor_of_a_golden_matters(name, frames, expected):
    """A golden that passes without one of the biases would prove nothing. Setting any tensor to its
    neutral value (1 for the weight of a norm or LayerScale, otherwise 0) changes the features by
    far more than the tolerance."""
    encoder = load_encoder(small(name), GOLDENS / f"{name}.safetensors")
    for tensor, weight in encoder.named_parameters():
        before = weight.clone()
        weight.fill_(float(tensor.endswith(("_scale", "norm.weight"))))
        changed = relative_error(encoder(frames[:, :1])[0], expected[f"{name}.float32"][:1])
        assert changed > 1e-2, tensor
        weight.copy_(before)


# ------------------------------------------------------------------------------------------- pixels


@EACH_SHAPE
@pytest.mark.parametrize(
    ("name", "interpolation", "step"),
    [("dinov2", "bicubic", 4), ("siglip", "bicubic", 4), ("vivit", "bilinear", 8)],
)
def test_squashing_an_image_equals_pillow_to_one_level_of_255(
    name, interpolation, step, shape, expected
):
    """timm's evaluation transform resizes with Pillow, antialiased. Nearly all bytes are equal, and
    none differs by more than one level: Pillow and torch round the filter differently. (For tall
    images the version of Pillow matters: see make_goldens.py.)"""
    pixels = preprocess(expected[f"image.{shape}"][None], ENCODERS[name])
    assert pixels.shape == (1, 3, 224, 224)
    squashed = unnormalised(pixels[0], ENCODERS[name])[:, ::step]
    difference = (squashed - expected[f"{interpolation}.{shape}"].float()).abs()
    assert difference.max() < 1.001
    assert (difference > 0.5).float().mean() < 0.01


def unnormalised(pixels: Tensor, config: EncoderConfig) -> Tensor:
    """Back to 0 ... 255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.pixel_mean, config.pixel_std))
    return 255 * (pixels * std + mean)


@EACH_SHAPE
@BOTH
def test_normalised_pixels_equal_timms_transform(name, shape, expected):
    """timm stores mean and standard deviation with the model; we differ by at most one level."""
    config = ENCODERS[name]
    pixels = preprocess(expected[f"image.{shape}"][None], config)[0, :, ::56]
    one_level = 1.001 / 255 / min(config.pixel_std)
    difference = (pixels - expected[f"{name}.pixels.{shape}"]).abs()
    assert difference.max() < one_level
    assert difference.median() < 1e-6


# --------------------------------------------------------------------------------- the golden files


def test_the_goldens_state_the_versions_that_made_them():
    """Each file has the versions in its metadata; the script's docstring has the same ones."""
    script = (GOLDENS / "make_goldens.py").read_text()
    files = sorted(GOLDENS.glob("*.safetensors"))
    assert [path.name for path in files] == [
        "dinov2.safetensors", "expected.safetensors", "siglip.safetensors"
    ]  # fmt: skip
    for path in files:
        with safe_open(path, "pt") as file:
            made_with = file.metadata()["made_with"].split(", ")
        assert {entry.split()[0] for entry in made_with} >= {"timm", "torch", "torchvision"}
        for entry in made_with[1:]:  # [0] is python, of which the docstring gives two numbers
            assert entry in script.replace("\n", " ")


def test_the_goldens_are_small():
    """They are kept in git, so together they stay under 1.6 MB."""
    assert sum(path.stat().st_size for path in GOLDENS.glob("*.safetensors")) < 1.6e6
