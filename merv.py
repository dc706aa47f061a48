"""MERV, a video language model: four frozen vision encoders, one learned mixture, LLaMA-2.

    python merv.py --trace                              print the shape of every stage
    python merv.py VIDEO "question" ["question" ...]    ask the checkpoint trained last
    python merv.py [VIDEO]                              chat with it; each line of input is a turn

"MERV: Multi-Encoder Representation of Videos" (ICML 2025), https://arxiv.org/abs/2501.01426.
Section, equation and table numbers in the code are those of this paper.

Shape letters, also used as suffixes of names, so x_bend is (b, e, n, d); full-size values:
    b  batch            t, h, w  aligned grid: time steps, rows, columns (16, 8, 8)
    e  encoders (4)     n        visual tokens, n = t * h * w (1024)
    d  width of the LLM (4096)   d_e  width of one encoder (768 or 1024)
    T, H, W  frames and pixels of a clip; v: rows of a batch that have a video or image

    frames (b, T, 3, H, W) -> encoder -> features v_e  (b, t, h_e, w_e, d_e)   frozen
                           -> pool    -> pooled        (b, t, h, w, d_e)       equation 1
                           -> Linear  -> x_e           (b, n, d)               equation 1
    x_e of all encoders    -> mixer   -> visual tokens (b, n, d)               equation 2
    [BOS] + visual tokens + text -> LLaMA-2 -> answer

Read first: from here down to the class MERV. Then read encoders.py, llama.py and data.py, and
after them the rest of this file. Read next: eval.py, train.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import encoders
from data import TEMPLATES, Batch, load_pixels, preprocess, render_prompt, stack, tokenize
from encoders import ENCODERS, EncoderConfig
from llama import LLAMAS, KVCache, Llama, LlamaConfig, Tokenizer, load_llama
from support import cli, variants, weights
from support.cli import DTYPES, option, parse_options, pick_device, pick_dtype
from support.conversation import TextStream, converse
from support.errors import CheckpointError, UserError
from support.features import own_code
from support.files import new_folder
from support.records import clean
from support.released import AUTHORS, LLAMA_SKIP, authors_settings, authors_tensors, explained
from support.replies import common_beginning
from support.runs import latest_run
from support.video import load_video
from support.weights import assign_weights, initialise

# -------------------------------------------------------------------------------- equations 1 and 2


def pooling_matrix(size: int, side: int, device: torch.device) -> Tensor:
    """The matrix (side, size) that averages `size` values down to `side`. Row i averages window i,
    floor(i * size / side) up to ceil((i + 1) * size / side). From 14 to 8, windows overlap."""
    window = torch.arange(side, device=device)[:, None]
    first = window * size // side
    end = ((window + 1) * size + side - 1) // side  # rounded up
    place = torch.arange(size, device=device)
    inside = (first <= place) & (place < end)
    return inside / inside.sum(1, keepdim=True)


def project(v_bthwd: Tensor, linear: nn.Module, side: int) -> Tensor:
    """Equation 1: x_e = P(v_e) W_e, for one encoder: (b, t, h_e, w_e, d_e) -> (b, n, d).

    P averages each frame's grid to side x side, so all encoders get the same grid; W_e, a Linear,
    brings them to the width of the LLM. P does not change features that are already pooled.
    """
    # WHY matrices: they equal F.adaptive_avg_pool2d, but they can also pool 14 to 8 on Apple's MPS,
    # and their backward pass is deterministic on CUDA.
    # WHY pool first: both are linear, so P(v) W = P(v W), and the Linear does 3 to 4 times less.
    _, _, h, w, d_e = v_bthwd.shape
    rows = pooling_matrix(h, side, v_bthwd.device)
    columns = pooling_matrix(w, side, v_bthwd.device)
    pooled = rows @ v_bthwd.float().flatten(3)  # (b, t, side, w_e * d_e): rows averaged
    pooled = columns @ pooled.unflatten(3, (w, d_e))  # (b, t, side, side, d_e): columns too
    x_e = linear(pooled.to(v_bthwd.dtype))  # (b, t, side, side, d)
    return x_e.flatten(1, 3)


class PooledProjector(nn.Module):
    """Equation 1 as a module: it holds W_e. Its interface is that of support/variants.py."""

    time_stride = 1  # frames that become one time step
    class_token = False  # whether it takes class tokens instead of patches
    keeps_grid = False  # whether each patch becomes a token

    def __init__(self, d_e: int, d: int, side: int):
        super().__init__()
        self.side = side
        self.linear = nn.Linear(d_e, d)

    def pool(self, v_bthwd: Tensor) -> Tensor:
        """P alone, which has no parameters: (b, t, h_e, w_e, d_e) -> (b, t, side, side, d_e)."""
        pooled = project(v_bthwd, nn.Identity(), self.side)
        return pooled.unflatten(1, (-1, self.side, self.side))

    def forward(self, pooled: Tensor) -> Tensor:
        return project(pooled, self.linear, self.side)


class CrossAttentionMixer(nn.Module):
    """Equation 2: o = sum_e softmax_e(Q . mean_n(x_e) / sqrt(d)) x_e, with one learned query Q."""

    keeps_all_tokens = False  # it mixes the tokens of a place into one

    def __init__(self, d: int, e: int = 4):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d))  # Q; MERV.create draws it at random, paper 3.2

    def mixing_weights(self, x_bend: Tensor) -> Tensor:
        """(b, e, n, d) -> (b, e), float32, summing to 1."""
        key_bed = x_bend.mean(2)  # one key per encoder, so a clip has one mixture for all tokens
        score_be = key_bed @ self.query / math.sqrt(x_bend.shape[-1])
        return score_be.float().softmax(-1)

    def forward(self, x_bend: Tensor) -> tuple[Tensor, Tensor]:
        weight_be = self.mixing_weights(x_bend)
        o_bnd = torch.einsum("be,bend->bnd", weight_be.to(x_bend.dtype), x_bend)
        return o_bnd, weight_be


# --------------------------------------------------------------------------------------------- MERV


class MERV(nn.Module):
    """Frozen encoders, a projector for each of them, a mixer and a LLaMA (paper 3)."""

    def __init__(self, config: MERVConfig, encoders: list, llm: Llama, tokenizer: Tokenizer | None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.llm = llm
        self.template = config.llm.template  # of prompts, a key of data.TEMPLATES
        self.encoder_streams = False  # run each encoder in a CUDA stream of its own
        self.streams = {}  # encoder -> its stream, created at first use
        self.encoders = nn.ModuleDict()
        self.projectors = nn.ModuleDict()
        d = config.llm.hidden_size
        projector = PROJECTORS[config.projector]
        for e, encoder in zip(config.encoders, encoders, strict=True):
            self.encoders[e.name] = encoder
            self.projectors[e.name] = projector(e.hidden_size, d, config.pooled_side)
        self.mixer = MIXERS[config.mixer](d, len(encoders))

    def train(self, mode: bool = True) -> MERV:
        """Switch to training or evaluation; the frozen encoders are always evaluated."""
        super().train(mode)
        self.encoders.eval()
        return self

    # ---- from pixels to visual tokens

    @torch.no_grad()
    def pooled_features(self, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the frozen part: {encoder: (v, T_e, 3, H, W)} -> {encoder: (v, t, h, w, d_e)}."""
        if self.encoder_streams:
            return self.pooled_features_in_streams(pixels)
        return {name: self.pooled_features_of(name, pixels[name]) for name in self.encoders}

    def pooled_features_in_streams(self, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same, with the encoders overlapping to keep the GPU busy."""
        device = torch.get_device_module(self.device)
        here = device.current_stream()
        if not self.streams:
            # WHY once: the memory allocator keeps free blocks per stream, and torch has 32 streams.
            # New streams at every call would in the end hold the activations 32 times.
            self.streams = {name: device.Stream() for name in self.encoders}
        pooled = {}
        for name, stream in self.streams.items():
            stream.wait_stream(here)  # the pixels may still be on their way
            with device.stream(stream):
                pooled[name] = self.pooled_features_of(name, pixels[name])
        for stream in self.streams.values():
            here.wait_stream(stream)  # the caller may use the results at once
        return pooled

    def pooled_features_of(self, name: str, frames: Tensor) -> Tensor:
        """Run one encoder and P of its projector: (v, T_e, 3, H, W) -> (v, t, h, w, d_e)."""
        encoder = self.encoders[name]
        projector = self.projectors[name]
        parameter = next(encoder.parameters())
        frames = frames.to(parameter.device, parameter.dtype)
        is_still = frames.shape[1] == 1
        if is_still and not encoder.encodes_frames_alone:
            frames = frames.expand(-1, encoder.config.num_frames, -1, -1, -1)
        # FIX: a still is a clip of identical frames. An encoder of single frames encodes it once,
        # not 16 times, and rows of text alone run no encoder (ledger F8).
        features = encoder(frames, projector.class_token)
        features = features.expand(-1, encoder.config.grid[0], -1, -1, -1)  # a still: t steps
        return projector.pool(features)

    def encode(
        self, videos: dict[str, Tensor], pooled: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Turn clips into visual tokens (b, n, d) and mixing weights (b, e).

        videos: encoder -> preprocessed clips (b, T_e, 3, H, W). pooled: `pooled_features` of other
        clips, which were computed earlier; the tokens of these clips come first.
        """
        parts = [pooled] if pooled else []
        if videos:
            parts.append(self.pooled_features(videos))
        dtype = next(self.projectors.parameters()).dtype
        x_e = []
        for name, project_e in self.projectors.items():
            features = torch.cat([part[name].to(dtype) for part in parts])
            x_e.append(project_e(features))
        visual, mixing_weights = self.mixer(torch.stack(x_e, dim=1))
        if visual.shape[1] != self.config.num_visual:
            what = f"A clip has {visual.shape[1]} visual tokens, expected {self.config.num_visual}."
            why = "attributes of the projector's and the mixer's class say how many to expect."
            raise UserError(what, why, "correct those that support/variants.py describes.")
        return visual, mixing_weights

    # ---- the loss

    def forward(self, batch: Batch, join: bool = False) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy of a batch's labels, in nats, and mixing weights (v, e).

        A sum, because train.py divides by the number of labels in the whole step.
        join: run the encoders even if this batch has no pixels, because other processes do.
        """
        visual = None
        mixing_weights = torch.empty(0, len(self.encoders), device=self.device)
        if join and not batch.pixels:
            self.run_encoders_on_nothing()
        if batch.visual_rows:
            visual, mixing_weights = self.encode(batch.pixels, batch.pooled)
        embeds = self.interleave(batch, visual)
        if visual is None:
            # WHY: all processes gather layers and reduce gradients together. So each of them needs
            # the same backward pass, even with text only and a frozen LLM. These terms give every
            # trained parameter a gradient of zeros; the other processes would wait for one.
            for parameter in [*self.projectors.parameters(), *self.mixer.parameters()]:
                embeds = embeds + parameter.sum() * 0.0
        # The hidden state of one token predicts the next token. Visual tokens come after [BOS], so
        # they shift the text. With n = 3, and the label "red" at position 2 of the text:
        #
        #     position in the text      0               1     2
        #     sequence                [BOS]  v  v  v   what  red
        #     position in the sequence  0    1  2  3    4     5
        #                                               ^ its hidden state predicts "red": 2 + n - 1
        rows, positions = batch.labelled
        shift = torch.zeros_like(batch.input_ids[:, 0])  # (b,): n, or 0 for rows of text alone
        if visual is not None:
            shift[batch.visual_rows] = visual.shape[1]
        wanted = rows, positions + shift[rows] - 1
        predictors = self.llm.hidden_states(inputs_embeds=embeds, keep=wanted)
        loss = self.llm.loss(predictors, batch.input_ids[rows, positions])
        return loss, mixing_weights.detach()

    def run_encoders_on_nothing(self) -> None:
        """Run every encoder on a blank still: all processes gather sharded encoders together."""
        sides = {e.name: e.image_size for e in self.config.encoders}
        self.pooled_features({name: torch.zeros(1, 1, 3, s, s) for name, s in sides.items()})

    def interleave(self, batch: Batch, visual: Tensor | None) -> Tensor:
        """Embed each row as [BOS] + visual tokens + text, padded on the right: (b, s, d).

        visual (v, n, d): tokens of the rows with a video or image, in the order of visual_rows.
        """
        texts = self.llm.embed_tokens(batch.input_ids)  # (b, s, d)
        if visual is None:
            return texts
        n = visual.shape[1]
        sequences = nn.functional.pad(texts, (0, 0, 0, n))  # (b, s + n, d): texts, then zeros
        of_clips = texts[batch.visual_rows]
        parts = [of_clips[:, :1], visual.to(texts.dtype), of_clips[:, 1:]]
        sequences[batch.visual_rows] = torch.cat(parts, dim=1)
        ends = [batch.lengths[row] + n for row in batch.visual_rows]
        return sequences[:, : max(ends + batch.lengths)]

    # ---- answers

    def prefill(self, pixels: dict[str, Tensor], room: int = 0) -> tuple[KVCache, Tensor]:
        """Run [BOS] + visual tokens of one clip through the LLM, once for all its questions.

        pixels: encoder -> (T_e, 3, H, W), or {} for text alone. Returns the KV cache and the mixing
        weights (e,). room: the number of tokens by which the cache may be extended.
        FIX: the authors encode a video again for every question (ledger F2).
        """
        cache, mixing_weights = self.prefill_clips([pixels], room)
        return cache, mixing_weights[0]

    @torch.no_grad()
    def prefill_clips(self, clips: list[dict], room: int = 0) -> tuple[KVCache, Tensor]:
        """The same for c clips at once, or c times text alone: a KV cache of c rows and the mixing
        weights (c, e)."""
        c = len(clips)
        bos = torch.full((c, 1), self.tokenizer.bos_id, device=self.device)
        embeds = self.llm.embed_tokens(bos)
        mixing_weights = torch.empty(c, 0)
        if clips[0]:
            visual, mixing_weights = self.encode(stack(clips))
            embeds = torch.cat([embeds, visual.to(embeds.dtype)], dim=1)
        length = embeds.shape[1] + room
        cache = KVCache(self.config.llm, c, length, embeds.dtype, embeds.device)
        self.llm.hidden_states(inputs_embeds=embeds, cache=cache)
        return cache, mixing_weights.float().cpu()

    def answer(
        self, video, questions, max_new_tokens=256, temperature=0.0, top_p=1.0, generator=None,
        stream: Callable[[str], object] | None = None,
    ) -> list[Answer] | list[list[Answer]]:  # fmt: skip
        """Answer questions about a video, which is encoded once for all of them.

        video: a path, frames uint8 (T, 3, H, W), preprocessed pixels {encoder: (T_e, 3, H, W)}, or
        None for text alone. questions: a string, or a list of strings and of conversations that
        end with a human turn (data.render_prompt). Temperature 0 decodes greedily; otherwise tokens
        are drawn with `generator` (Llama.generate). Returns an Answer for each question.

        video may also be a list of videos, and questions a list with the questions of each, or a
        string to ask about all. The result is then a list of Answers for each video. This is
        faster, because all rows run through the model together.

        stream: a function that gets each new piece of the text; only for a single question.
        """
        sampling = {"temperature": temperature, "top_p": top_p, "generator": generator}
        videos = video if isinstance(video, list) else [video]
        if isinstance(questions, str):
            asked = [[questions] for _ in videos]
        elif isinstance(video, list):
            asked = [[each] if isinstance(each, str) else each for each in questions]
        else:
            asked = [questions]
        if stream is not None:
            if [len(each) for each in asked] != [1]:
                why = "the pieces of several answers would be mixed up."
                fix = "ask one question at a time, or leave out `stream`."
                raise UserError("Only a single question can be streamed.", why, fix)
            pieces = TextStream(self.tokenizer, stream)
            sampling["on_ids"] = pieces.add
        answers = self.answer_clips(videos, asked, max_new_tokens, **sampling)
        if stream is not None:
            pieces.close()
        return answers if isinstance(video, list) else answers[0]

    def answer_clips(self, videos: list, questions: list, max_new_tokens: int, **sampling):
        """Answer the questions of each video; see `answer`. Returns a list of Answers for each."""
        if len(videos) != len(questions):
            what = f"There are {len(videos)} videos, but questions for {len(questions)}."
            fix = "give a list of questions for each video, such as [[...], [...]]."
            raise UserError(what, "each video is asked its own questions.", fix)
        clips = [self.pixels(video) for video in videos]
        answers: list[list[Answer]] = [[] for _ in videos]
        # Prefixes must be equally long, so clips and text alone run one after the other.
        for has_video in (True, False):
            numbers = []
            for number, clip in enumerate(clips):
                if questions[number] and bool(clip) == has_video:
                    numbers.append(number)
            if not numbers:
                continue
            prefix, mixing_weights = self.prefill_clips([clips[number] for number in numbers])
            texts_asked = [questions[number] for number in numbers]
            replies = self.reply(prefix, texts_asked, has_video, max_new_tokens, **sampling)
            for number, texts, mixture in zip(numbers, replies, mixing_weights, strict=True):
                answers[number] = [Answer(text, mixture) for text in texts]
        return answers

    def reply(
        self, prefix: KVCache, asked: list[list], visual: bool, max_new_tokens: int, **sampling
    ) -> list[list[str]]:
        """Generate the texts that answer asked[i], the questions after row i of the prefix.

        visual: whether the prefix has visual tokens.
        """
        # The cache needs equally many rows after each prefix, so a short list repeats its last:
        #     [[a b c] [d]]  ->  rows a b c d d d
        most = max(map(len, asked))
        rows = []
        for questions in asked:
            rows.extend([*questions, *questions[-1:] * (most - len(questions))])
        ids, lengths = self.prompts(rows, visual)
        replies = self.llm.generate(
            ids, None, lengths, prefix, max_new_tokens, eos_id=self.tokenizer.eos_id, **sampling
        )
        texts = [self.tokenizer.decode(reply).strip() for reply in replies]
        return [texts[i * most :][: len(questions)] for i, questions in enumerate(asked)]

    @torch.no_grad()
    def likelihoods(self, video, questions, options: list[list[str]]) -> list[Tensor]:
        """Score the options of each question, such as ["A", "B"], by the first tokens that differ.

        Returns, for each question, a log-probability (k,) in nats for each of its k options: that
        of its first token or, where all options begin with the same tokens, of the token after
        these. Other arguments are those of `answer`.
        """
        pixels = self.pixels(video)
        prefix, _ = self.prefill(pixels)
        option_ids, shared = [], []
        for choices in options:
            encoded = [self.tokenizer.encode(choice) for choice in choices]
            option_ids.append(encoded)
            shared.append(common_beginning(encoded))
        ids, lengths = self.prompts(questions, bool(pixels), shared)
        cache = KVCache(self.config.llm, *ids.shape, prefix.keys.dtype, self.device, prefix)
        ends = torch.arange(len(ids), device=self.device), lengths - 1
        last = self.llm.hidden_states(ids, cache=cache, lengths=lengths, keep=ends)
        log_p = self.llm.logits(last).float().log_softmax(-1).cpu()
        scores = []
        for row, encoded, begun in zip(log_p, option_ids, shared, strict=True):
            scores.append(row[[choice[len(begun)] for choice in encoded]])
        return scores

    def prompts(
        self, questions: str | list, visual: bool = True, begun: list | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokenize what follows [BOS] + visual tokens: ids (b, s) padded on the right, and the
        number of real tokens in each row (b,). visual: whether there are visual tokens.
        begun: the ids with which each answer begins, if any."""
        if isinstance(questions, str):
            questions = [questions]
        prompts = []
        begun = begun or [[]] * len(questions)
        for question, answer_ids in zip(questions, begun, strict=True):
            prompts.append(torch.tensor(self.prompt_ids(question, visual) + answer_ids))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        return padded.to(self.device), lengths

    def prompt_ids(self, question: str | list[dict], visual: bool = True) -> list[int]:
        """The ids of one question or conversation, without [BOS]."""
        conversation = question
        if isinstance(question, str):
            conversation = [{"from": "human", "value": question}]
        turns = render_prompt(conversation, TEMPLATES[self.template], visual)
        ids, _ = tokenize([(clean(text), is_answer) for text, is_answer in turns], self.tokenizer)
        return ids[1:]

    def pixels(self, video: str | Path | Tensor | dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Preprocess any form of video that `answer` takes: encoder -> (T_e, 3, H, W)."""
        if video is None or isinstance(video, dict):
            return video or {}
        if isinstance(video, Tensor):
            return {e.name: preprocess(video, e) for e in self.config.encoders}
        return load_pixels(video, self.config.encoders)

    @property
    def device(self) -> torch.device:
        """Where the LLM is."""
        return self.llm.embed_tokens.weight.device

    # ---- making, saving and loading a model

    @classmethod
    def create(cls, config: MERVConfig, tokenizer, seed: int = 0) -> MERV:
        """Make a model to train, with random projectors and mixer.

        Encoders and LLM are loaded from their sources, or random where the source is "".
        tokenizer: a Tokenizer, a path to tokenizer.model, or None for a model without one.
        Weights keep the dtype of their files and stay mapped to them, so that a process holds only
        what it uses; train.shard casts each part when it shards it.
        """
        if isinstance(tokenizer, str | Path):
            tokenizer = Tokenizer(tokenizer)
        if tokenizer:
            tokenizer.require_fit(config.llm)
        loaded = [encoders.load_encoder(e, e.source or None, None) for e in config.encoders]
        # A video may need more than half of LLaMA-2's 4096 positions. RoPE can be computed for any
        # position, so the limit is raised, to leave as many positions for text as for the video.
        max_positions = max(config.llm.max_positions, 2 * config.num_visual)
        llm_config = replace(config.llm, max_positions=max_positions)
        llm = load_llama(llm_config, llm_config.source or None, None)
        encoder_configs = tuple(encoder.config for encoder in loaded)
        config = replace(config, llm=llm.config, encoders=encoder_configs)
        model = cls(config, loaded, llm, tokenizer)
        untrained = [model.projectors, model.mixer]
        if not config.llm.source:
            untrained.append(llm)
        generator = torch.Generator().manual_seed(seed)
        for part in untrained:
            # WHY: 1 / sqrt(d) keeps the size of activations: 0.016 at width 4096, 0.06 at 256.
            initialise(part, generator, std=config.llm.hidden_size**-0.5)
        if llm in untrained:
            # WHY: a small LLM whose layers add little at first learns faster (docs/train.md).
            with torch.no_grad():
                for layer in llm.layers:
                    layer.self_attn.o_proj.weight.mul_(0.1)
                    layer.mlp.down_proj.weight.mul_(0.1)
        return model

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write config.json, model.safetensors and tokenizer.model for `from_pretrained`.

        Encoders from the hub are stored as references, others are copied. The folder is never
        half written. If it is an older checkpoint, it is replaced; if it holds something else, such
        as results, UserError. state: the full state_dict, if this process holds only a shard.
        """
        folder = Path(folder).resolve()
        weights.require_replaceable(folder)
        if self.tokenizer is None:
            fix = "set model.tokenizer = llama.Tokenizer(file) first."
            raise UserError("Only a model with a tokenizer is saved.", "it has none.", fix)
        if state is None:
            state = self.state_dict()
        with new_folder(folder) as partial:
            partial.mkdir(parents=True)
            saved_encoders = []
            for e in self.config.encoders:
                saved_encoders.append(self.save_encoder(e, partial, state))
            trained = {k: v.contiguous() for k, v in state.items() if not k.startswith("encoders.")}
            weights.save_tensors(trained, partial / "model.safetensors")
            shutil.copyfile(self.tokenizer.path, partial / "tokenizer.model")
            config = asdict(replace(self.config, encoders=tuple(saved_encoders)))
            (partial / "config.json").write_text(json.dumps({"merv": config}, indent=2))

    def save_encoder(self, e: EncoderConfig, folder: Path, state: dict) -> EncoderConfig:
        """Copy an encoder into a checkpoint's folder, unless it is of the hub. Returns its
        configuration there."""
        if e.source and not Path(e.source).exists():
            return e
        if e.source:
            # WHY read again: training may hold frozen encoders in bfloat16, and a saved file should
            # not depend on the machine that wrote it.
            frozen = encoders.load_encoder(e, e.source).state_dict()
        else:
            prefix = f"encoders.{e.name}."
            own = [name for name in state if name.startswith(prefix)]
            frozen = {name.removeprefix(prefix): state[name].float() for name in own}
        e = replace(e, source=f"encoders/{e.name}.safetensors")
        encoders.save_encoder(self.encoders[e.name], folder / e.source, frozen)
        return e

    @classmethod
    def from_pretrained(
        cls, name_or_folder, dtype=torch.float32, device="cpu", tokenizer=None, sources=None
    ) -> MERV:
        """Load a model in eval mode: a run of train.py, a folder that `save_pretrained` wrote, or
        an authors' checkpoint, by its name (a key of AUTHORS) or as a folder.

        tokenizer: a tokenizer.model (default: the checkpoint's, else the LLM's, from the hub).
        sources: encoder -> file, folder or hub id to use instead of the config's.
        """
        checkpoint = Checkpoint(name_or_folder)
        model = checkpoint.build_skeleton()
        tensors, names = checkpoint.read_weights(model)
        model.tokenizer = checkpoint.load_tokenizer(model.config, tokenizer)
        assign_weights(model, tensors, names, LLAMA_SKIP, str(name_or_folder), dtype, device)
        checkpoint.load_encoders(model, sources or {}, dtype, device)
        return model.to(device).eval()

    def fingerprints(self) -> dict[str, str]:
        """Hash what determines each encoder's pooled features: weights, settings, how many frames
        of a clip are loaded, and the code of a user's own encoder or projector.

        All encoders share the frames that the most demanding one wants. Of 8 frames, an encoder of
        4 sees numbers 0, 2, 4, 6; without an encoder of 8, it sees the first, the last and two
        between them.
        """
        frames = max(config.num_frames for config in self.config.encoders)
        fingerprints = {}
        for name, encoder in self.encoders.items():
            settings = asdict(encoder.config)
            for without_effect in ("name", "label", "source"):
                del settings[without_effect]
            known = [settings, frames, self.config.pooled_side, self.config.projector]
            known += own_code(encoder) + own_code(self.projectors[name])
            digest = hashlib.sha256(json.dumps(known).encode())
            for key, tensor in sorted(encoder.state_dict().items()):
                digest.update(key.encode())
                digest.update(tensor.detach().float().cpu().numpy().tobytes())
            fingerprints[name] = digest.hexdigest()[:16]
        return fingerprints


@dataclass
class Answer:
    """One answer of the model, and the mixing weights of its video."""

    text: str
    weights: Tensor  # mixing weights (e,), float32, in the order of the config; (0,) without video


# ------------------------------------------------------------------------------------ configuration

PROJECTORS = {  # table 2a
    "avg2d": PooledProjector,  # average each frame to side x side: the paper's choice
    "attn2d": variants.AttentionProjector,  # learned queries attend to each frame
    "conv2d": variants.ConvProjector,  # convolutions before and after the average
    "avg3d": variants.Pooled3dProjector,  # averages pairs of frames too
    "conv3d": variants.Conv3dProjector,  # one convolution over space and time
    "all": variants.AllTokensProjector,  # no pooling
    "class": variants.ClassTokenProjector,  # one token per frame
}
MIXERS = {  # table 2c
    "cross_attention": CrossAttentionMixer,  # equation 2
    "concat_sequence": variants.SequenceMixer,  # e times as many tokens
    "concat_channel": variants.ChannelMixer,  # one Linear over all features side by side
    "learned": variants.LearnedMixer,  # one mixture for all clips
    "mean": variants.MeanMixer,  # 1/e of each
}


@dataclass(frozen=True)
class MERVConfig:
    """The architecture of one model: its encoders, projector, mixer and LLM."""

    name: str
    encoders: tuple[EncoderConfig, ...]  # in the order of e; paper 3.1
    llm: LlamaConfig  # paper 3.2: the LLaMA-2 7B base model
    pooled_side: int = 8  # h = w after pooling: 64 tokens per frame is best in table 2b
    projector: str = "avg2d"  # a key of PROJECTORS
    mixer: str = "cross_attention"  # a key of MIXERS

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the tokens of one encoder."""
        t, h, w = self.encoders[0].grid
        projector = PROJECTORS[self.projector]
        t = t // projector.time_stride
        if projector.class_token:
            return t, 1, 1
        if getattr(projector, "keeps_grid", False):
            return t, h, w
        return t, self.pooled_side, self.pooled_side

    @property
    def num_visual(self) -> int:
        """Visual tokens of a clip: n, or e times n if the mixer concatenates tokens."""
        keeps_all = getattr(MIXERS[self.mixer], "keeps_all_tokens", False)
        return math.prod(self.grid) * (len(self.encoders) if keeps_all else 1)

    @classmethod
    def from_dict(cls, values: dict) -> MERVConfig:
        """The inverse of dataclasses.asdict, after JSON has turned tuples into lists."""
        encoder_configs = []
        for settings in values["encoders"]:
            pixels = {key: tuple(settings[key]) for key in ("pixel_mean", "pixel_std")}
            encoder_configs.append(EncoderConfig(**(settings | pixels)))
        llm = LlamaConfig(**values["llm"])
        return cls(**(values | {"encoders": tuple(encoder_configs), "llm": llm}))


FOUR = ("languagebind", "dinov2", "vivit", "siglip")  # the paper's encoders, in its order


def with_llama_7b(name: str, labels: tuple[str, ...]) -> MERVConfig:
    """A full-size MERV with these entries of ENCODERS."""
    encoder_configs = tuple(ENCODERS[label] for label in labels)
    return MERVConfig(name, encoder_configs, LLAMAS["llama2-7b"])


MERVS: dict[str, MERVConfig] = {"merv": with_llama_7b("merv", FOUR)}
for _label in FOUR:
    _others = tuple(other for other in FOUR if other != _label)
    MERVS[f"{_label}-single"] = with_llama_7b(f"{_label}-single", (_label,))  # table 8
    MERVS[f"without-{_label}"] = with_llama_7b(f"without-{_label}", _others)  # table 7
MERVS["miniature"] = MERVConfig(
    name="miniature",
    encoders=tuple(ENCODERS[f"miniature-{label}"] for label in FOUR),
    llm=LLAMAS["miniature"],
    pooled_side=3,  # of a grid of 4x4
)


def choose_encoders(config: MERVConfig, names: str) -> tuple[EncoderConfig, ...]:
    """Look up encoders by a comma-separated list such as "siglip,dinov2".

    A name is a label of the model's own encoders, else a key of ENCODERS. So "siglip" means
    miniature-siglip in the miniature. If a name appears twice, all get numbers: siglip-1, siglip-2.
    """
    own = {encoder.label: encoder for encoder in config.encoders}
    known = ENCODERS | own
    listed = names.split(",")
    chosen = []
    for number, name in enumerate(listed, start=1):
        if name not in known:
            what = f"There is no encoder {name}."
            fix = f"choose among {', '.join(known)}."
            raise UserError(what, f"{config.name} has {', '.join(own)}.", fix)
        encoder = known[name]
        if len(set(listed)) < len(listed):
            encoder = replace(encoder, name=f"{encoder.name}-{number}", label=f"{name}-{number}")
        chosen.append(encoder)
    return tuple(chosen)


# -------------------------------------------------------------------------------------- checkpoints


CHOICES = {  # fields of config.json that name an entry of a table
    "projector": PROJECTORS, "mixer": MIXERS, "family": encoders.FAMILIES,
    "activation": encoders.ACTIVATIONS, "template": sorted(TEMPLATES.keys() - {"caption"}),
    "resize": ("squash", "short_side"), "interpolation": ("bicubic", "bilinear"),
}  # fmt: skip


class Checkpoint:
    """The files of a checkpoint, ours or the authors', and the steps that load them."""

    def __init__(self, name_or_folder: str | Path):
        self.folder = Path(name_or_folder)
        if self.folder.is_file():
            why = "a checkpoint is a folder with a config.json, weights and more."
            raise CheckpointError(
                f"{self.folder} is a file.", why, "name the folder of config.json."
            )
        if (self.folder / "checkpoint").is_dir():  # a run of train.py
            self.folder = self.folder / "checkpoint"
        self.place = self.folder  # what weights.find_file searches: a folder or a hub id
        self.prefix = ""  # in front of file names
        if str(name_or_folder) in AUTHORS and not (self.folder / "config.json").is_file():
            self.place = "tyleryzhu/merv"
            self.prefix = f"{name_or_folder}/"
        self.is_ours = True

    def build_skeleton(self) -> MERV:
        """A MERV as config.json describes it, on the meta device: all weights come from files."""
        path = weights.find_file(self.place, (self.prefix + "config.json",))
        try:
            raw = weights.read_json(path)
            self.is_ours = "merv" in raw
            if self.is_ours:
                self.check_config(raw["merv"], str(path))
                config = MERVConfig.from_dict(raw["merv"])
            else:
                config = authors_config(self.folder.name, raw, str(path))
            if config.num_visual >= config.llm.max_positions:
                wanted = f"fewer visual tokens than {config.llm.name} can read"
                raise weights.field_error(str(path), "pooled_side", config.pooled_side, wanted)
            with torch.device("meta"):
                placeholders = [nn.Module() for _ in config.encoders]
                return MERV(config, placeholders, Llama(config.llm), None)
        except (AttributeError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
            what = f"{path} does not describe a MERV: {error!r}."
            why = "it belongs to another model or version, or to a run that has not ended."
            fix = "name another checkpoint, or train this one again."
            raise CheckpointError(what, why, fix) from error

    def check_config(self, stated: dict, place: str) -> None:
        """Raise CheckpointError if a field of our config.json is missing or impossible."""
        weights.require_fields(stated, MERVConfig, place)
        weights.require_fields(stated["llm"], LlamaConfig, place)
        for settings in stated["encoders"]:
            weights.require_fields(settings, EncoderConfig, place)
        weights.check_fields(stated, place, CHOICES)

    def read_weights(self, model: MERV) -> tuple[dict[str, Tensor], dict | None]:
        """All tensors but the encoders', and a table of names if they differ from ours."""
        if self.is_ours:
            return weights.read_tensors(self.place, ("model.safetensors",)), None
        file = self.prefix + "checkpoints/latest-checkpoint.pt"
        tensors = weights.read_tensors(self.place, (file,))
        d = model.config.llm.hidden_size
        with explained(f"{self.place}/{file}"):
            return authors_tensors(list(model.projectors), d, tensors["model"])

    def load_tokenizer(self, config: MERVConfig, path: str | Path | None) -> Tokenizer:
        """The tokenizer at `path`, else the checkpoint's own, else the LLM's."""
        if path is None:
            path = config.llm.source
            if (self.folder / "tokenizer.model").is_file():
                path = self.folder
            path = weights.find_file(path, ("tokenizer.model",))
        tokenizer = Tokenizer(path)
        tokenizer.require_fit(config.llm)
        return tokenizer

    def load_encoders(self, model: MERV, sources: dict[str, str], dtype, device) -> None:
        """Put the frozen encoders in their places, from `sources` or where the config says."""
        loaded_configs = []
        for e in model.config.encoders:
            source = e.source
            if (self.folder / e.source).is_file():  # a copy in this folder
                source = self.folder / e.source
                e = replace(e, source="")  # so that the next save_pretrained copies it too
            if e.name in sources:
                source = sources[e.name]
                local = Path(source).exists()  # then the next save_pretrained copies that file
                e = replace(e, source=str(Path(source).resolve() if local else source))
            try:
                model.encoders[e.name] = encoders.load_encoder(e, source, dtype, device)
            except CheckpointError as error:
                what, why, fix = error.args
                what = f"The encoder {e.name} of {self.place} cannot be loaded.\n{what}"
                raise CheckpointError(what, why, fix) from error
            loaded_configs.append(model.encoders[e.name].config)
        model.config = replace(model.config, encoders=tuple(loaded_configs))


def authors_config(name: str, raw: dict, place: str = "config.json") -> MERVConfig:
    """Our configuration for the authors' config.json. place: the file, for errors."""
    settings = authors_settings(raw, place)
    encoder_configs = tuple(ENCODERS[encoder] for encoder in settings["encoders"])
    # QUIRK: 32064 rows of embeddings; 64 are for a <PAD> token, which we do not need (ledger K9).
    llm = replace(LLAMAS["llama2-7b"], vocab_size=32064, rope_bf16=True)
    tokens = settings["visual_tokens"]
    # The file does not name the projector, but the number of visual tokens shows which it is.
    for projector in ("avg2d", "all"):
        config = MERVConfig(name, encoder_configs, llm, settings["pooled_side"], projector)
        if tokens in (None, math.prod(config.grid)):
            return config
    names = ", ".join(settings["encoders"])
    what = f"{place} asks for {tokens} visual tokens from {names}."
    why = "only pooled grids and all patches are implemented for the authors' checkpoints."
    raise CheckpointError(what, why, "name a run of train.py or another released MERV.")


# ----------------------------------------------------------------------------------------- commands


@torch.no_grad()
def run_stages(model: MERV, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a model stage by stage: name of the stage -> its result, in order."""
    stages = {}
    x_e = []
    for e in model.config.encoders:
        projector = model.projectors[e.name]
        frames = pixels[e.name]
        features = model.encoders[e.name](frames)
        pooled = projector.pool(features)
        x_e.append(projector(pooled))
        stages[f"{e.label} preprocessed (b, T_e, 3, H, W)"] = frames
        stages[f"  {e.label} features (b, t, h_e, w_e, d_e)"] = features
        stages[f"  {e.label} pooled (b, t, h, w, d_e), eq. 1"] = pooled
        stages[f"  {e.label} projected (b, n, d), eq. 1"] = x_e[-1]
    visual, mixing_weights = model.mixer(torch.stack(x_e, dim=1))
    stages["mixing weights (b, e), eq. 2"] = mixing_weights
    stages["visual tokens (b, n, d), eq. 2"] = visual
    bos = model.llm.embed_tokens(torch.tensor([[1]], device=model.device))  # 1: <s> of LLaMA-2
    embeds = torch.cat([bos, visual], dim=1)
    stages["[BOS] + visual tokens (b, s, d)"] = embeds
    stages["LLaMA -> logits (b, s, vocabulary)"] = model.llm(inputs_embeds=embeds)
    return stages


def trace() -> None:
    """Print the shape of every stage of MERV in full size and of the miniature.

    The miniature really runs, with random weights, on 32 copies of one grey gradient. The full-size
    model is on the meta device, which computes shapes only.
    """
    config = MERVS["merv"]
    with torch.device("meta"):
        parts = [encoders.empty_encoder(e) for e in config.encoders]
        full_size = MERV(config, parts, Llama(config.llm), None)
        pixels = {}
        for e in config.encoders:
            pixels[e.name] = torch.empty(1, e.num_frames, 3, e.image_size, e.image_size)
        full_stages = run_stages(full_size, pixels)

    miniature = MERV.create(MERVS["miniature"], tokenizer=None).eval()
    frames = torch.linspace(0, 255, 128).byte().expand(32, 3, 72, 128)
    clips = {name: clip[None] for name, clip in miniature.pixels(frames).items()}
    small_stages = run_stages(miniature, clips)

    print(f"{'':<46} {'full size':<24} miniature")
    print(f"{'frames sampled (T, 3, H, W)':<46} {'(32, 3, any, any)':<24} {tuple(frames.shape)}")
    for stage, result in full_stages.items():
        small = small_stages[stage]
        print(f"{stage:<46} {tuple(result.shape)!s:<24} {tuple(small.shape)}")
    mixing_weights = small_stages["mixing weights (b, e), eq. 2"][0]
    print(f"The miniature's mixing weights, which sum to 1: {mixing_weights.numpy().round(4)}")
    print("The LLM reads [BOS], the visual tokens, then text; here there is no text.")


@dataclass(frozen=True)
class AskConfig:
    """The command line of merv.py."""

    ask: tuple[str, ...] = option(
        (), "a video, GIF, image or folder of images, then questions; none: chat"
    )
    trace: bool = option(False, "print the shape of every stage and stop")
    checkpoint: str | None = option(
        None, f"a run, a folder or one of {', '.join(AUTHORS)}; none: the latest run", group="model"
    )
    tokenizer: str | None = option(None, "tokenizer.model, if the checkpoint has none")
    start: float | None = option(None, "second to start at; none: the first frame", group="video")
    end: float | None = option(None, "second to end at; none: the last frame")
    max_new_tokens: int = option(256, "longest answer, in tokens", group="answer", least=1)
    device: str = option("auto", "auto, cuda, mps or cpu", group="machine")
    dtype: str = option("auto", "to compute in; auto: 16 bits on CUDA, else float32", DTYPES)


def read_options(arguments: list[str] | None = None) -> AskConfig:
    """Read the command line of merv.py."""
    return parse_options(AskConfig, arguments, "Ask a video language model about a video.")


def main(arguments: list[str] | None = None) -> None:
    """`merv.py`: answer questions about a video, or chat about it."""
    options = read_options(arguments)
    try:
        status = trace() if options.trace else answer_questions(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left, as `head -1` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except cli.FIXABLE as error:
        sys.exit(cli.explain(error, "use --dtype bfloat16, or ask fewer questions at once."))
    except KeyboardInterrupt:
        status = 130  # as a shell reports a program that Ctrl-C ended
    if status:
        sys.exit(status)


def answer_questions(options: AskConfig) -> int:
    """Load the checkpoint and print an answer to each question, then the mixing weights.

    Without a question, start a conversation about the video; without a video, one of text alone.
    Returns the exit status.
    """
    checkpoint = options.checkpoint or latest_run()
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    model = MERV.from_pretrained(checkpoint, dtype, device, options.tokenizer)

    def load(video: str, start: float | None = None, end: float | None = None) -> dict:
        pixels = load_pixels(video, model.config.encoders, start, end)
        warn_of_real_video(model, video)
        return pixels

    pixels = load(options.ask[0], options.start, options.end) if options.ask else {}
    questions = options.ask[1:]
    if not questions:
        return converse(model, pixels, load, options.max_new_tokens)
    answers = model.answer(pixels, list(questions), options.max_new_tokens)
    for question, answer in zip(questions, answers, strict=True):
        print(f"Q: {question}\nA: {answer.text}")
    shares = []
    for e, share in zip(model.config.encoders, answers[0].weights.tolist(), strict=True):
        shares.append(f"{e.label} {share:.2f}")
    print("mix: " + "  ".join(shares))
    return 0


def warn_of_real_video(model: MERV, video: str) -> None:
    """Warn on stderr if the miniature is asked about a clip that is not of its drawn world."""
    if model.config.name != MERVS["miniature"].name:
        return
    side = model.config.encoders[0].image_size
    frames = load_video(video, num_frames=1)
    if frames.shape[-2:] == (side, side):  # the size of every drawn clip
        return
    print(
        "warning: this checkpoint is the miniature. Unless it was trained on other data, it\n"
        "knows only the drawn world of miniature/world.py, moving shapes on a plain background,\n"
        "and its answer about this video means nothing. For real videos use\n"
        "--checkpoint merv-frozen, or a run of train.py --model merv on real data.",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
