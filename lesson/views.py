"""The numbers behind the pictures: each function measures one thing in a real model.

Shape letters are those of merv.py: t, h, w grid; e encoders; n visual tokens; d width of the LLM.
Read next: figures.py, which draws these numbers.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from data import IGNORE, tokenize
from encoders import Encoder, EncoderConfig, load_encoder
from eval import score
from llama import KVCache, rotate
from merv import MERV
from support.benchmarks import Question
from support.cli import progress
from support.weights import initialise

LONGEST = 64  # answers, in tokens
Pooled = dict[str, Tensor]  # encoder -> pooled features of one clip (t, h, w, d_e)


# ----------------------------------------------------------------------------- what an encoder sees


def principal_colours(features: Tensor) -> Tensor:
    """Turn features (t, h, w, d_e) into colours (t, h, w, 3) from 0 to 1.

    Red, green and blue are the three directions in which the patches of the clip differ most (their
    principal components). Each is scaled to its range over the clip. So within a clip, equal
    colours mean similar features; colours of two encoders cannot be compared.
    """
    patches = features.flatten(0, 2)
    patches = patches.float().cpu()
    centred = patches - patches.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    scores = centred @ directions[:3].mT  # (t*h*w, 3)
    # The sign of a direction is arbitrary; this choice does not depend on the machine.
    place = scores.abs().argmax(0, keepdim=True)
    largest = scores.gather(0, place)
    scores = scores * largest.sign()
    low = scores.amin(0)
    span = scores.amax(0) - low
    colours = (scores - low) / span.clamp_min(1e-12)
    return colours.unflatten(0, features.shape[:3])


@torch.no_grad()
def features_of(encoder: Encoder, clip: Tensor) -> Tensor:
    """The features (t, h, w, d_e) of one preprocessed clip (T_e, 3, H, W), before pooling."""
    parameter = next(encoder.parameters())
    clips = clip[None].to(parameter.device, parameter.dtype)
    return encoder(clips)[0]


def reach(encoder: Encoder, clip: Tensor) -> Tensor:
    """Which frames reach which time step: (T_e, t), from one pass for each changed frame.

    Entry (i, j) is how much the features of step j change if frame i of the clip (T_e, 3, H, W) is
    replaced by its negative: the norm of the difference over the norm of the features.
    """
    before = features_of(encoder, clip).float()
    size = before.flatten(1).norm(dim=1)
    rows = []
    for frame in range(len(clip)):
        changed = clip.clone()
        changed[frame] = 1 - clip[frame]  # differs from any frame but one of 1/2 everywhere
        after = features_of(encoder, changed).float()
        difference = (after - before).flatten(1)
        rows.append(difference.norm(dim=1) / size)
    return torch.stack(rows).cpu()


def narrow(config: EncoderConfig) -> Encoder:
    """A quick encoder with the frames and the attention of `config`: 24 channels, 4 patches.

    Which frames reach which step depends on these alone, so random weights show it.
    """
    small = replace(
        config, source="", hidden_size=24, num_heads=2, num_layers=2, released_layers=2,
        patch_size=4, image_size=8,
    )  # fmt: skip
    encoder = load_encoder(small)
    initialise(encoder, torch.Generator().manual_seed(0), std=0.3)
    return encoder


# ------------------------------------------------------------------------- answers from other views


@dataclass
class Asked:
    """A clip of a benchmark: its pooled features, forwards and backwards, and its questions."""

    pooled: Pooled
    backwards: Pooled  # of the same frames in reverse order
    questions: list[Question]


@torch.no_grad()
def look_both_ways(model: MERV, pixels: dict[str, Tensor], questions: list[Question]) -> Asked:
    """Encode a clip {encoder: (T_e, 3, H, W)} forwards and backwards."""
    pooled = {}
    backwards = {}
    for name, clip in pixels.items():
        both_ways = torch.stack([clip, clip.flip(0)])
        features = model.pooled_features_of(name, both_ways)
        pooled[name] = features[0]
        backwards[name] = features[1]
    return Asked(pooled, backwards, questions)


def reader_of_features(model: MERV, names: list[str]) -> MERV:
    """A copy of a model whose `answer` takes pooled features {encoder: (t, h, w, d_e)} for pixels.

    It shares the model's weights. Encoders that are not in `names` are taken away: the mixer mixes
    the others.
    """
    reader = copy.copy(model)
    reader._modules = dict(model._modules)  # else the next line would change the model itself
    reader.projectors = nn.ModuleDict()
    for name in names:
        reader.projectors[name] = model.projectors[name]
    reader.pooled_features = dict  # instead of running encoders, take what is given
    return reader


def answers_of(reader: MERV, pooled: Pooled, questions: list[Question]) -> list[Question]:
    """The questions with the reader's answers, scored as eval.py scores them."""
    prompts = [question.prompt for question in questions]
    answered = []
    replies = reader.answer(pooled, prompts, LONGEST)
    for question, reply in zip(questions, replies, strict=True):
        question = replace(question, answer=reply.text)
        score(question, "parse")
        answered.append(question)
    return answered


@dataclass
class Matters:
    """How many answers change when one encoder is shown something else, for each kind of question.

    An answer *turns* if it changes when all encoders see the clip backwards.
    """

    kinds: list[str]
    right: Tensor  # (kinds,): right answers when all encoders see the clip itself
    lost: Tensor  # (e, kinds): of these, wrong when encoder e sees another clip
    turning: Tensor  # (kinds,): answers that turn
    turned: Tensor  # (e, kinds): of these, changed the same way when e alone sees it backwards


