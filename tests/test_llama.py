"""LLaMA-2: each formula written out, the cache against no cache, and transformers as the judge.

The model under test is tiny and random, but of unit scale (conftest.unit_scale). Its norms and
rotations compute in float32 whatever the dtype, so the tolerance here is 1e-4 on such numbers.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import unit_scale
from safetensors.torch import save_file
from torch import Tensor

from llama import (
    LLAMAS,
    KVCache,
    Llama,
    LlamaConfig,
    RMSNorm,
    SwiGLU,
    Tokenizer,
    load_llama,
    read_config,
    rope,
    rotate,
    sample,
)
from support.errors import CheckpointError, UserError
from support.released import LLAMA_NAMES as NAMES
from support.released import read_meta
from support.weights import released_names

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPED = LlamaConfig(
    "tiny", vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4,
    num_kv_heads=2, max_positions=64,
)  # fmt: skip
EACH_GROUPING = pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
NO_EOS = -1  # an id that never comes, to see answers of full length


def build(config: LlamaConfig = GROUPED, **changes) -> Llama:
    return unit_scale(load_llama(replace(config, **changes))).eval()


def ids_of(b: int, s: int, seed: int = 0, vocab: int = 97) -> Tensor:
    return torch.randint(3, vocab, (b, s), generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert 0.2 < theirs.std() < 20, "of unit scale, or the tolerance means little"
    assert (ours - theirs).abs().max() < tolerance


def new_cache(model: Llama, b: int, length: int, prefix: KVCache | None = None) -> KVCache:
    return KVCache(model.config, b, length, torch.float32, "cpu", prefix)


# ------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-7b-chat", 6_738_415_616),
        ("vicuna-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("vicuna-13b", 13_015_864_320),
        ("tinyllama-1.1b", 1_100_048_384),
    ],
)
def test_each_preset_has_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = Llama(LLAMAS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_no_preset_is_left_out_of_the_count():
    assert len(LLAMAS) == 6 + 1, "six published models and the miniature"
    assert all(name == config.name for name, config in LLAMAS.items())


def test_llama2_reads_4096_positions_and_tinyllama_2048():
    assert LLAMAS["llama2-7b"].max_positions == LLAMAS["llama2-13b"].max_positions == 4096
    assert LLAMAS["tinyllama-1.1b"].max_positions == 2048
    assert {config.rope_bf16 for config in LLAMAS.values()} == {False}


def test_the_7b_preset_has_the_names_and_shapes_of_the_release(shared_folder):
    manifest = json.loads((shared_folder / "manifests" / "llama2-7b.json").read_text())
    with torch.device("meta"):
        model = Llama(LLAMAS["llama2-7b"])
    ours = {
        released_names(key, NAMES)[0]: list(tensor.shape)
        for key, tensor in model.state_dict().items()
    }
    assert ours == {key: shape for key, (shape, _) in manifest.items()}


def test_random_weights_are_the_same_each_time_and_leave_the_global_seed_alone():
    state = torch.get_rng_state()
    one, two = (load_llama(GROUPED).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert one["layers.0.mlp.up_proj.weight"].std() > 0
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------- naive loop = fast path


def test_rmsnorm_divides_by_the_root_mean_square():
    norm = unit_scale(RMSNorm(8, eps=1e-5))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 3
    for row, normed in zip(x.tolist(), norm(x), strict=True):
        rms = math.sqrt(sum(value**2 for value in row) / 8 + 1e-5)
        slow = torch.tensor([value / rms for value in row]) * norm.weight
        torch.testing.assert_close(normed, slow)


def test_rmsnorm_squares_in_float32():
    """300 * 300 = 90000 is infinite in float16, whose largest number is 65504."""
    norm = RMSNorm(4, eps=1e-5).half()
    assert torch.equal(norm(torch.full((1, 4), 300.0).half()), torch.ones(1, 4).half())


def test_swiglu_is_a_gated_mlp():
    mlp = unit_scale(SwiGLU(GROUPED))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * up) @ mlp.down_proj.weight.T)


def test_rope_turns_each_pair_of_channels_as_a_complex_number():
    """Channels i and i + c/2 are one complex number, times exp(1j * position * theta^(-2i/c))."""
    config = replace(GROUPED, rope_theta=500.0)  # head_dim 8
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 17, 63]])
    fast = rotate(x, *rope(positions, config))
    for head in range(2):
        for slot, position in enumerate(positions[0].tolist()):
            for i in range(4):
                number = complex(x[0, head, slot, i], x[0, head, slot, i + 4])
                angle = position * 500.0 ** (-2 * i / 8)
                number *= complex(math.cos(angle), math.sin(angle))
                assert fast[0, head, slot, i].item() == pytest.approx(number.real, abs=1e-4)
                assert fast[0, head, slot, i + 4].item() == pytest.approx(number.imag, abs=1e-4)


def test_rope_sees_only_how_far_apart_two_tokens_are():
    """q at position 9 and k at 4 agree as much as q at 29 and k at 24."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def agreement(m: int, n: int) -> Tensor:
        rotated = [rotate(x, *rope(torch.tensor([[p]]), GROUPED)) for x, p in ((q, m), (k, n))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(agreement(9, 4), agreement(29, 24), atol=1e-5, rtol=1e-5)
    assert (agreement(9, 4) - agreement(9, 5)).abs() > 1e-3


def test_rope_bf16_rounds_the_frequencies_and_only_those():
    """At LLaMA-2's size the angle is off by more than a radian at position 1100 (ledger K1)."""
    exact, rounded = LLAMAS["llama2-7b"], replace(LLAMAS["llama2-7b"], rope_bf16=True)
    frequencies = 1 / 10000 ** (torch.arange(0, 128, 2).double() / 128)
    bf16 = frequencies.float().bfloat16().double()
    positions = torch.tensor([[0, 1, 7, 1100]])
    for config, used in ((exact, frequencies), (rounded, bf16)):
        angles = positions[0, :, None] * torch.cat([used, used])
        cos, sin = rope(positions, config)
        assert cos.dtype == sin.dtype == torch.float32
        torch.testing.assert_close(cos[0, 0].double(), angles.cos(), atol=2e-4, rtol=0)
        torch.testing.assert_close(sin[0, 0].double(), angles.sin(), atol=2e-4, rtol=0)
    assert 1.0 < (1100 * (frequencies - bf16)).abs().max() < 1.5


def naive_forward(model: Llama, ids: list[int]) -> Tensor:
    """Logits (s, vocab) of one row: every layer, head and query in turn, a query over its past."""
    config = model.config
    c, group = config.head_dim, config.num_heads // config.num_kv_heads
    x = model.embed_tokens.weight[ids]
    cos, sin = (table[0, 0] for table in rope(torch.arange(len(ids))[None], config))

    def turned(vector: Tensor, position: int) -> Tensor:
        swapped = torch.cat([-vector[c // 2 :], vector[: c // 2]])
        return vector * cos[position] + swapped * sin[position]

    for layer in model.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            normed @ proj.weight.T
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        y = torch.zeros_like(x)
        for head in range(config.num_heads):
            mine = slice(head * c, (head + 1) * c)
            shared = slice(head // group * c, (head // group + 1) * c)  # its key-value head
            for i in range(len(ids)):
                query = turned(q[i, mine], i)
                scores = [query @ turned(k[j, shared], j) / math.sqrt(c) for j in range(i + 1)]
                weights = torch.stack(scores).softmax(0)
                y[i, mine] = weights @ v[: i + 1, shared]
        x = x + y @ attention.o_proj.weight.T
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.norm(x) @ model.lm_head.weight.T


@EACH_GROUPING
@torch.no_grad()
def test_the_decoder_is_a_loop_over_layers_heads_and_queries(num_kv_heads):
    """Heads 0 and 1 share key-value head 0, heads 2 and 3 share key-value head 1."""
    model, ids = build(num_kv_heads=num_kv_heads), ids_of(2, 7)
    logits = model(ids)
    for row in range(2):
        assert_close(logits[row], naive_forward(model, ids[row].tolist()))


# ------------------------------------------------------------------------ properties of the forward


@torch.no_grad()
def test_embeddings_in_place_of_ids_give_the_same_logits():
    model, ids = build(), ids_of(2, 6)
    assert torch.equal(model(ids), model(inputs_embeds=model.embed_tokens(ids)))


@torch.no_grad()
def test_a_token_never_sees_what_stands_to_its_right():
    """So padding on the right needs no mask: whatever it is, the real positions do not change."""
    model, ids = build(), ids_of(1, 6)
    padded = torch.cat([ids, ids_of(1, 5, seed=9)], dim=1)
    torch.testing.assert_close(model(padded)[:, :6], model(ids))


@torch.no_grad()
def test_tied_embeddings_are_the_head():
    model = build(tie_word_embeddings=True)
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    ids = ids_of(1, 5)
    expected = model.hidden_states(ids) @ model.embed_tokens.weight.T
    torch.testing.assert_close(model(ids), expected)


# -------------------------------------------------------------------------------- cached = uncached


@EACH_GROUPING
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5], [3, 9]])
@torch.no_grad()
def test_reading_piece_by_piece_with_a_cache_equals_reading_at_once(num_kv_heads, pieces):
    model, ids = build(num_kv_heads=num_kv_heads), ids_of(2, 12)
    cache = new_cache(model, 2, 12)
    logits = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
    assert_close(logits, model(ids))


@torch.no_grad()
def test_rows_of_different_lengths_continue_as_if_alone():
    """[a b c] and [d e] padded to 3: the second row's next token overwrites its padding."""
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
def test_a_shared_prefix_equals_repeating_it_in_every_row(num_kv_heads):
    """[BOS] + the video is read once; questions of different lengths follow it as a batch."""
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


@torch.no_grad()
def test_a_prefix_serves_one_question_after_another_unchanged():
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


def test_more_positions_than_the_model_has_are_refused_with_the_count():
    """The prefix counts too; exactly as many as there are is fine."""
    model = build()
    prefix = new_cache(model, 1, 20)
    with torch.no_grad():
        model(ids_of(1, 20), cache=prefix)
    new_cache(model, 2, 44, prefix)
    with pytest.raises(UserError, match="asked for 65 positions, has 64") as error:
        new_cache(model, 2, 45, prefix)
    assert "\nWhy: " in str(error.value)
    assert "\nFix: " in str(error.value)
    with pytest.raises(UserError, match="asked for 70 positions, has 64"):
        model.generate(ids_of(1, 10), max_new_tokens=60)


# ----------------------------------------------------------------------------------------- generate


def greedy_without_cache(model: Llama, ids: list[int], steps: int) -> list[int]:
    """The definition: read everything again for each new token."""
    new: list[int] = []
    for _ in range(steps):
        new.append(model(torch.tensor([ids + new]))[0, -1].argmax().item())
    return new


@torch.no_grad()
def test_greedy_answers_of_a_ragged_batch_equal_each_row_read_again_and_again():
    model, ids, lengths = build(), ids_of(3, 6), [6, 2, 4]
    answers = model.generate(ids, lengths=torch.tensor(lengths), max_new_tokens=10, eos_id=NO_EOS)
    for row, length in enumerate(lengths):
        assert answers[row] == greedy_without_cache(model, ids[row, :length].tolist(), 10)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter():
    model, ids, lengths = build(), ids_of(2, 6), torch.tensor([6, 3])
    other = ids.clone()
    other[1, 3:] = 0
    one, two = (
        model.generate(x, lengths=lengths, max_new_tokens=8, eos_id=NO_EOS) for x in (ids, other)
    )
    assert one == two


@torch.no_grad()
def test_answers_after_a_prefix_equal_answers_to_the_whole():
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


@torch.no_grad()
def test_answers_to_embeddings_equal_answers_to_ids():
    model, ids = build(), ids_of(2, 5)
    by_embedding = model.generate(
        inputs_embeds=model.embed_tokens(ids), max_new_tokens=6, eos_id=NO_EOS
    )
    assert by_embedding == model.generate(ids, max_new_tokens=6, eos_id=NO_EOS)


def test_each_row_stops_at_its_own_end_of_sequence():
    """The </s> is not part of the answer, and a row that has ended does not disturb the others."""
    model, ids = build(), ids_of(3, 4)
    full = model.generate(ids, max_new_tokens=12, eos_id=NO_EOS)
    eos = full[1][3]
    expected = [row[: row.index(eos)] if eos in row else row for row in full]
    assert len({len(row) for row in expected}) > 1, "rows should end at different steps"
    assert model.generate(ids, max_new_tokens=12, eos_id=eos) == expected


def test_generation_ends_when_every_row_has_ended(monkeypatch):
    """No step is computed after the last </s>, and none for the last token's successor."""
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
    """Recomputing layers in the backward pass must not cost generation its cache."""
    model, ids = build(), ids_of(2, 5)
    expected = model.generate(ids, max_new_tokens=8, eos_id=NO_EOS)
    model.train()
    model.activation_checkpointing = True
    assert model.generate(ids, max_new_tokens=8, eos_id=NO_EOS) == expected


# ----------------------------------------------------------------------------------------- sampling

PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])


