"""The decoder of llama.py: each formula against a naive loop, and the model against transformers.

test_generation.py tests the KV cache, generation and sampling; test_llama_weights.py tests loading.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import unit_scale
from tiny_llama import (
    EACH_GROUPING,
    GROUPED,
    assert_close,
    build,
    ids_of,
    transformers_llama,
    with_weights_of,
)
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.overrides import TorchFunctionMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import llama
from llama import LLAMAS, KVCache, Llama, RMSNorm, SwiGLU, load_llama, rope, rotate
from support.released import LLAMA_HF
from support.weights import released_names

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_the_parameter_counts_cover_every_preset():
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
        released_names(key, LLAMA_HF)[0]: list(tensor.shape)
        for key, tensor in model.state_dict().items()
    }
    assert ours == {key: shape for key, (shape, _) in manifest.items()}


def test_random_weights_are_reproducible_and_do_not_touch_the_global_seed():
    state = torch.get_rng_state()
    one, two = (load_llama(GROUPED).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert one["layers.0.mlp.up_proj.weight"].std() > 0
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------- RMSNorm, SwiGLU


def test_rmsnorm_divides_by_the_root_mean_square():
    norm = unit_scale(RMSNorm(8, eps=1e-5))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 3
    for row, normed in zip(x.tolist(), norm(x), strict=True):
        rms = math.sqrt(sum(value**2 for value in row) / 8 + 1e-5)
        slow = torch.tensor([value / rms for value in row]) * norm.weight
        torch.testing.assert_close(normed, slow)


def test_rmsnorm_squares_in_float32_for_float16_input():
    """300 * 300 = 90000 overflows float16, whose largest number is 65504."""
    norm = RMSNorm(4, eps=1e-5).half()
    assert torch.equal(norm(torch.full((1, 4), 300.0).half()), torch.ones(1, 4).half())


def test_rmsnorm_sums_in_float32_for_bfloat16_input():
    """A bfloat16 sum of 4096 ones stops at 256, because 256 + 1 rounds to 256."""
    norm = RMSNorm(4096, eps=1e-5).bfloat16()
    assert torch.equal(norm(torch.ones(1, 4096).bfloat16()), torch.ones(1, 4096).bfloat16())


@torch.no_grad()
def test_rmsnorm_equals_that_of_transformers_in_float32():
    ours, theirs, _ = norms_of_width_4096(torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_rmsnorm_equals_that_of_transformers_in_bfloat16_to_rounding():
    """transformers rounds to bfloat16 before and after multiplying by the weight; we round once.

    One rounding is a relative error of at most 2^-8, so ours is the more exact of the two.
    """
    ours, theirs, exact = norms_of_width_4096(torch.bfloat16)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert ((ours - exact).abs() <= 2**-8 * exact.abs() + 1e-9).all()
    assert ((ours.double() - theirs.double()).abs() <= 3 * 2**-8 * exact.abs() + 1e-9).all()
    assert (ours - exact).abs().mean() <= (theirs - exact).abs().mean()


def norms_of_width_4096(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, transformers' and the exact (float64) norm of the same 50 random vectors."""
    ours = unit_scale(RMSNorm(4096, eps=1e-5)).to(dtype)
    theirs = LlamaRMSNorm(4096, eps=1e-5).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(50, 4096, generator=torch.Generator().manual_seed(1)).to(dtype)
    x64 = x.double()
    exact = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.weight.double()
    return ours(x), theirs(x), exact


def test_swiglu_is_a_gated_mlp():
    mlp = unit_scale(SwiGLU(GROUPED))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * up) @ mlp.down_proj.weight.T)


# --------------------------------------------------------------------------------------------- RoPE


