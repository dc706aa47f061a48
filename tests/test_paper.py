"""The tables of parameters and multiply-adds, counted on the real modules; the projectors."""

import pytest
import torch
import torch.nn.functional as F

import cost
from merv import PROJECTORS

EXACT_WORK = ("MERV", "LanguageBind alone", "DINOv2 alone", "SigLIP alone", "concat (sequence)")


@pytest.mark.slow
@pytest.mark.parametrize("row", cost.PAPER, ids=lambda row: row.name)
def test_the_efficiency_table_is_the_papers(row):
    """Parameters to the million; multiply-adds within 2 % where the text has the same length."""
    counted_m, counted_t = cost.cost_of(row, released=True)
    ours_m, ours_t = cost.cost_of(row, released=False)
    if row.millions is not None:
        assert int(counted_m) == row.millions
    assert (abs(counted_t / row.tera - 1) < 0.02) == (row.name in EXACT_WORK)
    assert ours_t < counted_t and ours_m < counted_m + 1


@pytest.mark.parametrize(
    ("name", "millions"), [("avg2d", 0), ("avg3d", 0), ("attn2d", 12.7), ("conv2d", 237.4)]
)
def test_a_projector_has_the_parameters_of_table_2a(name, millions):
    """From LanguageBind to width 4096, everything before the final Linear."""
    assert round(cost.projector_cost(name), 1) == millions


def test_the_3d_convolution_has_the_parameters_of_a_3x3x3_one():
    """The text says 2x3x3, which has 75 million; table 2a's 113 million is 3x3x3 (K11)."""
    with torch.device("meta"):
        projector = PROJECTORS["conv3d"](1024, 4096, 8)
    assert projector.conv.weight.numel() == 27 * 1024 * 4096
    assert round(cost.count(projector.conv) / 1e6) == 113


@pytest.mark.parametrize("name", PROJECTORS)
def test_every_projector_gives_tokens_of_the_llms_width(name):
    """(b, t, h_e, w_e, d_e) -> (b, n, d); the 3-D ones halve time, "all" keeps every patch."""
    grid = 1 if name == "class" else 5  # what the encoder is asked for
    projector, v = PROJECTORS[name](24, 32, 2), torch.randn(2, 4, grid, grid, 24)
    t, side = 4 // projector.time_stride, grid if name in ("all", "class") else 2
    tokens = projector(projector.pool(v))
    assert tokens.shape == (2, t * side * side, 32)
    tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in projector.parameters())


@pytest.mark.parametrize("name", ["avg2d", "attn2d", "conv2d", "all"])
def test_image_projectors_see_frames_apart(name):
    """Changing frame 2 changes the tokens of frame 2 only."""
    projector, v = PROJECTORS[name](24, 32, 2).eval(), torch.randn(1, 4, 5, 5, 24)
    changed = v.clone()
    changed[:, 2] += 1 + torch.rand_like(v[:, 2])
    before, after = (projector(projector.pool(x)).unflatten(1, (4, -1)) for x in (v, changed))
    same = torch.isclose(before, after, atol=1e-6).all(-1).all(-1)[0]
    assert same.tolist() == [True, True, False, True]


def test_3d_average_is_the_mean_of_two_frames_2d_averages():
    """Even grids: averaging over 2 frames and a window is averaging twice."""
    v = torch.randn(2, 4, 6, 6, 8)
    flat, deep = PROJECTORS["avg2d"](8, 8, 3), PROJECTORS["avg3d"](8, 8, 3)
    pairs = flat.pool(v).unflatten(1, (2, 2)).mean(2)
    torch.testing.assert_close(deep.pool(v), pairs)


def test_the_3d_convolution_pools_after_convolving():
    """conv, then the 3-D average, then the Linear."""
    projector, v = PROJECTORS["conv3d"](6, 8, 2), torch.randn(1, 4, 4, 4, 6)
    convolved = F.conv3d(v.movedim(-1, 1), projector.conv.weight, projector.conv.bias, padding=1)
    pooled = F.adaptive_avg_pool3d(convolved, (2, 2, 2)).movedim(1, -1)
    torch.testing.assert_close(projector(projector.pool(v)), projector.linear(pooled).flatten(1, 3))
