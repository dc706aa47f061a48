"""Equations 1 and 2 against naive loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from encoders import ENCODERS
from merv import FOUR, MERV, MERVS, CrossAttentionMixer, PooledProjector, pooling_matrix, project

pytest_plugins = ["tiny_merv"]  # fixtures: model, saved, short_clip, tokenizer
pytestmark = pytest.mark.usefixtures("no_hub")

# --------------------------------------------------------------------------------------- equation 1


@pytest.mark.parametrize(("side_e", "side"), [(16, 8), (14, 8), (4, 2), (5, 3), (2, 2)])
def test_pooling_is_a_mean_over_each_window(side_e, side):
    """Window i of 14 -> 8 is floor(14 i / 8) to ceil(14 (i + 1) / 8): windows of 2 or 3 overlap."""
    v = torch.randn(2, 3, side_e, side_e, 5)
    pooled = PooledProjector(5, 7, side).pool(v)
    assert pooled.shape == (2, 3, side, side, 5)
    windows = [
        (math.floor(i * side_e / side), math.ceil((i + 1) * side_e / side)) for i in range(side)
    ]
    if side_e == 14:
        assert windows[:3] == [(0, 2), (1, 4), (3, 6)]
    for (i, rows), (j, columns) in itertools.product(enumerate(windows), repeat=2):
        window = v[:, :, slice(*rows), slice(*columns)]
        torch.testing.assert_close(pooled[:, :, i, j], window.mean((2, 3)))


@pytest.mark.parametrize(("side_e", "side"), [(16, 8), (14, 8), (4, 2)])
def test_pooling_first_equals_projecting_first(side_e, side):
    """P(v) W = P(v W): both are linear, and the bias is the same everywhere."""
    projector = PooledProjector(6, 9, side)
    v = torch.randn(2, 3, side_e, side_e, 6)
    pool_first = projector(projector.pool(v))
    linear_first = projector.pool(projector.linear(v)).flatten(1, 3)
    torch.testing.assert_close(pool_first, linear_first)


def test_tokens_are_in_reading_order():
    """A token has index (frame * 8 + row) * 8 + column, as released weights expect."""
    projector = PooledProjector(4, 6, 8)
    pooled = torch.randn(1, 3, 8, 8, 4)
    x = projector(pooled)
    for t, i, j in [(0, 0, 1), (0, 1, 0), (2, 7, 3)]:
        torch.testing.assert_close(x[0, (t * 8 + i) * 8 + j], projector.linear(pooled[0, t, i, j]))


@pytest.mark.parametrize("name", FOUR)
def test_each_frame_becomes_64_tokens(name):
    """In full size, grids of 16x16 or 14x14 patches become 1024 tokens of width 4096."""
    config = ENCODERS[name]
    with torch.device("meta"):
        projector = PooledProjector(config.hidden_size, 4096, MERVS["merv"].pooled_side)
        v = torch.empty(2, *config.grid, config.hidden_size)
        pooled = projector.pool(v)
        assert pooled.shape == (2, 16, 8, 8, config.hidden_size)
        assert projector(pooled).shape == (2, 16 * 64, 4096)


@pytest.mark.parametrize(("size", "side"), [(16, 8), (14, 8), (5, 3), (8, 8)])
def test_pooling_matrices_equal_torchs_adaptive_pooling(size, side):
    """F.adaptive_avg_pool2d is what they replace."""
    v = torch.randn(2, 3, size, size, 6)
    pooled = PooledProjector(6, 4, side).pool(v)
    frames = v.flatten(0, 1).permute(0, 3, 1, 2)
    expected = F.adaptive_avg_pool2d(frames, side).permute(0, 2, 3, 1).unflatten(0, (2, 3))
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)


def test_pooling_again_changes_nothing():
    """So cached, pooled features may go through equation 1 like fresh ones."""
    projector = PooledProjector(6, 4, 8)
    v = torch.randn(1, 2, 14, 14, 6)
    pooled = projector.pool(v)
    assert torch.equal(projector.pool(pooled), pooled)
    torch.testing.assert_close(project(v, projector.linear, 8), projector(pooled))
    assert torch.equal(pooling_matrix(8, 8, torch.device("cpu")), torch.eye(8))


# --------------------------------------------------------------------------------------- equation 2


@pytest.fixture
def mixer() -> CrossAttentionMixer:
    mixer = CrossAttentionMixer(12)
    nn.init.normal_(mixer.query)
    return mixer


def test_the_mixer_equals_a_naive_loop(mixer):
    """softmax over e of Q . mean_n(x_e) / sqrt(d), then the weighted sum of the x_e."""
    x = 3 * torch.randn(2, 4, 7, 12)
    mixed, weights = (result.detach() for result in mixer(x))
    for b in range(2):
        scores = []
        for e in range(4):
            key = sum(x[b, e, n] for n in range(7)) / 7
            scores.append(math.exp(float(mixer.query.detach() @ key) / math.sqrt(12)))
        for e in range(4):
            assert float(weights[b, e]) == pytest.approx(scores[e] / sum(scores), rel=1e-4)
        for n in range(7):
            token = sum(scores[e] / sum(scores) * x[b, e, n] for e in range(4))
            torch.testing.assert_close(mixed[b, n], token)


def test_mixing_weights_sum_to_one(mixer):
    """They are float32 for every clip, even if the model is in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        _, weights = mixer.to(dtype)(50 * torch.randn(3, 4, 5, 12, dtype=dtype))
        assert weights.dtype == torch.float32
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_equal_encoders_share_equally_and_change_nothing(mixer):
    x = torch.randn(2, 1, 7, 12).expand(-1, 4, -1, -1)
    mixed, weights = mixer(x)
    torch.testing.assert_close(weights, torch.full((2, 4), 0.25))
    torch.testing.assert_close(mixed, x[:, 0])


