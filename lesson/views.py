"""The numbers behind the pictures: each function measures one thing in a real model.

Shape letters are those of merv.py: t, h, w grid; e encoders; n visual tokens; d width of the LLM.
Read next: figures.py, which draws these numbers.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
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
Pixels = dict[str, Tensor]  # encoder -> preprocessed frames of one clip (T_e, 3, H, W)
Pooled = dict[str, Tensor]  # encoder -> pooled features of one clip (t, h, w, d_e)


def principal_colours(features: Tensor) -> Tensor:
    """Turn features (t, h, w, d_e) into colours (t, h, w, 3) from 0 to 1.

    Red, green and blue are the three directions in which the patches of the clip differ most (their
    principal components). Each is scaled to its range over the clip. So within a clip, equal
    colours mean similar features; colours of two encoders cannot be compared.
    """
    patches = features.float().cpu()
    patches = patches.flatten(0, 2)
    centred = patches - patches.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    scores = centred @ directions[:3].mT  # (t*h*w, 3)
    # The sign of a direction is arbitrary; this choice does not depend on the machine.
    skewness = scores.pow(3).sum(0)
    scores = scores * skewness.sign()
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
        difference = after - before
        change = difference.flatten(1).norm(dim=1)
        rows.append(change / size)
    return torch.stack(rows).cpu()


def narrow(config: EncoderConfig) -> Encoder:
    """A quick encoder with the frames and the attention of `config`: 24 channels, 4 patches.

    Which frames reach which step depends on these alone, so random weights show it.
    """
    depth = {"num_layers": 2, "released_layers": 2}
    size = {"hidden_size": 24, "num_heads": 2, "patch_size": 4, "image_size": 8}
    encoder = load_encoder(replace(config, source="", **depth, **size))
    generator = torch.Generator().manual_seed(0)
    initialise(encoder, generator, std=0.3)
    return encoder


@dataclass
class Asked:
    """A clip of a benchmark: its pooled features, forwards and backwards, and its questions."""

    pooled: Pooled
    backwards: Pooled  # of the same frames in reverse order
    questions: list[Question]


@torch.no_grad()
def look_both_ways(model: MERV, pixels: Pixels, questions: list[Question]) -> Asked:
    """Encode a clip forwards and backwards."""
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


def answers_of(reader: MERV, clip: Asked, changes: list[Pooled]) -> list[list[Question]]:
    """A clip's questions with the reader's answers, scored as eval.py scores them, for each change.

    changes: what some encoders see instead of the clip. All are answered in one batch.
    """
    prompts = [question.prompt for question in clip.questions]
    seen = [clip.pooled | change for change in changes]
    answered = []
    for replies in reader.answer(seen, [prompts] * len(seen), LONGEST):
        questions = []
        for question, reply in zip(clip.questions, replies, strict=True):
            question = replace(question, answer=reply.text)
            score(question, "parse")
            questions.append(question)
        answered.append(questions)
    return answered


def whose_view_matters(model: MERV, clips: list[Asked]) -> Counter:
    """How many answers change when one encoder is shown something else than the clip.

    The keys of the Counter, for each kind of question and each encoder:
      "right", kind            answers that are right when all encoders see the clip
      "lost", encoder, kind    of these, wrong when this encoder sees another clip
      "turning", kind          answers that change when all encoders see the clip backwards
      "turned", encoder, kind  of these, changed in the same way when this encoder alone does
    """
    counts = Counter()
    names = list(model.encoders)
    reader = reader_of_features(model, names)
    for number, clip in enumerate(progress(clips, "swap views")):
        other = clips[number - 1]
        changes = [{}, clip.backwards]
        for name in names:
            changes += [{name: other.pooled[name]}, {name: clip.backwards[name]}]
        own, backwards, *changed = answers_of(reader, clip, changes)
        for question, turn in zip(own, backwards, strict=True):
            kind = question.kind
            if question.correct:
                counts["right", kind] += 1
            if question.answer != turn.answer:
                counts["turning", kind] += 1
        for encoder in model.config.encoders:
            swapped, replayed, *changed = changed
            answers = zip(own, backwards, swapped, replayed, strict=True)
            for question, turn, swap, replay in answers:
                key = (encoder.label, question.kind)
                if question.correct and not swap.correct:
                    counts["lost", *key] += 1
                if replay.answer == turn.answer and turn.answer != question.answer:
                    counts["turned", *key] += 1
    return counts


def mixing_of(model: MERV, clips: list[Asked]) -> Tensor:
    """The mixing weights (clips, e), float32."""
    names = list(model.encoders)
    reader = reader_of_features(model, names)
    rows = []
    for clip in clips:
        _, mixing_weights = reader.prefill(clip.pooled)
        rows.append(mixing_weights)
    return torch.stack(rows)


def strip(model: MERV, turns: list[tuple[str, bool]]) -> list[dict]:
    """The input of the LLM for a clip and a rendered conversation, token by token.

    Each token has an `id` (None: a visual token), a `piece`, a `label`, which is the same piece or
    "", and `predicts`, the label of the next token. Visual tokens follow [BOS] and have no label.
    """
    ids, labels = tokenize(turns, model.tokenizer)
    tokens = []
    for id, label in zip(ids, labels, strict=True):
        piece = model.tokenizer.pieces.id_to_piece(id)
        piece = piece.replace("\n", "\\n")
        token = {"id": id, "piece": piece, "label": piece, "predicts": ""}
        if label == IGNORE:
            token["label"] = ""
        tokens.append(token)
    for here, following in pairwise(tokens):
        here["predicts"] = following["label"]
    visual = {"id": None, "piece": "visual", "label": "", "predicts": ""}
    tokens[1:1] = [visual] * model.config.num_visual
    return tokens


@torch.no_grad()
def read_prompts(model: MERV, pixels: Pixels, questions: str | list[str]) -> KVCache:
    """Let the LLM read a clip and questions about it; the KV cache, whose prefix is the clip."""
    prefix, _ = model.prefill(pixels)
    ids, lengths = model.prompts(questions)
    dtype = prefix.keys.dtype
    cache = KVCache(model.config.llm, *ids.shape, dtype, model.device, prefix)
    lengths = lengths.to(model.device)
    model.llm.hidden_states(ids, cache=cache, lengths=lengths)
    return cache


def where_it_looks(model: MERV, pixels: Pixels, question: str) -> Tensor:
    """Attention of the last prompt token to each place of the clip: (layers, t, h, w).

    It is the mean over heads. The rest, up to 1, goes to [BOS] and to the text.
    """
    queries = {}  # of each layer; those of the question, which is read last, stay

    def record(attention, inputs):
        x, rotary, _ = inputs
        q = attention.split_heads(attention.q_proj(x))
        q = rotate(q, rotary)
        queries[attention.layer] = q[:, :, -1:]  # (1, heads, 1, head_dim)

    hooks = []
    for layer in model.llm.layers:
        hook = layer.self_attn.register_forward_pre_hook(record)
        hooks.append(hook)
    cache = read_prompts(model, pixels, question)
    for hook in hooks:
        hook.remove()
    found = []
    for layer, q in queries.items():
        clip_k = cache.prefix.keys[layer]
        text_k = cache.keys[layer]
        k = torch.cat([clip_k, text_k], dim=2)
        # Attention gives a weighted sum of values: for the rows of an identity, its weights.
        values = torch.eye(k.shape[2]).to(k)
        values = values.expand(*k.shape[:2], -1, -1)
        attention = F.scaled_dot_product_attention(q, k, values, enable_gqa=True)
        mean = attention.mean(1).flatten()  # over heads: (prefix + s,)
        on_clip = mean[1 : 1 + model.config.num_visual]
        # A mixer that concatenates has each place once for every encoder.
        grids = on_clip.unflatten(0, (-1, *model.config.grid))
        found.append(grids.sum(0))
    return torch.stack(found).cpu()
