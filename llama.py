"""LLaMA-2: a decoder that reads embeddings and says what comes next (arXiv:2302.13971, 2307.09288).

In:   token ids (b, s), or embeddings (b, s, d): MERV hands over visual tokens as embeddings
Out:  logits (b, s, vocab), or answers as lists of token ids

Rows of one batch may differ in length. They are padded on the right, and no padding mask is needed
anywhere: a query sees positions up to its own, so what stands to the right of a row is never seen.
Read before: encoders.py (how released weights are read). Read next: data.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support import weights
from support.errors import CheckpointError, UserError
from support.released import (
    CONFIG_NAMES,
    LLAMA_NAMES,
    LLAMA_SKIP,
    META_CONFIG_NAMES,
    META_FILE,
    META_NAMES,
    PLAIN,
    read_meta,
)
from support.weights import assign_weights, initialise


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of one model of the family; the defaults are LLaMA-2 7B."""

    name: str
    source: str = ""  # where the weights are: a hub id or a folder
    vocab_size: int = 32000
    hidden_size: int = 4096  # d
    intermediate_size: int = 11008  # width inside the MLP
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32  # fewer than num_heads: grouped-query attention
    max_positions: int = 4096
    rope_theta: float = 10000.0
    rope_bf16: bool = False  # ledger K1: round RoPE's frequencies to bfloat16
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    template: str = "base"  # which prompt it was trained with: data.TEMPLATES

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


_13B = dict(hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40)
LLAMAS: dict[str, LlamaConfig] = {
    config.name: config
    for config in [
        LlamaConfig("llama2-7b", "meta-llama/Llama-2-7b-hf"),
        LlamaConfig("llama2-13b", "meta-llama/Llama-2-13b-hf", **_13B),
        LlamaConfig("llama2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", template="llama2_chat"),
        LlamaConfig("vicuna-7b", "lmsys/vicuna-7b-v1.5", template="vicuna"),
        LlamaConfig("vicuna-13b", "lmsys/vicuna-13b-v1.5", template="vicuna", **_13B),
        LlamaConfig(
            "tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
            hidden_size=2048, intermediate_size=5632, num_layers=22, num_kv_heads=4,
            max_positions=2048,
        ),
        LlamaConfig(
            "miniature", vocab_size=640, hidden_size=128, intermediate_size=256, num_layers=2,
            num_heads=4, num_kv_heads=4, max_positions=1024,
        ),
    ]
}  # fmt: skip


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the mean of squares in float32 whatever the dtype of x."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rope(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation angle: positions (b, s) -> two of (b, 1, s, head_dim)."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    frequencies = config.rope_theta ** -exponent.float()
    if config.rope_bf16:
        # QUIRK: the authors cast the model, and this table with it, to bfloat16 (ledger K1).
        frequencies = frequencies.bfloat16().float()
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + head_dim/2) of x (b, heads, s, head_dim) by their angles."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of what has been read, so that each token passes through the model once.

    Rows differ in length, up to max_length. A row's token number p lies in slot p all the same:
    [a b c] and [d e] padded to 3 lie in slots 0..2, and the next token of the second row overwrites
    its padding in slot 2. So one rule serves as mask: a query in slot p sees slots 0..p.
    FIX: the authors drop the mask when decoding, so rows see each other's padding (ledger F3).

    prefix: a cache of one row that all rows of this one begin with (BOS and the video), shared.
    """

    def __init__(self, config: LlamaConfig, batch_size, max_length, dtype, device, prefix=None):
        self.prefix = prefix
        self.prefix_length = prefix.used if prefix else 0
        total = self.prefix_length + max_length
        if total > config.max_positions:
            what = f"{config.name} was asked for {total} positions, has {config.max_positions}."
            fix = "a shorter question, fewer visual tokens, or a smaller max_new_tokens."
            raise UserError(what, "it was trained on no more.", fix)
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys, self.values = torch.zeros(2, *shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.used = 0  # slots in use: the longest row

    def advance(self, s: int, lengths: Tensor | None) -> Tensor:
        """Make room for s more tokens a row, lengths (b,) of them real; their positions (b, s)."""
        self.slots = self.lengths[:, None] + torch.arange(s, device=self.lengths.device)
        self.lengths = self.lengths + (s if lengths is None else lengths)
        self.used += s
        seen = torch.arange(self.used, device=self.slots.device)
        self.visible = seen <= self.slots[:, None, :, None]  # (b, 1, s, used)
        return self.prefix_length + self.slots

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (b, kv_heads, s, c), then attend with q (b, heads, s, c) to all so far."""
        where = self.slots[:, None, :, None].expand_as(k)
        self.keys[layer].scatter_(2, where, k)
        self.values[layer].scatter_(2, where, v)
        if self.prefix is None and self.used == q.shape[2]:  # nothing before
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        k, v = self.keys[layer, :, :, : self.used], self.values[layer, :, :, : self.used]
        if self.prefix is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible, enable_gqa=True)
        # WHY: expanding the prefix to b rows would copy it: 0.5 GB a question at 7B. Instead all
        # rows' queries meet the one copy, and one softmax runs over both parts.
        prefix_k = self.prefix.keys[layer, 0, :, : self.prefix_length]
        prefix_v = self.prefix.values[layer, 0, :, : self.prefix_length]
        grouped = q.unflatten(1, (k.shape[1], -1)) / math.sqrt(q.shape[-1])  # (b, g, r, s, c)
        own = torch.einsum("bgrsc,bgmc->bgrsm", grouped, k)
        own = own.masked_fill(~self.visible[:, :, None], -math.inf)
        scores = torch.cat([torch.einsum("bgrsc,gpc->bgrsp", grouped, prefix_k), own], dim=-1)
        weights = scores.float().softmax(-1).to(v.dtype)
        from_prefix, from_own = weights.split([self.prefix_length, self.used], dim=-1)
        y = torch.einsum("bgrsp,gpc->bgrsc", from_prefix, prefix_v)
        return (y + torch.einsum("bgrsm,bgmc->bgrsc", from_own, v)).flatten(1, 2)


