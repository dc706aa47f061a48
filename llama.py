"""LLaMA-2, the language model that reads visual tokens and a question and writes the answer.

In:   token ids (b, s), or embeddings (b, s, d): MERV passes its visual tokens as embeddings
Out:  logits (b, s, vocab), or generated answers as lists of token ids

b is the number of sequences (rows) in a batch, s the number of tokens in each, d the width of a
token. Shorter rows are padded on the right. Attention is causal, so no token attends to the padding
on its right, and no padding mask is needed.

Papers: LLaMA (arXiv:2302.13971), LLaMA-2 (arXiv:2307.09288).
Read before: encoders.py. Read next: data.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support import released, weights
from support.cuda_graph import DecodingStep
from support.errors import CheckpointError, UserError

# ------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture of one LLaMA model. The defaults are those of LLaMA-2 7B."""

    name: str
    source: str = ""  # where the weights come from: a hub id or a folder
    vocab_size: int = 32000
    hidden_size: int = 4096  # d, the width of the residual stream
    intermediate_size: int = 11008  # width inside the MLP
    num_layers: int = 32
    num_heads: int = 32  # query heads
    num_kv_heads: int = 32  # key-value heads; fewer than num_heads is grouped-query attention
    max_positions: int = 4096  # longest sequence the model was trained on
    rope_theta: float = 10000.0  # base of RoPE's frequencies
    rope_bf16: bool = False  # round RoPE's frequencies to bfloat16 (ledger K1)
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False  # use the embedding matrix as the output head too
    template: str = "base"  # the prompt format it was trained with, a key of data.TEMPLATES

    @property
    def head_dim(self) -> int:
        """Channels of one attention head: 4096 / 32 = 128 in LLaMA-2 7B."""
        return self.hidden_size // self.num_heads


_13B = dict(hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40)

_PRESETS = [  # the sizes are those of config.json in each repository
    LlamaConfig("llama2-7b", "meta-llama/Llama-2-7b-hf"),
    LlamaConfig("llama2-13b", "meta-llama/Llama-2-13b-hf", **_13B),
    LlamaConfig("llama2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", template="llama2_chat"),
    LlamaConfig("vicuna-7b", "lmsys/vicuna-7b-v1.5", template="vicuna"),
    LlamaConfig("vicuna-13b", "lmsys/vicuna-13b-v1.5", template="vicuna", **_13B),
    LlamaConfig(
        "tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        hidden_size=2048, intermediate_size=5632, num_layers=22, num_kv_heads=4, max_positions=2048,
    ),
    LlamaConfig(
        "miniature", vocab_size=640, hidden_size=256, intermediate_size=512, num_layers=2,
        num_heads=8, num_kv_heads=8, max_positions=1024,
    ),
]  # fmt: skip
LLAMAS: dict[str, LlamaConfig] = {config.name: config for config in _PRESETS}

TEMPLATES_BY_NAME = {  # name of a folder or hub id in lower case -> template; others: "base"
    "vicuna-*b": "vicuna",  # as our presets are called
    "vicuna-*-v1.[1-5]*": "vicuna",  # version 1.0 had other prompts
    "llama*2-*b-chat*": "llama2_chat",  # all sizes, of Hugging Face and of Meta
}


# -------------------------------------------------------------------------------------------- model


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight.

    F.rms_norm is one kernel on a GPU, and sums the squares in float32 if x is bfloat16 or float16.
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RotaryTable:
    """Rotary position embedding (RoPE, arXiv:2104.09864): the cosine and sine of each angle.

    Both are float32, (s, head_dim), or (b, 1, s, head_dim) where rows differ in their positions.
    The first half of `sin` is negated, as `rotate` needs it.

    WHY a plain class: FSDP casts the floating-point tensors among a layer's arguments to bfloat16,
    also inside tuples and dataclasses, which would leave 3 digits of each cosine. It does not look
    inside other objects, so these tables stay in float32.
    """

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos = cos
        self.sin = sin

    def at(self, positions: Tensor) -> RotaryTable:
        """Look up positions (b, s) in a table of (length, head_dim)."""
        return RotaryTable(self.cos[positions][:, None], self.sin[positions][:, None])