def drawn(temperature: float, top_p: float, seed: int = 0, n: int = 20_000) -> Tensor:
    """The share (4,) of each id among n draws."""
    logits = (PROBABILITIES.log() + 3.0).expand(n, 4)
    ids = sample(logits, temperature, top_p, torch.Generator().manual_seed(seed))
    return torch.bincount(ids, minlength=4) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_ids_are_drawn_in_proportion_to_probability_to_the_power_of_1_over_temperature(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    expected = expected / expected.sum()
    assert (drawn(temperature, 1.0) - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.45, [1]), (0.6, [1, 3]), (0.85, [1, 3, 0]), (0.99, [1, 3, 0, 2])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    """Of .5 .3 .15 .05: 0.6 keeps .5 and .3; they are drawn in their old proportion, 5 to 3."""
    expected = torch.zeros(4)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    shares = drawn(1.0, top_p)
    assert set(shares.nonzero().flatten().tolist()) == set(kept)
    assert (shares - expected).abs().max() < 0.02


@pytest.mark.parametrize("top_p", [1e-6, 0.0])
def test_a_small_top_p_is_greedy(top_p):
    """The most likely id always stays."""
    model, ids = build(), ids_of(3, 4)
    greedy = model.generate(ids, max_new_tokens=8, eos_id=NO_EOS)
    nucleus = model.generate(
        ids, max_new_tokens=8, eos_id=NO_EOS, temperature=1.0, top_p=top_p,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert nucleus == greedy


def test_the_same_seed_gives_the_same_answers_and_the_global_seed_is_left_alone():
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


# ----------------------------------------------------------------------------------- loss, training


@pytest.mark.parametrize("chunk", [1, 4, 7, 1024])
def test_the_chunked_loss_and_its_gradients_are_those_of_cross_entropy(chunk):
    model = build().requires_grad_(True)
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = ids_of(1, 7)[0]
    plain = F.cross_entropy(hidden @ model.lm_head.weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(plain, [hidden, model.lm_head.weight])
    ours = model.loss(hidden, targets, chunk=chunk)
    gradients = torch.autograd.grad(ours, [hidden, model.lm_head.weight])
    torch.testing.assert_close(ours, plain)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


def test_the_loss_never_holds_more_logits_than_a_chunk(monkeypatch):
    model, seen = build(), []
    plain = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: seen.append(len(hidden)) or plain(hidden))
    hidden = torch.randn(10, 32, requires_grad=True)
    model.loss(hidden, ids_of(1, 10)[0], chunk=4).backward()
    assert sorted(set(seen)) == [2, 4]


def test_a_batch_without_labels_has_loss_zero_and_gradient_zero():
    """A rank whose rows are all prompt still takes part in the backward pass."""
    model = build()
    hidden = torch.randn(5, 32, requires_grad=True)
    loss = model.loss(hidden[:0], torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros(5, 32))


def test_activation_checkpointing_changes_no_gradient():
    model, ids = build().requires_grad_(True).train(), ids_of(2, 6)
    gradients = []
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        hidden = model.hidden_states(ids)[:, :-1].flatten(0, 1)
        model.loss(hidden, ids[:, 1:].flatten()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_activation_checkpointing_recomputes_every_layer():
    """It trades a second forward of each layer for not keeping what is inside it."""
    model, ids, calls = build().requires_grad_(True).train(), ids_of(1, 4), []
    model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing, passes in ((False, 1), (True, 2)):
        calls.clear()
        model.activation_checkpointing = checkpointing
        model(ids).sum().backward()
        assert len(calls) == passes


# ------------------------------------------------------------------------- parity with transformers


def judge(num_kv_heads: int = 2, seed: int = 0, **changes) -> transformers.LlamaForCausalLM:
    """transformers' LLaMA, random at unit scale."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=num_kv_heads, max_position_embeddings=64,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes,
    )  # fmt: skip
    return unit_scale(transformers.LlamaForCausalLM(config), seed).eval()


def as_ours(theirs: transformers.LlamaForCausalLM, config: LlamaConfig) -> Llama:
    """The same weights in our model: only the word "model." is different."""
    model = load_llama(config).eval()
    state = {name.removeprefix("model."): x for name, x in theirs.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model


@EACH_GROUPING
@torch.no_grad()
def test_logits_equal_those_of_transformers(num_kv_heads):
    theirs = judge(num_kv_heads)
    ours, ids = as_ours(theirs, replace(GROUPED, num_kv_heads=num_kv_heads)), ids_of(2, 40)
    assert_close(ours(ids), theirs(ids).logits)


@EACH_GROUPING
@torch.no_grad()
def test_logits_equal_those_of_transformers_in_float64(num_kv_heads):
    """Both compute RMSNorm and the angles in float32, all else in float64."""
    theirs = judge(num_kv_heads).double()
    ours = as_ours(theirs, replace(GROUPED, num_kv_heads=num_kv_heads)).double()
    ours.load_state_dict({n.removeprefix("model."): x for n, x in theirs.state_dict().items()})
    logits, expected = ours(ids_of(2, 40)), theirs(ids_of(2, 40)).logits
    assert logits.dtype == torch.float64
    assert (logits - expected).abs().max() < 1e-12 * expected.abs().max()


@EACH_GROUPING
@torch.no_grad()
def test_logits_token_by_token_equal_those_of_transformers(num_kv_heads):
    """Each with its own cache, 6 tokens at once and then one at a time."""
    theirs = judge(num_kv_heads)
    ours, ids = as_ours(theirs, replace(GROUPED, num_kv_heads=num_kv_heads)), ids_of(2, 12)
    cache, past = new_cache(ours, 2, 12), None
    for piece in ids.split([6, 1, 1, 1, 1, 1, 1], dim=1):
        expected = theirs(piece, past_key_values=past, use_cache=True)
        past = expected.past_key_values
        assert_close(ours(piece, cache=cache), expected.logits)


@EACH_GROUPING
def test_greedy_answers_equal_those_of_transformers(num_kv_heads):
    """A ragged batch: ours padded on the right, theirs on the left with a mask."""
    theirs = judge(num_kv_heads)
    ours = as_ours(theirs, replace(GROUPED, num_kv_heads=num_kv_heads))
    ids, lengths = ids_of(3, 6), [6, 3, 5]
    left = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        left[row, 6 - length :], mask[row, 6 - length :] = ids[row, :length], 1
    expected = theirs.generate(
        left, attention_mask=mask, do_sample=False, max_new_tokens=15, eos_token_id=96
    )
    cut = [row[: row.index(96)] if 96 in row else row for row in expected[:, 6:].tolist()]
    answers = ours.generate(ids, lengths=torch.tensor(lengths), max_new_tokens=15, eos_id=96)
    assert answers == cut
    assert len(set(map(tuple, answers))) == 3


# ------------------------------------------------------------------------------------------ loading


def hf_config(**changes) -> dict:
    """config.json as LLaMA-2 7B has it on the hub, with the numbers of the tiny model."""
    return {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 48, "max_position_embeddings": 64, "model_type": "llama",
        "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
        "vocab_size": 97,
    } | changes  # fmt: skip


def released(model: Llama) -> dict[str, Tensor]:
    """The tensors under the names of the hub."""
    return {released_names(key, NAMES)[0]: x.clone() for key, x in model.state_dict().items()}


def write(folder, tensors: dict[str, Tensor], form: str, **changes) -> None:
    """A model folder in Hugging Face format: config.json and weights in one of four forms."""
    (folder / "config.json").write_text(json.dumps(hf_config(**changes)))
    suffix = ".safetensors" if "safetensors" in form else ".bin"
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    save = save_file if suffix == ".safetensors" else torch.save
    if not form.startswith("sharded"):
        save(tensors, folder / f"{stem}{suffix}")
        return
    shards = [f"{stem}-0000{i}-of-00003{suffix}" for i in (1, 2, 3)]
    where = {name: shards[i % 3] for i, name in enumerate(tensors)}
    for shard in shards:
        save({name: x for name, x in tensors.items() if where[name] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
@torch.no_grad()
def test_a_hugging_face_folder_gives_the_configuration_and_the_weights(form, tmp_path):
    model = build()
    write(tmp_path, released(model), form)
    loaded = load_llama(tmp_path)
    expected = replace(GROUPED, name=tmp_path.name, source=str(tmp_path))
    assert loaded.config == expected
    state = model.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in loaded.state_dict().items())
    assert torch.equal(loaded(ids_of(2, 5)), model(ids_of(2, 5)))


@pytest.mark.parametrize("theta", [10000.0, 50000.0])
@torch.no_grad()
def test_a_folder_that_transformers_wrote_computes_the_same(theta, tmp_path):
    """Version 5 writes RoPE's base as rope_parameters.rope_theta, earlier ones as rope_theta."""
    rope_parameters = {"rope_type": "default", "rope_theta": theta}
    theirs = judge(rope_parameters=rope_parameters)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_llama(tmp_path)
    assert_close(ours(ids_of(2, 40)), theirs(ids_of(2, 40)).logits)


def test_an_older_folders_rope_theta_is_read(tmp_path):
    write(tmp_path, {}, "bin", rope_theta=50000.0)
    assert read_config(tmp_path).rope_theta == 50000.0


def test_llama2_7bs_own_config_gives_the_preset(tmp_path):
    """What meta-llama/Llama-2-7b-hf says of itself is what LLAMAS says of it."""
    released_config = hf_config(
        hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, vocab_size=32000,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(released_config))
    preset = LLAMAS["llama2-7b"]
    assert replace(read_config(tmp_path), name=preset.name, source=preset.source) == preset


def test_a_config_without_key_value_heads_has_as_many_as_heads(tmp_path):
    """LLaMA-1 and Vicuna were released before grouped-query attention had a field."""
    config = hf_config()
    del config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).num_kv_heads == 4


def test_a_folder_named_like_a_preset_has_its_prompt_template(tmp_path):
    folder = tmp_path / "vicuna-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config()))
    assert read_config(folder).template == "vicuna"
    assert read_config(folder).hidden_size == 32, "its numbers are still its own"


def test_old_rotary_tables_in_a_file_are_ignored(tmp_path):
    """Early conversions stored inv_freq in each layer; rope() computes it."""
    tensors = released(build())
    for index in range(3):
        tensors[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write(tmp_path, tensors, "bin")
    assert load_llama(tmp_path).config.num_layers == 3


def test_a_padded_vocabulary_is_accepted(tmp_path):
    """The authors' checkpoint has 32064 rows for 32000 pieces (ledger K9): the config says so."""
    write(tmp_path, released(build(vocab_size=128)), "safetensors", vocab_size=128)
    assert load_llama(tmp_path)(ids_of(1, 3)).shape == (1, 3, 128)


def test_a_tied_checkpoint_needs_no_head_and_may_carry_one(tmp_path):
    model = build(tie_word_embeddings=True)
    tensors = released(model)
    for extra in ({}, {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}):
        write(tmp_path, tensors | extra, "safetensors", tie_word_embeddings=True)
        with torch.no_grad():
            assert torch.equal(load_llama(tmp_path)(ids_of(1, 4)), model(ids_of(1, 4)))


def test_weights_are_cast_to_the_dtype_asked_for(tmp_path):
    write(tmp_path, released(build()), "safetensors")
    model = load_llama(tmp_path, dtype=torch.bfloat16)
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    assert model(ids_of(1, 4)).dtype == torch.bfloat16


def test_all_that_does_not_fit_stands_in_one_error(tmp_path):
    tensors = released(build())
    del tensors["model.norm.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(2)
    tensors["lm_head.weight"] = torch.ones(96, 32)
    write(tmp_path, tensors, "safetensors")
    with pytest.raises(CheckpointError) as error:
        load_llama(tmp_path)
    for problem in (
        "missing     model.norm.weight",
        "missing     model.layers.2.mlp.up_proj.weight",
        "mis-shaped  lm_head.weight: [96, 32], wanted [97, 32]",
        "unexpected  model.layers.3.mlp.up_proj.weight",
    ):
        assert problem in str(error.value)
    assert "layers.0" not in str(error.value)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, released(build()), "sharded safetensors")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        load_llama(tmp_path)


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config())[:-40])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_llama(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral"}, "mistral"),
    ],
)
def test_a_configuration_that_would_compute_something_else_is_refused(change, named, tmp_path):
    write(tmp_path, released(build()), "bin", **change)
    with pytest.raises(CheckpointError) as error:
        load_llama(tmp_path)
    assert named in str(error.value)
    assert "\nFix: " in str(error.value)


