"""The four encoders written again in the plainest way, and compared with the fast code.

The naive encoders loop over one token, head and frame at a time, in float64. Then come parity with
transformers, and adding a new encoder. test_weights.py tests how released weights are read.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from conftest import REPOSITORY, unit_scale
from safetensors.torch import load_file, save_file
from tiny_encoders import FULL_SIZE, build, clip, tiny
from torch import Tensor, nn

import encoders
from encoders import ENCODERS, FAMILIES, Block, Encoder, EncoderConfig, load_encoder, save_encoder
from llama import LLAMAS
from merv import MERV, MERVConfig
from support.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

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
    """(b, T, 3, H, W) -> (b, t, h, w, d_e); blocks after the feature layer are not built."""
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
def test_each_encoder_states_how_pixels_are_preprocessed(
    name, resize, interpolation, mean, std, frames
):
    """The values of the paper's released code; data.preprocess follows these fields."""
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


@pytest.mark.parametrize(
    ("name", "frames", "wants"),
    [("languagebind", 12, "multiple of 8"), ("vivit", 30, "32"), ("vivit", 64, "32")],
)
def test_a_wrong_number_of_frames_is_an_error_with_a_reason(name, frames, wants):
    """LanguageBind takes 8, 16, 24 ... frames, ViViT exactly 32: their positions are learned."""
    encoder = load_encoder(tiny(name))
    with pytest.raises(UserError) as error:
        encoder(torch.zeros(1, frames, 3, 12, 12))
    assert f"{name} got {frames} frames" in str(error.value)
    assert wants in str(error.value)
    assert "\nWhy: " in str(error.value)
    assert "\nFix: " in str(error.value)


@pytest.mark.parametrize("shape", [(16, 3, 12, 12), (1, 16, 1, 12, 12), (1, 16, 3, 8, 12)])
@pytest.mark.parametrize("name", FULL_SIZE)
def test_frames_of_a_wrong_shape_are_an_error(name, shape):
    with pytest.raises(UserError, match=r"wants \(b, T, 3, 12, 12\)"):
        load_encoder(tiny(name))(torch.zeros(shape))


@pytest.mark.parametrize("name", ["languagebind", "dinov2", "vivit"])
def test_class_tokens_are_the_first_tokens_of_each_row(name):
    """There is one per frame, or in ViViT one per clip; features hold the other tokens."""
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
    """Asking for it is an error; the first patch must not be returned instead."""
    with pytest.raises(UserError, match="miniature-siglip has no class token"):
        load_encoder("miniature-siglip")(torch.zeros(1, 4, 3, 32, 32), class_token=True)


# ------------------------------------------------------------------ naive loops equal the fast code


@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_vit_equals_a_loop_over_frames_patches_heads_and_queries(name):
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
def test_vit_encodes_each_frame_by_itself(name):
    """Frames in another order have the same features in that order, so a still is encoded once."""
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


def test_languagebind_treats_16_frames_as_two_independent_clips():
    """Changing frame 8 changes all features of its own window and no bit of the window before."""
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
    """The class token and all 16*9 tubelets get positions, pass the blocks and a final norm."""
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
    assert (quick - gelu(x)).abs().max() > 0.01, "it differs from GELU"


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_clip_has_the_same_features_alone_and_in_a_batch(name):
    config = tiny(name)
    encoder, frames = build(config), clip(config, b=3)
    alone = torch.cat([encoder(row[None]) for row in frames])
    torch.testing.assert_close(encoder(frames), alone)


# ----------------------------------------------------------------------------------- the naive code


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """The largest difference is small relative to the largest feature; features have unit scale."""
    assert ours.shape == theirs.shape
    assert 0.2 < theirs.std() < 20, "without unit scale the tolerance means little"
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max().clamp(max=10)


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
    """softmax(q k^T / sqrt(c)) v for one sequence (n, d), one head and one query at a time."""
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
    """(3, H, W) -> (h*w, d): multiply each p x p square, row after row, with every filter."""
    squares = [
        frame[:, y : y + p, x : x + p]
        for y, x in product(range(0, frame.shape[1], p), range(0, frame.shape[2], p))
    ]
    return torch.stack([(weight * square).sum((1, 2, 3)) + bias for square in squares])