def rope(positions: Tensor, config: LlamaConfig) -> RotaryTable:
    """Compute the rotary table of positions (s,): angle = position * theta^(-2i / head_dim)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    frequencies = config.rope_theta**-exponents  # (head_dim / 2), radians per position
    if config.rope_bf16:
        # QUIRK: the authors cast the model, and this table with it, to bfloat16 (ledger K1).
        frequencies = frequencies.bfloat16().float()
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return RotaryTable(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x: Tensor, rotary: RotaryTable) -> Tensor:
    """Rotate each channel pair (i, i + head_dim/2) of x (b, heads, s, head_dim) by its angle.

    With head_dim 4, the pairs are (x0, x2) and (x1, x3), and the result is
        [x0 x1 x2 x3] * [c0 c1 c0 c1] + [x2 x3 x0 x1] * [-s0 -s1 s0 s1]
    computed in float32 even if x is bfloat16, because the tables are float32.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * rotary.cos + swapped * rotary.sin).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal self-attention. In grouped-query attention several query heads share one kv head."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer  # index of this layer in the KV cache
        self.head_dim = config.head_dim
        d = config.hidden_size
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv_width, bias=False)
        self.v_proj = nn.Linear(d, kv_width, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        """(b, s, heads * head_dim) -> (b, heads, s, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, rotary: RotaryTable, cache: KVCache | None) -> Tensor:
        q = self.split_heads(self.q_proj(x))  # (b, heads, s, head_dim)
        k = self.split_heads(self.k_proj(x))  # (b, kv_heads, s, head_dim)
        v = self.split_heads(self.v_proj(x))
        # WHY together: the number of GPU kernels limits the speed of decoding.
        rotated = rotate(torch.cat([q, k], dim=1), rotary)
        q, k = rotated.split([q.shape[1], k.shape[1]], dim=1)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = cache.attend(self.layer, q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The gated MLP (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        d = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then the MLP, each with a norm before it and a residual connection around both."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, rotary: RotaryTable, cache: KVCache | None, keep=None) -> Tensor:
        """x (b, s, d) -> (b, s, d), or (k, d) at the k places `keep` = (rows, positions)."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        if keep is not None:
            x = x[keep]  # only attention mixes tokens; from here on, each is independent
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder: token embedding, layers, final norm, and the head that computes logits."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute each layer in the backward pass
        self.cuda_graph = False  # decode with a CUDA graph: faster, same answers up to rounding
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids=None, inputs_embeds=None, cache=None, lengths=None) -> Tensor:
        """Logits (b, s, vocab); the arguments are those of `hidden_states`."""
        return self.logits(self.hidden_states(input_ids, inputs_embeds, cache, lengths))

    def hidden_states(
        self, input_ids=None, inputs_embeds=None, cache=None, lengths=None, keep=None
    ) -> Tensor:
        """The output of the final norm (b, s, d) for ids (b, s) or embeddings (b, s, d).

        cache: a KVCache of the tokens before these, which are added to it.
        lengths (b,): the number of real tokens in each row, the rest being padding (default: s).
        keep: where the output is needed, as rows (k,) and positions (k,). The result is then
        (k, d), and the last layer runs its MLP there only.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        s = x.shape[1]
        if cache is None:
            rotary = rope(torch.arange(s, device=x.device), self.config)
        else:
            rotary = cache.advance(s, lengths)
        recompute = self.activation_checkpointing and self.training and cache is None
        for layer in self.layers:
            wanted = keep if layer is self.layers[-1] else None
            if recompute:
                x = checkpoint(layer, x, rotary, None, wanted, use_reentrant=False)
            else:
                x = layer(x, rotary, cache, wanted)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of each token of the vocabulary: (..., d) -> (..., vocab)."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight)

    def loss(self, hidden: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
        """The summed cross-entropy, in nats, of k hidden states (k, d) and their targets (k,).

        FIX: the authors compute float32 logits at every position, 32000 numbers each, which take
        more memory than all other activations together (ledger F14). Here only positions with a
        label are passed in, and chunks of them are recomputed in the backward pass, so that only
        (chunk, vocab) logits exist at a time.
        """

        def chunk_loss(hidden: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(hidden).float(), targets, reduction="sum")

        total = hidden.sum() * 0.0  # so that a batch without labels has a gradient too, of zeros
        for part in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            total = total + checkpoint(chunk_loss, *part, use_reentrant=False)
        return total

    @torch.no_grad()
    def generate(
        self, input_ids=None, inputs_embeds=None, lengths=None, prefix: KVCache | None = None,
        max_new_tokens=256, temperature=0.0, top_p=1.0, generator=None, eos_id=2,
        cache: KVCache | None = None, on_ids: Callable[[list[int]], object] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """Continue each row until </s> or max_new_tokens. Returns the new ids, without </s>.

        input_ids (b, s) or inputs_embeds (b, s, d), padded on the right; lengths (b,): the number
        of real tokens in each row; prefix: the cache of the tokens before the rows. Temperature 0
        decodes greedily; otherwise ids are drawn with `generator`, see `sample`.
        cache: a cache of earlier tokens, to which the rows are added, instead of a new one.
        on_ids: called at each step with the newest id of every row.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        b, s, _ = x.shape
        lengths = torch.full((b,), s) if lengths is None else lengths
        lengths = lengths.to(x.device)
        if cache is None:
            cache = KVCache(self.config, b, s + max_new_tokens, x.dtype, x.device, prefix)
        ends = torch.arange(b, device=x.device), lengths - 1  # the last real token of each row
        last = self.hidden_states(None, x, cache, lengths, ends)  # (b, d)
        answers = torch.full((b, max_new_tokens), eos_id, device=x.device)
        finished = torch.zeros(b, dtype=torch.bool, device=x.device)
        logits = self.logits(last)
        decode = DecodingStep(self, cache, torch.zeros_like(lengths)) if self.cuda_graph else None
        for step in range(max_new_tokens):
            next_ids = sample(logits, temperature, top_p, generator)
            answers[:, step] = next_ids
            finished |= next_ids == eos_id
            if on_ids is not None:
                on_ids(next_ids.tolist())
            if step == max_new_tokens - 1 or finished.all():
                break
            if decode is None:
                logits = self(next_ids[:, None], cache=cache)[:, 0]
            else:
                logits = decode(next_ids)
        return [ids_before(eos_id, row) for row in answers.tolist()]


