"""The mixers of table 2c; test_paper.py tests the projectors of table 2a."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import unit_scale
from tiny_merv import QUESTIONS, TINY, example, random_pixels
from torch import nn

from data import collate
from merv import MERV, MIXERS, CrossAttentionMixer, PooledProjector

pytest_plugins = ["tiny_merv"]  # fixtures: model, saved, short_clip, tokenizer
pytestmark = pytest.mark.usefixtures("no_hub")

# ---------------------------------------------------------------------------------------- table 2c


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("e", [1, 3, 4])
def test_every_mixer_gives_tokens_and_weights_that_sum_to_one(name, e):
    """Tokens are (b, n, d), or (b, e * n, d) if concatenated; mixing weights are always (b, e)."""
    for dtype in (torch.float32, torch.bfloat16):
        mixer = MIXERS[name](12, e).to(dtype)
        tokens, weights = mixer(torch.randn(2, e, 7, 12, dtype=dtype))
        assert tokens.shape == (2, 7 * e if name == "concat_sequence" else 7, 12)
        assert tokens.dtype == dtype
        assert weights.shape == (2, e) and weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(1), torch.ones(2))


def test_the_mean_is_a_quarter_of_each_encoder():
    """The result is that of equation 2 with a query of zeros, but nothing is learned."""
    x, mixer = torch.randn(2, 4, 7, 12), MIXERS["mean"](12, 4)
    tokens, weights = mixer(x)
    for b, n in itertools.product(range(2), range(7)):
        torch.testing.assert_close(tokens[b, n], sum(x[b, e, n] for e in range(4)) / 4)
    assert torch.equal(weights, torch.full((2, 4), 0.25))
    assert list(mixer.parameters()) == []
    assert torch.equal(CrossAttentionMixer(12)(x)[1], weights)


def test_learned_weights_are_a_softmax_that_no_clip_changes():
    """One score per encoder, a softmax over them and the weighted sum, the same for every clip."""
    x, mixer = torch.randn(2, 4, 7, 12), MIXERS["learned"](12, 4)
    (scores,) = mixer.parameters()
    nn.init.normal_(scores)
    tokens, weights = mixer(x)
    powers = [math.exp(score) for score in scores.tolist()]
    assert torch.equal(weights[0], weights[1])
    for e in range(4):
        assert weights[0, e].item() == pytest.approx(powers[e] / sum(powers), rel=1e-5)
    for b, n in itertools.product(range(2), range(7)):
        token = sum(powers[e] / sum(powers) * x[b, e, n] for e in range(4))
        torch.testing.assert_close(tokens[b, n], token)
    tokens.square().sum().backward()
    assert (scores.grad != 0).all()


def test_concatenation_along_the_sequence_keeps_every_token():
    """Token n of encoder e is token e * 7 + n of the result."""
    x = torch.randn(2, 4, 7, 12)
    tokens, _ = MIXERS["concat_sequence"](12, 4)(x)
    for b, e, n in itertools.product(range(2), range(4), range(7)):
        assert torch.equal(tokens[b, e * 7 + n], x[b, e, n])


def test_concatenation_along_channels_is_a_sum_of_projections():
    """[v_1 v_2 ...] side by side, 5 + 6 channels, through one Linear of 11 -> 12 with one bias."""
    pooled = [torch.randn(2, 3, 2, 2, 5), torch.randn(2, 3, 2, 2, 6)]
    projectors = [PooledProjector(5, 12, 2), PooledProjector(6, 12, 2)]
    x = torch.stack([p(v) for p, v in zip(projectors, pooled, strict=True)], dim=1)
    tokens, _ = MIXERS["concat_channel"](12, 2)(x)
    linear = nn.Linear(11, 12)
    linear.weight.data = torch.cat([p.linear.weight for p in projectors], dim=1)
    linear.bias.data = projectors[0].linear.bias + projectors[1].linear.bias
    torch.testing.assert_close(tokens, linear(torch.cat(pooled, dim=-1)).flatten(1, 3))


@pytest.mark.parametrize("name", MIXERS)
def test_a_merv_with_any_mixer_trains_answers_and_is_saved(name, tokenizer, clip, tmp_path):
    """encode, prefill, loss, answer, save_pretrained and from_pretrained work with every mixer."""
    model = MERV.create(replace(TINY, mixer=name), tokenizer)
    unit_scale(model)
    n = 4 * 16 if name == "concat_sequence" else 16
    visual, weights = model.encode({k: v[None] for k, v in random_pixels(1).items()})
    assert visual.shape == (1, n, 32) and weights.shape == (1, 4)
    prefix, _ = model.prefill(random_pixels(1))
    assert prefix.used == 1 + n
    rows = [example(model, "video", "what", "red"), example(model, "text", "what", "left")]
    together, _ = model(collate(rows))
    alone = [model(collate([row]))[0] for row in rows]
    torch.testing.assert_close(together, sum(alone), rtol=1e-5, atol=1e-4)
    together.backward()
    trained = [n for n, _ in model.named_parameters() if not n.startswith("encoders.")]
    found = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert found == trained
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = MERV.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config and type(loaded.mixer) is MIXERS[name]
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    before, after = (m.answer(clip, QUESTIONS, max_new_tokens=4) for m in (model, loaded))
    for first, second in zip(before, after, strict=True):
        assert first.text == second.text
        assert torch.equal(first.weights, second.weights)


def test_many_visual_tokens_raise_the_number_of_positions(tokenizer):
    """Four encoders in a row are 4096 tokens at full size: all the positions of LLaMA-2, and then
    there would be none for the question. The trained model has twice as many."""
    llm = replace(TINY.llm, max_positions=64)
    assert MERV.create(replace(TINY, llm=llm), tokenizer).llm.config.max_positions == 64
    long = MERV.create(replace(TINY, llm=llm, mixer="concat_sequence"), tokenizer).eval()
    assert long.llm.config.max_positions == long.config.llm.max_positions == 2 * 4 * 16
    assert len(long.answer(random_pixels(1), ["what moves"], max_new_tokens=4)) == 1
