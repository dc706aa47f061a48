"""The other projectors of table 2a and the other mixers of table 2c of the MERV paper.

merv.py has equations 1 and 2 and lists these classes beside them, in PROJECTORS and MIXERS.

A projector is `Projector(d_e, d, side)`: it turns the features of one encoder into tokens of width
d, on a grid of side x side where it changes the grid.

    pool(v)            everything before the first parameter, so its result may be cached
                       (b, t, h_e, w_e, d_e) -> (b, t, h, w, d_e)
    forward(pooled)    (b, t, h, w, d_e) -> (b, n, d)
    time_stride        number of frames that become one time step
    class_token        whether it takes each frame's class token instead of its patches
    keeps_grid         whether each patch becomes a token: h_e x w_e, not side x side, a frame
                       (if a class does not say: no)

A mixer is `Mixer(d, e)`: it turns the tokens of e encoders into those that the LLM reads.

    mixing_weights(x)  (b, e, n, d) -> (b, e), float32, summing to 1
    forward(x)         (b, e, n, d) -> visual tokens (b, n, d), mixing weights (b, e)
    keeps_all_tokens   whether it returns all e * n tokens instead of n (if it does not say: no)

Parameters must have a dimension, because FSDP shards them along the first. A new model draws them
at random, whatever a class sets them to, except biases (0) and weights of norms (1). A class of
your own stands in a file that every command has to import first: docs/experiments.md has an
example.

Each class can be read by itself, so some lines appear in several of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --------------------------------------------------------------------------------------- projectors


class AllTokensProjector(nn.Module):
    """Every patch becomes a token: table 2a, "257 tok", and the single encoders of figure 4a."""

    time_stride = 1
    class_token = False
    keeps_grid = True

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__()
        self.linear = nn.Linear(d_e, d)

    def pool(self, v: Tensor) -> Tensor:
        """Return the features as they are: the grid is not changed."""
        return v

    def forward(self, pooled: Tensor) -> Tensor:
        return self.linear(pooled).flatten(1, 3)


class ClassTokenProjector(AllTokensProjector):
    """Each frame becomes one token, its class token (b, t, 1, 1, d_e): table 2a, "class tok"."""

    class_token = True
    keeps_grid = False


class AttentionProjector(nn.Module):
    """side*side learned queries attend to the patches of each frame: table 2a, "2D Attn"."""

    time_stride = 1
    class_token = False
    keeps_grid = False

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__()
        self.linear = nn.Linear(d_e, d)
        self.queries = nn.Parameter(torch.zeros(side * side, d_e))
        self.patch_norm = nn.LayerNorm(d_e)
        self.mlp_norm = nn.LayerNorm(d_e)
        self.attention = nn.MultiheadAttention(d_e, num_heads=8, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d_e, 4 * d_e), nn.GELU(), nn.Linear(4 * d_e, d_e))

    def pool(self, v: Tensor) -> Tensor:
        """Return the features as they are: the first step, the norm, has parameters."""
        return v

    def forward(self, pooled: Tensor) -> Tensor:
        b, t = pooled.shape[:2]
        patches = pooled.flatten(0, 1).flatten(1, 2)  # (b*t, h_e*w_e, d_e)
        patches = self.patch_norm(patches)
        queries = self.queries.expand(b * t, -1, -1)
        x, _ = self.attention(queries, patches, patches, need_weights=False)
        x = x + self.mlp(self.mlp_norm(x))
        x = self.linear(x)  # (b*t, side*side, d)
        return x.unflatten(0, (b, t)).flatten(1, 2)


def linear_and_norm(wide_in: int, wide: int) -> nn.Sequential:
    """A 1x1 convolution and its norm, channels last."""
    return nn.Sequential(nn.Linear(wide_in, wide, bias=False), nn.LayerNorm(wide))


class RegNetBlock(nn.Module):
    """Convolutions 1x1, depthwise 3x3 and 1x1 with squeeze-and-excite, and a residual connection.

    From RegNet (arXiv:2003.13678). Channels come last, where a 1x1 convolution is a Linear:
    (b, t, h, w, wide_in) -> (b, t, h, w, wide).
    """

    def __init__(self, wide_in: int, wide: int):
        super().__init__()
        self.enter = linear_and_norm(wide_in, wide)
        self.leave = linear_and_norm(wide, wide)
        self.shortcut = nn.Identity()
        if wide_in != wide:
            self.shortcut = linear_and_norm(wide_in, wide)
        # A kernel of 1x3x3 convolves each frame by itself.
        self.depthwise = nn.Conv3d(wide, wide, (1, 3, 3), padding="same", groups=wide, bias=False)
        self.norm = nn.LayerNorm(wide)
        self.squeeze = nn.Linear(wide, wide_in // 4)
        self.excite = nn.Linear(wide_in // 4, wide)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.enter(x))
        y = self.depthwise(y.movedim(-1, 1))
        y = y.movedim(1, -1)
        y = F.silu(self.norm(y))
        mean = y.mean((2, 3), keepdim=True)  # of each frame, (b, t, 1, 1, wide)
        gate = self.excite(F.silu(self.squeeze(mean))).sigmoid()
        return F.silu(self.leave(y * gate) + self.shortcut(x))


class ConvProjector(nn.Module):
    """Three RegNet blocks, average pooling and three more: table 2a, "2D Conv".

    The C-Abstractor of Honeybee (arXiv:2312.06742), at the width of the LLM.
    """

    time_stride = 1
    class_token = False
    keeps_grid = False

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__()
        self.side = side
        self.linear = nn.Linear(d, d)
        self.before = nn.Sequential(RegNetBlock(d_e, d), RegNetBlock(d, d), RegNetBlock(d, d))
        self.after = nn.Sequential(RegNetBlock(d, d), RegNetBlock(d, d), RegNetBlock(d, d))

    def pool(self, v: Tensor) -> Tensor:
        """Return the features as they are: pooling comes after three blocks with parameters."""
        return v

    def forward(self, pooled: Tensor) -> Tensor:
        x = self.before(pooled)  # (b, t, h_e, w_e, d)
        frames = x.flatten(0, 1).movedim(-1, 1)  # (b*t, d, h_e, w_e)
        frames = F.adaptive_avg_pool2d(frames, self.side)
        x = frames.movedim(1, -1).unflatten(0, x.shape[:2])  # (b, t, side, side, d)
        return self.linear(self.after(x)).flatten(1, 3)


class Pooled3dProjector(nn.Module):
    """Average pooling that halves time as well, then a Linear: table 2a, "3D Avg"."""

    time_stride = 2
    class_token = False
    keeps_grid = False

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__()
        self.side = side
        self.linear = nn.Linear(d_e, d)

    def pool(self, v: Tensor) -> Tensor:
        """(b, t, h_e, w_e, d_e) -> (b, t/2, side, side, d_e)."""
        grid = (v.shape[1] // self.time_stride, self.side, self.side)
        return F.adaptive_avg_pool3d(v.movedim(-1, 1), grid).movedim(1, -1)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.linear(pooled).flatten(1, 3)


class Conv3dProjector(nn.Module):
    """A 3x3x3 convolution, average pooling that halves time, a Linear: table 2a, "3D Conv"."""

    time_stride = 2
    class_token = False
    keeps_grid = False

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__()
        self.side = side
        self.linear = nn.Linear(d, d)
        # QUIRK: the text says 2x3x3, but its 113 M parameters are those of 3x3x3 (ledger K11).
        self.conv = nn.Conv3d(d_e, d, 3, padding=1)

    def pool(self, v: Tensor) -> Tensor:
        """Return the features as they are: pooling comes after the convolution."""
        return v

    def forward(self, pooled: Tensor) -> Tensor:
        x = self.conv(pooled.movedim(-1, 1))  # (b, d, t, h_e, w_e)
        grid = (x.shape[2] // self.time_stride, self.side, self.side)
        x = F.adaptive_avg_pool3d(x, grid).movedim(1, -1)
        return self.linear(x).flatten(1, 3)


# ------------------------------------------------------------------------------------------- mixers


class EqualWeights(nn.Module):
    """Base class of the mixers without parameters: all e encoders have the mixing weight 1/e."""

    keeps_all_tokens = False

    def __init__(self, d: int, e: int = 4):
        super().__init__()

    def mixing_weights(self, x_bend: Tensor) -> Tensor:
        """(b, e, n, d) -> (b, e), each 1/e."""
        b, e = x_bend.shape[:2]
        return torch.full((b, e), 1 / e, device=x_bend.device)


class MeanMixer(EqualWeights):
    """The mean of the encoders: table 2c, "25 % each"."""

    def forward(self, x_bend: Tensor) -> tuple[Tensor, Tensor]:
        weight_be = self.mixing_weights(x_bend)
        o_bnd = torch.einsum("be,bend->bnd", weight_be.to(x_bend.dtype), x_bend)
        return o_bnd, weight_be


class SequenceMixer(EqualWeights):
    """Concatenate the encoders' tokens along the sequence: table 2c, "concat (seq)"."""

    keeps_all_tokens = True

    def forward(self, x_bend: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x_bend.flatten(1, 2)  # (b, e * n, d)
        return tokens, self.mixing_weights(x_bend)


class ChannelMixer(EqualWeights):
    """Concatenate features along channels, then one Linear to d: table 2c, "concat (channel)".

    With two encoders, [v_1 v_2] [W_1; W_2] + b = v_1 W_1 + v_2 W_2 + b: the projectors hold the
    parts of that one matrix, and their biases add up to b. So mixing is a plain sum.
    """

    def forward(self, x_bend: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x_bend.sum(1)
        return tokens, self.mixing_weights(x_bend)


class LearnedMixer(nn.Module):
    """One learned score for each encoder, the same for every clip: table 2c, "learnable W"."""

    keeps_all_tokens = False

    def __init__(self, d: int, e: int = 4):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(e))

    def mixing_weights(self, x_bend: Tensor) -> Tensor:
        """The softmax of the scores."""
        return self.scores.float().softmax(-1).expand(len(x_bend), -1)

    def forward(self, x_bend: Tensor) -> tuple[Tensor, Tensor]:
        weight_be = self.mixing_weights(x_bend)
        o_bnd = torch.einsum("be,bend->bnd", weight_be.to(x_bend.dtype), x_bend)
        return o_bnd, weight_be
