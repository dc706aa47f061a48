"""Parity with transformers at the real width, heads, grid and number of frames, in float32.

test_encoders.py and test_llama.py compare tiny models. Here only the depth is small (two or three
blocks), to catch what shows at full size only: 3137 tokens in one softmax, sums over 1024 channels,
positions resized from the released 37x37. transformers writes the file of ViViT.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from encoders import ENCODERS, EncoderConfig, load_encoder
from llama import LLAMAS, KVCache, Llama

pytestmark = pytest.mark.slow


BLOCK = {
    "blocks.*.norm1": "layer_norm1",
    "blocks.*.attn.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "blocks.*.attn.proj": "self_attn.out_proj",
    "blocks.*.norm2": "layer_norm2",
    "blocks.*.mlp.fc1": "mlp.fc1",
    "blocks.*.mlp.fc2": "mlp.fc2",
}


@torch.no_grad()
def test_vivit_at_full_width_equals_transformers_on_32_frames(tmp_path):
    """3137 tokens attend to each other. transformers writes the file in the released format."""
    theirs = oracle(
        transformers.VivitForVideoClassification,
        transformers.VivitConfig(
            num_hidden_layers=2, hidden_act="gelu_fast", layer_norm_eps=1e-6, num_labels=400
        ),
    )
    theirs.save_pretrained(tmp_path)
    config = shallow("vivit", 2)
    frames = frames_for(config)
    encoder = load_encoder(config, tmp_path)
    assert encoder.position_embedding.shape == (1, 3137, 768)
    expected = theirs.vivit(frames).last_hidden_state[:, 1:].unflatten(1, (16, 14, 14))
    assert_equal_to_rounding(encoder(frames), expected)


@torch.no_grad()
def oracle(model_class: type, config: transformers.PreTrainedConfig) -> nn.Module:
    """A model of transformers with random weights with which every part matters.

    They follow conftest.unit_scale, but are drawn in float32 and not initialised before that,
    because there are 200 million of them.
    """
    with no_init_weights():
        model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if name.endswith("bias"):
            parameter.mul_(0.2)
        elif name.endswith("weight") and parameter.ndim == 1:  # of a norm
            parameter.mul_(0.2).add_(1)
        elif "embed_tokens" in name:  # LLaMA's are about that small: the norm's epsilon matters
            parameter.mul_(0.02)
        elif name.endswith("weight") and "position" not in name:
            parameter.div_(math.sqrt(parameter[0].numel()))
    return model


def shallow(name: str, released_layers: int, **changes) -> EncoderConfig:
    """The released encoder with fewer blocks; as many as in the release come after the features."""
    full = ENCODERS[name]
    taken = released_layers - (full.released_layers - full.num_layers)
    return replace(full, released_layers=released_layers, num_layers=taken, **changes)


def frames_for(config: EncoderConfig) -> Tensor:
    """(1, T, 3, 224, 224), of unit scale."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(
        1, config.num_frames, 3, config.image_size, config.image_size, generator=generator
    )


