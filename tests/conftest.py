"""What the tests share: the maintainers' reference folder, and weights worth testing with."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from helpers import SMALL, cut_in_half, noise, numbered_frames, talk, train_tokenizer, write_video
from PIL import Image
from torch import nn

from data import TEMPLATES, ConversationDataset
from llama import Tokenizer

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread for each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The checks that need a GPU run one after the other: they measure time and memory.

    Other test files are not imported, because a GPU machine may lack packages that they need.
    """
    if config.option.markexpr == "cuda":
        if config.args_source is not config.ArgsSource.ARGS:
            config.args = [str(REPOSITORY / "tests" / "test_cuda.py")]
        config.option.numprocesses = 0
        config.option.dist = "no"
        config.option.tx = []


def pytest_xdist_auto_num_workers(config) -> int:
    """One process more than cores: many tests wait for a command that they have started."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else None


# Test files of training runs. They take longest, so they start first.
LONG = ("test_train.py", "test_start.py", "test_resume.py", "test_plan.py", "test_runs.py")


def pytest_collection_modifyitems(config, items):
    """Deselect what needs CUDA where there is none, so that it is never counted as passed."""
    items.sort(key=lambda item: item.path.name not in LONG)
    if not torch.cuda.is_available():
        needs_cuda = [item for item in items if item.get_closest_marker("cuda")]
        if needs_cuda:
            config.hook.pytest_deselected(items=needs_cuda)
            items[:] = [item for item in items if item not in needs_cuda]


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """../shared: manifests (names and shapes of released weights) and LLaMA's tokenizer."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: the maintainers' manifests and tokenizer are needed")
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """For tests on tiny tensors: waking a second thread takes longer than computing them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def unit_scale(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights under which every part matters: unit scale, no norm or bias neutral.

    WHY: with the usual N(0, 0.02) attention is almost uniform and a block adds almost nothing,
    so a wrong head split or a forgotten bias would hide below any tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("bias"):
            noise = 0.2 * noise
        elif name.endswith("weight") and parameter.ndim == 1:  # of a norm
            noise = 1 + 0.2 * noise
        elif name.endswith("weight") and "position" not in name and "embed_tokens" not in name:
            noise = noise / math.sqrt(parameter[0].numel())
        parameter.copy_(noise)
    return model


# ------------------------------------------------------------------------------ videos and datasets


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """An ordinary clip: 40 frames at 25 per second, H.264 with B-frames and four key frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    options = {"x264-params": "scenecut=0"}
    return write_video(path, numbered_frames(40), b_frames=3, **options)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


@pytest.fixture(scope="session")
def llama2_tokenizer(shared_folder) -> Tokenizer:
    return Tokenizer(shared_folder / "data" / "llama2_tokenizer.model")


@pytest.fixture(scope="session")
def mixed_folder(tmp_path_factory, clip) -> Path:
    """A dataset of a video, a text, an image and a video row, in one folder."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    Image.fromarray(noise(20, 30)[0].permute(1, 2, 0).numpy()).save(folder / "still.png")
    rows = [
        {
            "id": "v",
            "video": "clip.mp4",
            "conversations": talk("<video>\nwhat moves", "red square"),
        },
        {"id": "t", "conversations": talk("left or right", "left")},
        {
            "id": "i",
            "image": "still.png",
            "conversations": talk("<image>\nwhat", "the blue circle"),
        },
        {"id": "w", "video": "clip.mp4", "conversations": talk("the", "red", "left", "right")},
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def mixed(mixed_folder, tiny_tokenizer) -> ConversationDataset:
    return ConversationDataset(mixed_folder / "rows.json", tiny_tokenizer, TEMPLATES["base"], SMALL)


@pytest.fixture
def damaged(tmp_path, clip) -> Path:
    """Rows 0, 3, 6 ... 27 are videos, of which 3, 6 and 9 cannot be used; the others are text."""
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    cut_in_half(tmp_path)
    rows = []
    for number in range(30):
        row = {"id": f"id-{number}", "conversations": talk(f"what {number}", "left")}
        if number % 3 == 0:
            row["video"] = "clip.mp4"
        rows.append(row)
    rows[3]["video"] = "half.mp4"
    rows[6]["video"] = "gone.mp4"
    rows[9]["conversations"] = [{"from": "gpt", "value": "left"}]
    (tmp_path / "stage2.json").write_text(json.dumps(rows))
    return tmp_path / "stage2.json"