class SelfAttention(nn.Module):
    """Causal attention with rotary positions; key-value heads may be shared by groups of heads."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer  # where its keys and values lie in the cache
        d, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv_width, bias=False)
        self.v_proj = nn.Linear(d, kv_width, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (b, heads, s, head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = cache.attend(self.layer, q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention, then pre-norm MLP: (b, s, d) -> (b, s, d)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Embedding, decoder layers, norm, and the head that gives logits."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute each layer in the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids=None, inputs_embeds=None, cache=None, lengths=None) -> Tensor:
        """Logits (b, s, vocab) for ids (b, s) or embeddings (b, s, d); see `hidden_states`."""
        return self.logits(self.hidden_states(input_ids, inputs_embeds, cache, lengths))

    def hidden_states(self, input_ids=None, inputs_embeds=None, cache=None, lengths=None) -> Tensor:
        """The normed output of the last layer (b, s, d).

        cache: the KVCache that these tokens follow and are added to. lengths (b,): how many of the
        s tokens of each row are real, the rest being padding on the right (default: all).
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        s = x.shape[1]
        positions = cache.advance(s, lengths) if cache else torch.arange(s, device=x.device)[None]
        cos, sin = rope(positions, self.config)
        for layer in self.layers:
            if self.activation_checkpointing and self.training and cache is None:
                x = checkpoint(layer, x, cos, sin, None, use_reentrant=False)
            else:
                x = layer(x, cos, sin, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., vocab)."""
        tied = self.config.tie_word_embeddings
        return F.linear(hidden, self.embed_tokens.weight if tied else self.lm_head.weight)

    def loss(self, hidden: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
        """Sum of cross-entropies of hidden (k, d) against targets (k,), in nats.

        FIX: only at labelled positions, in chunks that are recomputed in the backward pass, so that
        only (chunk, vocab) logits ever exist. The authors make logits for every position, 32000
        wide in float32, which is more than all other activations together (ledger F14).
        """

        def one(hidden: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(hidden).float(), targets, reduction="sum")

        total = hidden.sum() * 0.0  # also without a label there is a gradient, of zeros
        for part in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            total = total + checkpoint(one, *part, use_reentrant=False)
        return total

    @torch.no_grad()
    def generate(
        self, input_ids=None, inputs_embeds=None, lengths=None, prefix: KVCache | None = None,
        max_new_tokens=256, temperature=0.0, top_p=1.0, generator=None, eos_id=2,
    ) -> list[list[int]]:  # fmt: skip
        """Continue each row until </s> or max_new_tokens; the new ids of each row, without </s>.

        input_ids (b, s) or inputs_embeds (b, s, d); lengths (b,): real tokens of each right-padded
        row; prefix: what all rows follow. temperature 0 is greedy; otherwise `generator` draws from
        the smallest set of ids with probability top_p.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        b, s, _ = x.shape
        lengths = torch.full((b,), s, device=x.device) if lengths is None else lengths.to(x.device)
        cache = KVCache(self.config, b, s + max_new_tokens, x.dtype, x.device, prefix)
        hidden = self.hidden_states(inputs_embeds=x, cache=cache, lengths=lengths)
        hidden = hidden[torch.arange(b, device=x.device), lengths - 1]
        answers = torch.zeros(b, 0, dtype=torch.long, device=x.device)
        for step in range(max_new_tokens):
            next_ids = sample(self.logits(hidden), temperature, top_p, generator)[:, None]
            answers = torch.cat([answers, next_ids], dim=1)
            if step == max_new_tokens - 1 or (answers == eos_id).any(1).all():
                break
            hidden = self.hidden_states(input_ids=next_ids, cache=cache)[:, 0]
        return [row[: row.index(eos_id)] if eos_id in row else row for row in answers.tolist()]


