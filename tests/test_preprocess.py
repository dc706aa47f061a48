"""data.preprocess and data.load_pixels: what each encoder gets of the frames."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, noise, write_images
from PIL import Image
from torch import Tensor

from data import load_pixels, preprocess
from encoders import ENCODERS
from support.errors import DataError
from support.video import load_video

ODD_SIZES = [(37, 53), (301, 200), (1, 9), (9, 1), (224, 224), (225, 223), (1203, 2001)]


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("name", ["dinov2", "siglip", "vivit"])
def test_squashing_is_pillows_antialiased_resize(name, size):
    """The weights were trained on Pillow's pixels; ours differ by at most one level of 256.

    Two resizes, first of the width, then of the height, are what Pillow did when the weights
    were trained; since 13 it does the cheaper one first, and noise is clipped differently between.
    """
    config, frame = ENCODERS[name], noise(*size)
    method = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[config.interpolation]
    assert config.interpolation == ("bilinear" if name == "vivit" else "bicubic")
    image = Image.fromarray(frame[0].permute(1, 2, 0).numpy())
    image = image.resize((224, image.height), method).resize((224, 224), method)
    mean, std = {
        "dinov2": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "siglip": ([0.5] * 3, [0.5] * 3),
        "vivit": ([0.5] * 3, [0.5] * 3),
    }[name]
    got = preprocess(frame, config)
    assert got.shape == (1, 3, 224, 224)
    assert got.dtype == torch.float32
    pixels = got[0].permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)
    expected = torch.from_numpy(np.array(image)).float() / 255
    assert (pixels - expected).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("size", ODD_SIZES)
def test_languagebind_is_scaled_by_its_short_side_and_cropped(size):
    """Normalising before or after interpolating is the same (both are linear): within 1e-5."""
    frame = noise(*size)
    got = preprocess(frame, ENCODERS["languagebind"])
    assert got.shape == (1, 3, 224, 224)
    assert (got[0] - languagebind_pixels(frame[0])).abs().max() < 1e-5


def languagebind_pixels(frame: Tensor) -> Tensor:
    """The released order: normalise, scale the short side (long side floored), crop the centre."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    x = ((frame.float() / 255 - mean) / std)[None]
    height, width = frame.shape[1:]
    if height <= width:
        size = (224, int(np.floor(width * 224 / height)))
    else:
        size = (int(np.floor(height * 224 / width)), 224)
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)
    top, left = (round((length - 224) / 2.0) for length in size)
    return x[0, :, top : top + 224, left : left + 224]


@pytest.mark.parametrize("name", ["languagebind", "dinov2", "vivit", "siglip"])
def test_no_encoder_ever_sees_a_flipped_frame(name):
    """FIX F1: the released LanguageBind transform flips half of all clips, at inference too."""
    frame = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    frame[..., :32] = 255  # bright on the left
    for _ in range(8):
        pixels = preprocess(frame, ENCODERS[name])
        assert pixels[..., :100].min() > pixels[..., 124:].max()


def test_preprocessing_uses_no_randomness():
    state = torch.get_rng_state()
    first = preprocess(noise(40, 50), ENCODERS["languagebind"])
    assert torch.equal(first, preprocess(noise(40, 50), ENCODERS["languagebind"]))
    assert torch.equal(state, torch.get_rng_state())


def test_the_encoders_see_the_same_moments():
    """Of 32 frames ViViT sees all, the others 0, 2 ... 30: its tubelet i begins with their frame i.

    QUIRK K7: so the very last frame is never seen by three of the four.
    """
    frames = torch.arange(32, dtype=torch.uint8)[:, None, None, None].expand(32, 3, 32, 32) * 5
    small = {name: replace(ENCODERS[name], image_size=32) for name in ENCODERS}
    levels = {}
    for name in ("languagebind", "dinov2", "vivit", "siglip"):
        config = small[name]
        pixels = preprocess(frames, config)
        assert len(pixels) == config.num_frames
        grey = pixels[:, 0, 0, 0] * config.pixel_std[0] + config.pixel_mean[0]
        levels[name] = (grey * 255 / 5).round().int().tolist()
    assert levels["vivit"] == list(range(32))
    for name in ("languagebind", "dinov2", "siglip"):
        assert levels[name] == list(range(0, 32, 2))
        assert levels[name] == levels["vivit"][::2]  # frame i beside the first of tubelet i


def test_a_single_frame_stays_a_single_frame():
    """Image encoders encode a still once, so it is not repeated here."""
    for name in ("languagebind", "dinov2", "vivit", "siglip"):
        assert preprocess(noise(20, 30), ENCODERS[name]).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(("name", "count"), [("vivit", 16), ("dinov2", 24), ("siglip", 8)])
def test_the_number_of_frames_must_be_a_multiple(name, count):
    with pytest.raises(DataError) as caught:
        preprocess(noise(20, 30, count), ENCODERS[name])
    assert f"{name} wants {ENCODERS[name].num_frames} frames, got {count}" in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_load_pixels_cuts_a_folder_of_images_by_its_frame_rate(tmp_path):
    """VLEP: from second 1 on, at 3 frames per second, is from frame 3 on."""
    folder = write_images(tmp_path / "frames", [f"{n}.png" for n in range(12)])
    pixels = load_pixels(folder, SMALL, start=1, end=3, fps=3)
    frames = load_video(folder, max(c.num_frames for c in SMALL), start=1, end=3, fps=3)
    for config in SMALL:
        assert torch.equal(pixels[config.name], preprocess(frames, config))
