"""The four specialists, said a second time in the plainest way: loops over what tensors do at once.

The naive encoders below are written from the architecture's description, one token, head and frame
at a time, in float64. Then: parity with transformers; how released weights are read and refused.
"""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import huggingface_hub.errors as hub_errors
import pytest
import torch
import transformers
from conftest import unit_scale
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import encoders
from encoders import ENCODERS, FAMILIES, Encoder, EncoderConfig, load_encoder, save_encoder
from support import weights
from support.errors import CheckpointError, UserError
from support.released import NAMES, PREFIXES, resize_positions
from support.weights import FILES, find_file, read_tensors, released_names, save_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

FULL_SIZE = ["languagebind", "dinov2", "vivit", "siglip"]


def tiny(name: str, **changes) -> EncoderConfig:
    """The encoder `name` with 32 channels, 3x3 patches and 3 released blocks, else as it is."""
    full = ENCODERS[name]
    shape = {
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "image_size": 12,
        "released_layers": 3,
        "num_layers": 3 - (full.released_layers - full.num_layers),
    }
    return replace(full, **(shape | changes))


def build(config: EncoderConfig, dtype: torch.dtype = torch.float64) -> Encoder:
    return unit_scale(load_encoder(config, dtype=dtype))


def clip(config: EncoderConfig, b: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random frames (b, T, 3, H, W)."""
    shape = (b, config.num_frames, 3, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """The largest difference is small against the largest feature; features are of unit scale."""
    assert ours.shape == theirs.shape
    assert 0.2 < theirs.std() < 20, "of unit scale, or the tolerance means little"
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max().clamp(max=10)


# ------------------------------------------------------------------------------- shapes and presets


@pytest.mark.parametrize(
    ("name", "blocks", "features"),
    [
        ("languagebind", 23, (16, 16, 16, 1024)),
        ("dinov2", 23, (16, 16, 16, 1024)),
        ("vivit", 12, (16, 14, 14, 768)),
        ("siglip", 11, (16, 14, 14, 768)),
        ("miniature-languagebind", 3, (4, 4, 4, 96)),
        ("miniature-dinov2", 3, (4, 4, 4, 96)),
        ("miniature-vivit", 4, (4, 4, 4, 96)),
        ("miniature-siglip", 3, (4, 4, 4, 96)),
    ],
)
def test_each_preset_gives_the_grid_of_the_specification(name, blocks, features):
    """(b, T, 3, H, W) -> (b, t, h, w, d_e); no block after the one whose output is taken exists."""
    config = ENCODERS[name]
    with torch.device("meta"):
        encoder = FAMILIES[config.family](config)
        frames = torch.empty(2, config.num_frames, 3, config.image_size, config.image_size)
    assert len(encoder.blocks) == blocks
    assert encoder(frames).shape == (2, *features)
    assert config.grid == features[:3]


def test_no_preset_is_left_out_of_the_shape_test():
    assert set(ENCODERS) == {*FULL_SIZE, *(f"miniature-{name}" for name in FULL_SIZE)}
    assert all(name == config.name for name, config in ENCODERS.items())


@pytest.mark.parametrize(
    ("name", "resize", "interpolation", "mean", "std", "frames"),
    [
        ("dinov2", "squash", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 16),
        ("siglip", "squash", "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 16),
        ("vivit", "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32),
        (
            "languagebind",
            "short_side",
            "bilinear",
            (0.48145466, 0.4578275, 0.40821073),
            (0.26862954, 0.26130258, 0.27577711),
            16,
        ),
    ],
)
def test_each_encoder_says_which_pixels_it_wants(name, resize, interpolation, mean, std, frames):
    """The pixel table of the paper's released code; data.preprocess only follows these fields."""
    config = ENCODERS[name]
    assert (config.resize, config.interpolation, config.num_frames) == (
        resize,
        interpolation,
        frames,
    )
    assert (config.pixel_mean, config.pixel_std) == (mean, std)
    assert config.image_size == 224


@pytest.mark.parametrize("name", FULL_SIZE)
def test_an_encoder_is_frozen_and_in_eval_mode(name):
    encoder = load_encoder(tiny(name))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())


