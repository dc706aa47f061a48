"""MERV: four specialists watch a video, one learned query mixes what they saw, LLaMA answers.

    python merv.py --trace                              the shape of every stage; needs nothing
    python merv.py VIDEO "question" ["question" ...]    answers, by the checkpoint trained last

Multi-Encoder Representation of Videos, ICML 2025; sections and equations are those of the paper.

Shape letters, used as suffixes of names (x_bend is (b, e, n, d)):
    b  batch               t, h, w  aligned grid: time steps, rows, columns (16, 8, 8)
    e  encoders (4)        n        visual tokens, n = t * h * w (1024)
    d  width of the LLM    d_e      width of one encoder
    T, H, W  frames and pixels of a clip; v: the rows of a batch that have a picture

    frames (b, T, 3, H, W) -> encoder -> v_e (b, t, h_e, w_e, d_e)
                           -> pool    ->     (b, t, h, w, d_e)      eq. 1; frozen up to here
                           -> linear  -> x_e (b, n, d)              eq. 1
    four x_e               -> mixer   -> o   (b, n, d)              eq. 2
    [BOS] + o + text       -> LLaMA   -> answer

Read before: encoders.py, llama.py, data.py. Read next: eval.py, train.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import encoders
from data import TEMPLATES, Batch, load_pixels, preprocess, render_prompt, tokenize
from encoders import ENCODERS, EncoderConfig
from llama import LLAMAS, KVCache, Llama, LlamaConfig, Tokenizer, load_llama
from support import weights
from support.cli import option, parse_options, pick_device
from support.errors import CheckpointError, UserError
from support.released import AUTHORS, AUTHORS_ENCODERS, LLAMA_SKIP, authors_tensors
from support.runs import latest_run
from support.weights import assign_weights, initialise

Place = str | Path  # of a file or a folder, on disk or the hub


@dataclass(frozen=True)
class MERVConfig:
    """One model: which encoders, how their grids are aligned and mixed, which LLM."""

    name: str
    encoders: tuple[EncoderConfig, ...]  # the order of e; paper 3.1
    llm: LlamaConfig  # paper 3.2: LLaMA-2 7B base
    pooled_side: int = 8  # h = w after pooling: 64 tokens a frame, table 2b
    projector: str = "avg2d"  # PROJECTORS, table 2a
    mixer: str = "cross_attention"  # MIXERS, table 2c

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the aligned features."""
        t, h, w = self.encoders[0].grid
        if self.projector != "all":
            h = w = 1 if self.projector == "class" else self.pooled_side
        return t // PROJECTORS[self.projector].time_stride, h, w

    @property
    def num_visual(self) -> int:
        """Visual tokens of a clip: n, or e * n where the encoders' stand in a row."""
        copies = len(self.encoders) if self.mixer == "concat_sequence" else 1
        return copies * math.prod(self.grid)

    @classmethod
    def from_dict(cls, values: dict) -> MERVConfig:
        """The inverse of dataclasses.asdict, after JSON made lists of tuples."""
        rgb = "pixel_mean", "pixel_std"
        four = [e | {key: tuple(e[key]) for key in rgb} for e in values["encoders"]]
        parts = {"encoders": tuple(EncoderConfig(**e) for e in four)}
        return cls(**values | parts | {"llm": LlamaConfig(**values["llm"])})


FOUR = ("languagebind", "dinov2", "vivit", "siglip")
_SETS = {"merv": FOUR} | {f"{one}-single": (one,) for one in FOUR}
_SETS |= {f"without-{one}": tuple(name for name in FOUR if name != one) for one in FOUR}
MERVS: dict[str, MERVConfig] = {
    name: MERVConfig(name, tuple(ENCODERS[one] for one in names), LLAMAS["llama2-7b"])
    for name, names in _SETS.items()
}
_small = tuple(ENCODERS[f"miniature-{name}"] for name in FOUR)
MERVS["miniature"] = MERVConfig("miniature", _small, LLAMAS["miniature"], pooled_side=2)

