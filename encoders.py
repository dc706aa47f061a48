"""The four frozen vision encoders: pixels in, a grid of patch features out (paper 3.1, table 4).

    class          encoder          what it adds to a plain Vision Transformer (ViT)
    ViT            DINOv2, SigLIP   nothing: it encodes each frame separately, without time
    LanguageBind   LanguageBind     attention over time in every block, in windows of 8 frames
    ViViT          ViViT            patches of 2 frames, all of which attend to each other

In:   frames, normalised as the configuration says (data.preprocess)   (b, T, 3, H, W)
Out:  features: one vector per patch, in a grid per time step          (b, t, h, w, d_e)

A ViT cuts an image into square patches, turns each into a vector (a *token*), adds a learned vector
for its position and applies blocks in which the tokens attend to each other. A *class token*, which
has no patch, collects a summary of the image.

MERV never trains the encoders. From three of them it takes the features before the last block, so
this block is not built, loaded or run.

To add an encoder, add an entry to ENCODERS; if no class fits, also a subclass of `Encoder`. An
entry is enough for other sizes of DINOv2 (with or without registers), of SigLIP, and of SigLIP 2
with a fixed resolution; their weights may have the names of timm or of Hugging Face. Training reads
them from --encoder-files FOLDER/NAME.safetensors, which `save_encoder` writes. Exercise 8 of
lesson/ goes through all of it. After any edit of this file, the miniature makes clips and encoders
again.

Read next: llama.py, data.py.

Sources: ViT https://arxiv.org/abs/2010.11929, DINOv2 https://arxiv.org/abs/2304.07193 with
registers https://arxiv.org/abs/2309.16588, SigLIP https://arxiv.org/abs/2303.15343, LanguageBind
https://arxiv.org/abs/2310.01852, ViViT https://arxiv.org/abs/2103.15691.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import weights
from support.errors import UserError
from support.released import (
    GOOGLE_VIVIT,
    LANGUAGEBIND,
    OTHER_VITS,
    OUR_NAMES,
    TIMM,
    Names,
    as_object,
    choose_names,
    convert_positions,
)
from support.weights import released_names

# ------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class EncoderConfig:
    """Everything that determines the features of one encoder: shape, depth and input pixels."""

    name: str
    family: str  # which class: a key of FAMILIES
    source: str  # of the weights: a hub id, a file or a folder; "" for random weights
    hidden_size: int  # d_e
    num_heads: int
    released_layers: int  # blocks in the released checkpoint
    num_layers: int  # blocks that we build; the output of the last one is the features
    patch_size: int
    image_size: int = 224  # H = W of its frames
    num_frames: int = 16  # T of its clips
    tubelet_frames: int = 1  # frames in one patch: 2 for ViViT, so t = T / 2
    temporal_window: int = 0  # LanguageBind: how many frames attend to each other
    num_registers: int = 0  # DINOv2: extra tokens that have no patch and no position
    class_token: bool = True  # whether it was trained with one
    layer_scale: bool = False  # DINOv2: a learned factor per channel on each residual branch
    norm_eps: float = 1e-6
    activation: str = "gelu"  # a key of ACTIVATIONS
    resize: str = "squash"  # to a square; or "short_side": scale, then crop (data.preprocess)
    interpolation: str = "bicubic"
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of R, G, B in [0, 1]
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    mlp_size: int | None = None  # width inside the MLP; None: 4 d_e
    label: str = ""  # short and unique within a model; "" is the name without "miniature-"

    def __post_init__(self):
        if not self.label:
            label = self.name.removeprefix("miniature-")
            object.__setattr__(self, "label", label)  # how a frozen dataclass sets a field

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the features."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_frames, side, side


IMAGENET = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
CLIP = {
    "pixel_mean": (0.48145466, 0.4578275, 0.40821073),
    "pixel_std": (0.26862954, 0.26130258, 0.27577711),
}

# QUIRK: the released MERV weights expect features from these blocks (ledger K6). LanguageBind,
# DINOv2 and SigLIP: after the last block but one, without a norm, so we build one block fewer than
# were released. ViViT: after its last block and final norm.
ENCODERS: dict[str, EncoderConfig] = {
    "languagebind": EncoderConfig(
        name="languagebind", family="languagebind", source="LanguageBind/LanguageBind_Video_merge",
        hidden_size=1024, num_heads=16, released_layers=24, num_layers=23, patch_size=14,
        temporal_window=8, norm_eps=1e-5,
        resize="short_side", interpolation="bilinear", **CLIP,
    ),
    "dinov2": EncoderConfig(
        name="dinov2", family="vit", source="timm/vit_large_patch14_reg4_dinov2.lvd142m",
        hidden_size=1024, num_heads=16, released_layers=24, num_layers=23, patch_size=14,
        num_registers=4, layer_scale=True, **IMAGENET,
    ),
    "vivit": EncoderConfig(
        name="vivit", family="vivit", source="google/vivit-b-16x2-kinetics400",
        hidden_size=768, num_heads=12, released_layers=12, num_layers=12, patch_size=16,
        num_frames=32, tubelet_frames=2, activation="gelu_tanh", interpolation="bilinear",
    ),
    "siglip": EncoderConfig(
        name="siglip", family="vit", source="timm/vit_base_patch16_siglip_224.webli",
        hidden_size=768, num_heads=12, released_layers=12, num_layers=11, patch_size=16,
        class_token=False,
    ),
}  # fmt: skip

# The same architectures with 4 blocks, small enough to pre-train on a laptop. Their features come
# from the same place: before the last block, or for ViViT after it.
SMALL = {
    "source": "", "hidden_size": 96, "num_heads": 4, "released_layers": 4,
    "patch_size": 8, "image_size": 32,
}  # fmt: skip
ENCODERS |= {
    "miniature-languagebind": replace(
        ENCODERS["languagebind"], name="miniature-languagebind",
        num_layers=3, num_frames=4, temporal_window=4, **SMALL,
    ),
    "miniature-dinov2": replace(
        ENCODERS["dinov2"], name="miniature-dinov2", num_layers=3, num_frames=4, **SMALL,
    ),
    "miniature-vivit": replace(
        ENCODERS["vivit"], name="miniature-vivit", num_layers=4, num_frames=8, **SMALL,
    ),
    "miniature-siglip": replace(
        ENCODERS["siglip"], name="miniature-siglip", num_layers=3, num_frames=4, **SMALL,
    ),
}  # fmt: skip

# -------------------------------------------------------------------------------- transformer block


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, as in the released ViViT."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU, as in OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def swiglu(x: Tensor) -> Tensor:
    """The gated activation of DINOv2's giant: (..., 2 * width) -> (..., width)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "swiglu": swiglu}


