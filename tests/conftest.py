"""What the tests share: the maintainers' reference folder, and weights worth testing with."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread for each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The checks that need a GPU run one after the other: they measure time and memory."""
    if config.option.markexpr == "cuda":
        config.option.numprocesses = 0
        config.option.dist = "no"
        config.option.tx = []


def pytest_collection_modifyitems(config, items):
    """Deselect what needs CUDA where there is none, so that it is never counted as passed."""
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
