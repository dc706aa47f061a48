"""Four frozen specialists: pixels in, a grid of patch features out (paper 3.1, table 4).

    class          who              what it adds to a plain ViT
    ViT            DINOv2, SigLIP   each frame alone; DINOv2: registers, LayerScale
    LanguageBind   LanguageBind     each block first attends over time, in windows
    ViViT          ViViT            2-frame tubelets, one joint space-time sequence

In:   frames, normalised as the config says (data.preprocess)          (b, T, 3, H, W)
Out:  patch features, one grid per aligned time step                   (b, t, h, w, d_e)

MERV trains nothing here. No block after the one whose output is taken is built, loaded or run.
The file ends with how released weights of any model are read. Read next: llama.py, data.py.

Sources: ViT arXiv:2010.11929, DINOv2 2304.07193 with registers 2309.16588, SigLIP 2303.15343,
LanguageBind 2310.01852, ViViT 2103.15691.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.errors import UserError
from support.released import BLOCKS, NAMES, PREFIXES, SKIP, resize_positions
from support.weights import (
    FILES,
    assign_weights,
    find_file,
    initialise,
    read_json,
    read_tensors,
    released_names,
    save_tensors,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of R, G, B
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
VIT_L = dict(hidden_size=1024, num_heads=16, released_layers=24, num_layers=23, patch_size=14)
VIT_B = dict(hidden_size=768, num_heads=12, released_layers=12, num_layers=11, patch_size=16)

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class EncoderConfig:
    """All that decides one encoder's features: its shape, where they are taken, its pixels."""

    name: str
    family: str  # which class below: "vit", "languagebind" or "vivit"
    source: str  # where the weights are: a hub id, a file or a folder
    hidden_size: int  # d_e
    num_heads: int
    released_layers: int  # blocks in the released file
    num_layers: int  # blocks built: the features are the output of the last of them
    patch_size: int
    image_size: int = 224  # H = W that the encoder is given
    num_frames: int = 16  # T that the encoder is given
    tubelet_frames: int = 1  # frames in one patch: 2 for ViViT, so t = T / 2
    temporal_window: int = 0  # LanguageBind: frames that attend to each other
    num_registers: int = 0  # DINOv2: extra tokens without a place
    class_token: bool = True
    layer_scale: bool = False
    norm_eps: float = 1e-6
    activation: str = "gelu"  # "gelu" (exact), "gelu_tanh" or "quick_gelu"
    resize: str = "squash"  # to a square; or "short_side" to size and centre crop: data.preprocess
    interpolation: str = "bicubic"
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixels in [0, 1]
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the features."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_frames, side, side


# QUIRK: features are taken where the released weights expect them (ledger K6): DINOv2, SigLIP and
# LanguageBind after the last block but one and without a norm; ViViT after its last block and norm.
ENCODERS: dict[str, EncoderConfig] = {
    config.name: config
    for config in [
        EncoderConfig(
            "languagebind", "languagebind", "LanguageBind/LanguageBind_Video_merge", **VIT_L,
            temporal_window=8, norm_eps=1e-5, resize="short_side", interpolation="bilinear",
            pixel_mean=CLIP[0], pixel_std=CLIP[1],
        ),
        EncoderConfig(
            "dinov2", "vit", "timm/vit_large_patch14_reg4_dinov2.lvd142m", **VIT_L,
            num_registers=4, layer_scale=True, pixel_mean=IMAGENET[0], pixel_std=IMAGENET[1],
        ),
        EncoderConfig(
            "vivit", "vivit", "google/vivit-b-16x2-kinetics400", **VIT_B | {"num_layers": 12},
            num_frames=32, tubelet_frames=2, activation="gelu_tanh", interpolation="bilinear",
        ),
        EncoderConfig(
            "siglip", "vit", "timm/vit_base_patch16_siglip_224.webli", **VIT_B, class_token=False,
        ),
    ]
}  # fmt: skip