def sample(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator | None) -> Tensor:
    """One id a row (b,) from logits (b, vocab): the likeliest at temperature 0, else nucleus."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = (logits.float() / temperature).softmax(-1).sort(descending=True)
    # Keep an id if the likelier ones together have not reached top_p yet; the first always stays.
    dropped = probabilities.cumsum(-1) - probabilities >= top_p
    dropped[..., 0] = False
    probabilities[dropped] = 0
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=rng)).squeeze(-1)


# ------------------------------------------------------------------------------------------ weights


def load_llama(config_or_name_or_folder, source=None, dtype=torch.float32, device="cpu") -> Llama:
    """A LLaMA with released weights, or random ones if only a configuration or its name is given.

    A folder or hub id, first or as `source`, has config.json and weights in Hugging Face format, or
    Meta's own params.json and consolidated.*.pth. Raises CheckpointError if they do not fit.
    """
    config = LLAMAS.get(str(config_or_name_or_folder), config_or_name_or_folder)
    if not isinstance(config, LlamaConfig):
        source = config if source is None else source
        config = read_config(config)
    with torch.device("meta"):
        model = Llama(config)
    if source is None:
        initialise(model.to_empty(device="cpu"), torch.Generator().manual_seed(0))
    else:
        skip = LLAMA_SKIP | ({"lm_head.weight": "tied"} if config.tie_word_embeddings else {})
        tensors, names = weights.read_tensors(source, (*weights.FILES, META_FILE)), LLAMA_NAMES
        if "tok_embeddings.weight" in tensors:
            tensors, names = read_meta(source, config), META_NAMES
        assign_weights(model, tensors, names, skip, f"{config.name} from {source}", dtype)
    return model.to(device, dtype)


def read_config(source: str | Path) -> LlamaConfig:
    """The configuration of a folder or hub id, by Hugging Face's config.json or Meta's params.json.

    What Meta's leaves out is read off the weights, or as in LLaMA-2 7B.
    """
    path = weights.find_file(source, ("config.json", "params.json"))
    found, names, said = weights.read_json(path), CONFIG_NAMES, {}
    if path.name == "params.json":
        tensors, names = weights.read_tensors(source, (META_FILE,)), META_CONFIG_NAMES
        shards = found["dim"] // tensors["layers.0.attention.wq.weight"].shape[0]
        said["vocab_size"] = tensors["tok_embeddings.weight"].shape[0]
        said["intermediate_size"] = tensors["layers.0.feed_forward.w1.weight"].shape[0] * shards
    else:
        found = {"model_type": None, **found, **(found.get("rope_parameters") or {})}
        if odd := [f"{k} = {found[k]!r}" for k, v in PLAIN.items() if found.get(k, v) != v]:
            what = f"{source} is no plain LLaMA: {', '.join(odd)}."
            why = "this file has the architecture of LLaMA 1 and 2, Vicuna and TinyLlama only."
            raise CheckpointError(what, why, "choose one of those.")
    said |= {ours: found[theirs] for ours, theirs in names.items() if found.get(theirs) is not None}
    said = {"num_kv_heads": said["num_heads"]} | said
    name, hub_id = Path(source).name, str(source).partition("@")[0]  # pinned: the same model
    known = (c for c in LLAMAS.values() if c.source == hub_id or c.name == name)
    like = next(known, LlamaConfig(name))
    return LlamaConfig(like.name, str(source), template=like.template, **said)


class Tokenizer:
    """LLaMA's SentencePiece model: text -> ids and back. BOS and </s> are never added silently."""

    def __init__(self, path: str | Path):
        self.path = weights.find_file(path, ("tokenizer.model",))
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        self.vocab_size = self.pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text on its own: SentencePiece marks its beginning like that of a word."""
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self.pieces.decode(ids)
