"""LoRA: adapters change nothing at first, learn alone, and merge into an ordinary model."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_llama import GROUPED, assert_close, build, ids_of

from llama import Llama, load_llama
from support import lora
from support.errors import UserError

RANK, ALPHA = 4, 8.0
MATRICES = 7 * GROUPED.num_layers  # q, k, v, o, gate, up, down


def test_new_adapters_change_nothing():
    """B is zero, so the model computes what it did, to the last bit."""
    base, model = adapted()
    ids = ids_of(2, 9)
    assert torch.equal(model(ids), base(ids))


def adapted(seed: int = 0) -> tuple[Llama, Llama]:
    """A tiny LLaMA, and a copy of it with adapters."""
    base = build()
    model = copy.deepcopy(base)
    lora.add_adapters(model, RANK, ALPHA, seed)
    return base, model


def test_every_matrix_of_every_layer_has_an_adapter_and_nothing_else_has():
    """Embeddings, head and norms stay as they are. A differs from matrix to matrix."""
    _, model = adapted()
    firsts = [p for name, p in model.named_parameters() if name.endswith("lora_a")]
    assert len(firsts) == MATRICES
    assert len({tuple(p[0, :4].tolist()) for p in firsts}) == MATRICES
    assert not any("lora" in name for name, _ in model.embed_tokens.named_parameters())
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_an_adapter_adds_alpha_over_rank_times_b_a_x():
    """The equation of the paper (arXiv:2106.09685, section 4.1), element by element."""
    _, model = adapted()
    fill(model)
    module = model.layers[1].self_attn.k_proj
    x = torch.randn(3, GROUPED.hidden_size, generator=torch.Generator().manual_seed(2))
    for row in range(3):
        wanted = module.weight @ x[row]
        wanted = wanted + ALPHA / RANK * (module.lora_b @ (module.lora_a @ x[row]))
        torch.testing.assert_close(module(x)[row], wanted)


def fill(model: Llama) -> None:
    """Give B random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)


def test_a_merged_model_computes_what_the_adapted_one_does():
    """To rounding, and its state_dict is that of a plain LLaMA."""
    base, model = adapted()
    fill(model)
    plain = load_llama(GROUPED).eval()
    plain.load_state_dict(lora.merge(model.state_dict(), ALPHA / RANK), strict=True)
    ids = ids_of(2, 9)
    assert_close(plain(ids), model(ids), 1e-4)
    assert (plain(ids) - base(ids)).abs().max() > 0.1  # the adapters do matter


def test_merging_a_bfloat16_base_does_not_round_the_adapters_away():
    """A change of a thousandth is below bfloat16's resolution of W, so the sum is float32."""
    _, model = adapted()
    fill(model)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor if lora.is_adapter(name) else tensor.bfloat16()
    name = "layers.0.mlp.up_proj"
    for adapter in ("lora_a", "lora_b"):
        state[f"{name}.{adapter}"] = state[f"{name}.{adapter}"] * 0.01
    merged = lora.merge(state, 1.0)[f"{name}.weight"]
    change = merged - state[f"{name}.weight"].float()
    wanted = state[f"{name}.lora_b"] @ state[f"{name}.lora_a"]
    assert merged.dtype == torch.float32
    torch.testing.assert_close(change, wanted, rtol=1e-3, atol=1e-6)


def test_only_adapters_get_a_gradient():
    """The first gradient of A is zero, because B is; that of B is not."""
    _, model = adapted()
    model(ids_of(2, 9)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == lora.is_adapter(name), name
        if name.endswith("lora_b"):
            assert parameter.grad.abs().max() > 0, name
        elif name.endswith("lora_a"):
            assert parameter.grad.abs().max() == 0, name


def test_adapters_overfit_one_batch_while_the_base_stays():
    """From 5 nats a token to less than 0.5. It cannot reach 0: the head and the final norm, both
    random and frozen, bound the logits."""
    base, model = adapted()
    ids = ids_of(2, 12)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(150):
        logits = model(ids)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 0.5
    frozen = base.state_dict()
    for name, tensor in model.state_dict().items():
        assert lora.is_adapter(name) or torch.equal(tensor, frozen[name]), name


@pytest.mark.parametrize("rank", [0, -1, GROUPED.hidden_size + 1])
def test_an_impossible_rank_is_explained(rank):
    """A correction cannot have a rank above the width of the matrix."""
    with pytest.raises(UserError, match=f"--lora {rank} is not possible"):
        lora.add_adapters(build(), rank, ALPHA)


def test_peft_computes_the_same_from_the_same_adapters():
    """Hugging Face's implementation with our A and B in it: output, gradients, merged weights."""
    peft = pytest.importorskip("peft", reason="peft is one of requirements-dev.txt")
    base, model = adapted()
    fill(model)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)
    theirs = peft.inject_adapter_in_model(settings, copy.deepcopy(base))
    ours = dict(model.named_parameters())
    pairs = {}  # our name of an adapter -> their parameter
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            module, _, rest = name.partition(".lora_")
            pairs[f"{module}.lora_{rest[0].lower()}"] = parameter
            with torch.no_grad():
                parameter.copy_(ours[f"{module}.lora_{rest[0].lower()}"])
    assert len(pairs) == 2 * MATRICES
    ids = ids_of(2, 9)
    assert_close(theirs(ids), model(ids), 1e-4)

    theirs(ids).square().mean().backward()
    model(ids).square().mean().backward()
    for name, parameter in pairs.items():
        torch.testing.assert_close(parameter.grad, ours[name].grad, rtol=1e-3, atol=1e-5)

    merged = lora.merge(model.state_dict(), ALPHA / RANK)
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
            torch.testing.assert_close(module.base_layer.weight, merged[f"{name}.weight"])