@pytest.mark.parametrize("name", FULL_SIZE)
def test_random_weights_are_the_same_each_time_and_leave_the_global_seed_alone(name):
    state = torch.get_rng_state()
    one, two = (load_encoder(tiny(name)).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert one["blocks.0.mlp.up_proj.weight"].std() > 0


# --------------------------------------------------------------------------- naive loop = fast path


def layer_norm(x: Tensor, norm: nn.LayerNorm, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias
    )


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def naive_attention(x: Tensor, attention: nn.Module, heads: int) -> Tensor:
    """softmax(q k' / sqrt(c)) v for one sequence (n, d), one head and one query at a time."""
    n, d = x.shape
    c = d // heads
    q, k, v = (x @ attention.qkv_proj.weight.T + attention.qkv_proj.bias).chunk(3, dim=-1)
    y = torch.zeros_like(x)
    for head in range(heads):
        columns = slice(head * c, (head + 1) * c)
        for i in range(n):
            scores = (k[:, columns] @ q[i, columns] / math.sqrt(c)).exp()
            y[i, columns] = (scores / scores.sum()) @ v[:, columns]
    return y @ attention.out_proj.weight.T + attention.out_proj.bias


def naive_block(x: Tensor, block: nn.Module, heads: int, eps: float, activation) -> Tensor:
    """x + g1 attention(norm x), then x + g2 mlp(norm x); g = 1 without LayerScale."""
    gamma_1 = block.attention_scale
    gamma_2 = block.mlp_scale
    x = x + gamma_1 * naive_attention(
        layer_norm(x, block.attention_norm, eps), block.attention, heads
    )
    up, down = block.mlp.up_proj, block.mlp.down_proj
    inner = activation(layer_norm(x, block.mlp_norm, eps) @ up.weight.T + up.bias)
    return x + gamma_2 * (inner @ down.weight.T + down.bias)


def naive_patches(frame: Tensor, weight: Tensor, bias: Tensor | float, p: int) -> Tensor:
    """(3, H, W) -> (h*w, d): each p x p square, row after row, meets every filter."""
    squares = [
        frame[:, y : y + p, x : x + p]
        for y, x in product(range(0, frame.shape[1], p), range(0, frame.shape[2], p))
    ]
    return torch.stack([(weight * square).sum((1, 2, 3)) + bias for square in squares])


@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_vit_is_what_a_loop_over_frames_patches_heads_and_queries_computes(name):
    """Positions go to patches only: the class token and DINOv2's registers enter as they are, and
    leave before the features. DINOv2 scales both branches; SigLIP has no class token at all."""
    config = tiny(name, num_frames=2)
    encoder, frames = build(config), clip(config)
    extra = []
    if name == "dinov2":
        extra = [encoder.class_token[0], encoder.register_tokens[0]]
        assert encoder.register_tokens.shape[1] == 4
    assert encoder.position_embedding.shape == (1, 9, 32)
    for row, t in product(range(2), range(2)):
        patch = encoder.patch_embedding
        x = naive_patches(frames[row, t], patch.weight, patch.bias, 4)
        x = torch.cat([*extra, x + encoder.position_embedding[0]])
        for block in encoder.blocks:
            x = naive_block(x, block, heads=4, eps=1e-6, activation=gelu)
        assert_close(encoder(frames)[row, t].flatten(0, 1), x[-9:], 1e-12)


@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_vit_sees_each_frame_alone(name):
    """Frames in another order give the same features in that order: a still can be encoded once."""
    config = tiny(name, num_frames=4)
    encoder, frames = build(config), clip(config)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(encoder(frames[:, order]), encoder(frames)[:, order])


def test_languagebind_attends_over_time_in_windows_at_each_position():
    """Each block: temporal embedding, temporal attention at one position, then a block of CLIP."""
    config = tiny("languagebind", image_size=8)  # 2x2 patches and the class token
    encoder, frames = build(config), clip(config)
    fast = encoder(frames)
    x = torch.zeros(2, 16, 5, 32, dtype=torch.float64)
    for row, t in product(range(2), range(16)):
        patches = naive_patches(frames[row, t], encoder.patch_embedding.weight, 0.0, 4)
        tokens = torch.cat([encoder.class_token[None], patches]) + encoder.position_embedding
        x[row, t] = layer_norm(tokens, encoder.embedding_norm, 1e-5)
    for block in encoder.blocks:
        for row, start, position in product(range(2), (0, 8), range(5)):
            sequence = x[row, start : start + 8, position] + block.temporal_embedding[0]
            normed = layer_norm(sequence, block.temporal_norm, 1e-5)
            sequence = sequence + naive_attention(normed, block.temporal_attention, heads=4)
            x[row, start : start + 8, position] = sequence
        for row, t in product(range(2), range(16)):
            x[row, t] = naive_block(x[row, t], block, heads=4, eps=1e-5, activation=gelu)
    assert_close(fast, x[:, :, 1:].unflatten(2, (2, 2)), 1e-12)


def test_languagebind_reads_16_frames_as_two_clips_that_never_meet():
    """Another frame 8 changes every frame of its own window and, to the last bit, none before."""
    config = tiny("languagebind")
    encoder, frames = build(config), clip(config)
    changed = frames.clone()
    changed[:, 8] += 1
    before, after = encoder(frames), encoder(changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert ((before - after)[:, 8:].abs().amax((2, 3, 4)) > 1e-3).all()


def test_languagebinds_temporal_embedding_starts_again_at_frame_8():
    """The same 8 frames twice give the same features twice."""
    config = tiny("languagebind")
    encoder, frames = build(config), clip(config)
    features = encoder(torch.cat([frames[:, :8], frames[:, :8]], dim=1))
    torch.testing.assert_close(features[:, :8], features[:, 8:])
    assert (features[:, 0] - features[:, 1]).abs().max() > 1e-3


def test_vivits_tokens_are_tubelets_of_two_frames():
    """The Conv3d is a loop over tubelets: time first, then rows, then columns."""
    config = tiny("vivit")
    encoder, frames = build(config), clip(config, b=1)
    fast = encoder.patch_embedding(frames.transpose(1, 2))[0]
    filters, bias = encoder.patch_embedding.weight, encoder.patch_embedding.bias  # (d, 3, 2, 4, 4)
    for t, h, w in product(range(16), range(3), range(3)):
        tubelet = frames[0, 2 * t : 2 * t + 2, :, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4]
        slow = (filters * tubelet.transpose(0, 1)).sum((1, 2, 3, 4)) + bias
        torch.testing.assert_close(fast[:, t, h, w], slow)


def test_vivit_is_one_sequence_over_space_and_time():
    """The class token and all 16*9 tubelets: positions, blocks with tanh-GELU, the last norm."""
    config = tiny("vivit")
    encoder, frames = build(config), clip(config, b=1)
    tubelets = encoder.patch_embedding(frames.transpose(1, 2))[0].flatten(1).T
    x = torch.cat([encoder.class_token[0], tubelets]) + encoder.position_embedding[0]
    for block in encoder.blocks:
        x = naive_block(x, block, heads=4, eps=1e-6, activation=gelu_tanh)
    x = layer_norm(x, encoder.final_norm, 1e-6)
    assert_close(encoder(frames)[0].flatten(0, 2), x[1:], 1e-12)


def test_quick_gelu_is_a_sigmoid():
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    quick = x / (1 + (-1.702 * x).exp())
    torch.testing.assert_close(encoders.ACTIVATIONS["quick_gelu"](x), quick)
    assert (quick - gelu(x)).abs().max() > 0.01, "it is another function than GELU"


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_clip_has_the_same_features_alone_and_in_a_batch(name):
    config = tiny(name)
    encoder, frames = build(config), clip(config, b=3)
    alone = torch.cat([encoder(row[None]) for row in frames])
    torch.testing.assert_close(encoder(frames), alone)


@pytest.mark.parametrize(
    ("name", "frames", "wants"),
    [("languagebind", 12, "multiple of 8"), ("vivit", 30, "32"), ("vivit", 64, "32")],
)
def test_a_wrong_number_of_frames_is_refused_with_a_reason(name, frames, wants):
    """LanguageBind takes 8, 16, 24 ... frames; ViViT exactly 32, for its positions are learned."""
    encoder = load_encoder(tiny(name))
    with pytest.raises(UserError) as error:
        encoder(torch.zeros(1, frames, 3, 12, 12))
    assert f"{name} got {frames} frames" in str(error.value)
    assert wants in str(error.value)
    assert "\nWhy: " in str(error.value)
    assert "\nFix: " in str(error.value)


@pytest.mark.parametrize("shape", [(16, 3, 12, 12), (1, 16, 1, 12, 12), (1, 16, 3, 8, 12)])
@pytest.mark.parametrize("name", FULL_SIZE)
def test_frames_of_a_wrong_shape_are_refused(name, shape):
    with pytest.raises(UserError, match=r"wants \(b, T, 3, 12, 12\)"):
        load_encoder(tiny(name))(torch.zeros(shape))


# ------------------------------------------------------------------------- parity with transformers


def take_weights(encoder: Encoder, theirs: dict[str, Tensor], table: dict) -> None:
    """Fill ours from theirs: `table` says ours -> theirs, "*" is the block, a tuple is stacked."""
    state = {}
    for name in encoder.state_dict():
        words = name.split(".")
        index = words[1] if words[0] == "blocks" else ""
        if index:
            words[1] = "*"
        leaf = "" if ".".join(words) in table else "." + words.pop()
        found = table[".".join(words)]
        found = (found,) if isinstance(found, str) else found
        state[name] = torch.cat([theirs[part.replace("*", index) + leaf] for part in found])
    encoder.load_state_dict(state, strict=True)


def block_table(prefix: str, norms: tuple[str, str], attention: str, out: str) -> dict:
    return {
        "blocks.*.attention_norm": f"{prefix}.*.{norms[0]}",
        "blocks.*.attention.qkv_proj": tuple(f"{prefix}.*.{attention}.{x}_proj" for x in "qkv"),
        "blocks.*.attention.out_proj": f"{prefix}.*.{attention}.{out}",
        "blocks.*.mlp_norm": f"{prefix}.*.{norms[1]}",
        "blocks.*.mlp.up_proj": f"{prefix}.*.mlp.fc1",
        "blocks.*.mlp.down_proj": f"{prefix}.*.mlp.fc2",
    }


SHAPE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "image_size": 12,
    "intermediate_size": 128,
}
PARITY = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)]
)