# ---------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer(shared_folder) -> Tokenizer:
    return Tokenizer(shared_folder / "data" / "llama2_tokenizer.model")


def test_bos_is_1_eos_is_2_and_neither_is_added_silently(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = tokenizer.encode("What is in the video?")
    assert not {1, 2} & set(ids)
    assert tokenizer.pieces.get_piece_size() == LLAMAS["llama2-7b"].vocab_size


def test_hello_world_is_two_known_pieces(tokenizer):
    assert tokenizer.encode("Hello world") == [15043, 3186]
    assert tokenizer.decode([15043, 3186]) == "Hello world"


@pytest.mark.parametrize(
    "text",
    [
        "a man opens a door.",
        "(A) left  (B) right",
        "line\nbreak",
        "Grüße, 世界! 🎬",
        "42 % of 1,000",
        "",
    ],
)
def test_decoding_gives_back_what_was_encoded(text, tokenizer):
    """Also of characters the vocabulary lacks: they fall back to their bytes."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < 32000 for i in ids)


def test_the_text_of_a_control_piece_is_not_the_piece(tokenizer):
    """A question that contains "</s>" cannot end the sequence."""
    assert 2 not in tokenizer.encode("say </s> now")


def test_bos_and_eos_decode_to_nothing(tokenizer):
    assert tokenizer.decode([1, 15043, 2]) == "Hello"


def test_a_missing_tokenizer_says_where_to_find_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"Found no tokenizer\.model at .*tokenizer\.model"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_metas_rotation_of_neighbours_is_ours_of_halves(tmp_path):
    """Attention scores by Meta's own rule, complex numbers of neighbouring channels, from its rows;
    and by ours, from the rows that read_meta puts in another order.
    """
    config = replace(GROUPED, num_kv_heads=GROUPED.num_heads)
    heads, c, d = config.num_heads, config.head_dim, config.hidden_size
    generator = torch.Generator().manual_seed(0)
    wq, wk, x = (torch.randn(d, d, generator=generator, dtype=torch.float64) for _ in range(3))
    named = {"layers.0.attention.wq.weight": wq, "layers.0.attention.wk.weight": wk}
    torch.save(named, tmp_path / "consolidated.00.pth")

    def turned(w: torch.Tensor) -> torch.Tensor:  # (s, heads, c / 2) complex
        pairs = torch.view_as_complex((x @ w.mT).view(d, heads, c // 2, 2))
        angle = torch.arange(d)[:, None] * config.rope_theta ** -(torch.arange(0, c, 2) / c)
        return pairs * torch.polar(torch.ones(()), angle.float())[:, None]

    expected = torch.einsum("shc,thc->hst", turned(wq), turned(wk).conj()).real
    cos, sin = rope(torch.arange(d)[None], config)
    q, k = (
        rotate((x @ w.mT).view(1, d, heads, c).transpose(1, 2), cos, sin)[0]
        for w in read_meta(tmp_path, config).values()
    )
    scores = q @ k.mT
    assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()
