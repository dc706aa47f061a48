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

Read before: encoders.py, llama.py, data.py. Read next: train.py, eval.py.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import IGNORE, TEMPLATES, Batch, load_pixels, preprocess, render_prompt, tokenize
from encoders import (
    ENCODERS,
    CheckpointError,
    Encoder,
    EncoderConfig,
    UserError,
    assign_weights,
    find_file,
    initialise,
    load_encoder,
    read_json,
    read_tensors,
    save_encoder,
    save_tensors,
)
from llama import LLAMAS, KVCache, Llama, LlamaConfig, Tokenizer, load_llama
from llama import NAMES as LLAMA_NAMES
from llama import SKIP as LLAMA_SKIP

# ------------------------------------------------------------------------------------------- config


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
    def num_frames(self) -> int:
        """T sampled from a clip: what the most demanding encoder wants."""
        return max(encoder.num_frames for encoder in self.encoders)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the aligned features."""
        t, h, w = self.encoders[0].grid
        if self.projector != "all":
            h = w = self.pooled_side
        return t // PROJECTORS[self.projector].time_stride, h, w

    @classmethod
    def from_dict(cls, values: dict) -> MERVConfig:
        """The inverse of dataclasses.asdict, after JSON made lists of tuples."""
        encoders = [
            EncoderConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in e.items()})
            for e in values["encoders"]
        ]
        llm = LlamaConfig(**values["llm"])
        return cls(**values | {"encoders": tuple(encoders), "llm": llm})


FOUR = ("languagebind", "dinov2", "vivit", "siglip")


def _presets() -> dict[str, MERVConfig]:
    four, llama = [ENCODERS[name] for name in FOUR], LLAMAS["llama2-7b"]
    configs = [MERVConfig("merv", tuple(four), llama)]
    for one in four:
        others = tuple(encoder for encoder in four if encoder != one)
        configs.append(MERVConfig(f"{one.name}-single", (one,), llama))
        configs.append(MERVConfig(f"without-{one.name}", others, llama))
    small = tuple(ENCODERS[f"miniature-{name}"] for name in FOUR)
    configs.append(MERVConfig("miniature", small, LLAMAS["miniature"], pooled_side=2))
    return {config.name: config for config in configs}


MERVS: dict[str, MERVConfig] = _presets()

# ------------------------------------------------------------------------------ projector and mixer


class PooledProjector(nn.Module):
    """Equation 1, x_e = P(v_e) W_e: average pooling aligns the grids, a Linear the widths.

    The other projectors of table 2a differ in what comes before the Linear.
    """

    time_stride = 1  # frames in, time steps out

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__()
        self.side = side
        self.linear = nn.Linear(d_e, d)

    def pool(self, v: Tensor) -> Tensor:
        """Before any parameter, so once a clip: (b, t, h_e, w_e, d_e) -> (b, t, h, w, d_e)."""
        # WHY: pooling and the Linear commute (both are linear), so pool first: 4 times less work.
        return over_frames(lambda frames: F.adaptive_avg_pool2d(frames, self.side), v)

    def forward(self, pooled: Tensor) -> Tensor:
        """(b, t, h, w, d_e) -> (b, n, d)."""
        return self.linear(pooled).flatten(1, 3)


def over_frames(layer, v: Tensor) -> Tensor:
    """Apply an image layer, channels first, to every frame of (b, t, h, w, channels)."""
    frames = layer(v.flatten(0, 1).permute(0, 3, 1, 2))
    return frames.permute(0, 2, 3, 1).unflatten(0, v.shape[:2])


class CrossAttentionMixer(nn.Module):
    """Equation 2: one learned query asks every encoder's mean token how much of it to take."""

    def __init__(self, d: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d))  # Q

    def forward(self, x_bend: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features -> their mixture (b, n, d) and the weights (b, e), which sum to 1."""
        key_bed = x_bend.mean(2)  # one key an encoder, not one a token: a clip has one mixture
        score_be = key_bed @ self.query / math.sqrt(x_bend.shape[-1])
        weight_be = score_be.float().softmax(-1)
        mixed_bnd = torch.einsum("be,bend->bnd", weight_be.to(x_bend.dtype), x_bend)
        return mixed_bnd, weight_be


# ------------------------------------------------------------ the other projectors, for table 2a


class AllTokensProjector(PooledProjector):
    """Table 2a, "257 tok", and the single encoders of figure 4a: every patch is a token."""

    def pool(self, v: Tensor) -> Tensor:
        return v


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


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (frames, channels, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RegNetBlock(nn.Module):
    """1x1, depthwise 3x3, squeeze and excite, 1x1, around a shortcut (arXiv:2003.13678)."""

    def __init__(self, wide_in: int, wide: int):
        super().__init__()
        self.squeeze = nn.Sequential(
            nn.Conv2d(wide_in, wide, 1, bias=False), LayerNorm2d(wide), nn.SiLU(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            LayerNorm2d(wide), nn.SiLU(),
        )  # fmt: skip
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide_in // 4, 1), nn.SiLU(),
            nn.Conv2d(wide_in // 4, wide, 1), nn.Sigmoid(),
        )  # fmt: skip
        self.expand = nn.Sequential(nn.Conv2d(wide, wide, 1, bias=False), LayerNorm2d(wide))
        self.shortcut = nn.Identity()
        if wide_in != wide:
            self.shortcut = nn.Sequential(
                nn.Conv2d(wide_in, wide, 1, bias=False), LayerNorm2d(wide)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.squeeze(x)
        return F.silu(self.expand(y * self.excite(y)) + self.shortcut(x))


class ConvProjector(AllTokensProjector):
    """Table 2a, 2D Conv: three RegNet blocks at width d, average pooling, three more (Honeybee)."""

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__(d, d, side)
        self.blocks = nn.Sequential(
            *(RegNetBlock(d if i else d_e, d) for i in range(3)),
            nn.AdaptiveAvgPool2d(side),
            *(RegNetBlock(d, d) for _ in range(3)),
        )

    def forward(self, v: Tensor) -> Tensor:
        return self.linear(over_frames(self.blocks, v)).flatten(1, 3)


class Pooled3dProjector(PooledProjector):
    """Table 2a, 3D Avg: average pooling that halves time as well."""

    time_stride = 2

    def pool(self, v: Tensor) -> Tensor:
        size = (max(1, v.shape[1] // 2), self.side, self.side)
        return F.adaptive_avg_pool3d(v.movedim(-1, 1), size).movedim(1, -1)


class Conv3dProjector(Pooled3dProjector):
    """Table 2a, 3D Conv: one 3x3x3 convolution to width d, then the 3-D pool."""

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__(d, d, side)
        # QUIRK: the text says 2x3x3; its 113 M parameters are those of 3x3x3 (ledger K11).
        self.conv = nn.Conv3d(d_e, d, 3, padding=1)

    def pool(self, v: Tensor) -> Tensor:
        return v

    def forward(self, v: Tensor) -> Tensor:
        v = self.conv(v.movedim(-1, 1)).movedim(1, -1)
        return super().forward(super().pool(v))


PROJECTORS = {
    "avg2d": PooledProjector, "attn2d": AttentionProjector, "conv2d": ConvProjector,
    "avg3d": Pooled3dProjector, "conv3d": Conv3dProjector, "all": AllTokensProjector,
}  # fmt: skip
MIXERS = {"cross_attention": CrossAttentionMixer}

# --------------------------------------------------------------------------------------------- MERV


@dataclass
class Answer:
    """One answer, and how much of each encoder is in what the LLM saw."""

    text: str
    weights: Tensor  # (e,) in the order of the config, float32; empty if there was no video


class MERV(nn.Module):
    """Frozen encoders, a projector for each, a mixer and a LLaMA."""

    def __init__(
        self, config: MERVConfig, encoders: list[Encoder], llm: Llama, tokenizer: Tokenizer
    ):
        super().__init__()
        self.config, self.tokenizer, self.llm = config, tokenizer, llm
        self.encoders = nn.ModuleDict(
            {e.name: m for e, m in zip(config.encoders, encoders, strict=True)}
        )
        d, projector = config.llm.hidden_size, PROJECTORS[config.projector]
        self.projectors = nn.ModuleDict(
            {e.name: projector(e.hidden_size, d, config.pooled_side) for e in config.encoders}
        )
        self.mixer = MIXERS[config.mixer](d)

    # ------------------------------------------------------------------------------ video -> tokens

    @torch.no_grad()
    def features(self, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """encoder -> (v, T_e, 3, H, W) becomes encoder -> pooled (v, t, h, w, d_e); all frozen."""
        pooled = {}
        for name, encoder in self.encoders.items():
            frames, t = pixels[name].to(self.dtype), encoder.config.grid[0]
            if frames.shape[1] == 1 and encoder.config.family != "vit":
                frames = frames.expand(-1, encoder.config.num_frames, -1, -1, -1)
            grid = encoder(frames)
            # FIX: a still is a clip of identical frames; an encoder of single frames sees it once,
            # not 16 times, and text-only rows run no encoder at all (ledger F8).
            grid = grid.expand(-1, t, -1, -1, -1) if grid.shape[1] == 1 else grid
            pooled[name] = self.projectors[name].pool(grid)
        return pooled

    def mix(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """encoder -> pooled (v, t, h, w, d_e) becomes visual tokens (v, n, d), weights (v, e)."""
        x_e = [
            projector(features[name].to(projector.linear.weight.dtype))
            for name, projector in self.projectors.items()
        ]
        return self.mixer(torch.stack(x_e, dim=1))

    def encode(self, videos: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Preprocessed clips, encoder -> (b, T_e, 3, H, W): tokens (b, n, d), weights (b, e)."""
        return self.mix(self.features(videos))

    # --------------------------------------------------------------------------------------- loss

    def forward(self, batch: Batch, join: bool = False) -> tuple[Tensor, Tensor]:
        """Sum of cross-entropies over the labels of a batch, in nats, and mixing weights (v, e).

        A sum, not a mean: the loop divides by the tokens of the whole step (train.py).
        join: other processes run their encoders in this step, so this one must too.
        """
        visual, weights = None, torch.empty(0, len(self.encoders))
        if len(batch.visual_rows):
            visual, weights = self.mix(batch.features or self.features(batch.pixels))
        elif (
            join
        ):  # sharded encoders are gathered by all processes together: take part, use nothing
            sizes = {e.name: e.image_size for e in self.config.encoders}
            self.features(
                {n: torch.zeros(1, 1, 3, s, s, device=self.device) for n, s in sizes.items()}
            )
        embeds, labels = self.interleave(batch, visual)
        hidden = self.llm.hidden_states(inputs_embeds=embeds)
        hidden, targets = hidden[:, :-1], labels[:, 1:]  # position i predicts token i + 1
        labelled = targets != IGNORE
        loss = self.llm.loss(hidden[labelled], targets[labelled])
        if visual is None:
            # WHY: every rank must have a gradient for every trained parameter, or the reduction
            # of a step in which only some ranks have pictures would wait for ever.
            unused = [*self.projectors.parameters(), *self.mixer.parameters()]
            loss = loss + sum(p.sum() for p in unused) * 0.0
        return loss, weights.detach()

    def interleave(self, batch: Batch, visual: Tensor | None) -> tuple[Tensor, Tensor]:
        """[BOS] + visual + text for every row: embeddings (b, s, d), labels (b, s), right-padded.

        Rows without a picture are [BOS] + text. A visual position carries no label.
        """
        text = self.llm.embed_tokens(batch.input_ids)
        place = {row: index for index, row in enumerate(batch.visual_rows.tolist())}
        embeds, labels = [], []
        for row, length in enumerate(batch.lengths.tolist()):
            embed, label = text[row, :length], batch.labels[row, :length]
            if row in place:
                seen = visual[place[row]].to(embed.dtype)
                embed = torch.cat([embed[:1], seen, embed[1:]])
                label = torch.cat([label[:1], label.new_full((len(seen),), IGNORE), label[1:]])
            embeds.append(embed)
            labels.append(label)
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(embeds, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORE)

    # ------------------------------------------------------------------------------------- answers

    @torch.no_grad()
    def prefill(self, pixels: dict[str, Tensor]) -> tuple[KVCache, Tensor]:
        """Run [BOS] + visual tokens of one clip through the LLM, once for all its questions.

        FIX: the authors encode and read the video again for every question (ledger F2).

        pixels: encoder -> (T_e, 3, H, W), or nothing. Gives the cache and the weights (e,).
        """
        bos = torch.tensor([[self.tokenizer.bos_id]], device=self.device)
        embeds, weights = self.llm.embed_tokens(bos), torch.empty(1, 0)
        if pixels:
            clip = {name: frames[None].to(self.device) for name, frames in pixels.items()}
            visual, weights = self.encode(clip)
            embeds = torch.cat([embeds, visual.to(embeds.dtype)], dim=1)
        cache = KVCache(self.config.llm, 1, embeds.shape[1], embeds.dtype, embeds.device)
        self.llm.hidden_states(inputs_embeds=embeds, cache=cache)
        return cache, weights[0].float().cpu()

    def answer(
        self,
        videos: str | Path | Tensor | dict[str, Tensor] | list | None,
        questions: str | list,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        template: str | None = None,
    ) -> list[Answer]:
        """Answer questions about a video; it is encoded and read once for all of them.

        videos: a path, frames uint8 (T, 3, H, W), preprocessed pixels {encoder: (T_e, 3, H, W)} or
        None for text alone; or a list of these, one a question (repeated ones are read once).
        questions: strings, or conversations that end with a human turn (data.render_prompt).
        """
        questions = [questions] if isinstance(questions, str) else questions
        videos = videos if isinstance(videos, list) else [videos] * len(questions)
        groups: dict[object, list[int]] = {}
        for index, (video, _) in enumerate(zip(videos, questions, strict=True)):
            key = video if isinstance(video, str | Path) else id(video)
            groups.setdefault(key, []).append(index)
        answers: dict[int, Answer] = {}
        for indices in groups.values():
            prefix, weights = self.prefill(self.pixels(videos[indices[0]]))
            prompts = [self.prompt_ids(questions[index], template) for index in indices]
            lengths = torch.tensor([len(prompt) for prompt in prompts])
            padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
            replies = self.llm.generate(
                padded.to(self.device),
                lengths=lengths,
                prefix=prefix,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                generator=generator,
                eos_id=self.tokenizer.eos_id,
            )
            for index, ids in zip(indices, replies, strict=True):
                answers[index] = Answer(self.tokenizer.decode(ids).strip(), weights)
        return [answers[index] for index in range(len(questions))]

    def prompt_ids(
        self, question: str | list[dict[str, str]], template: str | None = None
    ) -> Tensor:
        """Ids of what follows [BOS] + visual tokens when a question is asked."""
        if isinstance(question, str):
            question = [{"from": "human", "value": question}]
        turns = render_prompt(question, TEMPLATES[template or self.config.llm.template])
        ids, _ = tokenize(turns, self.tokenizer)
        return torch.tensor(ids[1:])

    def pixels(self, video: str | Path | Tensor | dict[str, Tensor] | None) -> dict[str, Tensor]:
        """What `answer` takes as a video -> encoder -> (T_e, 3, H, W)."""
        if video is None or isinstance(video, dict):
            return video or {}
        if isinstance(video, Tensor):
            return {e.name: preprocess(video, e) for e in self.config.encoders}
        return load_pixels(video, self.config.encoders)

    # ------------------------------------------------------------------------------------- weights

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoders.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return self.llm.embed_tokens.weight.device

    @classmethod
    def create(
        cls,
        config: MERVConfig,
        tokenizer: Tokenizer | str | Path,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> MERV:
        """A model to train. Encoders and LLM come from their sources, random where that is "";
        projectors and mixer are random.
        """
        if isinstance(tokenizer, str | Path):
            tokenizer = Tokenizer(tokenizer)
        if tokenizer.vocab_size > config.llm.vocab_size:
            raise UserError(
                f"The tokenizer has {tokenizer.vocab_size} pieces, {config.llm.name} only "
                f"{config.llm.vocab_size} embeddings.",
                "they do not belong together.",
                "take the tokenizer.model that lies beside the LLM's weights.",
            )
        encoders = [load_encoder(e, e.source or None, dtype, device) for e in config.encoders]
        llm = load_llama(config.llm, config.llm.source or None, dtype, device)
        config = replace(config, encoders=tuple(e.config for e in encoders))
        model = cls(config, encoders, llm, tokenizer).to(device, dtype)
        generator = torch.Generator().manual_seed(seed)
        for part in [model.projectors, model.mixer] + ([] if config.llm.source else [llm]):
            # WHY: keeps the size of activations: 0.016 at width 4096, but 0.09 at 128.
            initialise(part, generator, std=config.llm.hidden_size**-0.5)
        return model

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write what `from_pretrained` reads: config.json, model.safetensors, tokenizer.model.

        Encoders of the hub stay references; others are copied. The folder gets its name when it is
        complete. state: full weights, if this model's are sharded.
        """
        folder = Path(folder)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state = self.state_dict() if state is None else state
        trained = {k: v.contiguous() for k, v in state.items() if not k.startswith("encoders.")}
        save_tensors(trained, partial / "model.safetensors")
        encoders = []
        for config in self.config.encoders:
            if not config.source or Path(config.source).exists():
                prefix = f"encoders.{config.name}."
                weights = {
                    k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)
                }
                config = replace(config, source=f"encoders/{config.name}.safetensors")
                save_encoder(self.encoders[config.name], partial / config.source, weights)
            encoders.append(config)
        shutil.copyfile(self.tokenizer.path, partial / "tokenizer.model")
        saved = asdict(replace(self.config, encoders=tuple(encoders)))
        (partial / "config.json").write_text(json.dumps({"merv": saved}, indent=2))
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        tokenizer: str | Path | None = None,
        sources: dict[str, str | Path] | None = None,
    ) -> MERV:
        """A model to ask, in eval mode: a run of train.py, a folder of `save_pretrained`, or a
        checkpoint of the authors, by name (AUTHORS) or as a folder.

        tokenizer: LLaMA-2's tokenizer.model, where the checkpoint has none; else the LLM's own is
        asked of the hub. sources: encoder -> file, folder or hub id, instead of the config's.
        """
        folder = Path(name_or_folder)
        folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
        if str(name_or_folder) in AUTHORS:
            found = read_json(find_file(AUTHORS_HUB, (f"{name_or_folder}/config.json",)))
        else:
            found = read_json(find_file(folder, ("config.json",)))
        if "merv" in found:
            try:
                config = MERVConfig.from_dict(found["merv"])
            except (KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{folder}/config.json does not describe a MERV.",
                    f"{type(error).__name__}: {error}",
                    "another version wrote it, or a hand changed it; train or copy it again.",
                ) from error
            tensors, names, skip = read_tensors(folder, ("model.safetensors",)), None, {}
        else:
            config, skip = authors_config(name_or_folder, found), LLAMA_SKIP
            hub, file = str(name_or_folder) in AUTHORS, "checkpoints/latest-checkpoint.pt"
            where = (AUTHORS_HUB, f"{name_or_folder}/{file}") if hub else (folder, file)
            parts = read_tensors(where[0], where[1:])["model"]
            tensors, names = authors_tensors(config, parts)
        encoders = []
        for e in config.encoders:
            copied = (folder / e.source).is_file()
            source = (sources or {}).get(e.name, folder / e.source if copied else e.source)
            # A copied encoder is this folder's own: "" makes the next save_pretrained copy it too.
            encoders.append(
                load_encoder(replace(e, source="" if copied else e.source), source, dtype, device)
            )
        config = replace(config, encoders=tuple(e.config for e in encoders))
        with torch.device("meta"):
            model = cls(config, [nn.Module() for _ in encoders], Llama(config.llm), None)
        beside = (
            find_file(folder, ("tokenizer.model",), required=False) if folder.is_dir() else None
        )
        tokenizer = tokenizer or beside or find_file(config.llm.source, ("tokenizer.model",))
        model.tokenizer = Tokenizer(tokenizer)
        assign_weights(model, tensors, names, skip, str(name_or_folder), dtype)
        model.encoders = nn.ModuleDict(
            {e.name: m for e, m in zip(config.encoders, encoders, strict=True)}
        )
        return model.to(device).eval()

    def fingerprints(self) -> dict[str, str]:
        """encoder -> hash of all that decides its pooled features: weights, config, pooled size."""
        prints = {}
        for name, encoder in self.encoders.items():
            settings = [asdict(replace(encoder.config, source="")), self.config.pooled_side]
            settings.append(self.config.projector)  # each pools in its own way
            digest = hashlib.sha256(json.dumps(settings).encode())
            for key, tensor in sorted(encoder.state_dict().items()):
                digest.update(key.encode() + tensor.detach().float().cpu().numpy().tobytes())
            prints[name] = digest.hexdigest()[:16]
        return prints


# ------------------------------------------------------------------------- the authors' checkpoints

AUTHORS_HUB = "tyleryzhu/merv"
AUTHORS = ("merv-frozen", "merv-full", *(f"{name}-single" for name in FOUR))
AUTHORS_ENCODERS = {  # their names -> ours
    "languagebind-video-noclass": "languagebind",
    "dinov2-video-all-tokens": "dinov2",
    "vivit-google-b-all-no-cls-16frames": "vivit",
    "siglip-vit-b16-224px-all-no-cls": "siglip",
}


def authors_config(name: str | Path, found: dict) -> MERVConfig:
    """Our configuration for the authors' config.json."""
    settings = found.get("model", {})
    backbones, tokens = (settings.get(k) for k in ("video_backbone_ids", "visual_feature_length"))
    # QUIRK: 32064 rows, 64 of them for a <PAD> that we never need (ledger K9).
    llm = replace(LLAMAS["llama2-7b"], vocab_size=32064, rope_bf16=True)
    if backbones and set(backbones) <= set(AUTHORS_ENCODERS):
        encoders = tuple(ENCODERS[AUTHORS_ENCODERS[backbone]] for backbone in backbones)
        side = math.isqrt(settings.get("projector_token_length", 64))
        for projector in ("avg2d", "all"):  # the visual tokens tell which
            config = MERVConfig(Path(name).name, encoders, llm, side, projector)
            if tokens in (None, math.prod(config.grid)):
                return config
    raise CheckpointError(
        f"{name}/config.json asks for {tokens} visual tokens from the encoders {backbones}.",
        f"known are {', '.join(AUTHORS_ENCODERS)}, pooled or with all their patches.",
        "give a run of train.py, a folder of save_pretrained, or a released MERV.",
    )


def authors_tensors(
    config: MERVConfig, parts: dict[str, dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an authors' checkpoint, and which of them is which of ours.

    Older files say `projector` without a number, and `adapter`.
    """
    tensors = {k.removeprefix("llm."): v for k, v in parts["llm_backbone"].items()}
    for key, tensor in parts.get("projectors", parts.get("projector", {})).items():
        tensors["projectors." + (key if key[0].isdigit() else f"0.{key}")] = tensor
    fusion = parts.get("feature_fusion", parts.get("adapter", {}))
    if len(config.encoders) == 1 and not fusion:  # the softmax over one is 1, whatever the query
        tensors["query"] = torch.zeros(config.llm.hidden_size)
    else:
        tensors["query"] = fold_query(fusion)
    names = {f"llm.{ours}": theirs for ours, theirs in LLAMA_NAMES.items()}
    names["mixer.query"] = "query"
    for index, encoder in enumerate(config.encoders):
        names[f"projectors.{encoder.name}.linear"] = f"projectors.{index}.projector.projector"
    return tensors, names


def fold_query(fusion: dict[str, Tensor]) -> Tensor:
    """The authors' fusion module as one query (d,): Q_eff = W_k' (W_q Q + b_q) sqrt(d / d_inner).

    QUIRK: 44 million parameters, of which inference sees one vector (ledger K5). Their score is
    (W_q Q + b_q) . (W_k x + b_k) / sqrt(d_inner). W_k moves over to the query; b_k adds the same to
    every encoder's score and cancels in the softmax. Values and output projection are never used.
    """
    wq, wk = (fusion.get(f"attention.{name}_proj_weight", torch.empty(1, 1)) for name in "qk")
    inner, d = len(wq), wk.shape[-1]
    attention = nn.MultiheadAttention(inner, 1, kdim=d, vdim=d, device="meta")
    wanted = {f"attention.{k}": list(v.shape) for k, v in attention.state_dict().items()}
    wanted["Q"] = [1, inner]
    shapes = {name: list(tensor.shape) for name, tensor in fusion.items()}
    if shapes != wanted:
        wrong = sorted(n for n in shapes | wanted if shapes.get(n) != wanted.get(n))
        raise CheckpointError(
            f"The fusion module does not fit: {', '.join(wrong)}.",
            f"wanted {wanted}, found {shapes}.",
            "check that the checkpoint is complete.",
        )
    bias = fusion["attention.in_proj_bias"][:inner].double()
    query = wq.double() @ fusion["Q"].double().squeeze(0) + bias
    return wk.double().mT @ query * math.sqrt(d / inner)


# ------------------------------------------------------------------------------------- command line


def drawn_clip(num_frames: int = 32, height: int = 72, width: int = 128) -> Tensor:
    """A red square that crosses a grey gradient from left to right: uint8 (T, 3, height, width)."""
    clip = (
        torch.linspace(60, 200, width).expand(num_frames, 3, height, width).to(torch.uint8).clone()
    )
    side = height // 4
    for frame in range(num_frames):
        left = frame * (width - side) // (num_frames - 1)
        square = clip[frame, :, height // 3 : height // 3 + side, left : left + side]
        square.copy_(torch.tensor([220, 40, 40])[:, None, None])
    return clip


class ByteTokenizer:
    """LLaMA's vocabulary without SentencePiece: ids 3..258 are the 256 bytes. For `trace` only."""

    bos_id, eos_id, vocab_size = 1, 2, 259

    def encode(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="replace")


def trace() -> None:
    """Print the shape of every stage of a tiny MERV with random weights on a drawn clip."""
    model = MERV.create(MERVS["miniature"], ByteTokenizer()).eval()
    frames, x_e = drawn_clip(model.config.num_frames), []

    def line(stage: str, value: object, note: str = "") -> None:
        shape = str(tuple(value.shape)) if isinstance(value, Tensor) else str(value)
        print(f"{stage:<34} {shape:<24} {note}".rstrip())

    line("frames sampled", frames, "(T, 3, H, W) uint8, a drawn clip")
    for name, clip in model.pixels(frames).items():
        print("\n" + name.removeprefix("miniature-"))
        line("  preprocessed", clip[None], "(b, T_e, 3, H, W)")
        grid = model.encoders[name](clip[None])
        line("  encoder -> grid", grid, "(b, t, h_e, w_e, d_e)")
        pooled = model.projectors[name].pool(grid)
        line("  pooled (eq. 1)", pooled, "(b, t, h, w, d_e)")
        x_e.append(model.projectors[name](pooled))
        line("  projected (eq. 1)", x_e[-1], "(b, n, d)")
    mixed, weights = model.mixer(torch.stack(x_e, dim=1))
    print()
    line("stacked", torch.stack(x_e, dim=1), "(b, e, n, d)")
    line("mixing weights (eq. 2)", weights, "  ".join(f"{w:.4f}" for w in weights[0].tolist()))
    line("visual tokens", mixed, "(b, n, d)")
    question = "Which way does the square move?"
    n, text = mixed.shape[1], len(model.prompt_ids(question))
    line("LLM input", f"{1 + n + text} positions", f"[BOS] + {n} visual + {text} text (bytes)")
    reply = model.answer(frames, question, max_new_tokens=8)[0]
    line("answer of random weights", repr(reply.text))


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" takes CUDA, then MPS, then the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def latest_run(folder: str | Path = "runs") -> Path:
    """The run whose checkpoint was written last."""
    runs = sorted(Path(folder).glob("*/checkpoint/config.json"), key=lambda f: f.stat().st_mtime)
    if not runs:
        raise CheckpointError(
            f"No trained run under {folder}/.",
            "nothing has been trained here yet.",
            "run `torchrun train.py` first, or name a checkpoint with --checkpoint.",
        )
    return runs[-1].parent.parent


def option(default: object, text: str, nargs: str = ""):
    """A field of a dataclass that is a command line; nargs "?" or "*" makes it nameless."""
    return field(default=default, metadata={"help": text, "nargs": nargs})


def parse_options(cls: type, arguments: list[str] | None, description: str):
    """Fill the dataclass `cls` from the command line: --field-name VALUE for each field.

    An unknown option is an error that names the nearest one; flags are --name and --no-name.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for f in fields(cls):
        name, how = "--" + f.name.replace("_", "-"), {"type": type(f.default)}
        if isinstance(f.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif f.metadata["nargs"]:
            name, how = f.name, {"nargs": f.metadata["nargs"]}
        parser.add_argument(name, default=f.default, help=f.metadata["help"], **how)
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [o for action in parser._actions for o in action.option_strings]
        near = difflib.get_close_matches(unknown[0], known, 1)
        parser.error(
            f"unknown option {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return cls(**vars(values))


def choose(table: dict, name: str, what: str):
    """The entry of a table of presets."""
    if name not in table:
        raise UserError(f"No {what} {name}.", "there is none.", f"choose of {', '.join(table)}.")
    return table[name]


def progress(what: str, done: int, total: int, note: str = "") -> None:
    """One line on stderr: rewritten in place on a terminal, every tenth of the way elsewhere."""
    live = sys.stderr.isatty()
    if live or done == total or done * 10 // total > (done - 1) * 10 // total:
        bar = "#" * (20 * done // total)
        text = f"{what:<20} [{bar:<20}] {done}/{total} {note}"
        end = "\n" if done == total or not live else ""
        print(("\r\x1b[K" if live else "") + text, end=end, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class AskConfig:
    """The command line of merv.py."""

    trace: bool = option(False, "print the shape of every stage of a tiny model and stop")
    checkpoint: str = option("", f"a run, a folder or one of {', '.join(AUTHORS)}; '': latest run")
    tokenizer: str = option("", "tokenizer.model, where the checkpoint has none")
    start: float = option(0.0, "first second of the clip")
    end: float = option(math.inf, "last second of the clip")
    max_new_tokens: int = option(256, "longest answer, in tokens")
    temperature: float = option(0.0, "0 is greedy")
    seed: int = option(0, "of sampling, if the temperature is above 0")
    device: str = option("auto", "auto, cuda, mps or cpu")
    dtype: str = option("float32", "float32 or bfloat16")
    video: str = option("", "video, GIF, image or folder of images", "?")
    questions: tuple[str, ...] = option((), "one or more questions", "*")


def main(arguments: list[str] | None = None) -> None:
    """`merv.py`: answer questions about a video."""
    args = parse_options(AskConfig, arguments, "Ask a video language model about a video.")
    if args.trace:
        return trace()
    if not args.questions:
        sys.exit('error: give a video and a question, or --trace: merv.py clip.mp4 "What is it?"')
    try:
        device = pick_device(args.device)
        checkpoint = args.checkpoint or latest_run()
        dtype = choose({"float32": torch.float32, "bfloat16": torch.bfloat16}, args.dtype, "dtype")
        model = MERV.from_pretrained(checkpoint, dtype, device, args.tokenizer or None)
        cut = (args.start or None, args.end if args.end < math.inf else None)
        pixels = load_pixels(args.video, model.config.encoders, *cut)
        generator = torch.Generator(device).manual_seed(args.seed)
        answers = model.answer(
            pixels, list(args.questions), args.max_new_tokens, args.temperature, generator=generator
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    for question, answer in zip(args.questions, answers, strict=True):
        print(f"Q: {question}\nA: {answer.text}")
    names = [e.name.removeprefix("miniature-") for e in model.config.encoders]
    weights = zip(names, answers[0].weights.tolist(), strict=True)
    print("mix: " + "  ".join(f"{name} {weight:.2f}" for name, weight in weights))


if __name__ == "__main__":
    main()