@PARITY
@torch.no_grad()
def test_vivit_equals_transformers(dtype, tolerance):
    theirs = transformers.VivitModel(
        transformers.VivitConfig(
            **SHAPE,
            num_frames=32,
            tubelet_size=[2, 4, 4],
            hidden_act="gelu_fast",
            layer_norm_eps=1e-6,
        ),
        add_pooling_layer=False,
    ).eval()
    unit_scale(theirs.to(dtype))
    config = tiny("vivit")
    encoder, frames = load_encoder(config, dtype=dtype), clip(config, dtype=dtype)
    table = {
        "class_token": "embeddings.cls_token",
        "position_embedding": "embeddings.position_embeddings",
        "patch_embedding": "embeddings.patch_embeddings.projection",
        "final_norm": "layernorm",
        **block_table("layers", ("layernorm_before", "layernorm_after"), "attention", "o_proj"),
    }
    take_weights(encoder, theirs.state_dict(), table)
    expected = theirs(frames).last_hidden_state[:, 1:].unflatten(1, (16, 3, 3))
    assert_close(encoder(frames), expected, tolerance)


@PARITY
@torch.no_grad()
def test_siglip_equals_transformers_before_its_last_block(dtype, tolerance):
    theirs = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            **SHAPE, patch_size=4, hidden_act="gelu", layer_norm_eps=1e-6
        )
    ).eval()
    unit_scale(theirs.to(dtype))
    config = tiny("siglip", num_frames=3)
    encoder, frames = load_encoder(config, dtype=dtype), clip(config, dtype=dtype)
    state = theirs.state_dict()
    state["position"] = state["embeddings.position_embedding.weight"][None]
    table = {
        "position_embedding": "position",
        "patch_embedding": "embeddings.patch_embedding",
        **block_table("encoder.layers", ("layer_norm1", "layer_norm2"), "self_attn", "out_proj"),
    }
    take_weights(encoder, state, table)
    expected = theirs(frames.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
    assert_close(encoder(frames), expected.view(2, 3, 3, 3, 32), tolerance)


@PARITY
@torch.no_grad()
def test_dinov2_with_registers_equals_transformers_before_its_last_block(dtype, tolerance):
    """transformers adds a position to the class token; the release has none, so it is 0."""
    theirs = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=32,
            num_attention_heads=4,
            num_hidden_layers=3,
            image_size=12,
            patch_size=4,
            num_register_tokens=4,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
    ).eval()
    unit_scale(theirs.to(dtype))
    theirs.embeddings.position_embeddings[:, 0] = 0
    config = tiny("dinov2", num_frames=3)
    encoder, frames = load_encoder(config, dtype=dtype), clip(config, dtype=dtype)
    state = theirs.state_dict()
    state["position"] = state["embeddings.position_embeddings"][:, 1:]
    table = {
        "class_token": "embeddings.cls_token",
        "register_tokens": "embeddings.register_tokens",
        "position_embedding": "position",
        "patch_embedding": "embeddings.patch_embeddings.projection",
        "blocks.*.attention_scale": "encoder.layer.*.layer_scale1.lambda1",
        "blocks.*.mlp_scale": "encoder.layer.*.layer_scale2.lambda1",
        **block_table("encoder.layer", ("norm1", "norm2"), "attention", "o_proj"),
    }
    take_weights(encoder, state, table)
    expected = theirs(frames.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
    assert_close(encoder(frames), expected[:, 5:].view(2, 3, 3, 3, 32), tolerance)


@PARITY
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_languagebind_without_time_is_clip(activation, dtype, tolerance):
    """Temporal embedding and attention at zero leave CLIP's image encoder, frame by frame."""
    theirs = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            **SHAPE, patch_size=4, hidden_act=activation, layer_norm_eps=1e-5
        )
    ).eval()
    unit_scale(theirs.to(dtype))
    config = tiny("languagebind", activation=activation)
    encoder, frames = load_encoder(config, dtype=dtype), clip(config, b=1, dtype=dtype)
    state = theirs.state_dict()
    for index in range(3):
        state[f"time.{index}.embedding"] = torch.zeros(1, 8, 32, dtype=dtype)
        state[f"time.{index}.norm.weight"] = torch.ones(32, dtype=dtype)
        state[f"time.{index}.norm.bias"] = torch.zeros(32, dtype=dtype)
        for part, rows in (("qkv", 96), ("out", 32)):
            state[f"time.{index}.{part}.weight"] = torch.zeros(rows, 32, dtype=dtype)
            state[f"time.{index}.{part}.bias"] = torch.zeros(rows, dtype=dtype)
    table = {
        "class_token": "embeddings.class_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "patch_embedding": "embeddings.patch_embedding",
        "embedding_norm": "pre_layrnorm",
        "blocks.*.temporal_embedding": "time.*.embedding",
        "blocks.*.temporal_norm": "time.*.norm",
        "blocks.*.temporal_attention.qkv_proj": "time.*.qkv",
        "blocks.*.temporal_attention.out_proj": "time.*.out",
        **block_table("encoder.layers", ("layer_norm1", "layer_norm2"), "self_attn", "out_proj"),
    }
    take_weights(encoder, state, table)
    expected = theirs(frames[0], output_hidden_states=True).hidden_states[-2]
    assert_close(encoder(frames)[0].flatten(1, 2), expected[:, 1:], tolerance)


