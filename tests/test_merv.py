"""The class MERV: presets, visual tokens, the input sequence and the loss.

The result must not depend on padding, on the other rows of a batch, on how a step is cut into
micro-batches, or on whether a still is encoded once or as a clip.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from tiny_merv import TINY, example, random_pixels
from torch import Tensor

from data import IGNORE, Batch, collate
from encoders import ENCODERS
from llama import LLAMAS
from merv import FOUR, MERV, MERVS, MERVConfig, choose_encoders
from support.errors import UserError

pytest_plugins = ["tiny_merv"]  # fixtures: model, saved, short_clip, tokenizer
pytestmark = pytest.mark.usefixtures("no_hub")

# ------------------------------------------------------------------------------------------ presets


def test_presets_have_the_sizes_of_the_paper():
    """Every full-size model has 16 time steps of 8x8, so 1024 visual tokens."""
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
    """config.json holds the whole configuration."""
    for config in MERVS.values():
        assert MERVConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_encoders_are_chosen_by_label_first():
    """In the miniature, siglip is miniature-siglip; other names come from ENCODERS."""
    (own,) = choose_encoders(MERVS["miniature"], "siglip")
    assert own == ENCODERS["miniature-siglip"]
    assert choose_encoders(MERVS["merv"], "siglip,dinov2") == (
        ENCODERS["siglip"], ENCODERS["dinov2"],
    )  # fmt: skip
    (other,) = choose_encoders(MERVS["merv"], "miniature-vivit")
    assert other == ENCODERS["miniature-vivit"]
    with pytest.raises(UserError, match="There is no encoder clip"):
        choose_encoders(MERVS["merv"], "siglip,clip")


# ---------------------------------------------------------------------------------- video -> tokens


def test_a_clip_becomes_visual_tokens_and_weights(model):
    """encode returns tokens (b, n, d), with n = 4 * 2 * 2, and mixing weights (b, e)."""
    clips = [random_pixels(1), random_pixels(2), random_pixels(3)]
    stacked = {name: torch.stack([c[name] for c in clips]) for name in clips[0]}
    visual, weights = model.encode(stacked)
    assert math.prod(TINY.grid) == 16
    assert visual.shape == (3, 16, 32)
    assert weights.shape == (3, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert weights.std(0).max() > 1e-4  # another clip, another mixture


def test_encode_is_the_figure_of_the_paper(model):
    """encode equals its five steps written out: encoders, pool, project, stack, mix."""
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
    """Encoding one frame and repeating its features equals encoding a clip of copies."""
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


def test_an_encoder_of_single_frames_encodes_a_still_once(model):
    seen = {}
    hooks = [
        encoder.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].shape[1]})
        )
        for name, encoder in model.encoders.items()
    ]
    model.pooled_features(
        {name: frames[None] for name, frames in random_pixels(5, still=True).items()}
    )
    for hook in hooks:
        hook.remove()
    for e in TINY.encoders:
        assert seen[e.name] == (1 if e.family == "vit" else e.num_frames)


def test_streams_change_nothing(model):
    """On CUDA each encoder may have its own stream; on a CPU the same code has only one."""
    pixels = {name: frames[None] for name, frames in random_pixels(1).items()}
    plain = model.pooled_features(pixels)
    model.encoder_streams = True
    try:
        streamed = model.pooled_features(pixels)
        streams = dict(model.streams)
        model.pooled_features(pixels)
        assert all(model.streams[name] is streams[name] for name in streams)  # created once
    finally:
        model.encoder_streams = False
    assert all(torch.equal(streamed[name], plain[name]) for name in plain)


def test_pooled_features_have_no_gradient_but_visual_tokens_do(model):
    pixels = {name: frames[None] for name, frames in random_pixels(1).items()}
    assert not any(f.requires_grad for f in model.pooled_features(pixels).values())
    assert model.encode(pixels)[0].requires_grad


# ------------------------------------------------------------------------------------- one sequence


def test_visual_tokens_are_between_bos_and_text(model):
    """A row is [BOS] + visual tokens + text."""
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
    """Longer padding, filled with </s> or with words, gives the same loss."""
    batch = collate(mixed_rows)
    expected, _ = model(batch)
    for filling in (2, 7):
        ids = F.pad(batch.input_ids, (0, 5), value=0)
        real = torch.arange(ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
        padded = replace(batch, input_ids=torch.where(real, ids, filling))
        torch.testing.assert_close(model(padded)[0], expected, rtol=1e-5, atol=1e-4)


def test_four_micro_batches_of_one_make_the_gradient_of_one_of_four(model, mixed_rows):
    """FIX F5: sums add up; means of unequal numbers of tokens would not."""
    whole = gradients(model, [collate(mixed_rows)])
    parts = gradients(model, [collate([row]) for row in mixed_rows])
    assert whole.keys() == parts.keys()
    for name in whole:
        scale = whole[name].abs().max().item()
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4 * scale + 1e-7)


def test_gradients_reach_all_that_is_trained_and_no_encoder(model, mixed_rows):
    """Every tensor of projectors, mixer and LLM has a non-zero gradient; encoders have none."""
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
    """A batch with pooled features in place of pixels runs no encoder."""
    batch = collate(mixed_rows)
    with torch.no_grad():
        expected, expected_weights = model(batch)
        features = model.pooled_features(batch.pixels)
        encoder_calls.clear()
        loss, weights = model(replace(batch, pixels={}, pooled=features))
    assert encoder_calls.total() == 0
    assert torch.equal(loss, expected)
    assert torch.equal(weights, expected_weights)


def test_a_batch_may_have_cached_features_for_some_of_its_clips(model, mixed_rows):
    """The same loss, and each row still gets the visual tokens of its own clip."""
    whole = collate(mixed_rows)
    first = {name: clips[:1] for name, clips in whole.pixels.items()}
    rest = {name: clips[1:] for name, clips in whole.pixels.items()}
    with torch.no_grad():
        half = replace(whole, pixels=rest, pooled=model.pooled_features(first))
        torch.testing.assert_close(model(half)[0], model(whole)[0], rtol=1e-5, atol=1e-5)


def test_a_batch_can_be_memorised(tokenizer):
    """The whole chain learns: below 0.1 nats a token within 80 steps of AdamW on four rows."""
    model = MERV.create(TINY, tokenizer)
    rows = [
        example(model, "video", "what moves", "the red square", seed=1),
        example(model, "video", "what moves", "the blue circle", seed=2),
        example(model, "image", "what", "right", seed=3),
        example(model, "text", "left or right", "left"),
    ]
    batch = collate(rows)
    batch = replace(batch, pooled=model.pooled_features(batch.pixels), pixels={})
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


def gradients(model: MERV, batches: list[Batch]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(batch)[0].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