# The same architectures, small enough to pre-train on a laptop.
ENCODERS |= {
    f"miniature-{name}": replace(
        full, name=f"miniature-{name}", source="", hidden_size=96, num_heads=4, released_layers=4,
        num_layers=4 - (full.released_layers - full.num_layers), patch_size=8, image_size=32,
        num_frames=4 * full.tubelet_frames, temporal_window=min(full.temporal_window, 4),
    )
    for name, full in ENCODERS.items()
}  # fmt: skip


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of each row: (rows, tokens, d_e) -> the same."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, d_e = x.shape
        qkv = self.qkv_proj(x).view(rows, tokens, 3, self.num_heads, d_e // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (rows, heads, tokens, d_e / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).reshape(rows, tokens, d_e))


class MLP(nn.Module):
    """Two Linears with an activation between, four times as wide inside."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down_proj = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class Block(nn.Module):
    """Pre-norm transformer block: (rows, tokens, d_e) -> the same."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        d_e = config.hidden_size
        self.attention_norm = nn.LayerNorm(d_e, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(d_e, config.norm_eps)
        self.mlp = MLP(config)
        # LayerScale (DINOv2): one learned factor per channel on each residual branch.
        self.attention_scale = nn.Parameter(torch.ones(d_e)) if config.layer_scale else 1.0
        self.mlp_scale = nn.Parameter(torch.ones(d_e)) if config.layer_scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_scale * self.attention(self.attention_norm(x))
        return x + self.mlp_scale * self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """What the four share; each has its own `embed`, from frames to rows of tokens."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        block = LanguageBindBlock if config.temporal_window else Block
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_layers))
        self.final_norm = nn.Identity()  # only ViViT has one

    def forward(self, frames: Tensor, class_token: bool = False) -> Tensor:
        """(b, T, 3, H, W) -> patches (b, t, h, w, d_e), or class tokens (b, t, 1, 1, d_e).

        ViViT has one class token for all of a clip, so its t is 1 then.
        """
        self.check(frames)
        if class_token and not self.config.class_token:
            what, why = f"{self.config.name} has no class token.", "it was trained without one."
            raise UserError(what, why, "choose another projector or another encoder.")
        x = self.embed(frames)
        for block in self.blocks:
            x = block(x)
        x, (_, h, w) = self.final_norm(x), self.config.grid
        if class_token:
            return x[:, 0].view(len(frames), -1, 1, 1, x.shape[-1])
        extra = self.config.class_token + self.config.num_registers  # they come first
        return x[:, extra:].view(len(frames), -1, h, w, x.shape[-1])

    def check(self, frames: Tensor) -> None:
        """Raise if `frames` is not (b, T, 3, side, side) with a T that the encoder can take."""
        name, side, window = self.config.name, self.config.image_size, self.config.temporal_window
        if frames.shape[2:] != (3, side, side):
            what = f"{name} got frames {tuple(frames.shape)}, wants (b, T, 3, {side}, {side})."
            fix = "pass the video through data.preprocess(frames, encoder.config)."
            raise UserError(what, f"it reads clips of {side}x{side} RGB frames.", fix)
        # LanguageBind takes whole windows, ViViT its 32 frames; a ViT sees each frame alone.
        given, every, alone = frames.shape[1], self.config.num_frames, self.config.family == "vit"
        if not (given % window == 0 if window else given == every or alone):
            wanted = f"a multiple of {window}" if window else f"{every}"
            why = "each moment that it sees at once has its own learned position."
            raise UserError(f"{name} got {given} frames, wants {wanted}.", why, f"sample {wanted}.")


class ViT(Encoder):
    """DINOv2 and SigLIP: every frame is an image of its own, so t = T."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        d_e, (_, h, w) = config.hidden_size, config.grid
        self.patch_embedding = nn.Conv2d(3, d_e, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, h * w, d_e))
        if config.class_token:
            self.class_token = nn.Parameter(torch.zeros(1, 1, d_e))
        if config.num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, d_e))

    def embed(self, frames: Tensor) -> Tensor:
        """(b, T, 3, H, W) -> (b*t, tokens, d_e)."""
        x = self.patch_embedding(frames.flatten(0, 1)).flatten(2).mT  # (b*t, h*w, d_e)
        x = x + self.position_embedding
        # Class token and registers have no place in the image, so no position is added to them.
        for name in ("register_tokens", "class_token"):
            if hasattr(self, name):
                x = torch.cat([getattr(self, name).expand(len(x), -1, -1), x], dim=1)
        return x