# --------------------------------------------------------------------------------- released weights

# What a released file holds besides the encoder, by example.
BESIDE = {
    "languagebind": [
        "vision_model.post_layernorm.weight",
        "text_model.embeddings.token_embedding.weight",
        "visual_projection.weight",
        "logit_scale",
    ],
    "dinov2": ["norm.weight", "norm.bias"],
    "vivit": ["vivit.pooler.dense.weight", "classifier.weight"],
    "siglip": ["norm.weight", "attn_pool.latent", "attn_pool.mlp.fc1.weight"],
}
# One tensor of the first block, as it is called in the file.
SOME_TENSOR = {
    "languagebind": "vision_model.encoder.layers.0.temporal_attn.k_proj.weight",
    "dinov2": "blocks.0.ls1.gamma",
    "vivit": "vivit.encoder.layer.0.attention.attention.key.weight",
    "siglip": "blocks.0.attn.qkv.bias",
}


def released(name: str, folder, **changes) -> tuple[Encoder, dict[str, Tensor]]:
    """An encoder with all released blocks, and the tensors of a file as its authors write it."""
    encoder = build(tiny(name, num_layers=3, **changes), torch.float32)
    save_encoder(encoder, folder / "all_blocks.safetensors")
    tensors = load_file(folder / "all_blocks.safetensors")
    return encoder, tensors | {beside: torch.ones(2) for beside in BESIDE[name]}