class Attention(nn.Module):
    """Multi-head self-attention within each row: (rows, tokens, d_e) -> the same shape.

    A row is whatever attends together: a frame in ViT, a clip in ViViT, the frames of one patch in
    LanguageBind's attention over time.
    """

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
    """Two Linear layers with an activation between them; the inner width is usually 4 d_e."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        inner = config.mlp_size or 4 * config.hidden_size
        gates = 2 if config.activation == "swiglu" else 1
        self.up_proj = nn.Linear(config.hidden_size, gates * inner)
        self.down_proj = nn.Linear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class Block(nn.Module):
    """Pre-norm transformer block: (rows, tokens, d_e) -> the same shape."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        d_e = config.hidden_size
        self.attention_norm = nn.LayerNorm(d_e, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(d_e, config.norm_eps)
        self.mlp = MLP(config)
        # LayerScale, https://arxiv.org/abs/2103.17239
        self.attention_scale = nn.Parameter(torch.ones(d_e)) if config.layer_scale else 1.0
        self.mlp_scale = nn.Parameter(torch.ones(d_e)) if config.layer_scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_scale * self.attention(self.attention_norm(x))
        return x + self.mlp_scale * self.mlp(self.mlp_norm(x))


def prepend(tokens: Tensor, x: Tensor) -> Tensor:
    """Put the same tokens (1, k, d_e) before each row of x (rows, n, d_e): (rows, k + n, d_e)."""
    return torch.cat([tokens.expand(len(x), -1, -1), x], dim=1)


# ------------------------------------------------------------------------------------- the encoders

FAMILIES: dict[str, type[Encoder]] = {}  # EncoderConfig.family -> class; each class adds itself


class Encoder(nn.Module):
    """Base class of all encoders. A family defines `embed`, from frames to rows of tokens.

    `class MyEncoder(Encoder, family="mine")` registers a new family.
    """

    released = OUR_NAMES  # what its checkpoints call our tensors (support/released.py)
    also_reads: tuple[Names, ...] = ()  # other names that its checkpoints may have
    block_class = Block
    encodes_frames_alone = False  # if True, frames do not see each other, so T may be any number

    def __init_subclass__(cls, family: str = "", **kwargs):
        super().__init_subclass__(**kwargs)
        if family:  # FSDP makes a subclass of each sharded class: that is not a new family
            FAMILIES[family] = cls

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(self.block_class(config) for _ in range(config.num_layers))
        self.final_norm = nn.Identity()  # ViViT has a LayerNorm here

    def embed(self, frames: Tensor) -> Tensor:
        """Turn frames (b, T, 3, H, W) into rows of tokens (rows, tokens, d_e).

        Rows are clips or frames. Class token and registers come first, then the patches in the
        order t, h, w.
        """
        raise NotImplementedError

    def forward(self, frames: Tensor, class_token: bool = False) -> Tensor:
        """Frames (b, T, 3, H, W) -> features (b, t, h, w, d_e).

        class_token: return the class tokens (b, t, 1, 1, d_e) instead. ViViT has one for the whole
        clip, so t is 1 there.
        """
        self.check(frames)
        if class_token and not self.config.class_token:
            what = f"{self.config.name} has no class token."
            fix = "choose another projector or another encoder."
            raise UserError(what, "it was trained without one.", fix)
        x = self.embed(frames)
        for block in self.blocks:
            x = block(x)
        x = self.final_norm(x)
        b = len(frames)
        d_e = x.shape[-1]
        if class_token:
            return x[:, 0].view(b, -1, 1, 1, d_e)
        first_patch = self.config.num_registers
        if self.config.class_token:
            first_patch += 1
        _, h, w = self.config.grid
        return x[:, first_patch:].view(b, -1, h, w, d_e)

    def check(self, frames: Tensor) -> None:
        """Raise UserError unless frames are (b, T, 3, side, side) with a T that fits."""
        name = self.config.name
        side = self.config.image_size
        if frames.shape[2:] != (3, side, side):
            what = f"{name} got frames {tuple(frames.shape)}, wants (b, T, 3, {side}, {side})."
            fix = "pass the video through data.preprocess(frames, encoder.config)."
            raise UserError(what, f"it reads clips of {side}x{side} RGB frames.", fix)
        if self.encodes_frames_alone:
            return
        num_frames = frames.shape[1]
        window = self.config.temporal_window
        if window:
            fits = num_frames % window == 0
            wanted = f"a multiple of {window}"
        else:
            fits = num_frames == self.config.num_frames
            wanted = str(self.config.num_frames)
        if not fits:
            what = f"{name} got {num_frames} frames, wants {wanted}."
            why = "each frame that it attends to at once has its own learned position."
            raise UserError(what, why, f"sample {wanted}.")

    @classmethod
    def read_config(cls, config: EncoderConfig, tensors: dict, source) -> EncoderConfig:
        """Fill in the settings that only the checkpoint knows; here there are none."""
        return config

    @classmethod
    def convert(cls, config: EncoderConfig, tensors: dict, names: Names) -> dict[str, Tensor]:
        """Convert a checkpoint's tensors to the shapes of this configuration; here unchanged.
        names: the naming scheme of the checkpoint."""
        return tensors


class ViT(Encoder, family="vit"):
    """Vision Transformer on single frames: DINOv2 and SigLIP."""

    released = TIMM
    also_reads = OTHER_VITS
    encodes_frames_alone = True

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        d_e = config.hidden_size
        _, h, w = config.grid
        self.patch_embedding = nn.Conv2d(3, d_e, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, h * w, d_e))
        if config.class_token:
            self.class_token = nn.Parameter(torch.zeros(1, 1, d_e))
        if config.num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, d_e))

    def embed(self, frames: Tensor) -> Tensor:
        """(b, T, 3, H, W) -> one row per frame (b*t, tokens, d_e)."""
        images = frames.flatten(0, 1)  # (b*t, 3, H, W)
        x = self.patch_embedding(images).flatten(2).mT  # (b*t, h*w, d_e)
        x = x + self.position_embedding
        # These tokens have no place in the image, so they get no position.
        if self.config.num_registers:
            x = prepend(self.register_tokens, x)
        if self.config.class_token:
            x = prepend(self.class_token, x)
        return x

    @classmethod
    def convert(cls, config: EncoderConfig, tensors: dict, names: Names) -> dict[str, Tensor]:
        """Bring position embeddings to our form: (1, h*w, d_e), none for the class token."""
        # timm's files with registers have no position for the class token, all others do.
        has_class_position = config.class_token and not (names is TIMM and config.num_registers)
        # timm always antialiases; Hugging Face and Meta do so only for DINOv2 with registers.
        antialias = names is TIMM or config.num_registers > 0
        size = config.grid[1:]
        return convert_positions(tensors, names.table, has_class_position, size, antialias)