def whose_view_matters(model: MERV, clips: list[Asked]) -> Matters:
    """Swap one encoder's features for those of another clip, or of the clip played backwards."""
    names = list(model.encoders)
    reader = reader_of_features(model, names)
    kinds = set()
    for clip in clips:
        kinds |= {question.kind for question in clip.questions}
    kinds = sorted(kinds)
    size = (len(names), len(kinds))
    right, turning = torch.zeros(2, len(kinds), dtype=torch.long)
    lost, turned = torch.zeros(2, *size, dtype=torch.long)

    for number, clip in enumerate(progress(clips, "swap views")):
        other = clips[(number + 1) % len(clips)]
        own = answers_of(reader, clip.pooled, clip.questions)
        backwards = answers_of(reader, clip.backwards, clip.questions)
        for e, name in enumerate(names):
            swapped = clip.pooled | {name: other.pooled[name]}
            swapped = answers_of(reader, swapped, clip.questions)
            replayed = clip.pooled | {name: clip.backwards[name]}
            replayed = answers_of(reader, replayed, clip.questions)
            for q, question in enumerate(own):
                column = kinds.index(question.kind)
                lost[e, column] += question.correct and not swapped[q].correct
                turn = backwards[q].answer
                turned[e, column] += question.answer != turn and replayed[q].answer == turn
        for q, question in enumerate(own):
            column = kinds.index(question.kind)
            right[column] += question.correct
            turning[column] += question.answer != backwards[q].answer
    return Matters(kinds, right, lost, turning, turned)


def mixing_of(model: MERV, clips: list[Asked]) -> Tensor:
    """The mixing weights (clips, e), float32."""
    names = list(model.encoders)
    reader = reader_of_features(model, names)
    rows = []
    for clip in clips:
        _, mixing_weights = reader.prefill(clip.pooled)
        rows.append(mixing_weights)
    return torch.stack(rows)


# ------------------------------------------------------------------------------- what the LLM reads


@dataclass
class Token:
    """One position of the LLM's input, and what the loss wants there."""

    id: int | None  # None: a visual token
    piece: str
    label: str = ""  # the piece that the position is labelled with
    predicts: str = ""  # the piece that the model must predict from here: the next label


def strip(model: MERV, turns: list[tuple[str, bool]]) -> list[Token]:
    """The input of the LLM for a clip and a rendered conversation, token by token.

    Visual tokens stand between [BOS] and the text, and carry no label.
    """
    ids, labels = tokenize(turns, model.tokenizer)
    tokens = []
    for id, label in zip(ids, labels, strict=True):
        piece = model.tokenizer.pieces.id_to_piece(id)
        piece = piece.replace("\n", "\\n")
        token = Token(id, piece)
        if label != IGNORE:
            token.label = piece
        tokens.append(token)
    visual = [Token(None, "visual") for _ in range(model.config.num_visual)]
    tokens[1:1] = visual
    for here, following in pairwise(tokens):
        here.predicts = following.label
    return tokens


@torch.no_grad()
def prompt_mask(model: MERV, pixels: dict[str, Tensor], questions: list[str]) -> Tensor:
    """Who may look at whom when questions share a prefix: bool (questions, s, prefix + s).

    Row i of a question is its i-th token. The mask is the one that the KV cache really uses.
    """
    prefix, _ = model.prefill(pixels)
    ids, lengths = model.prompts(questions)
    cache = KVCache(model.config.llm, *ids.shape, prefix.keys.dtype, model.device, prefix)
    cache.advance(ids.shape[1], lengths.to(model.device))
    return (cache.mask[:, 0] == 0).cpu()


@torch.no_grad()
def where_it_looks(model: MERV, pixels: dict[str, Tensor], question: str) -> Tensor:
    """Attention of the last prompt token to each place of the clip: (layers, t, h, w).

    It is the mean over heads. The rest, up to 1, goes to [BOS] and to the text.
    """
    prefix, _ = model.prefill(pixels)
    ids, lengths = model.prompts(question)
    cache = KVCache(model.config.llm, *ids.shape, prefix.keys.dtype, model.device, prefix)
    found = []

    def record(attention, inputs) -> None:
        x, rotary, _ = inputs
        q = attention.split_heads(attention.q_proj(x))
        k = attention.split_heads(attention.k_proj(x))
        q = rotate(q, rotary)
        k = rotate(k, rotary)
        before = prefix.keys[attention.layer]  # the keys of [BOS] and the visual tokens
        k = torch.cat([before, k], dim=2)
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, dim=1)  # one key for each query head
        last = q[:, :, -1:] / math.sqrt(attention.head_dim)
        shares = (last @ k.mT).float().softmax(-1)  # (1, heads, 1, prefix + s)
        found.append(shares.mean(1).flatten())

    hooks = []
    for layer in model.llm.layers:
        hook = layer.self_attn.register_forward_pre_hook(record)
        hooks.append(hook)
    model.llm.hidden_states(ids, cache=cache, lengths=lengths)
    for hook in hooks:
        hook.remove()
    end = 1 + model.config.num_visual
    attention = torch.stack(found)[:, 1:end]
    # A mixer that concatenates has each place once for every encoder.
    grids = attention.unflatten(1, (-1, *model.config.grid))
    return grids.sum(1).cpu()