def complaint(name: str, tensors: dict[str, Tensor], folder) -> str:
    """The one error that loading these tensors gives."""
    save_file(tensors, folder / "bad.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_encoder(tiny(name), folder / "bad.safetensors")
    return str(error.value)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_saved_and_loaded_again_is_the_same_to_the_bit(name, tmp_path):
    config = tiny(name)
    encoder, frames = build(config, torch.float32), clip(config, dtype=torch.float32)
    save_encoder(encoder, tmp_path / "deeper" / "encoder.safetensors")
    again = load_encoder(config, tmp_path / "deeper" / "encoder.safetensors")
    mine, loaded = encoder.state_dict(), again.state_dict()
    assert list(mine) == list(loaded)
    assert all(torch.equal(mine[key], loaded[key]) for key in mine)
    assert torch.equal(encoder(frames), again(frames))
    assert again.config == config
    assert not any(p.requires_grad for p in again.parameters())
    assert not again.training


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_released_file_loads_without_the_parts_that_are_not_used(name, tmp_path):
    """Its last block (but ViViT's), final norm, pooling heads and text tower are known and unread;
    the features are those of the complete encoder, taken at the block the specification says."""
    everything, tensors = released(name, tmp_path)
    save_file(tensors, tmp_path / FILES[0])
    encoder = load_encoder(tiny(name), tmp_path)
    assert len(encoder.blocks) == (3 if name == "vivit" else 2)
    frames = clip(encoder.config, dtype=torch.float32)
    everything.blocks = everything.blocks[: len(encoder.blocks)]
    assert torch.equal(encoder(frames), everything(frames))


@pytest.mark.parametrize("name", ["languagebind", "vivit"])
def test_a_pytorch_bin_in_a_folder_loads_too(name, tmp_path):
    _, tensors = released(name, tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    encoder = load_encoder(tiny(name), tmp_path)
    keys = released_names("blocks.1.mlp.up_proj.weight", NAMES[encoder.config.family])
    prefix = PREFIXES[encoder.config.family][0]
    assert torch.equal(encoder.blocks[1].mlp.up_proj.weight, tensors[prefix + keys[0]])


def test_a_loaded_encoder_has_the_dtype_asked_for(tmp_path):
    encoder = build(tiny("dinov2"), torch.float32)
    save_encoder(encoder, tmp_path / "model.safetensors")
    again = load_encoder(tiny("dinov2"), tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(again.class_token, encoder.class_token.bfloat16())


def test_open_clips_siglip_loads_from_behind_its_prefix(tmp_path):
    """The older release has the same names behind `visual.trunk.`, beside a text tower."""
    everything, tensors = released("siglip", tmp_path)
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {"text.transformer.x": torch.ones(2), "logit_scale": torch.ones(())}
    tensors["logit_bias"] = torch.ones(1)
    torch.save(tensors, tmp_path / "open_clip_pytorch_model.bin")
    encoder = load_encoder(tiny("siglip"), tmp_path)
    everything.blocks = everything.blocks[:2]
    frames = clip(encoder.config, dtype=torch.float32)
    assert torch.equal(encoder(frames), everything(frames))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_missing_tensor_is_named(name, tmp_path):
    _, tensors = released(name, tmp_path)
    missing = SOME_TENSOR[name]
    del tensors[missing]
    message = complaint(name, tensors, tmp_path)
    bare = missing.removeprefix("vision_model.").removeprefix("vivit.")
    assert f"missing     {bare}" in message
    assert "unexpected" not in message
    assert "mis-shaped" not in message


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize("stray", ["blocks.3.norm1.weight", "decoder.weight"])
def test_an_unexpected_tensor_is_named(name, stray, tmp_path):
    """Also a block after the last released one: that file is of a larger model."""
    _, tensors = released(name, tmp_path)
    message = complaint(name, tensors | {stray: torch.ones(2)}, tmp_path)
    assert f"unexpected  {stray}" in message
    assert message.count("unexpected  ") == 1


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_mis_shaped_tensor_is_named_with_both_shapes(name, tmp_path):
    _, tensors = released(name, tmp_path)
    wrong = SOME_TENSOR[name]
    tensors[wrong] = torch.ones(7, *tensors[wrong].shape[1:])
    message = complaint(name, tensors, tmp_path)
    assert "mis-shaped" in message
    assert wrong.removeprefix("vision_model.").removeprefix("vivit.") in message
    assert "wanted [" in message


@pytest.mark.parametrize(
    "shapes",
    [{"key": (32, 31)}, {"key": (16, 32), "value": (48, 32)}, {"query": ()}],
    ids=["columns", "rows that add up", "a scalar"],
)
def test_each_of_query_key_and_value_must_have_its_own_shape(shapes, tmp_path):
    """They become one matrix of ours; a wrong split of its rows must not pass for a right one."""
    _, tensors = released("vivit", tmp_path)
    for part, shape in shapes.items():
        tensors[f"vivit.encoder.layer.0.attention.attention.{part}.weight"] = torch.ones(shape)
    message = complaint("vivit", tensors, tmp_path)
    assert "mis-shaped" in message
    assert all(f"attention.attention.{part}.weight" in message for part in shapes)


def test_positions_that_are_no_square_grid_are_a_mis_shaped_tensor(tmp_path):
    """Such as those of a DINOv2 without registers, with one more for its class token."""
    _, tensors = released("dinov2", tmp_path)
    tensors["pos_embed"] = torch.ones(1, 7 * 7 + 1, 32)
    message = complaint("dinov2", tensors, tmp_path)
    assert "mis-shaped" in message
    assert "pos_embed" in message


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("dinov2", "pos_embed"), ("languagebind", "vision_model.encoder.layers.0.temporal_embedding")],
)
def test_positions_without_their_dimensions_are_a_mis_shaped_tensor(name, tensor, tmp_path):
    """What is read off a tensor's shape before the strict loader must not fail before it."""
    _, tensors = released(name, tmp_path)
    message = complaint(name, tensors | {tensor: torch.ones(5)}, tmp_path)
    assert f"mis-shaped  {tensor.removeprefix('vision_model.')}: [5]" in message


def test_all_problems_stand_in_one_error_with_a_reason_and_a_way_out(tmp_path):
    """The user repairs a conversion once, not tensor by tensor; good tensors are not named."""
    _, tensors = released("dinov2", tmp_path)
    del tensors["cls_token"], tensors["blocks.1.mlp.fc2.bias"]
    tensors |= {"reg_token": torch.ones(1, 5, 32), "surprise": torch.ones(1)}
    message = complaint("dinov2", tensors, tmp_path)
    for problem in (
        "missing     cls_token",
        "missing     blocks.1.mlp.fc2.bias",
        "mis-shaped  reg_token: [1, 5, 32], wanted [1, 4, 32]",
        "unexpected  surprise",
    ):
        assert problem in message
    assert "blocks.0" not in message
    assert "bad.safetensors" in message
    assert "\nWhy: " in message
    assert "\nFix: " in message


def test_languagebinds_window_is_read_from_its_weights(tmp_path):
    """The caller's configuration says 8; a file with 4 temporal positions makes windows of 4."""
    everything, tensors = released("languagebind", tmp_path, temporal_window=4)
    save_file(tensors, tmp_path / "model.safetensors")
    encoder = load_encoder(tiny("languagebind"), tmp_path)
    assert tiny("languagebind").temporal_window == 8
    assert encoder.config.temporal_window == 4
    frames = clip(encoder.config, dtype=torch.float32)
    everything.blocks = everything.blocks[:2]
    assert torch.equal(encoder(frames[:, :12]), everything(frames[:, :12]))


@pytest.mark.parametrize("point_at_the_file", [False, True])
@pytest.mark.parametrize(
    ("vision_config", "activation"),
    [({"hidden_act": "quick_gelu"}, "quick_gelu"), ({"hidden_act": "gelu"}, "gelu"), ({}, "gelu")],
)
def test_languagebinds_activation_is_read_from_the_config_beside_it(
    vision_config, activation, point_at_the_file, tmp_path
):
    _, tensors = released("languagebind", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision_config}))
    source = tmp_path / "model.safetensors" if point_at_the_file else tmp_path
    encoder = load_encoder(tiny("languagebind"), source)
    assert encoder.config.activation == activation
    assert encoder.blocks[0].mlp.activation is encoders.ACTIVATIONS[activation]