class LanguageBindBlock(Block):
    """A CLIP block that first lets each position attend over the frames of its window."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        d_e = config.hidden_size
        self.temporal_embedding = nn.Parameter(torch.zeros(1, config.temporal_window, d_e))
        self.temporal_norm = nn.LayerNorm(d_e, config.norm_eps)
        self.temporal_attention = Attention(config)

    def forward(self, x: Tensor) -> Tensor:
        """(b*t, 1 + h*w, d_e) -> the same."""
        # QUIRK: 16 frames with a window of 8 are two clips that never meet (ledger K2):
        # frames [0..7], [8..15], and the temporal embedding starts again at frame 8.
        frames, tokens, d_e = x.shape
        window = self.temporal_embedding.shape[1]
        x = x.view(-1, window, tokens, d_e).transpose(1, 2).reshape(-1, window, d_e)
        x = x + self.temporal_embedding  # time is the sequence
        x = x + self.temporal_attention(self.temporal_norm(x))
        x = x.view(-1, tokens, window, d_e).transpose(1, 2).reshape(frames, tokens, d_e)
        return super().forward(x)


class LanguageBind(Encoder):
    """CLIP's image encoder with temporal attention in every block, so t = T."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        d_e, (_, h, w) = config.hidden_size, config.grid
        self.patch_embedding = nn.Conv2d(3, d_e, config.patch_size, config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.zeros(d_e))
        self.position_embedding = nn.Parameter(torch.zeros(1 + h * w, d_e))
        self.embedding_norm = nn.LayerNorm(d_e, config.norm_eps)

    def embed(self, frames: Tensor) -> Tensor:
        """(b, T, 3, H, W) -> (b*t, 1 + h*w, d_e)."""
        x = self.patch_embedding(frames.flatten(0, 1)).flatten(2).mT  # (b*t, h*w, d_e)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.position_embedding
        return self.embedding_norm(x)


class ViViT(Encoder):
    """Tubelets of 2 frames become tokens; all tokens of a clip attend to each other: t = T / 2."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        d_e, (t, h, w) = config.hidden_size, config.grid
        tubelet = (config.tubelet_frames, config.patch_size, config.patch_size)
        self.patch_embedding = nn.Conv3d(3, d_e, tubelet, tubelet)
        self.class_token = nn.Parameter(torch.zeros(1, 1, d_e))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + t * h * w, d_e))
        self.final_norm = nn.LayerNorm(d_e, config.norm_eps)

    def embed(self, frames: Tensor) -> Tensor:
        """(b, T, 3, H, W) -> (b, 1 + t*h*w, d_e), with T exactly config.num_frames."""
        x = self.patch_embedding(frames.transpose(1, 2)).flatten(2).mT  # (b, t*h*w, d_e)
        return torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.position_embedding


FAMILIES = {"vit": ViT, "languagebind": LanguageBind, "vivit": ViViT}

# ------------------------------------------------------------------------------------------ weights


def load_encoder(config_or_name, source=None, dtype=torch.float32, device="cpu") -> Encoder:
    """A frozen encoder in eval mode, with released weights or, without a source, random ones.

    config_or_name: an EncoderConfig, or its name in ENCODERS. source: a file, a folder or a hub id
    ("owner/name[@revision]") in the released format. CheckpointError names all that does not fit.
    """
    config = ENCODERS[config_or_name] if isinstance(config_or_name, str) else config_or_name
    if source is not None:
        tensors = read_tensors(source, FILES)
        for prefix in PREFIXES[config.family]:
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if "pos_embed" in tensors:
            tensors["pos_embed"] = resize_positions(tensors["pos_embed"], *config.grid[1:])
        if config.family == "languagebind":
            # Its window is in the weights, its activation in the config.json beside them.
            time = tensors.get("encoder.layers.0.temporal_embedding", torch.empty(0))
            window = time.shape[1] if time.ndim == 3 else config.temporal_window
            beside = Path(source).parent if Path(source).is_file() else source
            path = find_file(beside, ("config.json",), required=False)
            vision = read_json(path).get("vision_config", {}) if path else {}
            activation = vision.get("hidden_act", config.activation)
            config = replace(config, temporal_window=window, activation=activation)
    with torch.device("meta"):
        encoder = FAMILIES[config.family](config)
    if source is None:
        initialise(encoder.to_empty(device="cpu"), torch.Generator().manual_seed(0))
    else:
        names, block = NAMES[config.family], BLOCKS[config.family]
        after = range(config.num_layers, config.released_layers)  # the block whose output is taken
        skip = SKIP | {block.replace("*", f"{index}.*"): "not run" for index in after}
        assign_weights(encoder, tensors, names, skip, f"{config.name} from {source}", dtype)
    return encoder.to(device, dtype).eval().requires_grad_(False)


def save_encoder(encoder: Encoder, path: str | Path, state: dict | None = None) -> None:
    """Write what `load_encoder` reads. state: the full state_dict, if the encoder's is sharded."""
    family, tensors = encoder.config.family, {}
    for ours, tensor in (encoder.state_dict() if state is None else state).items():
        theirs = released_names(ours, NAMES[family])
        for name, part in zip(theirs, tensor.detach().cpu().chunk(len(theirs)), strict=True):
            tensors[PREFIXES[family][0] + name] = part.contiguous()
    save_tensors(tensors, path)


# -------------------------------------------- released files, for encoders.py, llama.py and merv.py