class LanguageBindBlock(Block):
    """A block of CLIP's image encoder, with attention over time before it at each position."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        d_e = config.hidden_size
        self.temporal_embedding = nn.Parameter(torch.zeros(1, config.temporal_window, d_e))
        self.temporal_norm = nn.LayerNorm(d_e, config.norm_eps)
        self.temporal_attention = Attention(config)

    def forward(self, x: Tensor) -> Tensor:
        """One row per frame: (b*t, 1 + h*w, d_e) -> the same shape."""
        # QUIRK: 16 frames in windows of 8 are two clips that never attend to each other, [0..7] and
        # [8..15], and the temporal embedding starts again at frame 8 (ledger K2).
        frames, tokens, d_e = x.shape
        window = self.temporal_embedding.shape[1]
        x = x.view(-1, window, tokens, d_e).transpose(1, 2).reshape(-1, window, d_e)
        x = x + self.temporal_embedding  # a row is now one position over a window of time
        x = x + self.temporal_attention(self.temporal_norm(x))
        x = x.view(-1, tokens, window, d_e).transpose(1, 2).reshape(frames, tokens, d_e)
        return super().forward(x)


class LanguageBind(Encoder, family="languagebind"):
    """CLIP's image encoder with attention over time in every block, so t = T."""

    released = LANGUAGEBIND
    block_class = LanguageBindBlock

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        d_e = config.hidden_size
        _, h, w = config.grid
        self.patch_embedding = nn.Conv2d(3, d_e, config.patch_size, config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.zeros(d_e))
        self.position_embedding = nn.Parameter(torch.zeros(1 + h * w, d_e))
        self.embedding_norm = nn.LayerNorm(d_e, config.norm_eps)

    def embed(self, frames: Tensor) -> Tensor:
        """(b, T, 3, H, W) -> one row per frame (b*t, 1 + h*w, d_e)."""
        images = frames.flatten(0, 1)  # (b*t, 3, H, W)
        x = self.patch_embedding(images).flatten(2).mT  # (b*t, h*w, d_e)
        x = prepend(self.class_token[None, None], x) + self.position_embedding
        return self.embedding_norm(x)

    @classmethod
    def read_config(cls, config: EncoderConfig, tensors: dict, source) -> EncoderConfig:
        """Read the window from the weights and the activation from the config.json beside them."""
        name = released_names("blocks.0.temporal_embedding", cls.released.table)[0]
        if name in tensors and tensors[name].ndim == 3:  # (1, window, d_e)
            config = replace(config, temporal_window=tensors[name].shape[1])
        folder = Path(source).parent if Path(source).is_file() else source
        path = weights.find_file(folder, ("config.json",), required=False)
        if path is not None:
            stated = weights.read_json(path).get("vision_config")
            vision = as_object(path, "vision_config", stated)
            activation = vision.get("hidden_act") or config.activation
            weights.check_fields({"hidden_act": activation}, path, {"hidden_act": ACTIVATIONS})
            config = replace(config, activation=activation)
        return config