def test_one_encoder_alone_passes_through(mixer):
    """With one encoder its mixing weight is 1, whatever the query."""
    x = torch.randn(2, 1, 7, 12)
    mixed, weights = mixer(x)
    assert torch.equal(weights, torch.ones(2, 1))
    assert torch.equal(mixed, x[:, 0])


def test_permuting_the_encoders_permutes_their_weights(mixer):
    """Equation 2 does not depend on the order of the encoders."""
    x, order = torch.randn(2, 4, 7, 12), [2, 0, 3, 1]
    mixed, weights = mixer(x)
    mixed_again, weights_again = mixer(x[:, order])
    torch.testing.assert_close(weights_again, weights[:, order])
    torch.testing.assert_close(mixed_again, mixed)


@pytest.mark.parametrize("chosen", range(4))
def test_the_query_selects_by_its_direction(mixer, chosen):
    """A query along an encoder's mean token selects that encoder; its negative, the others."""
    x = torch.randn(1, 4, 1, 12) * 0.1 + torch.eye(4, 12)[None, :, None]
    with torch.no_grad():
        mixer.query.copy_(100 * torch.eye(4, 12)[chosen])
        mixed, weights = mixer(x)
        assert weights[0, chosen] > 0.99
        assert (mixed - x[:, chosen]).abs().max() < 0.05
        mixer.query.neg_()
        assert mixer(x)[1][0, chosen] < 1e-3


def test_mixing_weights_belong_to_the_clip_and_not_to_a_token(mixer):
    """All tokens of a clip share the mixing weights, so shuffling tokens shuffles the result."""
    x, order = torch.randn(1, 4, 7, 12), torch.randperm(7)
    mixed, weights = mixer(x)
    shuffled, weights_again = mixer(x[:, :, order])
    torch.testing.assert_close(weights, weights_again)
    torch.testing.assert_close(shuffled, mixed[:, order])


def test_the_query_of_a_new_model_is_random():
    """Paper 3.2: "a single randomly initialized query"; its length is about 1."""
    queries = [MERV.create(MERVS["miniature"], None, seed).mixer.query for seed in (0, 1)]
    assert not torch.equal(*queries)
    for query in queries:
        assert float(query.detach().norm()) == pytest.approx(1, abs=0.3)