def test_rope_rotates_each_channel_pair_like_a_complex_number():
    """Channels i and i + c/2 form one complex number, times exp(1j * position * theta^(-2i/c))."""
    config = replace(GROUPED, rope_theta=500.0)  # head_dim c is 8
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 17, 63])
    fast = rotate(x, rope(positions, config))
    for head in range(2):
        for slot, position in enumerate(positions.tolist()):
            for i in range(4):
                number = complex(x[0, head, slot, i], x[0, head, slot, i + 4])
                angle = position * 500.0 ** (-2 * i / 8)
                number *= complex(math.cos(angle), math.sin(angle))
                assert fast[0, head, slot, i].item() == pytest.approx(number.real, abs=1e-4)
                assert fast[0, head, slot, i + 4].item() == pytest.approx(number.imag, abs=1e-4)


def test_rope_depends_only_on_the_distance_between_two_tokens():
    """The product of q at position 9 and k at 4 equals that of q at 29 and k at 24."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def product(m: int, n: int) -> Tensor:
        rotated_q = rotate(q, rope(torch.tensor([m]), GROUPED))
        rotated_k = rotate(k, rope(torch.tensor([n]), GROUPED))
        return (rotated_q * rotated_k).sum()

    torch.testing.assert_close(product(9, 4), product(29, 24), atol=1e-5, rtol=1e-5)
    assert (product(9, 4) - product(9, 5)).abs() > 1e-3


def test_rope_bf16_rounds_the_frequencies_and_nothing_else():
    """At LLaMA-2's size the angle is off by more than a radian at position 1100 (ledger K1)."""
    exact, rounded = LLAMAS["llama2-7b"], replace(LLAMAS["llama2-7b"], rope_bf16=True)
    frequencies = 1 / 10000 ** (torch.arange(0, 128, 2).double() / 128)
    bf16 = frequencies.float().bfloat16().double()
    positions = torch.tensor([0, 1, 7, 1100])
    for config, used in ((exact, frequencies), (rounded, bf16)):
        angles = positions[:, None] * used
        table = rope(positions, config)
        assert table.cos.dtype == table.sin.dtype == torch.float32
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
        torch.testing.assert_close(table.cos.double(), cos, atol=2e-4, rtol=0)
        torch.testing.assert_close(table.sin.double(), sin, atol=2e-4, rtol=0)
    assert 1.0 < (1100 * (frequencies - bf16)).abs().max() < 1.5


def test_a_table_lookup_gives_the_angles_of_the_positions_looked_up():
    table, positions = rope(torch.arange(20), GROUPED), torch.tensor([[3, 4], [17, 18]])
    found = table.at(positions)
    assert found.cos.shape == found.sin.shape == (2, 1, 2, 8)
    for row in range(2):
        expected = rope(positions[row], GROUPED)
        assert torch.equal(found.cos[row, 0], expected.cos)
        assert torch.equal(found.sin[row, 0], expected.sin)


def test_bfloat16_queries_are_rotated_in_float32():
    """The only error is that of rounding the result: at most 2^-8 of its size."""
    x = torch.randn(1, 2, 1101, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = rope(torch.arange(1101), GROUPED)
    rotated = rotate(x, table)
    assert rotated.dtype == torch.bfloat16
    exact = rotate(x.float(), table)
    assert ((rotated.float() - exact).abs() <= 2**-8 * exact.abs() + 1e-9).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_angles_stay_float32_when_fsdp_casts_to_bfloat16(one_process, monkeypatch, checkpointing):
    """FSDP's mixed precision casts the tensors that a layer receives. The rotary tables must not be
    among them: a bfloat16 cosine has 3 digits. Nor may angles be: near 1100, bfloat16 numbers are 8
    apart."""
    model = build(max_positions=2048, num_layers=2).requires_grad_(True).train()
    model.activation_checkpointing = checkpointing
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=one_process, mp_policy=policy)
    fully_shard(model, mesh=one_process, mp_policy=policy)
    received = []

    def recording_rotate(x, rotary):
        received.append((x.dtype, rotary))
        return rotate(x, rotary)

    monkeypatch.setattr(llama, "rotate", recording_rotate)
    model(ids_of(1, 1101)).float().square().mean().backward()
    assert len(received) == 2 * (1 + checkpointing), "two layers, recomputed or not"
    angles = 1100 * 10000 ** -(torch.arange(0, 8, 2).double() / 8)
    for dtype, rotary in received:
        assert dtype == torch.bfloat16, "FSDP should have cast the model"
        assert rotary.cos.dtype == rotary.sin.dtype == torch.float32
        expected = rope(torch.arange(1101), model.config)
        assert torch.equal(rotary.cos, expected.cos)
        assert torch.equal(rotary.sin, expected.sin)
        # A float32 angle of 1100 rad is exact to 6e-5; a bfloat16 cosine would be to 4e-3 only.
        torch.testing.assert_close(rotary.cos[1100, :4].double(), angles.cos(), atol=1e-4, rtol=0)
        torch.testing.assert_close(rotary.sin[1100, 4:].double(), angles.sin(), atol=1e-4, rtol=0)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.fixture
