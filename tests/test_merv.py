"""merv.py: equations 1 and 2 against naive loops, one sequence, and what must not matter.

What must not matter: padding, the other rows of a batch, how a step is cut into micro-batches,
whether a question is asked alone, whether a still is encoded once or as a clip, saving and loading.
The model is MERV as it is, four encoders and a LLaMA, a few layers deep, with weights of a scale at
which every part shows in the result (conftest.unit_scale).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, unit_scale
from PIL import Image
from safetensors.torch import load_file, save_file
from test_data import decode_everything, numbered_frames, talk, train_tokenizer, write_video
from torch import Tensor, nn

import merv
from data import IGNORE, TEMPLATES, Batch, Example, collate, preprocess, render_prompt, tokenize
from encoders import ENCODERS
from llama import LLAMAS, Tokenizer
from merv import FOUR, MERV, MERVS, MIXERS, CrossAttentionMixer, MERVConfig, PooledProjector
from support import cli
from support.errors import CheckpointError
from support.features import FeatureCache
from support.video import load_video, sample_indices

# -------------------------------------------------------------------------------------- a tiny MERV

TINY = replace(
    MERVS["miniature"],
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
NUM_FRAMES = max(e.num_frames for e in TINY.encoders)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test downloads anything: what is not on disk is an error at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(train_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.model"))


@pytest.fixture(scope="session")
def shared_model(tokenizer) -> MERV:
    return unit_scale(MERV.create(TINY, tokenizer)).eval()


@pytest.fixture
def model(shared_model) -> MERV:
    """A tiny MERV to read from; whoever trains one makes his own."""
    shared_model.zero_grad(set_to_none=True)
    return shared_model


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered_frames(24))


@pytest.fixture(scope="session")
def saved(shared_model, tmp_path_factory) -> Path:
    """A folder of save_pretrained, to read from only."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    shared_model.save_pretrained(folder)
    return folder


def random_pixels(seed: int, still: bool = False) -> dict[str, Tensor]:
    """encoder -> (T_e, 3, H, W), as preprocess gives them; a still has T_e = 1."""
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
    """Counts how often each encoder runs while a test looks on."""
    calls = Counter()
    hooks = [
        encoder.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, encoder in model.encoders.items()
    ]
    yield calls
    for hook in hooks:
        hook.remove()


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
    """P(v) W = P(v W): both are linear, the bias is the same everywhere. Four times less work."""
    projector = PooledProjector(6, 9, side)
    v = torch.randn(2, 3, side_e, side_e, 6)
    pool_first = projector(projector.pool(v))
    linear_first = projector.pool(projector.linear(v)).flatten(1, 3)
    torch.testing.assert_close(pool_first, linear_first)


def test_tokens_stand_in_reading_order():
    """Token number (frame * 8 + row) * 8 + column: the order that released weights expect."""
    projector = PooledProjector(4, 6, 8)
    pooled = torch.randn(1, 3, 8, 8, 4)
    x = projector(pooled)
    for t, i, j in [(0, 0, 1), (0, 1, 0), (2, 7, 3)]:
        torch.testing.assert_close(x[0, (t * 8 + i) * 8 + j], projector.linear(pooled[0, t, i, j]))


@pytest.mark.parametrize("name", FOUR)
def test_each_frame_becomes_64_tokens(name):
    """Full size, on meta: 16 frames of 16x16 or 14x14 patches -> 1024 tokens as wide as LLaMA."""
    config = ENCODERS[name]
    with torch.device("meta"):
        projector = PooledProjector(config.hidden_size, 4096, MERVS["merv"].pooled_side)
        v = torch.empty(2, *config.grid, config.hidden_size)
        pooled = projector.pool(v)
        assert pooled.shape == (2, 16, 8, 8, config.hidden_size)
        assert projector(pooled).shape == (2, 16 * 64, 4096)


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
    """For every clip, in float32 also when the model is in bfloat16."""
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
    """The single-encoder models have no mixture: weight 1, whatever the query."""
    x = torch.randn(2, 1, 7, 12)
    mixed, weights = mixer(x)
    assert torch.equal(weights, torch.ones(2, 1))
    assert torch.equal(mixed, x[:, 0])


def test_permuting_the_encoders_permutes_their_weights(mixer):
    """No encoder has a place of its own in eq. 2: the mixture is the same."""
    x, order = torch.randn(2, 4, 7, 12), [2, 0, 3, 1]
    mixed, weights = mixer(x)
    mixed_again, weights_again = mixer(x[:, order])
    torch.testing.assert_close(weights_again, weights[:, order])
    torch.testing.assert_close(mixed_again, mixed)


