"""The names inside released files: timm, Google, LanguageBind, Hugging Face, Meta, the authors."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.weights import assign_weights, read_tensors

# In front of the names of a family; we write the first.
PREFIXES = {"vit": ("", "visual.trunk."), "languagebind": ("vision_model.",), "vivit": ("vivit.",)}


BLOCKS = {"vit": "blocks.*", "languagebind": "encoder.layers.*", "vivit": "encoder.layer.*"}


_ROWS = [  # ours, timm's ("vit"), LanguageBind's, Google's ("vivit"); "*" is a block, "" is nothing
    ("class_token", "cls_token", "embeddings.class_embedding", "embeddings.cls_token"),
    ("register_tokens", "reg_token", "", ""),
    ("position_embedding", "pos_embed",
     "embeddings.position_embedding.weight", "embeddings.position_embeddings"),
    ("patch_embedding", "patch_embed.proj",
     "embeddings.patch_embedding", "embeddings.patch_embeddings.projection"),
    ("embedding_norm", "", "pre_layrnorm", ""),  # [sic]
    ("*.temporal_embedding", "", "*.temporal_embedding", ""),
    ("*.temporal_norm", "", "*.temporal_layer_norm1", ""),
    ("*.temporal_attention.qkv_proj", "", "*.temporal_attn.{q,k,v}_proj", ""),
    ("*.temporal_attention.out_proj", "", "*.temporal_attn.out_proj", ""),
    ("*.attention_norm", "*.norm1", "*.layer_norm1", "*.layernorm_before"),
    ("*.attention.qkv_proj", "*.attn.qkv",
     "*.self_attn.{q,k,v}_proj", "*.attention.attention.{query,key,value}"),
    ("*.attention.out_proj", "*.attn.proj", "*.self_attn.out_proj", "*.attention.output.dense"),
    ("*.attention_scale", "*.ls1.gamma", "", ""),
    ("*.mlp_norm", "*.norm2", "*.layer_norm2", "*.layernorm_after"),
    ("*.mlp.up_proj", "*.mlp.fc1", "*.mlp.fc1", "*.intermediate.dense"),
    ("*.mlp.down_proj", "*.mlp.fc2", "*.mlp.fc2", "*.output.dense"),
    ("*.mlp_scale", "*.ls2.gamma", "", ""),
    ("final_norm", "", "", "layernorm"),
]  # fmt: skip


NAMES: dict[str, dict[str, str]] = {family: {} for family in BLOCKS}  # ours -> theirs


for _ours, *_theirs in _ROWS:
    for (_family, _block), _name in zip(BLOCKS.items(), _theirs, strict=True):
        if _name:
            NAMES[_family][_ours.replace("*", "blocks.*")] = _name.replace("*", _block)


SKIP = {  # left unread -> why
    "norm.*": "DINOv2's and SigLIP's features are taken before the final norm",
    "attn_pool.*": "SigLIP's head pools an image to one vector; MERV wants the grid",
    "post_layernorm.*": "norms LanguageBind's class token for the contrastive loss",
    "*_projection.weight": "the contrastive loss",
    "logit_*": "the contrastive loss",
    "text*": "the text tower",
    "pooler.*": "ViViT's pooled class token",
    "classifier.*": "ViViT's Kinetics-400 classifier",
}


def resize_positions(positions: Tensor, h: int, w: int) -> Tensor:
    """(1, side*side, d_e) learned for a square grid -> (1, h*w, d_e). DINOv2: 37x37 -> 16x16."""
    side = round(positions.shape[1] ** 0.5) if positions.ndim == 3 else 0
    if not side or (side, side) == (h, w) or side * side != positions.shape[1]:
        return positions  # right already, or no square grid: assign_weights will name it
    grid = positions.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True, align_corners=False)
    return grid.flatten(2).mT


META_FILE = "consolidated.00.pth"  # as Meta ships LLaMA-2, before conversion


META_NAMES = {  # ours -> Meta's; "*" is the number of the layer
    "embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output",
    "layers.*.input_layernorm": "layers.*.attention_norm",
    "layers.*.self_attn.q_proj": "layers.*.attention.wq",
    "layers.*.self_attn.k_proj": "layers.*.attention.wk",
    "layers.*.self_attn.v_proj": "layers.*.attention.wv",
    "layers.*.self_attn.o_proj": "layers.*.attention.wo",
    "layers.*.post_attention_layernorm": "layers.*.ffn_norm",
    "layers.*.mlp.gate_proj": "layers.*.feed_forward.w1",
    "layers.*.mlp.up_proj": "layers.*.feed_forward.w3",
    "layers.*.mlp.down_proj": "layers.*.feed_forward.w2",
}  # fmt: skip


LLAMA_NAMES = {ours: f"model.{ours}" for ours in META_NAMES} | {
    "lm_head": "lm_head"
}  # Hugging Face's


LLAMA_SKIP = {
    "model.layers.*.self_attn.rotary_emb.inv_freq": "computed in rope()",
    "rope.freqs": "too",
}


CONFIG_NAMES = {  # ours -> config.json's
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size", "tie_word_embeddings": "tie_word_embeddings",
    "num_kv_heads": "num_key_value_heads", "max_positions": "max_position_embeddings",
    "num_heads": "num_attention_heads", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
}  # fmt: skip


META_CONFIG_NAMES = {  # ours -> params.json's, of those that it fills in
    "hidden_size": "dim", "num_layers": "n_layers", "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads", "norm_eps": "norm_eps",
}  # fmt: skip


PLAIN = {  # what config.json must say, if anything: this file computes nothing else
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "rope_type": "default", "rope_scaling": None,
}  # fmt: skip


def read_meta(source: str | Path, config: object) -> dict[str, Tensor]:
    """Meta's shards as whole tensors, with the rows of wq and wk in our order.

    WHY: Meta rotates neighbouring channels (0, 1), (2, 3) ... of a head; we, like Hugging Face,
    rotate channel i with i + head_dim/2. Same rotations, so sorting the rows even-then-odd is all:
    [r0 r1 r2 r3] -> [r0 r2 r1 r3].
    """
    source = Path(source).parent if Path(source).is_file() else source
    rows = len(read_tensors(source, (META_FILE,))["layers.0.attention.wq.weight"])
    files = [META_FILE.replace("00", f"{i:02d}") for i in range(config.hidden_size // rows)]
    shards = [read_tensors(source, (file,)) for file in files]
    tensors = {}
    for name, first in shards[0].items():
        if first.ndim == 2 and len(shards) > 1:  # split by input width or by output width
            by_input = name.split(".")[-2] in ("tok_embeddings", "wo", "w2")
            first = torch.cat([shard[name] for shard in shards], dim=1 if by_input else 0)
        if name.endswith(("wq.weight", "wk.weight")):
            heads = first.unflatten(0, (-1, config.head_dim // 2, 2))
            first = heads.transpose(1, 2).flatten(0, 2)
        tensors[name] = first
    return tensors


AUTHORS = (
    "merv-frozen",
    "merv-full",
    *(f"{name}-single" for name in ("languagebind", "dinov2", "vivit", "siglip")),
)  # at tyleryzhu/merv


AUTHORS_ENCODERS = {  # their names -> ours
    "languagebind-video-noclass": "languagebind",
    "dinov2-video-all-tokens": "dinov2",
    "vivit-google-b-all-no-cls-16frames": "vivit",
    "siglip-vit-b16-224px-all-no-cls": "siglip",
}


def authors_tensors(config, parts: dict) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The authors' tensors, and our name -> theirs. Older files say `projector` and `adapter`."""
    tensors = {k.removeprefix("llm."): v for k, v in parts["llm_backbone"].items()}
    for key, tensor in parts.get("projectors", parts.get("projector", {})).items():
        tensors["projectors." + (key if key[0].isdigit() else f"0.{key}")] = tensor
    fusion = parts.get("feature_fusion", parts.get("adapter", {}))
    needless = len(config.encoders) == 1 and not fusion  # the softmax over one is 1 in any case
    tensors["query"] = torch.zeros(config.llm.hidden_size) if needless else fold_query(fusion)
    names = {f"llm.{ours}": theirs for ours, theirs in LLAMA_NAMES.items()}
    names |= {"mixer.query": "query"}
    for index, encoder in enumerate(config.encoders):
        names[f"projectors.{encoder.name}.linear"] = f"projectors.{index}.projector.projector"
    return tensors, names


@torch.no_grad()
def fold_query(fusion: dict[str, Tensor]) -> Tensor:
    """The authors' fusion module as one query (d,): Q_eff = W_k' (W_q Q + b_q) sqrt(d / d_inner).

    QUIRK: 44 million parameters, of which inference sees one vector (ledger K5). Their score is
    (W_q Q + b_q) . (W_k x + b_k) / sqrt(d_inner). W_k moves over to the query; b_k adds the same to
    every encoder's score and cancels in the softmax. Values and output projection are never used.
    """
    inner, d = fusion.get("attention.k_proj_weight", torch.empty(1, 1)).shape
    with torch.device("meta"):
        attention = nn.MultiheadAttention(inner, 1, kdim=d, vdim=d)
        theirs = nn.ParameterDict({"Q": torch.empty(1, inner)})
        theirs.attention = attention
    assign_weights(theirs, fusion, None, {}, "the fusion module", torch.float64)
    query = attention.q_proj_weight @ theirs.Q[0] + attention.in_proj_bias[:inner]
    return attention.k_proj_weight.mT @ query * math.sqrt(d / inner)