# ------------------------------------------------------------------------------ projector and mixer


class PooledProjector(nn.Module):
    """Equation 1, x_e = P(v_e) W_e: average pooling aligns the grids, a Linear the widths.

    The other projectors of table 2a differ in what comes before the Linear.
    """

    time_stride = 1  # frames that become one time step
    class_token = False  # whether it wants that of each frame instead of its patches

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__()
        self.side = side
        self.linear = nn.Linear(d_e, d)

    def pool(self, v: Tensor) -> Tensor:
        """Before any parameter, so once a clip: (b, t, h_e, w_e, d_e) -> (b, t, h, w, d_e)."""
        # WHY: pooling and the Linear commute (both are linear), so pool first: 4 times less work.
        frames = F.adaptive_avg_pool2d(v.flatten(0, 1).permute(0, 3, 1, 2), self.side)
        pooled = frames.permute(0, 2, 3, 1).unflatten(0, (len(v), -1, self.time_stride))
        return pooled.mean(2)  # over the frames that become one

    def forward(self, pooled: Tensor) -> Tensor:
        """(b, t, h, w, d_e) -> (b, n, d)."""
        return self.linear(pooled).flatten(1, 3)


class Mixer(nn.Module):
    """Table 2c, 25 % each: x_e (b, e, n, d) -> tokens (b, n, d), weights (b, e), here 1/e."""

    def __init__(self, d: int, e: int = 4):
        super().__init__()

    def weigh(self, x_bend: Tensor) -> Tensor:
        return torch.full(x_bend.shape[:2], 1 / x_bend.shape[1], device=x_bend.device)

    def forward(self, x_bend: Tensor) -> tuple[Tensor, Tensor]:
        weight_be = self.weigh(x_bend)
        return torch.einsum("be,bend->bnd", weight_be.to(x_bend.dtype), x_bend), weight_be


class CrossAttentionMixer(Mixer):
    """Equation 2: one learned query asks every encoder's mean token how much of it to take."""

    def __init__(self, d: int, e: int = 4):
        super().__init__(d, e)
        self.query = nn.Parameter(torch.zeros(d))  # Q; MERV.create draws it, as the paper does

    def weigh(self, x_bend: Tensor) -> Tensor:
        key_bed = x_bend.mean(2)  # one key an encoder, not one a token: a clip has one mixture
        score_be = key_bed @ self.query / math.sqrt(x_bend.shape[-1])
        return score_be.float().softmax(-1)


# ------------------------------------------ the other mixers and projectors, for tables 2c and 2a


class LearnedMixer(Mixer):
    """Table 2c, learnable W: one score an encoder, the same mixture for every clip."""

    def __init__(self, d: int, e: int = 4):
        super().__init__(d, e)
        self.scores = nn.Parameter(torch.zeros(e))

    def weigh(self, x_bend: Tensor) -> Tensor:
        return self.scores.float().softmax(-1).expand(len(x_bend), -1)


class SequenceMixer(Mixer):
    """Table 2c, concat (seq): all encoders' tokens in a row: (b, e * n, d)."""

    def forward(self, x_bend: Tensor) -> tuple[Tensor, Tensor]:
        return x_bend.flatten(1, 2), self.weigh(x_bend)


class ChannelMixer(Mixer):
    """Table 2c, concat (channel): features side by side and one Linear from sum(d_e) to d."""

    def forward(self, x_bend: Tensor) -> tuple[Tensor, Tensor]:
        # WHY: [v_1 v_2] [W_1; W_2] + b = v_1 W_1 + v_2 W_2 + b: the projectors hold the parts of
        # that matrix, and their biases add up to b. Weights do not come into it: 1/e each.
        return x_bend.sum(1), self.weigh(x_bend)


class AllTokensProjector(PooledProjector):
    """Table 2a, "257 tok", and the single encoders of figure 4a: every patch is a token."""

    def pool(self, v: Tensor) -> Tensor:
        return v