@pytest.mark.parametrize("chosen", range(4))
def test_the_query_selects_by_its_direction(mixer, chosen):
    """A query along the mean token of one encoder takes that encoder; against it, the others."""
    x = torch.randn(1, 4, 1, 12) * 0.1 + torch.eye(4, 12)[None, :, None]
    with torch.no_grad():
        mixer.query.copy_(100 * torch.eye(4, 12)[chosen])
        mixed, weights = mixer(x)
        assert weights[0, chosen] > 0.99
        assert (mixed - x[:, chosen]).abs().max() < 0.05
        mixer.query.neg_()
        assert mixer(x)[1][0, chosen] < 1e-3


def test_weights_belong_to_the_clip_and_not_to_the_token(mixer):
    """One mixture a clip: shuffling the tokens of all encoders alike shuffles the mixture alike."""
    x, order = torch.randn(1, 4, 7, 12), torch.randperm(7)
    mixed, weights = mixer(x)
    shuffled, weights_again = mixer(x[:, :, order])
    torch.testing.assert_close(weights, weights_again)
    torch.testing.assert_close(shuffled, mixed[:, order])


def test_the_query_of_a_new_model_is_random():
    """Paper 3.2: "a single randomly initialized query"; of length about 1, a seed has its own."""
    queries = [MERV.create(MERVS["miniature"], None, seed).mixer.query for seed in (0, 1)]
    assert not torch.equal(*queries)
    for query in queries:
        assert float(query.detach().norm()) == pytest.approx(1, abs=0.3)


# ---------------------------------------------------------------------------------------- table 2c


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("e", [1, 3, 4])
def test_every_mixer_gives_tokens_and_weights_that_sum_to_one(name, e):
    """(b, e, n, d) -> (b, n, d), or (b, e * n, d) one after the other; weights always (b, e)."""
    for dtype in (torch.float32, torch.bfloat16):
        mixer = MIXERS[name](12, e).to(dtype)
        tokens, weights = mixer(torch.randn(2, e, 7, 12, dtype=dtype))
        assert tokens.shape == (2, 7 * e if name == "concat_sequence" else 7, 12)
        assert tokens.dtype == dtype
        assert weights.shape == (2, e) and weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(1), torch.ones(2))


def test_the_mean_is_a_quarter_of_each_encoder():
    """As eq. 2 with a query of zeros, but nothing is learned."""
    x, mixer = torch.randn(2, 4, 7, 12), MIXERS["mean"](12, 4)
    tokens, weights = mixer(x)
    for b, n in itertools.product(range(2), range(7)):
        torch.testing.assert_close(tokens[b, n], sum(x[b, e, n] for e in range(4)) / 4)
    assert torch.equal(weights, torch.full((2, 4), 0.25))
    assert list(mixer.parameters()) == []
    assert torch.equal(CrossAttentionMixer(12)(x)[1], weights)


def test_learned_weights_are_a_softmax_that_no_clip_changes():
    """One number an encoder: softmax over e, then the weighted sum, for every clip alike."""
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
    """encode, prefill, loss, answer, save_pretrained and from_pretrained know no mixer by name."""
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


def test_many_visual_tokens_make_room_for_themselves(tokenizer):
    """Four encoders in a row are 4096 tokens at full size: all the positions of LLaMA-2, and then
    there would be none for the question. The trained model has twice as many."""
    llm = replace(TINY.llm, max_positions=64)
    assert MERV.create(replace(TINY, llm=llm), tokenizer).llm.config.max_positions == 64
    long = MERV.create(replace(TINY, llm=llm, mixer="concat_sequence"), tokenizer).eval()
    assert long.llm.config.max_positions == long.config.llm.max_positions == 2 * 4 * 16
    assert len(long.answer(random_pixels(1), ["what moves"], max_new_tokens=4)) == 1


# ------------------------------------------------------------------------------------------ presets


def test_presets_have_the_sizes_of_the_paper():
    """16 time steps of 8x8: 1024 visual tokens of width 4096, whatever the encoders."""
    assert [e.name for e in MERVS["merv"].encoders] == ["languagebind", "dinov2", "vivit", "siglip"]
    singles = {f"{name}-single" for name in FOUR}
    without = {f"without-{name}" for name in FOUR}
    assert set(MERVS) >= {"merv", "miniature"} | singles | without
    for name in {"merv"} | singles | without:
        config = MERVS[name]
        assert config.name == name
        assert config.grid == (16, 8, 8)
        assert config.llm == LLAMAS["llama2-7b"]
        has_vivit = "vivit" in [e.name for e in config.encoders]
        assert max(e.num_frames for e in config.encoders) == (32 if has_vivit else 16)
    for name in FOUR:
        assert [e.name for e in MERVS[f"{name}-single"].encoders] == [name]
        rest = [other for other in FOUR if other != name]
        assert [e.name for e in MERVS[f"without-{name}"].encoders] == rest


def test_all_encoders_of_a_preset_have_the_same_time_steps():
    for config in MERVS.values():
        assert {e.grid[0] for e in config.encoders} == {config.grid[0]}


def test_a_configuration_survives_json():
    """What is written beside the weights is the whole configuration."""
    for config in MERVS.values():
        assert MERVConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


# ---------------------------------------------------------------------------------- video -> tokens


