"""A tiny MERV for tests: four encoders and a LLaMA, a few layers deep.

Its weights have a scale at which every part changes the result (conftest.unit_scale).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import unit_scale
from helpers import numbered_frames, talk, train_tokenizer, write_video
from torch import Tensor

from data import TEMPLATES, Example, preprocess, render_prompt, tokenize
from llama import LLAMAS, Tokenizer
from merv import MERV, MERVS

TINY = replace(
    MERVS["miniature"],
    pooled_side=2,
    name="tiny",
    encoders=tuple(
        replace(e, hidden_size=16 if e.family == "vit" else 24, num_heads=2, num_layers=2,
                released_layers=2)
        for e in MERVS["miniature"].encoders
    ),
    llm=replace(
        LLAMAS["miniature"], vocab_size=320, hidden_size=32, intermediate_size=48, num_heads=4,
        num_kv_heads=2, max_positions=256,
    ),
)  # fmt: skip
QUESTIONS = ["what moves", "the red square moves left or right, or what", "x", "circle"]
NUM_FRAMES = max(e.num_frames for e in TINY.encoders)


@pytest.fixture
def no_hub(monkeypatch):
    """Downloads fail at once, so tests use only what is on disk."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(train_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.model"))


@pytest.fixture(scope="session")
def shared_model(tokenizer) -> MERV:
    return unit_scale(MERV.create(TINY, tokenizer)).eval()


@pytest.fixture
def model(shared_model) -> MERV:
    """A tiny MERV to read from; tests that train make their own."""
    shared_model.zero_grad(set_to_none=True)
    return shared_model


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered_frames(24))


@pytest.fixture(scope="session")
def saved(shared_model, tmp_path_factory) -> Path:
    """A folder of save_pretrained, to read from only."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    shared_model.save_pretrained(folder)
    return folder


def random_pixels(seed: int, still: bool = False) -> dict[str, Tensor]:
    """encoder -> (T_e, 3, H, W), as data.preprocess returns them; a still has T_e = 1."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(1 if still else NUM_FRAMES, 3, 32, 32, generator=generator)
    return {e.name: preprocess((frames * 255).byte(), e) for e in TINY.encoders}


def example(model: MERV, kind: str, *turns: str, seed: int = 0) -> Example:
    """A row of a dataset: kind is "video", "image" or "text"."""
    rendered = render_prompt(talk(*turns), TEMPLATES["base"])
    ids, labels = (torch.tensor(v) for v in tokenize(rendered, model.tokenizer))
    if kind == "text":
        return Example(ids, labels)
    return Example(ids, labels, pixels=random_pixels(seed, still=kind == "image"))


@pytest.fixture
def mixed_rows(model) -> list[Example]:
    """Two clips, a text and a still, with answers of different lengths."""
    return [
        example(model, "video", "what moves", "the red square", seed=1),
        example(model, "text", "left or right", "left"),
        example(model, "image", "what", "the blue circle moves right", seed=2),
        example(model, "video", "the", "red", "left", "right", seed=3),
    ]


@pytest.fixture
def encoder_calls(model):
    """Count how often each encoder runs during a test: name -> number of calls."""
    calls = Counter()
    hooks = [
        encoder.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, encoder in model.encoders.items()
    ]
    yield calls
    for hook in hooks:
        hook.remove()