# ----------------------------------------------------------------------------------------- KV cache


class KVCache:
    """The keys and values of earlier tokens, so that each token passes through the model once.

    Every row has its own slots. All rows may also follow one shared prefix, such as BOS and the
    visual tokens of a video; its keys and values are computed and stored once:

        position   0   1   2   3      4   5   6
        prefix    BOS  v   v   v                     stored once
        row 0                         a   b   c      slots 0, 1, 2
        row 1                         d   e   .      slots 0, 1; "." is padding

    The next token of row 1 overwrites the padding in slot 2. So the slots of a row are in the order
    of its tokens, and one rule gives the mask: slot i attends to the prefix and to slots 0..i.
    FIX: the authors drop the mask when decoding, so rows attend to padding (ledger F3).

    Several prefixes, one for each video, have equal lengths and are followed by equally many rows:
    with 2 prefixes and 6 rows, rows 0 to 2 follow the first one and rows 3 to 5 the second.

    max_length: number of slots; prefix: a cache with a row for each prefix. It is read and never
    changed.
    """

    def __init__(self, config: LlamaConfig, batch_size, max_length, dtype, device, prefix=None):
        self.prefix = prefix
        self.prefix_length = 0 if prefix is None else prefix.used
        total = self.prefix_length + max_length
        if total > config.max_positions:
            raise UserError(
                f"{config.name} reads at most {config.max_positions} tokens, not {total}.",
                "it was trained on sequences up to that length and fails on longer ones.",
                "shorten the question, use fewer visual tokens, or lower max_new_tokens.",
            )
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)  # tokens per row
        self.used = 0  # slots in use, padding included
        self.rotary = rope(torch.arange(total, device=device), config)

    def advance(self, s: int, lengths: Tensor | None) -> RotaryTable:
        """Reserve slots for the next s tokens of each row, of which lengths (b,) are real tokens
        (default: all). Return the rotary table of their positions."""
        device = self.lengths.device
        self.slots = self.lengths[:, None] + torch.arange(s, device=device)  # (b, s)
        self.lengths += s if lengths is None else lengths
        self.used = min(self.used + s, self.keys.shape[3])
        self.mask = None  # plain causal attention, if these are the first tokens
        if self.used > s or self.prefix is not None:
            # Added to the scores: 0 where a token may look, else -inf; (b, 1, s, prefix + used).
            visible = torch.arange(self.used, device=device) <= self.slots[:, None, :, None]
            mask = torch.where(visible, 0.0, -math.inf).to(self.keys.dtype)
            self.mask = F.pad(mask, (self.prefix_length, 0))  # every token sees the whole prefix
        return self.rotary.at(self.prefix_length + self.slots)

    def cut(self, length: int) -> None:
        """Forget all tokens after the first `length` of each row."""
        self.lengths.clamp_(max=length)
        self.used = min(self.used, length)

    def use_all_slots(self) -> None:
        """Attend to every slot from now on, also to empty ones, which the mask hides.

        All shapes then stay the same from step to step, as a CUDA graph requires.
        """
        self.used = self.keys.shape[3]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (b, kv_heads, s, head_dim), then attend with q to all tokens so far."""
        slots = self.slots[:, None, :, None].expand_as(k)
        self.keys[layer].scatter_(2, slots, k)
        self.values[layer].scatter_(2, slots, v)
        if self.mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        k = self.keys[layer, :, :, : self.used]
        v = self.values[layer, :, :, : self.used]
        if self.prefix is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)
        return self.attend_with_prefix(layer, q, k, v)

    def attend_with_prefix(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with one softmax to a row's own keys k (b, kv_heads, used, head_dim) and to those
        of its prefix. The c prefixes have keys (c, kv_heads, prefix, head_dim)."""
        b, _, s, head_dim = q.shape
        kv_heads = k.shape[1]
        prefix_k = self.prefix.keys[layer, :, :, : self.prefix_length]
        prefix_v = self.prefix.values[layer, :, :, : self.prefix_length]
        # The queries of a group of heads that share a kv head become the rows of one matrix.
        queries = q.reshape(b, kv_heads, -1, head_dim)  # (b, kv_heads, group * s, head_dim)
        queries = queries / math.sqrt(head_dim)
        scores = torch.cat([matmul_shared(queries, prefix_k.mT), queries @ k.mT], dim=-1)
        scores = scores.unflatten(2, (-1, s)) + self.mask[:, None]
        attention = scores.softmax(-1).flatten(2, 3)  # (b, kv_heads, group * s, prefix + used)
        on_prefix, on_own = attention.split([self.prefix_length, self.used], dim=-1)
        y = matmul_shared(on_prefix, prefix_v) + on_own @ v  # (b, kv_heads, group * s, head_dim)
        return y.reshape(q.shape)