# ---------------------------------------------------------------------- DINOv2's positions, resized


def cubic(x: float) -> float:
    """Keys' kernel with a = -1/2, what an antialiased bicubic resize uses."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_matrix(old: int, new: int) -> Tensor:
    """(new, old): a new sample is a weighted mean of old ones; shrinking widens the kernel."""
    scale = old / new
    rows = [
        [cubic((j + 0.5 - (i + 0.5) * scale) / max(scale, 1)) for j in range(old)]
        for i in range(new)
    ]
    weights = torch.tensor(rows, dtype=torch.float64)
    return weights / weights.sum(1, keepdim=True)


def test_positions_shrink_from_37_to_16_by_the_definition_of_an_antialiased_bicubic_resize():
    positions = torch.randn(1, 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    resized = resize_positions(positions, 16, 16)
    assert resized.shape == (1, 256, 5)
    matrix = resize_matrix(37, 16)
    expected = torch.einsum("yi,xj,ijd->yxd", matrix, matrix, positions[0].double().view(37, 37, 5))
    torch.testing.assert_close(resized[0].double(), expected.flatten(0, 1), atol=1e-5, rtol=0)


def test_a_constant_grid_of_positions_stays_constant():
    positions = torch.tensor([0.25, -3.0, 7.0]).expand(1, 37 * 37, 3)
    resized = resize_positions(positions, 16, 16)
    torch.testing.assert_close(resized, positions[:, :256], atol=1e-5, rtol=0)


def test_positions_of_the_right_size_are_left_alone():
    positions = torch.randn(1, 256, 3)
    assert resize_positions(positions, 16, 16) is positions


def test_loading_resizes_dinov2s_positions(tmp_path):
    _, tensors = released("dinov2", tmp_path)
    positions = torch.randn(1, 49, 32, generator=torch.Generator().manual_seed(0))
    save_file(tensors | {"pos_embed": positions}, tmp_path / "model.safetensors")
    encoder = load_encoder(tiny("dinov2"), tmp_path)
    assert torch.equal(encoder.position_embedding, resize_positions(positions, 3, 3))


# ----------------------------------------------------------------------------- manifests, full size

# Names of the release that no encoder of ours reads.
UNREAD = {
    "languagebind": (
        "text_model.", "vision_model.encoder.layers.23.", "vision_model.post_layernorm.",
        "visual_projection.", "text_projection.", "logit_scale",
    ),
    "dinov2": ("blocks.23.", "norm."),
    "vivit": ("vivit.pooler.", "classifier."),
    "siglip": ("blocks.11.", "norm.", "attn_pool."),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_names_we_read_are_the_names_of_the_release(name, shared_folder):
    manifest = json.loads((shared_folder / "manifests" / f"{name}.json").read_text())
    config = ENCODERS[name]
    with torch.device("meta"):
        encoder = FAMILIES[config.family](config)
    ours = {
        PREFIXES[config.family][0] + theirs
        for key in encoder.state_dict()
        for theirs in released_names(key, NAMES[config.family])
    }
    assert ours == {key for key in manifest if not key.startswith(UNREAD[name])}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_released_file_fits_at_full_size(name, shared_folder, tmp_path, monkeypatch):
    """Names and shapes of the real file, as tensors without memory, in the strict loader."""
    manifest = json.loads((shared_folder / "manifests" / f"{name}.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, (shape, _) in manifest.items()}
    monkeypatch.setattr(weights, "read_tensors", lambda source, files: dict(tensors))
    encoder = load_encoder(name, tmp_path, device="meta")
    assert encoder.config == ENCODERS[name]
    missing = SOME_TENSOR[name]
    del tensors[missing]
    with pytest.raises(CheckpointError, match="missing") as error:
        load_encoder(name, tmp_path, device="meta")
    assert missing.removeprefix("vision_model.").removeprefix("vivit.") in str(error.value)


# ----------------------------------------------------------------------- files, folders and the hub


def test_our_name_becomes_theirs_by_the_table():
    table = {"norm": "final", "x": "a.b", "blocks.*.qkv": ("l.*.q", "l.*.k")}
    assert released_names("norm.bias", table) == ["final.bias"]
    assert released_names("x", table) == ["a.b"]
    assert released_names("blocks.12.qkv.weight", table) == ["l.12.q.weight", "l.12.k.weight"]
    assert released_names("blocks.12.qkv.weight", None) == ["blocks.12.qkv.weight"]


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_reported_as_such(file, tmp_path):
    good = {"x": torch.randn(1000)}
    path = tmp_path / file
    if path.suffix == ".bin":
        torch.save(good, path)
    else:
        save_file(good, path)
    assert torch.equal(read_tensors(tmp_path, (file,))["x"], good["x"])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=f"Cannot read .*{file}"):
        read_tensors(tmp_path, (file,))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', "{"])
def test_an_index_that_names_no_shards_is_reported_as_damaged(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"Cannot read .*index\.json"):
        read_tensors(tmp_path, FILES)


class Dangerous:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_code_is_refused_before_it_runs(tmp_path):
    torch.save({"x": Dangerous(tmp_path / "owned")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path, ("pytorch_model.bin",))
    assert not (tmp_path / "owned").exists()


def test_a_path_that_does_not_exist_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"Found no model.safetensors .*nowhere"):
        load_encoder(tiny("vivit"), tmp_path / "nowhere" / "model.safetensors")


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"Found no model\.safetensors or .*pytorch_model\.bin"
    ):
        load_encoder(tiny("vivit"), tmp_path)


def test_a_file_is_found_in_the_order_asked(tmp_path):
    for name in ("b", "c"):
        (tmp_path / name).touch()
    assert find_file(tmp_path, ("a", "c", "b")) == tmp_path / "c"
    assert find_file(tmp_path / "b", ("a",)) == tmp_path / "b"
    assert find_file(tmp_path, ("a",), required=False) is None


def hub_that_raises(error_class, monkeypatch) -> list[tuple]:
    """A hub on which every file gives this error; the calls are written down."""
    calls = []
    response = SimpleNamespace(headers={}, request=None, status_code=404)

    def download(repo, name, revision=None):
        calls.append((repo, name, revision))
        try:
            error = error_class("no", response=response)
        except TypeError:
            error = error_class("no")
        raise error

    monkeypatch.setattr(weights.huggingface_hub, "hf_hub_download", download)
    return calls


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (hub_errors.GatedRepoError, "accept its licence at huggingface.co/owner/name"),
        (hub_errors.RepositoryNotFoundError, "check the name (a local path must exist)"),
        (hub_errors.RevisionNotFoundError, "check the name"),
        (hub_errors.LocalEntryNotFoundError, "hf download owner/name"),
    ],
)
def test_what_the_hub_refuses_is_explained(error, fix, monkeypatch):
    """In the hub's own words, which here are "no", and with what to do about it."""
    calls = hub_that_raises(error, monkeypatch)
    with pytest.raises(CheckpointError, match=f"Why: {error.__name__}: no\nFix: ") as caught:
        find_file("owner/name@main", ("a.bin", "b.bin"))
    assert fix in str(caught.value)
    assert "Cannot download a.bin or b.bin of owner/name@main." in str(caught.value)
    # What is not in the cache may be there under another name; any other refusal is final.
    asked = ["a.bin", "b.bin"] if error is hub_errors.LocalEntryNotFoundError else ["a.bin"]
    assert calls == [("owner/name", name, "main") for name in asked]