# ------------------------------------------------------------------------- parity with transformers

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
    """transformers adds a position to the class token. The release does not, so we set it to 0."""
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
    """With temporal embedding and attention at zero, it is CLIP's image encoder on each frame."""
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


# ---------------------------------------------------------- other sizes, in the format of their hub

DINOV2_SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "image_size": 20,
    "patch_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
SIGLIP_SHAPE = SHAPE | {"patch_size": 4, "layer_norm_eps": 1e-6}
DINOV2_SMALL = {  # facebook/dinov2-small, also -with-registers-small
    "hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "image_size": 518,
    "patch_size": 14,
}  # fmt: skip
SIGLIP2_BASE = {  # google/siglip2-base-patch16-256
    "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "image_size": 256,
    "patch_size": 16, "intermediate_size": 3072,
}  # fmt: skip
TIMM_NAMES = {  # Hugging Face's name of a DINOv2 tensor -> timm's
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "encoder.layer": "blocks",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
META_NAMES = {  # likewise; the rest of Meta's names are timm's
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
}


@pytest.mark.parametrize("names", ["timm", "", "dinov2."])
@torch.no_grad()
def test_dinov2_without_registers_equals_transformers_from_released_names(names, tmp_path):
    """Its class token has a position of its own, which is added once, when the file is read."""
    theirs = dinov2_of_transformers(registers=0, swiglu=False)
    assert theirs.embeddings.position_embeddings.shape == (1, 26, 32)
    if names == "timm":
        tensors = in_timm_names(as_released(theirs, tmp_path), {})
        assert "blocks.0.attn.qkv.weight" in tensors
    else:
        tensors = as_released(theirs, tmp_path, names)
        assert f"{names}encoder.layer.0.attention.attention.query.weight" in tensors
    check_dinov2(theirs, dinov2_config(0, swiglu=False), tensors, tmp_path)


def dinov2_of_transformers(registers: int, swiglu: bool, **shape) -> nn.Module:
    """Their DINOv2 with random weights: positions of 5x5 patches and one for the class token."""
    kind, more = "Dinov2", {}
    if registers:
        kind, more = "Dinov2WithRegisters", {"num_register_tokens": registers}
    config = getattr(transformers, f"{kind}Config")(
        **(DINOV2_SHAPE | shape), use_swiglu_ffn=swiglu, mlp_ratio=4, **more
    )
    return unit_scale(getattr(transformers, f"{kind}Model")(config).eval())


def in_timm_names(tensors: dict[str, Tensor], more: dict[str, str]) -> dict[str, Tensor]:
    """The same under timm's names, with q, k and v in one matrix. more: other names to replace."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".attention.attention.query" in name:
            parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
            tensor = torch.cat(parts)
            name = name.replace("attention.attention.query", "attn.qkv")
        for theirs, timm in (TIMM_NAMES | more).items():
            name = name.replace(theirs, timm)
        if "attention.attention" not in name and not name.startswith("embeddings."):
            renamed[name] = tensor
    return renamed


def as_released(theirs: nn.Module, folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a model of transformers under the names of released files.

    Release 5 renamed its attributes; save_pretrained writes the old names.
    """
    theirs.save_pretrained(folder / "theirs")
    tensors = load_file(folder / "theirs/model.safetensors")
    return {prefix + name: tensor for name, tensor in tensors.items()}


def dinov2_config(registers: int, swiglu: bool, image_size: int = 20) -> EncoderConfig:
    """The same model of ours, by an EncoderConfig alone. The gated MLP is 2/3 as wide, rounded up
    to a multiple of 8."""
    return tiny(
        "dinov2", image_size=image_size, num_frames=3, num_registers=registers,
        activation="swiglu" if swiglu else "gelu", mlp_size=88 if swiglu else None,
    )  # fmt: skip


@torch.no_grad()
def test_dinov2_with_registers_in_hugging_faces_format_equals_transformers(tmp_path):
    """There the class token's position is not folded in yet, unlike in timm's file."""
    theirs = dinov2_of_transformers(registers=4, swiglu=False)
    check_dinov2(theirs, dinov2_config(4, swiglu=False), as_released(theirs, tmp_path), tmp_path)


@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_positions_are_resized_as_transformers_does(registers, tmp_path):
    """MERV's 224 pixels are fewer than DINOv2's 518: without registers, positions used to be
    smoothed here as in timm, and by Hugging Face and Meta not."""
    theirs = dinov2_of_transformers(registers, swiglu=False)
    config = dinov2_config(registers, swiglu=False, image_size=12)
    check_dinov2(theirs, config, as_released(theirs, tmp_path), tmp_path)


@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_the_giant_dinov2_with_a_gated_mlp_equals_transformers(registers, tmp_path):
    theirs = dinov2_of_transformers(registers, swiglu=True)
    tensors = as_released(theirs, tmp_path)
    assert "encoder.layer.0.mlp.weights_in.weight" in tensors
    check_dinov2(theirs, dinov2_config(registers, swiglu=True), tensors, tmp_path)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_dinov2_in_metas_own_format_equals_transformers(registers, swiglu, tmp_path):
    """As torch.hub downloads it: nearly timm's names, but a mask token, registers that are called
    otherwise and do not take the class token's position, and other names in the giant's MLP."""
    theirs = dinov2_of_transformers(registers, swiglu)
    tensors = in_timm_names(as_released(theirs, tmp_path), META_NAMES)
    expected = {"mask_token", "cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"}
    expected |= {"blocks.0.attn.qkv.weight", "blocks.0.attn.proj.bias", "blocks.0.ls1.gamma"}
    expected |= {"blocks.0.mlp.w12.weight" if swiglu else "blocks.0.mlp.fc1.weight"}
    expected |= {"register_tokens"} if registers else set()
    assert tensors.keys() >= expected
    assert tensors["pos_embed"].shape == (1, 26, 32)
    check_dinov2(theirs, dinov2_config(registers, swiglu), tensors, tmp_path)
    torch.save(tensors, tmp_path / "dinov2_pretrain.pth")
    again = load_encoder(dinov2_config(registers, swiglu), tmp_path / "dinov2_pretrain.pth")
    saved = load_encoder(dinov2_config(registers, swiglu), tmp_path)
    assert_same_weights(again, saved)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Every tensor of the two is equal, to the last bit."""
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def check_dinov2(theirs: nn.Module, config: EncoderConfig, tensors: dict, folder) -> None:
    """Features and class tokens equal theirs; so do those of a file that we write and read."""
    save_file(tensors, folder / "model.safetensors")
    encoder = load_encoder(config, folder)
    frames = clip(config, dtype=torch.float32)
    hidden = theirs(frames.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
    patches = hidden[:, 1 + config.num_registers :].view(2, *config.grid, -1)
    assert_close(encoder(frames), patches, 1e-4)
    class_tokens = encoder(frames, class_token=True)
    assert_close(class_tokens.flatten(0, 3), hidden[:, 0], 1e-4)
    save_encoder(encoder, folder / "ours.safetensors")
    again = load_encoder(config, folder / "ours.safetensors")
    assert torch.equal(again(frames), encoder(frames))


@pytest.mark.parametrize(("prefix", "inner"), [("vision_model.", 128), ("", 100)])
@torch.no_grad()
def test_siglip_in_hugging_faces_format_equals_transformers(prefix, inner, tmp_path):
    """SigLIP and SigLIP 2: a text tower beside it, positions (h*w, d_e), and an MLP of any width,
    as in so400m. The tanh approximation of GELU is what their config.json asks for."""
    shape = SIGLIP_SHAPE | {"intermediate_size": inner}
    config = tiny("siglip", num_frames=3, activation="gelu_tanh", mlp_size=inner)
    check_siglip(shape, config, prefix, tmp_path)


def check_siglip(shape: dict, config: EncoderConfig, prefix: str, folder: Path) -> None:
    """Features equal those of their SigLIP of this shape; prefix: of the names in its file."""
    shape = shape | {"hidden_act": "gelu_pytorch_tanh"}
    theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**shape)).eval()
    unit_scale(theirs)
    tensors = as_released(theirs, folder, prefix)
    tensors |= {"text_model.head.weight": torch.ones(2, 2), "logit_scale": torch.ones(1)}
    assert prefix + "head.probe" in tensors, "the head that pools should be in the file"
    save_file(tensors, folder / "model.safetensors")
    encoder, frames = load_encoder(config, folder), clip(config, dtype=torch.float32)
    expected = theirs(frames.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
    assert_close(encoder(frames), expected.view(2, *config.grid, -1), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_a_dinov2_of_published_size_equals_transformers(registers, tmp_path):
    """Its file is for 518 pixels, and MERV's clips have 224."""
    theirs = dinov2_of_transformers(registers, swiglu=False, **DINOV2_SMALL)
    config = replace(
        ENCODERS["dinov2"], hidden_size=384, num_heads=6, released_layers=12, num_layers=11,
        num_frames=1, num_registers=registers,
    )  # fmt: skip
    check_dinov2(theirs, config, as_released(theirs, tmp_path), tmp_path)


@pytest.mark.slow
@torch.no_grad()
def test_a_siglip_2_of_published_size_equals_transformers(tmp_path):
    config = replace(ENCODERS["siglip"], image_size=256, activation="gelu_tanh", num_frames=1)
    check_siglip(SIGLIP_SHAPE | SIGLIP2_BASE, config, "vision_model.", tmp_path)


def test_another_size_is_a_configuration_alone(monkeypatch):
    """The entries on docs/released.md have the grids and the parameters of those models."""
    page = (REPOSITORY / "docs/released.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "replace(" in b)
    monkeypatch.setattr(encoders, "ENCODERS", dict(ENCODERS))
    monkeypatch.setattr(encoders, "load_encoder", lambda name, source: None)  # no download here
    exec(block, {"__name__": "page"})
    expected = {  # name -> grid, parameters of one block
        "dinov2-base": ((16, 16, 16), 7_089_408),
        "dinov2-giant": ((16, 16, 16), 28_336_640),
        "siglip2-so400m": ((16, 27, 27), 15_239_504),
    }
    for name, (grid, size) in expected.items():
        config = encoders.ENCODERS[name]
        encoder = encoders.empty_encoder(config)
        assert config.grid == grid
        assert encoder.position_embedding.shape == (1, grid[1] * grid[2], config.hidden_size)
        assert sum(p.numel() for p in encoder.blocks[0].parameters()) == size
        assert len(encoder.blocks) == config.released_layers - 1


def test_a_file_with_the_names_of_another_library_that_does_not_fit_is_an_error(tmp_path):
    """The error names the tensors as the file does."""
    tensors = as_released(dinov2_of_transformers(0, swiglu=False), tmp_path)
    del tensors["encoder.layer.1.norm2.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_encoder(dinov2_config(0, swiglu=False), tmp_path)
    assert "missing     encoder.layer.1.norm2.bias" in str(error.value)
    assert str(error.value).count("missing     ") == 1


def take_weights(encoder: Encoder, theirs: dict[str, Tensor], table: dict) -> None:
    """Copy their weights by a table ours -> theirs; "*" is the block, a tuple is stacked."""
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


# -------------------------------------------------------------------------------- adding an encoder


@pytest.fixture
def mean_colour():
    """A new family and its entry: what adding an encoder takes. Both are removed after the test."""

    class MeanColour(Encoder, family="mean-colour"):
        """One token per patch: its mean colour, projected to d_e."""

        encodes_frames_alone = True

        def __init__(self, config: EncoderConfig):
            super().__init__(config)
            self.colour_embedding = nn.Linear(3, config.hidden_size)

        def embed(self, frames: Tensor) -> Tensor:
            colours = nn.functional.avg_pool2d(frames.flatten(0, 1), self.config.patch_size)
            return self.colour_embedding(colours.flatten(2).mT)

    ENCODERS["mean-colour"] = EncoderConfig(
        name="mean-colour",
        family="mean-colour",
        source="",
        hidden_size=24,
        num_heads=2,
        released_layers=2,
        num_layers=1,
        patch_size=8,
        image_size=32,
        num_frames=4,
        class_token=False,
    )
    yield MeanColour
    del ENCODERS["mean-colour"], FAMILIES["mean-colour"]


def test_a_new_encoder_is_one_class_and_one_entry(mean_colour, tmp_path):
    """It is saved, loaded and used in a MERV beside a released architecture."""
    config = ENCODERS["mean-colour"]
    encoder = load_encoder("mean-colour")
    assert type(encoder) is mean_colour and isinstance(encoder.blocks[0], Block)
    unit_scale(encoder)
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    again = load_encoder(config, tmp_path / "encoder.safetensors")
    frames = clip(config, dtype=torch.float32)
    assert encoder(frames).shape == (2, 4, 4, 4, 24)
    assert torch.equal(again(frames), encoder(frames))

    both = (config, ENCODERS["miniature-vivit"])
    model = MERV.create(MERVConfig("both", both, LLAMAS["miniature"], pooled_side=2), None)
    videos = torch.randint(256, (8, 3, 40, 50), dtype=torch.uint8)
    pixels = {name: x[None] for name, x in model.pixels(videos).items()}
    visual, mixing_weights = model.encode(pixels)
    assert visual.shape == (1, 4 * 2 * 2, LLAMAS["miniature"].hidden_size)
    assert mixing_weights.shape == (1, 2)


def test_a_checkpoint_with_a_new_encoder_is_read_again(
    mean_colour, tiny_tokenizer, tmp_path, monkeypatch
):
    """Also one without blocks, as in exercise 8; and without its class, the error says why."""
    config = replace(ENCODERS["mean-colour"], released_layers=0, num_layers=0)
    encoder = load_encoder(config)
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    config = replace(config, source=str(tmp_path / "encoder.safetensors"))
    llm = replace(LLAMAS["miniature"], vocab_size=tiny_tokenizer.vocab_size)
    model = MERV.create(MERVConfig("new", (config,), llm, pooled_side=2), tiny_tokenizer)
    model.save_pretrained(tmp_path / "model")
    again = MERV.from_pretrained(tmp_path / "model")
    frames = clip(config, dtype=torch.float32)
    assert torch.equal(again.encoders["mean-colour"](frames), encoder(frames))
    monkeypatch.delitem(FAMILIES, "mean-colour")
    with pytest.raises(UserError, match="whose file has been imported"):
        MERV.from_pretrained(tmp_path / "model")


def test_a_new_encoder_whose_file_does_not_fit_is_an_error(mean_colour, tmp_path):
    """A family without a table of names reads our own names, just as strictly."""
    encoder = load_encoder("mean-colour")
    state = encoder.state_dict()
    state["surprise"] = state.pop("colour_embedding.bias")
    save_encoder(encoder, tmp_path / "encoder.safetensors", state)
    with pytest.raises(UserError) as error:
        load_encoder("mean-colour", tmp_path / "encoder.safetensors")
    assert "missing     colour_embedding.bias" in str(error.value)
    assert "unexpected  surprise" in str(error.value)


def test_a_subclass_without_a_family_registers_nothing():
    """FSDP makes a subclass of each module that it shards."""
    before = dict(FAMILIES)
    type("FSDPViT", (encoders.ViT,), {})
    assert before == FAMILIES


def test_a_configuration_saved_without_a_label_gets_one():
    """Older config.json files have no label; the miniature has the labels of the full size."""
    for name, config in ENCODERS.items():
        assert config.label == name.removeprefix("miniature-")
        saved = asdict(config)
        del saved["label"]
        assert EncoderConfig(**saved) == config