def test_a_clip_becomes_visual_tokens_and_weights(model):
    """encode: (b, n, d) tokens and (b, e) weights, with n = 4 steps x 2 x 2."""
    clips = [random_pixels(1), random_pixels(2), random_pixels(3)]
    stacked = {name: torch.stack([c[name] for c in clips]) for name in clips[0]}
    visual, weights = model.encode(stacked)
    assert math.prod(TINY.grid) == 16
    assert visual.shape == (3, 16, 32)
    assert weights.shape == (3, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert weights.std(0).max() > 1e-4  # another clip, another mixture


def test_encode_is_the_figure_of_the_paper(model):
    """encoders -> pool -> project -> stack -> mix, written out."""
    pixels = {name: frames[None] for name, frames in random_pixels(1).items()}
    x_e = []
    for e in TINY.encoders:
        grid = model.encoders[e.name](pixels[e.name])
        projector = model.projectors[e.name]
        pooled = F.avg_pool2d(grid[0].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)  # 4x4 -> 2x2
        x_e.append(F.linear(pooled, projector.linear.weight, projector.linear.bias).flatten(0, 2))
    keys = torch.stack([x.mean(0) for x in x_e])
    weights = (keys @ model.mixer.query / math.sqrt(32)).softmax(0)
    visual, found = model.encode(pixels)
    torch.testing.assert_close(found[0], weights)
    torch.testing.assert_close(visual[0], sum(w * x for w, x in zip(weights, x_e, strict=True)))


def test_a_still_image_equals_the_long_way(model):
    """One frame through the encoders of single frames, repeated after: the same as a clip."""
    still = {name: frames[None] for name, frames in random_pixels(5, still=True).items()}
    copies = {e.name: still[e.name].expand(-1, e.num_frames, -1, -1, -1) for e in TINY.encoders}
    short, long = model.pooled_features(still), model.pooled_features(copies)
    for name in short:
        assert (
            short[name].shape
            == long[name].shape
            == (1, 4, 2, 2, model.encoders[name].config.hidden_size)
        )
        torch.testing.assert_close(short[name], long[name], rtol=1e-4, atol=1e-5)


def test_an_encoder_of_single_frames_sees_a_still_once(model):
    seen = {}
    hooks = [
        encoder.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].shape[1]})
        )
        for name, encoder in model.encoders.items()
    ]
    model.pooled_features({name: frames[None] for name, frames in random_pixels(5, still=True).items()})
    for hook in hooks:
        hook.remove()
    for e in TINY.encoders:
        assert seen[e.name] == (1 if e.family == "vit" else e.num_frames)


def test_streams_change_nothing(model):
    """On CUDA each encoder may have its own; the same code runs on a CPU, whose streams are one."""
    pixels = {name: frames[None] for name, frames in random_pixels(1).items()}
    plain = model.pooled_features(pixels)
    model.encoder_streams = True
    try:
        streamed = model.pooled_features(pixels)
    finally:
        model.encoder_streams = False
    assert all(torch.equal(streamed[name], plain[name]) for name in plain)


def test_features_carry_no_gradient_and_encode_does(model):
    pixels = {name: frames[None] for name, frames in random_pixels(1).items()}
    assert not any(f.requires_grad for f in model.pooled_features(pixels).values())
    assert model.encode(pixels)[0].requires_grad


# ------------------------------------------------------------------------------------- one sequence


def test_visual_tokens_stand_between_bos_and_text(model):
    """[BOS] + visual + text."""
    row = example(model, "video", "what moves", "the red square")
    visual = torch.randn(1, 16, 32)
    embeds = model.interleave(collate([row]), visual)
    text = model.llm.embed_tokens(row.input_ids)
    assert embeds.shape == (1, 16 + len(row.input_ids), 32)
    assert torch.equal(embeds[0, 0], model.llm.embed_tokens.weight[1])
    assert torch.equal(embeds[0, 1:17], visual[0])
    assert torch.equal(embeds[0, 17:], text[1:])


def test_a_row_without_a_picture_is_bos_and_text(model, mixed_rows):
    batch = collate(mixed_rows)
    embeds = model.interleave(batch, torch.randn(3, 16, 32))
    row = mixed_rows[1]
    assert torch.equal(embeds[1, : len(row.input_ids)], model.llm.embed_tokens(row.input_ids))


def test_each_row_gets_the_visual_tokens_of_its_own_picture(model, mixed_rows):
    """Rows 0, 2, 3 have pictures number 0, 1, 2."""
    visual = torch.randn(3, 16, 32)
    embeds = model.interleave(collate(mixed_rows), visual)
    for index, row in enumerate([0, 2, 3]):
        assert torch.equal(embeds[row, 1:17], visual[index])


# ----------------------------------------------------------------------------------------- the loss


