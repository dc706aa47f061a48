"""Generation: the KV cache against no cache, shared prefixes, greedy decoding and sampling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import (
    EACH_GROUPING,
    GROUPED,
    assert_close,
    build,
    ids_of,
    new_cache,
    transformers_llama,
    with_weights_of,
)
from torch import Tensor

from llama import KVCache, Llama, ids_before, matmul_shared, sample
from support.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

NO_EOS = -1  # an id that is never generated, so that answers have full length


# ---------------------------------------------------------------------------------------- the cache


@EACH_GROUPING
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5], [3, 9]])
@torch.no_grad()
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(num_kv_heads, pieces):
    model, ids = build(num_kv_heads=num_kv_heads), ids_of(2, 12)
    cache = new_cache(model, 2, 12)
    logits = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
    assert_close(logits, model(ids))


@torch.no_grad()
def test_rows_of_different_lengths_continue_as_if_each_were_alone():
    """[a b c] and [d e] padded to 3: the next token of the second row overwrites its padding."""
    model, ids, lengths = build(), ids_of(3, 7), [7, 3, 1]
    more = ids_of(3, 4, seed=5)
    cache = new_cache(model, 3, 11)
    first = model(ids, cache=cache, lengths=torch.tensor(lengths))
    later = torch.cat([model(more[:, i : i + 1], cache=cache) for i in range(4)], dim=1)
    for row, length in enumerate(lengths):
        alone = model(torch.cat([ids[row, :length], more[row]])[None])[0]
        assert_close(torch.cat([first[row, :length], later[row]]), alone)


@EACH_GROUPING
@torch.no_grad()
def test_logits_token_by_token_equal_those_of_transformers(num_kv_heads):
    """Each with its own cache: 6 tokens at once and then one at a time."""
    theirs = transformers_llama(num_kv_heads)
    ours = with_weights_of(theirs, replace(GROUPED, num_kv_heads=num_kv_heads))
    cache, past = new_cache(ours, 2, 12), None
    for piece in ids_of(2, 12).split([6, 1, 1, 1, 1, 1, 1], dim=1):
        expected = theirs(piece, past_key_values=past, use_cache=True)
        past = expected.past_key_values
        assert_close(ours(piece, cache=cache), expected.logits)


# ------------------------------------------------------------------------------------ shared prefix


@EACH_GROUPING
@torch.no_grad()
def test_a_shared_prefix_equals_repeating_it_in_every_row(num_kv_heads):
    """BOS and the video are read once; questions of different lengths follow them as a batch."""
    model = build(num_kv_heads=num_kv_heads)
    video, questions, lengths = ids_of(1, 9), ids_of(3, 5, seed=1), [5, 2, 4]
    more = ids_of(3, 3, seed=2)
    prefix = new_cache(model, 1, 9)
    model(video, cache=prefix)
    cache = new_cache(model, 3, 8, prefix)
    first = model(questions, cache=cache, lengths=torch.tensor(lengths))
    later = torch.cat([model(more[:, i : i + 1], cache=cache) for i in range(3)], dim=1)
    for row, length in enumerate(lengths):
        whole = torch.cat([video[0], questions[row, :length], more[row]])
        ours = torch.cat([first[row, :length], later[row]])
        assert_close(ours, model(whole[None])[0, 9:])


@EACH_GROUPING
@pytest.mark.parametrize("with_prefix", [False, True])
@torch.no_grad()
def test_attending_to_all_slots_equals_attending_to_those_in_use(num_kv_heads, with_prefix):
    """What a CUDA graph needs: shapes that do not grow. The mask hides the empty slots."""
    model, ids, more = build(num_kv_heads=num_kv_heads), ids_of(2, 5), ids_of(2, 4, seed=3)
    prefix = None
    if with_prefix:
        prefix = new_cache(model, 1, 6)
        model(ids_of(1, 6, seed=7), cache=prefix)
    results = []
    for all_slots in (False, True):
        cache = new_cache(model, 2, 12, prefix)
        model(ids, cache=cache, lengths=torch.tensor([5, 2]))
        if all_slots:
            cache.use_all_slots()
        results.append(torch.cat([model(token, cache=cache) for token in more.split(1, 1)], 1))
    assert_close(*results)


@torch.no_grad()
def test_a_cache_that_was_cut_continues_as_if_the_rest_had_never_been_there():
    """What a conversation does after Ctrl-C."""
    model, ids, more = build(), ids_of(1, 8), ids_of(1, 3, seed=4)
    cache = new_cache(model, 1, 12)
    model(ids, cache=cache)
    cache.cut(5)
    expected = model(torch.cat([ids[:, :5], more], dim=1))[:, 5:]
    assert_close(model(more, cache=cache), expected)


def test_generating_in_turns_with_one_cache_equals_generating_after_the_whole_sequence():
    """The newest id of a turn is not in the cache yet, so the next turn begins with it."""
    model, first, second = build(), ids_of(1, 4), ids_of(1, 3, seed=4)
    cache = new_cache(model, 1, 30)
    seen = []
    answer = model.generate(
        first, max_new_tokens=5, eos_id=NO_EOS, cache=cache, on_ids=seen.append
    )[0]
    assert seen == [[id] for id in answer]
    turn = torch.cat([torch.tensor([answer[-1:]]), second], dim=1)
    later = model.generate(turn, max_new_tokens=6, eos_id=NO_EOS, cache=cache)[0]
    whole = [*first[0].tolist(), *answer, *second[0].tolist()]
    assert later == model.generate(torch.tensor([whole]), max_new_tokens=6, eos_id=NO_EOS)[0]


@torch.no_grad()
def test_using_a_prefix_does_not_change_it():
    """So one prefix serves any number of questions."""
    model, video = build(), ids_of(1, 9)
    prefix = new_cache(model, 1, 9)
    model(video, cache=prefix)
    before = prefix.keys.clone(), prefix.values.clone(), prefix.used
    answers = [
        model.generate(ids_of(2, 4), prefix=prefix, max_new_tokens=5, eos_id=NO_EOS)
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert torch.equal(prefix.keys, before[0])
    assert torch.equal(prefix.values, before[1])
    assert prefix.used == before[2]


@pytest.mark.parametrize("c", [1, 2, 6])
def test_matmul_shared_equals_repeating_the_shared_matrices(c):
    """Six rows in c groups: each group has its matrices."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 5, 4, generator=generator)
    shared = torch.randn(c, 2, 4, 3, generator=generator)
    repeated = x @ shared.repeat_interleave(6 // c, dim=0)
    torch.testing.assert_close(matmul_shared(x, shared), repeated)


@EACH_GROUPING
@torch.no_grad()
def test_rows_follow_the_prefix_of_their_own_video(num_kv_heads):
    """Two videos are read together. Rows 0 and 1 follow the first one, rows 2 and 3 the second."""
    model = build(num_kv_heads=num_kv_heads)
    videos, questions, lengths = ids_of(2, 9), ids_of(4, 5, seed=1), [5, 2, 4, 1]
    more = ids_of(4, 3, seed=2)
    prefix = new_cache(model, 2, 9)
    model(videos, cache=prefix)
    cache = new_cache(model, 4, 8, prefix)
    first = model(questions, cache=cache, lengths=torch.tensor(lengths))
    later = torch.cat([model(more[:, i : i + 1], cache=cache) for i in range(3)], dim=1)
    for row, length in enumerate(lengths):
        whole = torch.cat([videos[row // 2], questions[row, :length], more[row]])
        ours = torch.cat([first[row, :length], later[row]])
        assert_close(ours, model(whole[None])[0, 9:])


@EACH_GROUPING
@pytest.mark.parametrize("s", [1, 3])
def test_attention_after_a_long_prefix_is_exact_to_rounding_in_bfloat16(num_kv_heads, s):
    """The softmax runs over 1030 keys: in bfloat16, a sum of ones stops growing at 256.

    The result is a weighted average of v. PyTorch's own attention has about half the error, because
    it rounds fewer of the numbers in between.
    """
    config = replace(
        GROUPED, hidden_size=512, num_kv_heads=num_kv_heads, max_positions=1040
    )  # head_dim 128, as at 7B
    generator = torch.Generator().manual_seed(0)
    prefix = KVCache(config, 1, 1030, torch.bfloat16, "cpu")
    prefix.advance(1030, None)
    for part in (prefix.keys, prefix.values):
        part.copy_(torch.randn(part.shape, generator=generator))
    cache = KVCache(config, 3, 5, torch.bfloat16, "cpu", prefix)
    cache.advance(s, None)
    q = torch.randn(3, 4, s, 128, generator=generator).bfloat16()
    k, v = torch.randn(2, 3, num_kv_heads, s, 128, generator=generator).bfloat16()
    ours = cache.attend(1, q, k, v)
    whole_k = torch.cat([prefix.keys[1].expand(3, -1, -1, -1), k], dim=2)
    whole_v = torch.cat([prefix.values[1].expand(3, -1, -1, -1), v], dim=2)
    mask = torch.ones(s, 1030 + s, dtype=torch.bool).tril(1030)

    def expected(dtype: torch.dtype) -> Tensor:
        inputs = (x.to(dtype) for x in (q, whole_k, whole_v))
        return F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True).double()

    exact = expected(torch.float64)
    assert exact.std() > 0.02
    assert (ours - exact).abs().max() < 0.02 * exact.abs().max()
    assert (ours - exact).abs().mean() < 3 * (expected(torch.bfloat16) - exact).abs().mean()


def test_more_tokens_than_the_model_can_read_raise_an_error_with_both_numbers():
    """The prefix counts too. Exactly the maximum is allowed."""
    model = build()
    prefix = new_cache(model, 1, 20)
    with torch.no_grad():
        model(ids_of(1, 20), cache=prefix)
    new_cache(model, 2, 44, prefix)
    with pytest.raises(UserError, match="at most 64 tokens, not 65") as error:
        new_cache(model, 2, 45, prefix)
    assert "\nWhy: " in str(error.value)
    assert "\nFix: " in str(error.value)
    with pytest.raises(UserError, match="at most 64 tokens, not 70"):
        model.generate(ids_of(1, 10), max_new_tokens=60)


# ----------------------------------------------------------------------------------------- generate


@torch.no_grad()
def test_greedy_answers_of_a_ragged_batch_equal_decoding_each_row_without_a_cache():
    model, ids, lengths = build(), ids_of(3, 6), [6, 2, 4]
    answers = model.generate(ids, lengths=torch.tensor(lengths), max_new_tokens=10, eos_id=NO_EOS)
    for row, length in enumerate(lengths):
        assert answers[row] == greedy_without_cache(model, ids[row, :length].tolist(), 10)


@torch.no_grad()
def test_answers_after_a_prefix_equal_answers_to_the_whole_sequence():
    model, video, questions = build(), ids_of(1, 9), ids_of(2, 4, seed=3)
    prefix = new_cache(model, 1, 9)
    model(video, cache=prefix)
    lengths = torch.tensor([4, 2])
    answers = model.generate(
        questions, lengths=lengths, prefix=prefix, max_new_tokens=8, eos_id=NO_EOS
    )
    for row in range(2):
        whole = torch.cat([video[0], questions[row, : lengths[row]]]).tolist()
        assert answers[row] == greedy_without_cache(model, whole, 8)


def greedy_without_cache(model: Llama, ids: list[int], steps: int) -> list[int]:
    """Greedy decoding by definition: read the whole sequence again for each new token."""
    new: list[int] = []
    for _ in range(steps):
        new.append(model(torch.tensor([ids + new]))[0, -1].argmax().item())
    return new


@EACH_GROUPING
def test_greedy_answers_equal_those_of_transformers(num_kv_heads):
    """A ragged batch: ours is padded on the right, theirs on the left with a mask."""
    theirs = transformers_llama(num_kv_heads)
    ours = with_weights_of(theirs, replace(GROUPED, num_kv_heads=num_kv_heads))
    ids, lengths = ids_of(3, 6), [6, 3, 5]
    left = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        left[row, 6 - length :] = ids[row, :length]
        mask[row, 6 - length :] = 1
    expected = theirs.generate(
        left, attention_mask=mask, do_sample=False, max_new_tokens=15, eos_token_id=96
    )
    answers = ours.generate(ids, lengths=torch.tensor(lengths), max_new_tokens=15, eos_id=96)
    assert answers == [ids_before(96, row) for row in expected[:, 6:].tolist()]
    assert len(set(map(tuple, answers))) == 3


@torch.no_grad()
def test_the_content_of_the_padding_does_not_matter():
    model, ids, lengths = build(), ids_of(2, 6), torch.tensor([6, 3])
    other = ids.clone()
    other[1, 3:] = 0
    one, two = (
        model.generate(x, lengths=lengths, max_new_tokens=8, eos_id=NO_EOS) for x in (ids, other)
    )
    assert one == two


@torch.no_grad()
def test_answers_to_embeddings_equal_answers_to_ids():
    model, ids = build(), ids_of(2, 5)
    by_embedding = model.generate(
        inputs_embeds=model.embed_tokens(ids), max_new_tokens=6, eos_id=NO_EOS
    )
    assert by_embedding == model.generate(ids, max_new_tokens=6, eos_id=NO_EOS)


def test_ids_before_eos_end_at_the_first_one():
    assert ids_before(2, [5, 7, 2, 9, 2]) == [5, 7]
    assert ids_before(2, [5, 7]) == [5, 7]
    assert ids_before(2, [2, 5]) == []


def test_each_row_stops_at_its_own_end_of_sequence():
    """The </s> is not part of the answer, and a finished row does not disturb the others."""
    model, ids = build(), ids_of(3, 4)
    full = model.generate(ids, max_new_tokens=12, eos_id=NO_EOS)
    eos = full[1][3]
    expected = [row[: row.index(eos)] if eos in row else row for row in full]
    assert len({len(row) for row in expected}) > 1, "rows should end at different steps"
    assert model.generate(ids, max_new_tokens=12, eos_id=eos) == expected


def test_generation_ends_when_every_row_has_ended(monkeypatch):
    """The model does not run again after the last </s>, nor after the last token allowed."""
    model, ids = build(), ids_of(1, 4)
    full = model.generate(ids, max_new_tokens=8, eos_id=NO_EOS)[0]
    stop = next(i for i in range(1, 8) if full[i] not in full[:i])
    steps = []
    plain = Llama.hidden_states
    monkeypatch.setattr(
        Llama, "hidden_states", lambda *args, **kwargs: steps.append(1) or plain(*args, **kwargs)
    )
    assert model.generate(ids, max_new_tokens=8, eos_id=full[stop])[0] == full[:stop]
    assert len(steps) == stop + 1
    steps.clear()
    assert model.generate(ids, max_new_tokens=3, eos_id=NO_EOS)[0] == full[:3]
    assert len(steps) == 3


def test_generating_in_the_middle_of_training_equals_generating_after_it():
    """Activation checkpointing, which cannot use a cache, must not apply while generating."""
    model, ids = build(), ids_of(2, 5)
    expected = model.generate(ids, max_new_tokens=8, eos_id=NO_EOS)
    model.train()
    model.activation_checkpointing = True
    assert model.generate(ids, max_new_tokens=8, eos_id=NO_EOS) == expected


# ----------------------------------------------------------------------------------------- sampling

PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_ids_are_drawn_in_proportion_to_probability_to_the_power_of_1_over_temperature(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    expected = expected / expected.sum()
    assert (drawn(temperature, 1.0) - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.45, [1]), (0.6, [1, 3]), (0.85, [1, 3, 0]), (0.99, [1, 3, 0, 2])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    """Of .5 .3 .15 .05, top_p 0.6 keeps .5 and .3, which are still drawn in proportion 5 to 3."""
    expected = torch.zeros(4)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    shares = drawn(1.0, top_p)
    assert set(shares.nonzero().flatten().tolist()) == set(kept)
    assert (shares - expected).abs().max() < 0.02


def drawn(temperature: float, top_p: float, seed: int = 0, n: int = 20_000) -> Tensor:
    """The share (4,) of each id among n draws."""
    logits = (PROBABILITIES.log() + 3.0).expand(n, 4)
    ids = sample(logits, temperature, top_p, torch.Generator().manual_seed(seed))
    return torch.bincount(ids, minlength=4) / n


@pytest.mark.parametrize("top_p", [1e-6, 0.0])
def test_a_tiny_top_p_is_greedy(top_p):
    """The most likely id always stays."""
    model, ids = build(), ids_of(3, 4)
    greedy = model.generate(ids, max_new_tokens=8, eos_id=NO_EOS)
    nucleus = model.generate(
        ids, max_new_tokens=8, eos_id=NO_EOS, temperature=1.0, top_p=top_p,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert nucleus == greedy


def test_the_same_seed_gives_the_same_answers_and_the_global_seed_is_not_touched():
    model, ids = build(), ids_of(2, 4)

    def answers(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(
            ids, max_new_tokens=12, eos_id=NO_EOS, temperature=1.0, generator=generator
        )

    state = torch.get_rng_state()
    assert answers(0) == answers(0)
    assert answers(0) != answers(1)
    assert torch.equal(torch.get_rng_state(), state)
