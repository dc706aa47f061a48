"""A tiny random LLaMA for test_llama.py, test_generation.py and test_llama_weights.py.

Its weights have unit scale (conftest.unit_scale), so logits have unit scale too and an absolute
tolerance of 1e-4 means four digits.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import unit_scale
from torch import Tensor

from llama import KVCache, Llama, LlamaConfig, load_llama

VOCAB = 97
GROUPED = LlamaConfig(
    "tiny", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4,
    num_kv_heads=2, max_positions=64,
)  # fmt: skip
# One kv head per query head; two query heads per kv head; one kv head for all.
EACH_GROUPING = pytest.mark.parametrize("num_kv_heads", [4, 2, 1])


def build(config: LlamaConfig = GROUPED, **changes) -> Llama:
    """The tiny model, with some fields of its configuration changed."""
    return unit_scale(load_llama(replace(config, **changes))).eval()


def ids_of(b: int, s: int, seed: int = 0) -> Tensor:
    """Random token ids (b, s) without the special ids 0, 1 and 2."""
    return torch.randint(3, VOCAB, (b, s), generator=torch.Generator().manual_seed(seed))


def new_cache(model: Llama, b: int, length: int, prefix: KVCache | None = None) -> KVCache:
    """An empty float32 cache."""
    return KVCache(model.config, b, length, torch.float32, "cpu", prefix)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Equal within an absolute tolerance; both must have unit scale."""
    assert ours.shape == theirs.shape
    assert 0.2 < theirs.std() < 20, "the tolerance is meant for tensors of unit scale"
    assert (ours - theirs).abs().max() < tolerance


def transformers_llama(num_kv_heads=2, seed=0, **changes) -> transformers.LlamaForCausalLM:
    """The reference: the same architecture in transformers, with random weights of unit scale."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=num_kv_heads, max_position_embeddings=64,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes,
    )  # fmt: skip
    return unit_scale(transformers.LlamaForCausalLM(config), seed).eval()


def with_weights_of(theirs: transformers.LlamaForCausalLM, config: LlamaConfig) -> Llama:
    """Our model with the weights of theirs. Names differ only by a leading "model."."""
    ours = load_llama(config).to(theirs.dtype).eval()
    state = {name.removeprefix("model."): x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=True)
    return ours