def test_the_loss_is_a_naive_sum_of_log_probabilities(model, mixed_rows):
    """- log p(token i + 1 | tokens up to i), added up over every labelled token of every row."""
    batch = collate(mixed_rows)
    with torch.no_grad():
        loss, weights = model(batch)
        visual, _ = model.encode(batch.pixels)
        expected, place = 0.0, {0: 0, 2: 1, 3: 2}
        for row, single in enumerate(mixed_rows):
            text = model.llm.embed_tokens(single.input_ids)
            seen = visual[place[row]] if row in place else visual[0, :0]
            logits = model.llm(inputs_embeds=torch.cat([text[:1], seen, text[1:]])[None])[0]
            log_p = logits.double().log_softmax(-1)
            for i, label in enumerate(single.labels.tolist()):
                if label != IGNORE:
                    expected -= float(log_p[len(seen) + i - 1, label])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert weights.shape == (3, 4)


def test_rows_of_a_batch_do_not_touch_each_other(model, mixed_rows):
    """The loss of a mixed batch is the sum of the losses of its rows, each alone and unpadded."""
    together, weights = model(collate(mixed_rows))
    alone = [model(collate([row])) for row in mixed_rows]
    torch.testing.assert_close(together, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-4)
    assert alone[1][1].shape == (0, 4)
    torch.testing.assert_close(weights, torch.cat([w for _, w in alone]), rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_in_the_loss(model, mixed_rows):
    """Whatever stands in the padding: longer, and filled with </s> or words."""
    batch = collate(mixed_rows)
    expected, _ = model(batch)
    for filling in (2, 7):
        ids = F.pad(batch.input_ids, (0, 5), value=0)
        real = torch.arange(ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
        padded = replace(batch, input_ids=torch.where(real, ids, filling))
        torch.testing.assert_close(model(padded)[0], expected, rtol=1e-5, atol=1e-4)


def gradients(model: MERV, batches: list[Batch]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(batch)[0].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_four_micro_batches_of_one_make_the_gradient_of_one_of_four(model, mixed_rows):
    """FIX F5: sums add up; means of unequal numbers of tokens would not."""
    whole = gradients(model, [collate(mixed_rows)])
    parts = gradients(model, [collate([row]) for row in mixed_rows])
    assert whole.keys() == parts.keys()
    for name in whole:
        scale = whole[name].abs().max().item()
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4 * scale + 1e-7)


def test_gradients_reach_all_that_is_trained_and_no_encoder(model, mixed_rows):
    """Every tensor of projectors, mixer and LLM has a gradient that is not zero; no other has."""
    found = gradients(model, [collate(mixed_rows)])
    names = [name for name, _ in model.named_parameters()]
    assert found.keys() == {name for name in names if not name.startswith("encoders.")}
    assert any(name.startswith("encoders.") for name in names)
    assert [name for name, grad in found.items() if not grad.abs().max() > 0] == []


def test_rows_of_text_run_no_encoder_and_still_give_every_gradient(model, encoder_calls):
    """FIX F8. Zeros for projectors and mixer: all ranks of a step must reduce the same tensors."""
    rows = [example(model, "text", "left", "right"), example(model, "text", "what", "red")]
    found = gradients(model, [collate(rows)])
    assert encoder_calls.total() == 0
    trained = [n for n, _ in model.named_parameters() if not n.startswith("encoders.")]
    assert found.keys() == set(trained)
    assert all(not found[n].any() for n in trained if n.startswith(("projectors.", "mixer.")))


def test_a_process_with_text_only_joins_in_running_the_encoders(model, encoder_calls):
    """Sharded encoders are gathered by all processes together; the result does not change."""
    batch = collate([example(model, "text", "left", "right")])
    expected, _ = model(batch)
    joined, weights = model(batch, join=True)
    assert encoder_calls == {name: 1 for name in model.encoders}
    assert torch.equal(joined, expected)
    assert weights.shape == (0, 4)


def test_a_batch_runs_every_encoder_once(model, mixed_rows, encoder_calls):
    with torch.no_grad():
        model(collate(mixed_rows))
    assert encoder_calls == {name: 1 for name in model.encoders}


def test_cached_features_give_the_same_loss(model, mixed_rows, encoder_calls):
    """Pooled features replace pixels; no encoder runs."""
    batch = collate(mixed_rows)
    with torch.no_grad():
        expected, expected_weights = model(batch)
        features = model.pooled_features(batch.pixels)
        encoder_calls.clear()
        loss, weights = model(replace(batch, pixels={}, features=features))
    assert encoder_calls.total() == 0
    assert torch.equal(loss, expected)
    assert torch.equal(weights, expected_weights)


def test_a_batch_can_be_learnt_by_heart(tokenizer):
    """The whole chain learns: below 0.1 nats a token within 80 steps of AdamW on four rows."""
    model = MERV.create(TINY, tokenizer)
    rows = [
        example(model, "video", "what moves", "the red square", seed=1),
        example(model, "video", "what moves", "the blue circle", seed=2),
        example(model, "image", "what", "right", seed=3),
        example(model, "text", "left or right", "left"),
    ]
    batch = collate(rows)
    batch = replace(batch, features=model.pooled_features(batch.pixels), pixels={})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    first = last = None
    for _ in range(80):
        loss = model(batch)[0] / batch.num_labels
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
        if last < 0.1:
            break
    assert first > 3
    assert last < 0.1
    # Two rows ask the same of different clips, so the answer was read from the pictures.
    answers = [model.eval().answer(row.pixels, "what moves", 16)[0] for row in rows[:2]]
    assert [a.text for a in answers] == ["the red square", "the blue circle"]


# ------------------------------------------------------------------------------------------ answers


@pytest.fixture
def replies(model, monkeypatch) -> list[list[int]]:
    """The token ids of every answer, in the order in which they were generated."""
    seen, generate = [], model.llm.generate

    def spy(*args, **options):
        found = generate(*args, **options)
        seen.extend(found)
        return found

    monkeypatch.setattr(model.llm, "generate", spy)
    return seen


QUESTIONS = ["what moves", "the red square moves left or right, or what", "x", "circle"]


def test_questions_together_are_answered_as_one_by_one(model, clip, replies):
    """FIX F3: token for token, though the questions differ in length and share one cache."""
    together = model.answer(clip, QUESTIONS, max_new_tokens=12)
    ids, replies[:] = list(replies), []
    alone = [model.answer(clip, question, max_new_tokens=12)[0] for question in QUESTIONS]
    assert replies == ids
    assert [a.text for a in together] == [a.text for a in alone]
    assert len({tuple(i) for i in ids}) > 1  # the question matters


def test_an_answer_is_the_most_likely_token_after_token(model, clip, replies):
    """Naively: the whole sequence through the LLM again for every new token."""
    (answer,) = model.answer(clip, "what moves", max_new_tokens=6)
    pixels = {name: frames[None] for name, frames in model.pixels(clip).items()}
    turns = render_prompt(talk("what moves"), TEMPLATES["base"])
    ids, _ = tokenize(turns, model.tokenizer)
    new = []
    with torch.no_grad():
        visual, weights = model.encode(pixels)
        for _ in range(6):
            text = model.llm.embed_tokens(torch.tensor([ids + new]))
            embeds = torch.cat([text[:, :1], visual, text[:, 1:]], dim=1)
            token = int(model.llm(inputs_embeds=embeds)[0, -1].argmax())
            if token == model.tokenizer.eos_id:
                break
            new.append(token)
    assert replies == [new]
    assert answer.text == model.tokenizer.decode(new).strip()
    torch.testing.assert_close(answer.weights, weights[0])


def test_the_same_video_twice_gives_bit_identical_answers(model, clip):
    first, second = (model.answer(clip, QUESTIONS[:2], max_new_tokens=6) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.text == b.text
        assert torch.equal(a.weights, b.weights)


def test_answering_uses_no_global_randomness(model, clip):
    """Sampling draws from the generator that is passed in, and from nothing else."""
    state = torch.get_rng_state()

    def sampled(seed: int) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        found = model.answer(clip, QUESTIONS, 8, temperature=1.0, generator=generator)
        return [a.text for a in found]

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    assert torch.equal(state, torch.get_rng_state())


def test_a_video_is_encoded_once_for_all_its_questions(model, clip, encoder_calls):
    """FIX F2: 4 questions, one pass of each encoder."""
    model.answer(clip, QUESTIONS, max_new_tokens=2)
    assert encoder_calls == {name: 1 for name in model.encoders}


def test_text_alone_is_answered_without_any_encoder(model, encoder_calls):
    answers = model.answer(None, QUESTIONS[:2], max_new_tokens=4)
    assert encoder_calls.total() == 0
    assert [a.weights.shape for a in answers] == [(0,), (0,)]
    ids, _ = tokenize(render_prompt(talk(QUESTIONS[0]), TEMPLATES["base"]), model.tokenizer)
    (expected,) = model.llm.generate(torch.tensor([ids]), max_new_tokens=4)
    assert answers[0].text == model.tokenizer.decode(expected).strip()


def test_a_video_can_be_given_as_path_frames_or_pixels(model, clip):
    """Three forms of one clip, one answer."""
    frames = decode_everything(clip)[sample_indices(24, NUM_FRAMES)]
    pixels = {e.name: preprocess(frames, e) for e in TINY.encoders}
    found = [
        model.answer(video, QUESTIONS[0], max_new_tokens=6)[0]
        for video in (clip, str(clip), frames, pixels)
    ]
    assert len({a.text for a in found}) == 1
    for answer in found:
        assert torch.equal(answer.weights, found[0].weights)


def test_a_still_image_can_be_asked_about(model, tmp_path):
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "still.png")
    (answer,) = model.answer(tmp_path / "still.png", "what", max_new_tokens=4)
    frames = load_video(tmp_path / "still.png", 1)
    pixels = {e.name: preprocess(frames, e) for e in TINY.encoders}
    (once,) = model.answer(pixels, "what", max_new_tokens=4)
    torch.testing.assert_close(answer.weights, once.weights, rtol=1e-4, atol=1e-5)
    assert answer.text == once.text


def test_a_conversation_can_be_continued(model, clip, replies):
    """Earlier turns stand in front of the question, rendered as in training."""
    conversation = talk("what moves", "the red square", "left or right")
    model.answer(clip, [conversation, "left or right"], max_new_tokens=6)
    with_history, without = replies
    prompt = model.prompts([conversation])[0][0].tolist()
    trained, _ = tokenize(render_prompt([*conversation, *talk("", "left")[1:]], TEMPLATES["base"]),
                          model.tokenizer)  # fmt: skip
    assert trained[: 1 + len(prompt)] == [model.tokenizer.bos_id, *prompt]
    assert with_history != without


def test_the_prompt_can_be_the_one_of_other_weights(model, monkeypatch):
    """The authors' models were trained with <video> in the text (K4): the template is a setting."""
    assert model.template == model.config.llm.template == "base"
    monkeypatch.setattr(model, "template", "base_video_tag")
    ids, _ = tokenize(render_prompt(talk("what"), TEMPLATES["base_video_tag"]), model.tokenizer)
    assert "<video>" in model.tokenizer.decode(ids)
    assert [model.tokenizer.bos_id, *model.prompts("what")[0][0].tolist()] == ids


# -------------------------------------------------------------------------------------- likelihoods


@torch.no_grad()
def test_likelihoods_are_those_of_the_whole_sequence_without_a_cache(model, clip):
    """log p(first token of each option | [BOS] + visual + question), each question alone."""
    options = [["red", "left"], ["x", "right", "blue"], ["what", "red"], ["circle"]]
    found = model.likelihoods(clip, QUESTIONS, options)
    visual, _ = model.encode({name: frames[None] for name, frames in model.pixels(clip).items()})
    for question, choices, log_p in zip(QUESTIONS, options, found, strict=True):
        ids, _ = tokenize(render_prompt(talk(question), TEMPLATES["base"]), model.tokenizer)
        text = model.llm.embed_tokens(torch.tensor([ids]))
        embeds = torch.cat([text[:, :1], visual, text[:, 1:]], dim=1)
        expected = model.llm(inputs_embeds=embeds)[0, -1].double().log_softmax(-1)
        assert log_p.shape == (len(choices),)
        for choice, value in zip(choices, log_p.tolist(), strict=True):
            first = model.tokenizer.encode(choice)[0]
            assert value == pytest.approx(float(expected[first]), abs=1e-4)


def test_a_video_is_encoded_once_for_all_its_likelihoods(model, clip, encoder_calls):
    """Together as apart."""
    options = [["red", "left"]] * 3
    found = model.likelihoods(clip, QUESTIONS[:3], options)
    assert encoder_calls == {name: 1 for name in model.encoders}
    for question, log_p in zip(QUESTIONS, found, strict=False):
        (alone,) = model.likelihoods(clip, [question], options[:1])
        torch.testing.assert_close(log_p, alone, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------- checkpoints


def test_a_saved_model_is_loaded_exactly(model, saved, clip):
    """Config, every tensor and every answer; encoders without a hub id are copied along."""
    loaded = MERV.from_pretrained(saved)
    assert not loaded.training
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name
    assert loaded.config == model.config
    answers = loaded.answer(clip, QUESTIONS, max_new_tokens=6)
    for found, wanted in zip(answers, model.answer(clip, QUESTIONS, max_new_tokens=6), strict=True):
        assert found.text == wanted.text
        assert torch.equal(found.weights, wanted.weights)


def test_a_loaded_model_trains_what_was_trained(saved):
    """Frozen encoders, everything else open."""
    loaded = MERV.from_pretrained(saved)
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad != name.startswith("encoders."), name


def test_a_saved_folder_can_be_moved(model, saved, tmp_path, monkeypatch):
    """Nothing in it points to where it was, or to the folder it was written from."""
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(saved, moved)
    monkeypatch.chdir(tmp_path)
    assert str(saved) not in (moved / "config.json").read_text()
    loaded = MERV.from_pretrained(moved)
    assert torch.equal(loaded.mixer.query, model.mixer.query)
    name = TINY.encoders[0].name
    for key, tensor in model.encoders[name].state_dict().items():
        assert torch.equal(loaded.encoders[name].state_dict()[key], tensor)


def test_a_run_of_training_can_be_named_instead_of_its_checkpoint(model, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run" / "checkpoint")
    loaded = MERV.from_pretrained(tmp_path / "run")
    assert torch.equal(loaded.mixer.query, model.mixer.query)


def test_a_loaded_model_can_be_saved_again(model, saved, tmp_path):
    """To another folder, and on top of the one it came from: the encoders are copied both times."""
    first = tmp_path / "first"
    shutil.copytree(saved, first)
    MERV.from_pretrained(first).save_pretrained(tmp_path / "second")
    MERV.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "second")
    state = MERV.from_pretrained(tmp_path / "second").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_encoders_of_the_hub_stay_a_reference_to_it(model, tokenizer, tmp_path):
    """1.5 GB that everybody has in the cache are not written again with every checkpoint."""
    hub = replace(TINY.encoders[1], source="owner/name@revision")
    config = replace(TINY, encoders=(hub,))
    single = MERV(config, [model.encoders[hub.name]], model.llm, tokenizer)
    single.save_pretrained(tmp_path / "single")
    assert not (tmp_path / "single" / "encoders").exists()
    found = json.loads((tmp_path / "single" / "config.json").read_text())
    assert found["merv"]["encoders"][0]["source"] == "owner/name@revision"


def test_a_complete_folder_replaces_the_old_one(model, tmp_path):
    """Saving again leaves neither old files nor a .partial, and clears what a broken save left."""
    folder = tmp_path / "model"
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "rest").write_text("of a save that was interrupted")
    for _ in range(2):
        model.save_pretrained(folder)
        (folder / "old").write_text("")
    model.save_pretrained(folder)
    names = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    encoders = {f"encoders/{e.name}.safetensors" for e in TINY.encoders}
    assert names == {"config.json", "model.safetensors", "tokenizer.model"} | encoders
    assert list(tmp_path.rglob("*.partial")) == []


def _broken(saved: Path, folder: Path, file: str) -> tuple[Path, str, str]:
    """A copy of `saved` in which one tensor of `file` is missing, one mis-shaped and one added."""
    shutil.copytree(saved, folder)
    tensors = load_file(folder / file)
    names = sorted(tensors)
    del tensors[names[0]]
    tensors[names[-1]] = torch.zeros(3, 5, 7)
    tensors["surprise"] = torch.zeros(1)
    save_file(tensors, folder / file)
    return folder, names[0], names[-1]


@pytest.mark.parametrize(
    "file", ["model.safetensors", f"encoders/{TINY.encoders[0].name}.safetensors"]
)
def test_all_that_does_not_fit_stands_in_one_error(saved, tmp_path, file):
    folder, missing, misshaped = _broken(saved, tmp_path / "broken", file)
    with pytest.raises(CheckpointError) as caught:
        MERV.from_pretrained(folder)
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()]
    prefix = "vision_model." if file.startswith("encoders/") else ""
    missing, misshaped = missing.removeprefix(prefix), misshaped.removeprefix(prefix)
    assert f"missing {missing}" in lines
    assert any(line.startswith(f"mis-shaped {misshaped}: [3, 5, 7], wanted ") for line in lines)
    assert "unexpected surprise" in lines
    assert str(folder) in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_a_damaged_file_is_a_checkpoint_error(saved, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="Cannot read"):
        MERV.from_pretrained(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_is_a_checkpoint_error(saved, tmp_path, file):
    folder = tmp_path / "incomplete"
    shutil.copytree(saved, folder)
    (folder / file).unlink()
    with pytest.raises(CheckpointError) as caught:
        MERV.from_pretrained(folder)
    assert file in str(caught.value)
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"merv": ',
        "[]",
        "null",
        '{"merv": null}',
        '{"merv": {"surprise": 1}}',
        '{"model": {}}',
        '{"model": "miniature"}',
        '{"model_type": "llama", "hidden_size": 4096}',
    ],
)
def test_a_config_that_is_not_mervs_is_a_checkpoint_error(tmp_path, text):
    """Half a file, no object, another model's, or that of a run of train.py that has not ended."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        MERV.from_pretrained(tmp_path)
    assert "\nWhy: " in str(caught.value) and "\nFix: " in str(caught.value)


def _set(values: dict, path: str, value: object) -> None:
    """_set({"llm": {}}, "llm.x", 1) makes it {"llm": {"x": 1}}."""
    *folders, name = path.split(".")
    for folder in folders:
        values = values[int(folder) if folder.isdigit() else folder]
    values[name] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("released_as", "merv-full"),
        ("encoders.0.released_as", "x"),
        ("llm.surprise", 1),
        ("projector", "avg4d"),
        ("mixer", "vote"),
    ],
)
def test_a_config_of_another_version_names_what_is_unknown(saved, tmp_path, path, value):
    """A field or a projector that this version has not cannot be ignored: it decided something."""
    found = json.loads((saved / "config.json").read_text())
    _set(found["merv"], path, value)
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        MERV.from_pretrained(tmp_path)
    unknown = value if path in ("projector", "mixer") else path.rpartition(".")[2]
    assert unknown in str(caught.value) and "\nFix: " in str(caught.value)


def test_a_model_in_bfloat16_still_answers(saved, clip):
    """Loaded, cast, and with its mixing weights in float32."""
    loaded = MERV.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    (answer,) = loaded.answer(clip, "what", max_new_tokens=3)
    assert answer.weights.dtype == torch.float32
    assert float(answer.weights.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("still", [False, True])
def test_features_of_clips_and_stills_go_into_the_cache(saved, clip, tmp_path, dtype, still):
    """As train.py stores them, whatever the dtype of the model; they come back in bfloat16."""
    loaded = MERV.from_pretrained(saved, dtype=dtype)
    pixels = {name: frames[None] for name, frames in random_pixels(1, still).items()}
    features = {name: value[0] for name, value in loaded.pooled_features(pixels).items()}
    cache = FeatureCache(tmp_path, loaded.fingerprints())
    cache.put(clip, features)
    found = cache.get(clip)
    for name in features:
        assert torch.equal(found[name], features[name].bfloat16())


def test_fingerprints_follow_weights_and_preprocessing(tokenizer):
    """They name entries of the feature cache: equal for equal encoders, other for anything else."""
    one, same = MERV.create(TINY, tokenizer), MERV.create(TINY, tokenizer)
    before = one.fingerprints()
    assert before == same.fingerprints()
    first, second = TINY.encoders[:2]
    with torch.no_grad():
        next(same.encoders[first.name].parameters()).view(-1)[0] += 1e-3
    after = same.fingerprints()
    assert after[first.name] != before[first.name]
    assert after[second.name] == before[second.name]
    finer = MERV.create(replace(TINY, pooled_side=4), tokenizer).fingerprints()
    assert all(finer[name] != before[name] for name in before)


# ------------------------------------------------------------------------------------- command line


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """`python merv.py ...` as a user would, with no way to the hub."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "merv.py"), *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_trace_prints_the_shape_of_every_stage(tmp_path):
    """Nothing to download, nothing to train: the figure of the paper as numbers."""
    found = run("--trace", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for stage in (
        "frames sampled", "languagebind", "dinov2", "vivit", "siglip", "preprocessed", "eq. 1",
        "mixing weights (eq. 2)", "visual tokens", "(1, 16, 128)", "[BOS] + visual", "logits",
        f"(1, 17, {LLAMAS['miniature'].vocab_size})",
    ):  # fmt: skip
        assert stage in found.stdout, stage
    assert found.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    """Eight that evaluate a 7B would not fit on the first one."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.pick_device() == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cli.pick_device() == cli.pick_device("cuda") == torch.device("cuda:3")
    assert cli.pick_device("cuda:1") == torch.device("cuda:1")
    assert cli.pick_device("cpu") == torch.device("cpu")


def test_a_question_on_the_command_line_is_answered(model, saved, clip, capsys):
    merv.main([str(clip), *QUESTIONS[:2], "--checkpoint", str(saved), "--max-new-tokens", "5",
               "--device", "cpu"])  # fmt: skip
    output = capsys.readouterr().out
    for question, answer in zip(
        QUESTIONS, model.answer(clip, QUESTIONS[:2], max_new_tokens=5), strict=False
    ):
        assert f"Q: {question}\nA: {answer.text}\n" in output
    mix = output.splitlines()[-1]
    assert [part for part in FOUR if part in mix] == list(FOUR)


def test_a_drawn_answer_is_drawn_again_with_its_seed(saved, clip):
    """A temperature leaves the likeliest words, a generator says where to; nothing else does."""
    model = MERV.from_pretrained(saved)

    def drawn(seed: int, temperature: float = 1.0) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        answers = model.answer(clip, QUESTIONS, 8, temperature, generator=generator)
        return [answer.text for answer in answers]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, 0.0) == drawn(2, 0.0)


@pytest.mark.parametrize("wrong", ["video", "checkpoint"])
def test_a_wrong_name_on_the_command_line_is_explained(saved, clip, tmp_path, wrong):
    """What, why, how to fix it; a traceback would be for us, not for the user."""
    video = "missing.mp4" if wrong == "video" else str(clip)
    checkpoint = str(tmp_path / "no" / "run") if wrong == "checkpoint" else str(saved)
    found = run(video, "what", "--checkpoint", checkpoint, cwd=tmp_path)
    assert found.returncode != 0
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    what, why, fix = found.stderr.strip().split("\n")[-3:]
    assert what.startswith("error: ")
    assert {"video": "missing.mp4", "checkpoint": "no/run"}[wrong] in what
    assert why.startswith("Why: ")
    assert fix.startswith("Fix: ")


def test_a_hub_id_out_of_reach_is_explained(clip):
    with pytest.raises(SystemExit) as caught:
        merv.main([str(clip), "what", "--checkpoint", "nobody/nothing"])
    assert "nobody/nothing" in str(caught.value.code)
    assert "Fix: " in str(caught.value.code)


def test_without_any_run_the_command_line_says_how_to_train_one(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        merv.main([str(clip), "what"])
    assert "torchrun train.py" in str(caught.value.code)


def test_a_video_without_a_question_is_an_error(clip):
    with pytest.raises(SystemExit) as caught:
        merv.main([str(clip)])
    assert "give a video and a question" in str(caught.value.code)