def one_process():
    """A process group of this process only, over gloo, as a device mesh."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------- the whole model


@EACH_GROUPING
@torch.no_grad()
def test_the_decoder_equals_a_loop_over_layers_heads_and_queries(num_kv_heads):
    """With 2 kv heads, query heads 0 and 1 share kv head 0, and 2 and 3 share kv head 1."""
    model, ids = build(num_kv_heads=num_kv_heads), ids_of(2, 7)
    logits = model(ids)
    for row in range(2):
        assert_close(logits[row], naive_forward(model, ids[row].tolist()))


def naive_forward(model: Llama, ids: list[int]) -> Tensor:
    """Logits (s, vocab) of one row, where each query of each head attends in turn."""
    config = model.config
    c, group = config.head_dim, config.num_heads // config.num_kv_heads
    frequencies = config.rope_theta ** -(torch.arange(0, c, 2) / c)
    x = model.embed_tokens.weight[ids]

    def rotated(vector: Tensor, position: int) -> Tensor:
        first, second = vector[: c // 2], vector[c // 2 :]
        cos, sin = (position * frequencies).cos(), (position * frequencies).sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    for layer in model.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        q = normed @ attention.q_proj.weight.T
        k = normed @ attention.k_proj.weight.T
        v = normed @ attention.v_proj.weight.T
        y = torch.zeros_like(x)
        for head in range(config.num_heads):
            own = slice(head * c, (head + 1) * c)
            shared = slice(head // group * c, (head // group + 1) * c)  # its kv head
            for i in range(len(ids)):
                query = rotated(q[i, own], i)
                scores = [query @ rotated(k[j, shared], j) / math.sqrt(c) for j in range(i + 1)]
                y[i, own] = torch.stack(scores).softmax(0) @ v[: i + 1, shared]
        x = x + y @ attention.o_proj.weight.T
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.norm(x) @ model.lm_head.weight.T


@torch.no_grad()
def test_embeddings_instead_of_ids_give_the_same_logits():
    model, ids = build(), ids_of(2, 6)
    assert torch.equal(model(ids), model(inputs_embeds=model.embed_tokens(ids)))


@torch.no_grad()
def test_tokens_on_the_right_do_not_change_the_logits_before_them():
    """So right padding needs no mask, whatever ids it consists of."""
    model, ids = build(), ids_of(1, 6)
    padded = torch.cat([ids, ids_of(1, 5, seed=9)], dim=1)
    torch.testing.assert_close(model(padded)[:, :6], model(ids))


@torch.no_grad()
def test_with_tied_embeddings_the_embedding_matrix_is_the_head():
    model = build(tie_word_embeddings=True)
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    ids = ids_of(1, 5)
    expected = model.hidden_states(ids) @ model.embed_tokens.weight.T
    torch.testing.assert_close(model(ids), expected)


# --------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(("after_prefix", "per_layer"), [(False, 22), (True, 33)])
def test_a_decoding_step_takes_few_operations_per_layer(after_prefix, per_layer):
    """Decoding one token on a GPU is limited by the number of kernels, not by arithmetic.

    Seven are matrix products with weights. If RMSNorm is written out, q and k are rotated apart and
    each layer makes its own mask, there are 44 in a layer and 56 after a prefix.
    """
    one = operations_of_a_decoding_step(1, after_prefix)
    three = operations_of_a_decoding_step(3, after_prefix)
    assert (three - one) / 2 <= per_layer
    assert one - per_layer <= 16, "outside of the layers"


@torch.no_grad()
def operations_of_a_decoding_step(num_layers: int, after_prefix: bool) -> int:
    model = build(num_layers=num_layers).bfloat16()
    prefix = None
    if after_prefix:
        prefix = KVCache(model.config, 1, 9, torch.bfloat16, "cpu")
        model(ids_of(1, 9), cache=prefix)
    cache = KVCache(model.config, 3, 6, torch.bfloat16, "cpu", prefix)
    model(ids_of(3, 5), cache=cache)
    next_ids = ids_of(3, 1)
    with CountOperations() as counted:
        model(next_ids, cache=cache)
    return len(counted.names)


class CountOperations(TorchFunctionMode):
    """Collect the names of the torch calls that compute something: views are free.

    One call is about one kernel on a GPU.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not is_view(result, args, function.__name__):
            self.names.append(function.__name__)
        return result