def matmul_shared(x: Tensor, shared: Tensor) -> Tensor:
    """Multiply rows that share matrices: x (b, h, m, n), shared (c, h, n, o) -> (b, h, m, o).

    The first b / c rows of x are multiplied by shared[0], the next ones by shared[1], and so on.
    WHY: repeating `shared` for each row would copy it: at 7B and over all layers, 0.5 GB for each
    question and step. Here rows are stacked on top of each other: (c, h, b/c * m, n) @ shared.
    """
    c, _, _, o = shared.shape
    b, h, m, _ = x.shape
    stacked = x.unflatten(0, (c, b // c)).transpose(1, 2).flatten(2, 3)
    product = (stacked @ shared).view(c, h, b // c, m, o)
    return product.transpose(1, 2).flatten(0, 1)


# --------------------------------------------------------------------------------------- generation


def sample(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator | None) -> Tensor:
    """Choose one id for each row (b,) from logits (b, vocab).

    Temperature 0 takes the most likely id. Otherwise draw from the nucleus (arXiv:1904.09751): the
    smallest set of most likely ids whose probabilities add up to top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    probabilities, ids = probabilities.sort(descending=True)
    sum_before = probabilities.cumsum(-1) - probabilities  # of all ids that are more likely
    dropped = sum_before >= top_p
    dropped[..., 0] = False  # the most likely id always stays
    probabilities[dropped] = 0
    drawn = torch.multinomial(probabilities, 1, generator=rng)
    return ids.gather(-1, drawn).squeeze(-1)


def ids_before(eos_id: int, ids: list[int]) -> list[int]:
    """The ids before the first </s>: (2, [5, 7, 2, 9]) -> [5, 7]."""
    if eos_id in ids:
        return ids[: ids.index(eos_id)]
    return ids


# ------------------------------------------------------------------------------------------ weights


def load_llama(config_or_name_or_folder, source=None, dtype=torch.float32, device="cpu") -> Llama:
    """Load a LLaMA, or build one with random weights if there is only a config or a preset's name.

    A folder or hub id, given first or as `source`, has config.json and weights in Hugging Face
    format, or Meta's params.json and consolidated.*.pth. Raises CheckpointError if they do not fit.
    dtype None: that of the file, whose tensors stay mapped into memory (weights.assign_weights).
    """
    config = LLAMAS.get(str(config_or_name_or_folder), config_or_name_or_folder)
    if not isinstance(config, LlamaConfig):  # a folder or hub id
        source = config if source is None else source
        config = read_config(config)
    with torch.device("meta"):
        model = Llama(config)
    if source is None:
        model.to_empty(device="cpu")
        weights.initialise(model, torch.Generator().manual_seed(0))
        return model.to(device) if dtype is None else model.to(device, dtype)
    names = released.LLAMA_HF
    tensors = weights.read_tensors(source, (*weights.FILES, released.META_FILE))
    if "tok_embeddings.weight" in tensors:  # Meta's name for embed_tokens
        names = released.LLAMA_META
        tensors = released.read_meta(source, config.hidden_size, config.head_dim)
    skip = dict(released.LLAMA_SKIP)
    if config.tie_word_embeddings:
        skip["lm_head.weight"] = "the head is the embedding matrix"
    what = f"{config.name} from {source}"
    weights.assign_weights(model, tensors, names, skip, what, dtype, device)
    return model


def read_config(source: str | Path) -> LlamaConfig:
    """Read the configuration of a folder or hub id from its config.json, or Meta's params.json.

    A preset's source, or a folder of that name, is called like the preset: lmsys/vicuna-7b-v1.5 and
    any folder vicuna-7b-v1.5 become vicuna-7b. Neither file states the prompt template, so it
    follows from the name of the folder or hub id by TEMPLATES_BY_NAME.
    """
    # Without the revision of "owner/name@revision".
    place = source if Path(source).is_dir() else str(source).partition("@")[0]
    own_name = Path(place).name
    name = Path(source).name
    for preset in LLAMAS.values():
        if own_name in (preset.name, Path(preset.source).name or None):
            name = preset.name
            break
    template = LlamaConfig.template
    for pattern, its_template in TEMPLATES_BY_NAME.items():
        if fnmatch(own_name.lower(), pattern):
            template = its_template
    return LlamaConfig(name, str(source), template=template, **released.llama_settings(source))


# ---------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """LLaMA's SentencePiece tokenizer. It never adds BOS or </s>: data.tokenize does.

    path: a tokenizer.model file, or a folder or hub id that has one.
    """

    def __init__(self, path: str | Path):
        self.path = weights.find_file(path, ("tokenizer.model",))
        weights.refuse_pointer(self.path)
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
            if min(self.pieces.bos_id(), self.pieces.eos_id()) < 0:
                raise ValueError("it has no <s> or no </s>")
        except (OSError, RuntimeError, ValueError) as error:
            what = f"{self.path} is not a tokenizer of LLaMA 1 or 2."
            fix = "take tokenizer.model, not tokenizer.json or tiktoken's, from LLaMA's repository."
            raise CheckpointError(what, f"it is not a SentencePiece file: {error}.", fix) from error
        self.bos_id = self.pieces.bos_id()
        self.eos_id = self.pieces.eos_id()
        self.vocab_size = self.pieces.vocab_size()

    def require_fit(self, llm: LlamaConfig) -> None:
        """Raise CheckpointError if an LLM has no embeddings for some of the ids."""
        if self.vocab_size > llm.vocab_size:
            what = f"The tokenizer has {self.vocab_size} pieces, {llm.name} only {llm.vocab_size}."
            fix = "take the tokenizer.model that lies beside the LLM's weights."
            raise CheckpointError(what, f"{self.path} does not belong to this LLM.", fix)

    def encode(self, text: str) -> list[int]:
        """Text -> ids. SentencePiece treats the start of the text as the start of a word."""
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Ids -> text. Ids beyond the tokenizer's pieces, which an LLM may have, are left out."""
        return self.pieces.decode([token for token in ids if token < self.vocab_size])