def test_a_file_the_repository_lacks_makes_room_for_the_next_name(monkeypatch):
    calls = hub_that_raises(hub_errors.RemoteEntryNotFoundError, monkeypatch)
    with pytest.raises(CheckpointError, match=r"Found no a\.bin or b\.bin at owner/name"):
        find_file("owner/name", ("a.bin", "b.bin"))
    assert calls == [("owner/name", "a.bin", None), ("owner/name", "b.bin", None)]


def test_an_interrupted_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_tensors({"x": torch.ones(3)}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]

    def half(tensors, where):
        where.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_tensors({"x": torch.zeros(3)}, path)
    assert torch.equal(load_file(path)["x"], torch.ones(3))


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_a_saved_file_may_be_read_by_whoever_may_read_its_folder(folder, file, tmp_path):
    """safetensors writes for the owner alone: in a shared folder nobody else could load a run."""
    tmp_path.chmod(folder)
    save_tensors({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == file


def test_an_explained_error_survives_the_way_out_of_a_worker_process():
    error = CheckpointError("what", "why", "fix")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is CheckpointError
    assert str(again) == str(error) == "what\nWhy: why\nFix: fix"


@pytest.mark.parametrize("name", ["languagebind", "dinov2", "vivit"])
def test_class_tokens_are_what_the_patches_leave_out(name):
    """One token a frame, or a clip for ViViT: the first of the sequence; the patches stay."""
    encoder = load_encoder(f"miniature-{name}")
    frames = torch.randn(2, encoder.config.num_frames, 3, 32, 32)
    whole = frames
    for step in (encoder.embed, *encoder.blocks, encoder.final_norm):
        whole = step(whole)
    tokens = encoder(frames, class_token=True)
    t = 1 if name == "vivit" else encoder.config.num_frames
    assert tokens.shape == (2, t, 1, 1, 96)
    torch.testing.assert_close(tokens.flatten(0, 3), whole[:, 0])


def test_siglip_has_no_class_token():
    """It says so instead of giving a patch."""
    with pytest.raises(UserError, match="miniature-siglip has no class token"):
        load_encoder("miniature-siglip")(torch.zeros(1, 4, 3, 32, 32), class_token=True)