def is_view(result: Tensor, args: tuple, name: str) -> bool:
    """Whether a call returned the memory of its first tensor without writing to it."""
    writes = name.endswith("_") and not name.endswith("__")
    tensors = [x for x in args if isinstance(x, Tensor)]
    if writes or not tensors:
        return False
    return result.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()


# ----------------------------------------------------------------------------------- loss, training


@pytest.mark.parametrize("chunk", [1, 4, 7, 1024])
def test_the_chunked_loss_and_its_gradients_equal_those_of_cross_entropy(chunk):
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
    """A process whose rows have no answers still takes part in the backward pass."""
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
    """It runs each layer forward twice, so that what is inside need not be kept."""
    model, ids, calls = build().requires_grad_(True).train(), ids_of(1, 4), []
    model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing, passes in ((False, 1), (True, 2)):
        calls.clear()
        model.activation_checkpointing = checkpointing
        model(ids).sum().backward()
        assert len(calls) == passes


# ------------------------------------------------------------------------- parity with transformers


@EACH_GROUPING
@torch.no_grad()
def test_logits_equal_those_of_transformers(num_kv_heads):
    theirs = transformers_llama(num_kv_heads)
    ours = with_weights_of(theirs, replace(GROUPED, num_kv_heads=num_kv_heads))
    ids = ids_of(2, 40)
    assert_close(ours(ids), theirs(ids).logits)


@EACH_GROUPING
@torch.no_grad()
def test_logits_equal_those_of_transformers_in_float64(num_kv_heads, monkeypatch):
    """To twelve digits. Both compute the angles of RoPE in float32 and everything else in float64;
    for that, the norms of transformers, which are float32, are replaced."""

    def norm_in_float64(self, x):
        mean_square = x.square().mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(mean_square + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    theirs = transformers_llama(num_kv_heads).double()
    ours = with_weights_of(theirs, replace(GROUPED, num_kv_heads=num_kv_heads))
    logits, expected = ours(ids_of(2, 40)), theirs(ids_of(2, 40)).logits
    assert logits.dtype == torch.float64
    assert (logits - expected).abs().max() < 1e-12 * expected.abs().max()


@EACH_GROUPING
@torch.no_grad()
def test_logits_equal_those_of_transformers_in_bfloat16_to_rounding(num_kv_heads):
    """The two differ less from each other than transformers differs from its float32 self."""
    reference = transformers_llama(num_kv_heads)
    ids = ids_of(2, 40)
    exact = reference(ids).logits
    theirs = reference.bfloat16()
    ours = with_weights_of(theirs, replace(GROUPED, num_kv_heads=num_kv_heads))
    logits = ours(ids)
    assert logits.dtype == torch.bfloat16
    their_error = (theirs(ids).logits - exact).abs().mean()
    assert (logits - exact).abs().mean() < 1.1 * their_error