class ViViT(Encoder, family="vivit"):
    """Video Vision Transformer: its patches are *tubelets* of 2 frames, so t = T / 2.

    All tubelets of a clip form one sequence and attend to each other, over space and time.
    """

    released = GOOGLE_VIVIT

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        d_e = config.hidden_size
        t, h, w = config.grid
        tubelet = (config.tubelet_frames, config.patch_size, config.patch_size)
        self.patch_embedding = nn.Conv3d(3, d_e, tubelet, tubelet)
        self.class_token = nn.Parameter(torch.zeros(1, 1, d_e))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + t * h * w, d_e))
        self.final_norm = nn.LayerNorm(d_e, config.norm_eps)

    def embed(self, frames: Tensor) -> Tensor:
        """(b, T, 3, H, W) -> one row per clip (b, 1 + t*h*w, d_e)."""
        clips = frames.transpose(1, 2)  # (b, 3, T, H, W)
        x = self.patch_embedding(clips).flatten(2).mT  # (b, t*h*w, d_e)
        return prepend(self.class_token, x) + self.position_embedding


# ------------------------------------------------------------------------------------------ weights


def load_encoder(config_or_name, source=None, dtype=torch.float32, device="cpu") -> Encoder:
    """Load a frozen encoder in eval mode.

    config_or_name: an EncoderConfig, or a key of ENCODERS.
    source: a file, a folder or a hub id ("owner/name[@revision]") of weights in the released
    format; without one the weights are random. Raises CheckpointError if the weights do not fit.
    dtype None: that of the file, whose tensors stay mapped into memory (weights.assign_weights).
    """
    config = ENCODERS[config_or_name] if isinstance(config_or_name, str) else config_or_name
    if source is None:
        encoder = empty_encoder(config).to_empty(device="cpu")
        weights.initialise(encoder, torch.Generator().manual_seed(0))
    else:
        encoder = read_encoder(config, source, dtype, device)
    if dtype is not None:
        encoder.to(dtype)
    return encoder.to(device).eval().requires_grad_(False)