def assert_equal_to_rounding(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """The largest difference is below `tolerance` times the largest value, at unit scale."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    assert 0.2 < theirs.std() < 20
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


@torch.no_grad()
def test_siglip_at_full_width_equals_transformers_before_its_last_block(tmp_path):
    """196 tokens of 768 channels and no class token; the pooling head in the file is skipped."""
    theirs = oracle(
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig(
            num_hidden_layers=3, hidden_act="gelu", layer_norm_eps=1e-6
        ),
    )
    positions = theirs.embeddings.position_embedding.weight
    theirs.register_buffer("position", positions[None])
    write_as_timm(
        theirs,
        tmp_path / "model.safetensors",
        "encoder.layers",
        {
            "pos_embed": "position",
            "patch_embed.proj": "embeddings.patch_embedding",
            "norm": "post_layernorm",
            "attn_pool.norm": "head.layernorm",
            **BLOCK,
        },
    )
    config = shallow("siglip", 3, num_frames=4)
    frames = frames_for(config)
    encoder = load_encoder(config, tmp_path)
    assert encoder.position_embedding.shape == (1, 196, 768)
    expected = theirs(frames[0], output_hidden_states=True).hidden_states[-2]
    assert_equal_to_rounding(encoder(frames)[0], expected.unflatten(1, (14, 14)))


def write_as_timm(theirs: nn.Module, path: Path, blocks: str, names: dict[str, str]) -> None:
    """Write a transformers model under timm's names; `names` maps timm's to transformers'.

    blocks: the name of the list of blocks in transformers; names with "*" are within each block.
    """
    state, tensors = theirs.state_dict(), {}
    count = 1 + max(int(name[len(blocks) :].split(".")[1]) for name in state if blocks in name)
    for timm, name in names.items():
        for i in range(count) if "*" in timm else [0]:
            parts = [f"{blocks}.{i}.{part}" if "*" in timm else part for part in name.split()]
            for leaf in (".weight", ".bias", ""):
                if all(part + leaf in state for part in parts):
                    tensor = torch.cat([state[part + leaf] for part in parts])
                    tensors[timm.replace("*", str(i)) + leaf] = tensor.contiguous()
    save_file(tensors, path)


@torch.no_grad()
def test_dinov2_with_registers_at_full_width_equals_transformers_before_its_last_block(tmp_path):
    """1024 channels, 16 heads, 4 registers, and 37x37 positions in the file. transformers resizes
    them to 16x16 at each call, we once. The release has no position for the class token, so it is
    set to 0 in transformers."""
    theirs = oracle(
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig(
            hidden_size=1024, num_attention_heads=16, num_hidden_layers=3, image_size=518,
            patch_size=14, num_register_tokens=4, hidden_act="gelu", layer_norm_eps=1e-6,
        ),
    )  # fmt: skip
    theirs.embeddings.position_embeddings[:, 0] = 0
    theirs.register_buffer("position", theirs.embeddings.position_embeddings[:, 1:])
    assert theirs.position.shape == (1, 37 * 37, 1024)
    write_as_timm(
        theirs,
        tmp_path / "model.safetensors",
        "encoder.layer",
        {
            "cls_token": "embeddings.cls_token",
            "reg_token": "embeddings.register_tokens",
            "pos_embed": "position",
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "norm": "layernorm",
            "blocks.*.norm1": "norm1",
            "blocks.*.attn.qkv": "attention.q_proj attention.k_proj attention.v_proj",
            "blocks.*.attn.proj": "attention.o_proj",
            "blocks.*.ls1.gamma": "layer_scale1.lambda1",
            "blocks.*.norm2": "norm2",
            "blocks.*.mlp.fc1": "mlp.fc1",
            "blocks.*.mlp.fc2": "mlp.fc2",
            "blocks.*.ls2.gamma": "layer_scale2.lambda1",
        },
    )
    config = shallow("dinov2", 3, num_frames=4)
    frames = frames_for(config)
    encoder = load_encoder(config, tmp_path)
    assert encoder.position_embedding.shape == (1, 16 * 16, 1024)
    expected = theirs(frames[0], output_hidden_states=True).hidden_states[-2]
    assert_equal_to_rounding(encoder(frames)[0], expected[:, 5:].unflatten(1, (16, 16)))


@torch.no_grad()
def test_llama_at_the_width_of_7b_equals_transformers(llamas):
    ours, theirs = llamas
    ids = torch.randint(1000, (1, 100), generator=torch.Generator().manual_seed(1))
    assert_equal_to_rounding(ours(ids), theirs(ids).logits)


@torch.no_grad()
def test_llama_at_the_width_of_7b_equals_transformers_far_into_a_video(llamas):
    """Token by token after 1100 others, about as many as a video and a question have.

    There RoPE's angles have grown to 1100 rad, of which float32 is exact to 6e-5 rad. That is why
    the tolerance is larger.
    """
    ours, theirs = llamas
    ids = torch.randint(1000, (1, 1103), generator=torch.Generator().manual_seed(2))
    cache = KVCache(ours.config, 1, 1103, torch.float32, "cpu")
    embeddings = ours.embed_tokens(ids)
    expected = theirs(inputs_embeds=embeddings).logits
    hidden = ours.hidden_states(inputs_embeds=embeddings[:, :1100], cache=cache)
    pieces = [ours.logits(hidden)]
    pieces += [ours(ids[:, p : p + 1], cache=cache) for p in range(1100, 1103)]
    assert_equal_to_rounding(torch.cat(pieces, dim=1), expected, 3e-5)


@pytest.fixture(scope="module")
def llamas() -> tuple[Llama, transformers.LlamaForCausalLM]:
    """Ours and theirs: one layer of LLaMA-2 7B with 32 heads, sharing one copy of the weights."""
    config = replace(LLAMAS["llama2-7b"], vocab_size=1000, num_layers=1)
    theirs = oracle(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            vocab_size=1000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1,
            num_attention_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
        ),
    )  # fmt: skip
    with torch.device("meta"):
        ours = Llama(config)
    state = {name.removeprefix("model."): x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=True, assign=True)
    return ours.eval(), theirs