class ClassTokenProjector(AllTokensProjector):
    """Table 2a, class tok: each frame is its class token, one visual token."""

    class_token = True


class AttentionProjector(AllTokensProjector):
    """Table 2a, 2D Attn: h*w learned queries attend to the patches of each frame."""

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__(d_e, d, side)
        self.queries = nn.Parameter(torch.zeros(side * side, d_e))
        self.patch_norm, self.mlp_norm = nn.LayerNorm(d_e), nn.LayerNorm(d_e)
        self.attention = nn.MultiheadAttention(d_e, num_heads=8, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d_e, 4 * d_e), nn.GELU(), nn.Linear(4 * d_e, d_e))

    def forward(self, v: Tensor) -> Tensor:
        patches = self.patch_norm(v.flatten(0, 1).flatten(1, 2))  # (b*t, h_e*w_e, d_e)
        queries = self.queries.expand(len(patches), -1, -1)
        x = self.attention(queries, patches, patches, need_weights=False)[0]
        x = x + self.mlp(self.mlp_norm(x))
        return self.linear(x).unflatten(0, v.shape[:2]).flatten(1, 2)


class RegNetBlock(nn.Module):
    """1x1, depthwise 3x3, squeeze and excite, 1x1, around a shortcut (arXiv:2003.13678).

    Channels last, where a 1x1 convolution is a Linear: (b, t, h, w, wide_in) -> (..., wide).
    """

    def __init__(self, wide_in: int, wide: int):
        super().__init__()
        self.enter, self.leave, self.shortcut = (
            nn.Sequential(nn.Linear(width, wide, bias=False), nn.LayerNorm(wide))
            for width in (wide_in, wide, wide_in)
        )
        if wide_in == wide:
            self.shortcut = nn.Identity()
        self.depthwise = nn.Conv3d(wide, wide, (1, 3, 3), padding="same", groups=wide, bias=False)
        self.norm = nn.LayerNorm(wide)
        self.squeeze, self.excite = nn.Linear(wide, wide_in // 4), nn.Linear(wide_in // 4, wide)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.enter(x)).movedim(-1, 1)
        y = F.silu(self.norm(self.depthwise(y).movedim(1, -1)))
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return F.silu(self.leave(y * gate) + self.shortcut(x))


class ConvProjector(AllTokensProjector):
    """Table 2a, 2D Conv: three RegNet blocks at width d, average pooling, three more (Honeybee)."""

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__(d, d, side)
        self.before = nn.Sequential(*(RegNetBlock(d if i else d_e, d) for i in range(3)))
        self.after = nn.Sequential(*(RegNetBlock(d, d) for _ in range(3)))

    def forward(self, v: Tensor) -> Tensor:
        return super().forward(self.after(PooledProjector.pool(self, self.before(v))))


class Pooled3dProjector(PooledProjector):
    """Table 2a, 3D Avg: average pooling that halves time as well."""

    time_stride = 2


class Conv3dProjector(AllTokensProjector):
    """Table 2a, 3D Conv: one 3x3x3 convolution to width d, then the 3-D pool."""

    time_stride = 2

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__(d, d, side)
        # QUIRK: the text says 2x3x3; its 113 M parameters are those of 3x3x3 (ledger K11).
        self.conv = nn.Conv3d(d_e, d, 3, padding=1)

    def forward(self, v: Tensor) -> Tensor:
        x = self.conv(v.movedim(-1, 1)).movedim(1, -1)
        return super().forward(PooledProjector.pool(self, x))


PROJECTORS = {
    "avg2d": PooledProjector, "attn2d": AttentionProjector, "conv2d": ConvProjector,
    "avg3d": Pooled3dProjector, "conv3d": Conv3dProjector, "all": AllTokensProjector,
    "class": ClassTokenProjector,
}  # fmt: skip
MIXERS = {
    "cross_attention": CrossAttentionMixer, "concat_sequence": SequenceMixer,
    "concat_channel": ChannelMixer, "learned": LearnedMixer, "mean": Mixer,
}  # fmt: skip

# --------------------------------------------------------------------------------------------- MERV


@dataclass
class Answer:
    """One answer, and how much of each encoder is in what the LLM saw."""

    text: str
    weights: Tensor  # (e,) in the order of the config, float32; empty if there was no video


class MERV(nn.Module):
    """Frozen encoders, a projector for each, a mixer and a LLaMA."""

    def __init__(self, config: MERVConfig, encoders: list, llm: Llama, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer, self.llm = config, tokenizer, llm
        self.template = config.llm.template  # of the prompt: data.TEMPLATES
        d, projector = config.llm.hidden_size, PROJECTORS[config.projector]
        self.encoders, self.projectors = nn.ModuleDict(), nn.ModuleDict()
        for e, encoder in zip(config.encoders, encoders, strict=True):
            self.encoders[e.name] = encoder
            self.projectors[e.name] = projector(e.hidden_size, d, config.pooled_side)
        self.mixer = MIXERS[config.mixer](d, len(encoders))
        self.encoder_streams = False  # whether each encoder has a CUDA stream of its own

    @torch.no_grad()
    def features(self, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """encoder -> (v, T_e, 3, H, W) becomes encoder -> pooled (v, t, h, w, d_e); all frozen."""
        if not self.encoder_streams:
            return {name: self.see(name, pixels[name]) for name in self.encoders}
        device, pooled = torch.get_device_module(self.device), {}
        here, streams = device.current_stream(), {name: device.Stream() for name in self.encoders}
        for name, stream in streams.items():  # what one leaves idle of the GPU, others use
            stream.wait_stream(here)
            with device.stream(stream):
                pooled[name] = self.see(name, pixels[name])
        for stream in streams.values():
            here.wait_stream(stream)
        return pooled

    def see(self, name: str, frames: Tensor) -> Tensor:
        """One encoder's share of `features`."""
        encoder, project = self.encoders[name], self.projectors[name]
        weight = next(encoder.parameters())
        frames = frames.to(weight.device, weight.dtype)
        if frames.shape[1] == 1 and encoder.config.family != "vit":
            frames = frames.expand(-1, encoder.config.num_frames, -1, -1, -1)
        # FIX: a still is a clip of identical frames; an encoder of single frames sees it once, not
        # 16 times, and text-only rows run no encoder at all (ledger F8).
        v = encoder(frames, project.class_token)
        return project.pool(v.expand(-1, encoder.config.grid[0], -1, -1, -1))

    def encode(self, videos: dict, features: dict | None = None) -> tuple[Tensor, Tensor]:
        """Preprocessed clips, encoder -> (b, T_e, 3, H, W), or their `features` where these are
        known: visual tokens (b, n, d), weights (b, e)."""
        features = features or self.features(videos)
        dtype = next(self.projectors.parameters()).dtype
        x_e = [project(features[name].to(dtype)) for name, project in self.projectors.items()]
        return self.mixer(torch.stack(x_e, dim=1))

    def forward(self, batch: Batch, join: bool = False) -> tuple[Tensor, Tensor]:
        """Sum of cross-entropies over the labels of a batch, in nats, and mixing weights (v, e).

        A sum, not a mean: the loop divides by the tokens of the whole step (train.py).
        join: other processes run their encoders in this step, so this one must too.
        """
        visual, weights = None, torch.empty(0, len(self.encoders))
        if len(batch.visual_rows):
            visual, weights = self.encode(batch.pixels, batch.features)
        elif join:  # sharded encoders are gathered by all processes together: run, use nothing
            sides = {e.name: e.image_size for e in self.config.encoders}
            self.features({name: torch.zeros(1, 1, 3, s, s) for name, s in sides.items()})
        hidden = self.llm.hidden_states(inputs_embeds=self.interleave(batch, visual))
        # Position i predicts token i + 1. A label at place p of a text stands at p, or at n + p
        # where n visual tokens are in front: [BOS] v v v text.
        rows, places = batch.labelled
        shift = torch.zeros_like(batch.input_ids[:, 0])
        shift[batch.visual_rows] = 0 if visual is None else visual.shape[1]
        before = hidden[rows, places + shift[rows] - 1]
        loss = self.llm.loss(before, batch.input_ids[rows, places])
        if visual is None:
            # WHY: every rank must have a gradient for every trained parameter, or the reduction
            # of a step in which only some ranks have pictures would wait for ever.
            unused = [*self.projectors.parameters(), *self.mixer.parameters()]
            loss = loss + sum(p.sum() for p in unused) * 0.0
        return loss, weights.detach()

    def interleave(self, batch: Batch, visual: Tensor | None) -> Tensor:
        """[BOS] + visual + text for every row, right-padded: embeddings (b, s, d).

        Rows without a picture are [BOS] + text.
        """
        text = self.llm.embed_tokens(batch.input_ids)
        place = {row: index for index, row in enumerate(batch.visual_rows)}
        embeds = []
        for row, length in enumerate(batch.lengths):
            seen = visual[place[row]].to(text.dtype) if row in place else text[row, :0]
            embeds.append(torch.cat([text[row, :1], seen, text[row, 1:length]]))
        return torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)

    @torch.no_grad()
    def prefill(self, pixels: dict[str, Tensor]) -> tuple[KVCache, Tensor]:
        """Run [BOS] + visual tokens of one clip through the LLM, once for all its questions.

        pixels: encoder -> (T_e, 3, H, W), or nothing. Gives the cache and the weights (e,).
        FIX: the authors encode and read the video again for every question (ledger F2).
        """
        bos = torch.tensor([[self.tokenizer.bos_id]], device=self.device)
        embeds, weights = self.llm.embed_tokens(bos), torch.empty(1, 0)
        if pixels:
            visual, weights = self.encode({name: clip[None] for name, clip in pixels.items()})
            embeds = torch.cat([embeds, visual.to(embeds.dtype)], dim=1)
        cache = KVCache(self.config.llm, 1, embeds.shape[1], embeds.dtype, embeds.device)
        self.llm.hidden_states(inputs_embeds=embeds, cache=cache)
        return cache, weights[0].float().cpu()

    def answer(
        self, video, questions, max_new_tokens=256, temperature=0.0, top_p=1.0, generator=None
    ) -> list[Answer]:
        """Answer questions about a video; it is encoded and read once for all of them.

        video: a path, frames uint8 (T, 3, H, W), preprocessed pixels {encoder: (T_e, 3, H, W)} or
        None for text alone. questions: a string, or a list of strings and of conversations that
        end with a human turn (data.render_prompt). temperature 0 is greedy; else tokens are drawn
        with `generator` (Llama.generate).
        """
        prefix, weights = self.prefill(self.pixels(video))
        ids, lengths = self.prompts(questions)
        how = (max_new_tokens, temperature, top_p, generator, self.tokenizer.eos_id)
        replies = self.llm.generate(ids, None, lengths, prefix, *how)
        return [Answer(self.tokenizer.decode(reply).strip(), weights) for reply in replies]

    @torch.no_grad()
    def likelihoods(self, video, questions, options: list[list[str]]) -> list[Tensor]:
        """For each question the log-probabilities (k,), in nats, that its answer begins with the
        first token of each of its k options, such as ["A", "B"]. The rest is as for `answer`."""
        prefix, _ = self.prefill(self.pixels(video))
        ids, lengths = self.prompts(questions)
        cache = KVCache(self.config.llm, *ids.shape, prefix.keys.dtype, self.device, prefix)
        hidden = self.llm.hidden_states(ids, cache=cache, lengths=lengths)
        last = hidden[torch.arange(len(ids), device=self.device), lengths - 1]
        log_p = self.llm.logits(last).float().log_softmax(-1).cpu()
        first = [[self.tokenizer.encode(option)[0] for option in row] for row in options]
        return [row[ids] for row, ids in zip(log_p, first, strict=True)]

    def prompts(self, questions: str | list) -> tuple[Tensor, Tensor]:
        """What follows [BOS] + visual tokens when these are asked: right-padded ids (b, s), and
        their lengths (b,)."""
        questions, prompts = [questions] if isinstance(questions, str) else questions, []
        for asked in questions:
            turns = asked if isinstance(asked, list) else [{"from": "human", "value": asked}]
            turns = render_prompt(turns, TEMPLATES[self.template])
            prompts.append(torch.tensor(tokenize(turns, self.tokenizer)[0][1:]))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        return ids.to(self.device), lengths

    def pixels(self, video: str | Path | Tensor | dict[str, Tensor] | None) -> dict[str, Tensor]:
        """What `answer` takes as a video -> encoder -> (T_e, 3, H, W)."""
        if video is None or isinstance(video, dict):
            return video or {}
        if isinstance(video, Tensor):
            return {e.name: preprocess(video, e) for e in self.config.encoders}
        return load_pixels(video, self.config.encoders)

    @property
    def device(self) -> torch.device:
        return self.llm.embed_tokens.weight.device

    @classmethod
    def create(
        cls, config: MERVConfig, tokenizer, seed: int = 0, dtype=torch.float32, device="cpu"
    ) -> MERV:
        """A model to train. Encoders and LLM come from their sources, random where that is "";
        projectors and mixer are random. tokenizer: a Tokenizer, where its tokenizer.model is, or
        None for a model that will see but not read.
        """
        tokenizer = Tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        if tokenizer and tokenizer.vocab_size > config.llm.vocab_size:
            what = f"The tokenizer has {tokenizer.vocab_size} pieces, {config.llm.name} has fewer."
            fix = "take the tokenizer.model that lies beside the LLM's weights."
            raise UserError(what, "they do not belong together.", fix)
        parts = [encoders.load_encoder(e, e.source or None, dtype, device) for e in config.encoders]
        # RoPE has no last position: where a video takes half of LLaMA-2's 4096, it trains beyond.
        room = max(config.llm.max_positions, 2 * config.num_visual)
        llm = replace(config.llm, max_positions=room)
        llm = load_llama(llm, llm.source or None, dtype, device)
        config = replace(config, llm=llm.config, encoders=tuple(e.config for e in parts))
        model = cls(config, parts, llm, tokenizer).to(device, dtype)
        generator = torch.Generator().manual_seed(seed)
        for part in [model.projectors, model.mixer] + ([] if config.llm.source else [llm]):
            # WHY: keeps the size of activations: 0.016 at width 4096, but 0.09 at 128.
            initialise(part, generator, std=config.llm.hidden_size**-0.5)
        return model

    def save_pretrained(self, folder: Place, state: dict[str, Tensor] | None = None) -> None:
        """Write what `from_pretrained` reads: config.json, model.safetensors, tokenizer.model.

        Encoders of the hub stay references; others are copied. The folder gets its name when it is
        complete. state: full weights, if this model's are sharded.
        """
        partial = Path(f"{Path(folder)}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state = self.state_dict() if state is None else state
        trained = {k: v.contiguous() for k, v in state.items() if not k.startswith("encoders.")}
        weights.save_tensors(trained, partial / "model.safetensors")
        saved = []
        for e in self.config.encoders:
            if not e.source or Path(e.source).exists():
                prefix = f"encoders.{e.name}."
                own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                e = replace(e, source=f"encoders/{e.name}.safetensors")
                encoders.save_encoder(self.encoders[e.name], partial / e.source, own)
            saved.append(e)
        shutil.copyfile(self.tokenizer.path, partial / "tokenizer.model")
        config = asdict(replace(self.config, encoders=tuple(saved)))
        (partial / "config.json").write_text(json.dumps({"merv": config}, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    @classmethod
    def from_pretrained(
        cls, name_or_folder: Place, dtype=torch.float32, device="cpu", tokenizer=None, sources=None
    ) -> MERV:
        """A model to ask, in eval mode: a run of train.py, a folder of `save_pretrained`, or a
        checkpoint of the authors, by name (AUTHORS) or as a folder.

        tokenizer: LLaMA-2's tokenizer.model, where the checkpoint has none; else the LLM's own is
        asked of the hub. sources: encoder -> file, folder or hub id, instead of the config's.
        """
        folder = Path(name_or_folder)
        folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
        hub = str(name_or_folder) in AUTHORS
        place, inside = ("tyleryzhu/merv", f"{name_or_folder}/") if hub else (folder, "")
        path = weights.find_file(place, (inside + "config.json",))
        try:
            raw = weights.read_json(path)
            ours = "merv" in raw
            config = MERVConfig.from_dict(raw["merv"]) if ours else authors_config(folder.name, raw)
            with torch.device("meta"):  # a skeleton: all its parts come from files
                model = cls(config, [nn.Module() for _ in config.encoders], Llama(config.llm), None)
        except (AttributeError, KeyError, TypeError) as error:
            what, fix = f"{path} describes no MERV: {error!r}.", "name one, or train it again."
            why = "it is another model's or another version's, or of a run that has not ended."
            raise CheckpointError(what, why, fix) from error
        if ours:
            tensors, names = weights.read_tensors(place, ("model.safetensors",)), None
        else:
            parts = weights.read_tensors(place, (inside + "checkpoints/latest-checkpoint.pt",))
            tensors, names = authors_tensors(config, parts["model"])
        home = folder if (folder / "tokenizer.model").is_file() else config.llm.source
        model.tokenizer = Tokenizer(tokenizer or weights.find_file(home, ("tokenizer.model",)))
        assign_weights(model, tensors, names, LLAMA_SKIP, str(name_or_folder), dtype)
        for e in config.encoders:
            # A copied encoder is this folder's own: "" makes the next save_pretrained copy it too.
            copy = folder / e.source
            e = replace(e, source="") if copy.is_file() else e
            source = (sources or {}).get(e.name, e.source or copy)
            model.encoders[e.name] = encoders.load_encoder(e, source, dtype, device)
        loaded = (encoder.config for encoder in model.encoders.values())
        model.config = replace(config, encoders=tuple(loaded))
        return model.to(device).eval()

    def fingerprints(self) -> dict[str, str]:
        """encoder -> hash of all that decides its pooled features: weights, config, pooled size."""
        prints = {}
        for name, encoder in self.encoders.items():
            known = asdict(replace(encoder.config, name="", source=""))
            settings = [known, self.config.pooled_side, self.config.projector]
            digest = hashlib.sha256(json.dumps(settings).encode())
            for key, tensor in sorted(encoder.state_dict().items()):
                digest.update(key.encode() + tensor.detach().float().cpu().numpy().tobytes())
            prints[name] = digest.hexdigest()[:16]
        return prints


# ------------------------------------------------------------------------- the authors' checkpoints


def authors_config(name: str, found: dict) -> MERVConfig:
    """Our configuration for the authors' config.json."""
    settings = found["model"]
    backbones, tokens = settings["video_backbone_ids"], settings.get("visual_feature_length")
    # QUIRK: 32064 rows, 64 of them for a <PAD> that we never need (ledger K9).
    llm = replace(LLAMAS["llama2-7b"], vocab_size=32064, rope_bf16=True)
    if set(backbones) <= set(AUTHORS_ENCODERS):
        four = tuple(ENCODERS[AUTHORS_ENCODERS[backbone]] for backbone in backbones)
        side = math.isqrt(settings.get("projector_token_length", 64))
        for projector in ("avg2d", "all"):  # the visual tokens tell which
            config = MERVConfig(name, four, llm, side, projector)
            if tokens in (None, math.prod(config.grid)):
                return config
    what = f"{name}/config.json asks for {tokens} visual tokens from the encoders {backbones}."
    why = f"known are {', '.join(AUTHORS_ENCODERS)}, pooled or with all their patches."
    raise CheckpointError(what, why, "give a run of train.py or a released MERV.")


def drawn_clip(num_frames: int = 32, height: int = 72, width: int = 128) -> Tensor:
    """A red square that crosses a grey gradient from left to right: uint8 (T, 3, height, width)."""
    clip = torch.linspace(60, 200, width).byte().repeat(num_frames, 3, height, 1)
    side, red = height // 4, torch.tensor([220, 40, 40]).view(3, 1, 1)
    for frame in range(num_frames):
        left = frame * (width - side) // (num_frames - 1)
        clip[frame, :, side : 2 * side, left : left + side] = red
    return clip


def trace() -> None:
    """Print the shape of every stage of a tiny MERV with random weights on a drawn clip."""
    model, frames = MERV.create(MERVS["miniature"], tokenizer=None).eval(), drawn_clip()
    pixels = {name: clip[None] for name, clip in model.pixels(frames).items()}

    def show(stage: str, tensor: Tensor) -> None:
        print(f"{stage:<48} {tuple(tensor.shape)}")

    show("frames sampled (T, 3, H, W)", frames)
    for name, pooled in model.features(pixels).items():
        show(f"{name.removeprefix('miniature-')} preprocessed (b, T_e, 3, H, W)", pixels[name])
        show("  encoder -> grid (b, t, h_e, w_e, d_e)", model.encoders[name](pixels[name]))
        show("  pooled (b, t, h, w, d_e), eq. 1", pooled)
        show("  projected (b, n, d), eq. 1", model.projectors[name](pooled))
    visual, weights = model.encode(pixels)
    print(f"{'mixing weights (eq. 2), which sum to 1':<48} {weights.detach().numpy().round(4)}")
    show("visual tokens (b, n, d), eq. 2", visual)
    print(f"LLM input: [BOS] + {visual.shape[1]} visual tokens + text; here without text:")
    bos = model.llm.embed_tokens(torch.tensor([[1]]))
    logits = model.llm(inputs_embeds=torch.cat([bos, visual], dim=1))
    show("[BOS] + visual -> LLaMA -> logits (b, s, vocab)", logits)


@dataclass(frozen=True)
class AskConfig:
    """The command line of merv.py."""

    trace: bool = option(False, "print the shape of every stage of a tiny model and stop")
    checkpoint: str = option("", f"a run, a folder or one of {', '.join(AUTHORS)}; '': latest run")
    tokenizer: str = option("", "tokenizer.model, where the checkpoint has none")
    start: float = option(0.0, "first second of the clip")
    end: float = option(0.0, "last second of the clip; 0: all of it")
    max_new_tokens: int = option(256, "longest answer, in tokens")
    device: str = option("auto", "auto, cuda, mps or cpu")
    dtype: str = option("float32", "of weights and activations", ("float32", "bfloat16"))
    ask: tuple[str, ...] = option((), "a video, GIF, image or folder of images, then questions")


def main(arguments: list[str] | None = None) -> None:
    """`merv.py`: answer questions about a video."""
    args = parse_options(AskConfig, arguments, "Ask a video language model about a video.")
    if args.trace:
        return trace()
    if len(args.ask) < 2:
        sys.exit('error: give a video and a question, or --trace: merv.py clip.mp4 "What is it?"')
    video, *questions = args.ask
    try:
        checkpoint = args.checkpoint or latest_run()
        device, tokenizer = pick_device(args.device), args.tokenizer or None
        model = MERV.from_pretrained(checkpoint, getattr(torch, args.dtype), device, tokenizer)
        pixels = load_pixels(video, model.config.encoders, args.start or None, args.end or None)
        answers = model.answer(pixels, questions, args.max_new_tokens)
    except UserError as error:
        sys.exit(f"error: {error}")
    for question, answer in zip(questions, answers, strict=True):
        print(f"Q: {question}\nA: {answer.text}")
    mix = zip(model.config.encoders, answers[0].weights.tolist(), strict=True)
    print("mix: " + "  ".join(f"{e.name.removeprefix('miniature-')} {w:.2f}" for e, w in mix))


if __name__ == "__main__":
    main()