def empty_encoder(config: EncoderConfig) -> Encoder:
    """Build an encoder on the meta device: it has shapes, but no memory is used for weights."""
    with torch.device("meta"):
        encoder = FAMILIES[config.family](config)
    if buffers := [name for name, _ in encoder.named_buffers()]:
        why = f"weights are parameters here; {', '.join(buffers[:3])} would not be loaded or saved."
        raise UserError(
            f"{config.name} has buffers.", why, "use layers without buffers, such as LayerNorm."
        )
    return encoder


def read_encoder(config: EncoderConfig, source: str | Path, dtype, device) -> Encoder:
    """Build an encoder with weights in the released format."""
    family = FAMILIES[config.family]
    encoder = empty_encoder(config)
    tensors = weights.read_tensors(source, weights.FILES)
    formats = (family.released, *family.also_reads)
    released, tensors = choose_names(formats, list(encoder.state_dict()), tensors)
    config = family.read_config(config, tensors, source)
    tensors = family.convert(config, tensors, released)
    skip = dict(released.skip)  # pattern of names that stay unread -> why
    for index in range(config.num_layers, config.released_layers):
        names_of_block = released.blocks.replace("*", f"{index}.*")
        skip[names_of_block] = "after the block whose output is the features"
    encoder = empty_encoder(config)
    what = f"{config.name} from {source}"
    weights.assign_weights(encoder, tensors, released.table, skip, what, dtype, device)
    return encoder


def save_encoder(encoder: Encoder, path: str | Path, state: dict | None = None) -> None:
    """Write a file in the released format, for `load_encoder`.

    state: the full state_dict, if this process holds only a shard of the encoder.
    """
    released = encoder.released
    if state is None:
        state = encoder.state_dict()
    tensors = {}
    for ours, tensor in state.items():
        theirs = released_names(ours, released.table)
        parts = tensor.detach().cpu().chunk(len(theirs))  # q, k and v may be three of theirs
        for name, part in zip(theirs, parts, strict=True):
            tensors[released.prefixes[0] + name] = part.contiguous()
    weights.save_tensors(tensors, path)
