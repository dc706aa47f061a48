"""Files as Meta and the authors of MERV write them, with small random weights."""

import io
import json
from dataclasses import replace
from pathlib import Path

import torch

from encoders import load_encoder, save_encoder
from llama import LLAMAS, Llama, LlamaConfig
from merv import FOUR

TINY_LLAMA = replace(
    LLAMAS["miniature"], name="tiny", vocab_size=97, hidden_size=32, intermediate_size=256,
    num_heads=4, num_kv_heads=4,
)  # fmt: skip
META = {  # our name -> Meta's, and the dimension along which Meta splits it over files
    "embed_tokens": ("tok_embeddings", 1), "norm": ("norm", None), "lm_head": ("output", 0),
    "input_layernorm": ("attention_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
}  # fmt: skip


def llama_of_meta(model: Llama) -> dict[str, bytes]:
    """The files of a repository such as meta-llama/Llama-2-13b: params.json, two .pth files.

    model: of TINY_LLAMA's sizes, with any vocabulary.
    """
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, x in model.state_dict().items():
        head, module = "", name.removesuffix(".weight")
        if module.startswith("layers."):
            _, index, module = module.split(".", 2)
            head = f"layers.{index}."
        theirs, dim = META[module]
        if theirs.endswith(("wq", "wk")):  # Meta rotates neighbours: [r0 r2 r1 r3] -> [r0 r1 r2 r3]
            x = x.unflatten(0, (4, 2, 4)).transpose(1, 2).flatten(0, 2)
        for shard, part in zip(shards, [x, x] if dim is None else x.chunk(2, dim), strict=True):
            shard[f"{head}{theirs}.weight"] = part.clone()
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": -1}
    files = {"params.json": json.dumps(params).encode()}
    for i, shard in enumerate(shards):
        buffer = io.BytesIO()
        torch.save(shard, buffer)
        files[f"consolidated.0{i}.pth"] = buffer.getvalue()
    return files


# ------------------------------------------------------------------------------------- the authors'

INNER = 48  # width inside their fusion module


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def fusion_weights(d: int, inner: int) -> dict[str, torch.Tensor]:
    """Random weights under the names of manifests/merv.json."""
    return {
        "Q": random(1, inner),
        "attention.q_proj_weight": random(inner, inner) / inner**0.5,
        "attention.k_proj_weight": random(inner, d) / d**0.5,
        "attention.v_proj_weight": random(inner, d) / d**0.5,
        "attention.in_proj_bias": random(3 * inner),
        "attention.out_proj.weight": random(inner, inner) / inner**0.5,
        "attention.out_proj.bias": random(inner),
    }


def write_checkpoint(
    folder: Path, llama: LlamaConfig, backbones: list[str], old_names: bool = False
) -> tuple[dict, dict[str, Path]]:
    """Write a folder laid out like tyleryzhu/merv; return its parts and a file per encoder."""
    torch.manual_seed(0)
    d = llama.hidden_size
    language = {f"llm.model.{k}": v for k, v in Llama(llama).state_dict().items()}
    language["llm.lm_head.weight"] = language.pop("llm.model.lm_head.weight")
    projectors = {}
    for index in range(len(backbones)):
        number = "" if old_names else f"{index}."
        projectors[f"{number}projector.projector.weight"] = random(d, 96) + index
        projectors[f"{number}projector.projector.bias"] = random(d) + index
    model = {"projectors": projectors, "llm_backbone": language}
    if old_names:
        model["projector"] = model.pop("projectors")
    else:
        model["feature_fusion"] = fusion_weights(d, INNER)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(
        {"model": model, "optimizer": {"state": {}, "param_groups": []}},
        folder / "checkpoints" / "latest-checkpoint.pt",
    )
    settings = {"video_backbone_ids": backbones, "projector_token_length": 4}
    (folder / "config.json").write_text(json.dumps({"model": settings}))
    sources = {}
    for name in FOUR:
        sources[name] = folder / f"{name}.safetensors"
        save_encoder(load_encoder(f"miniature-{name}"), sources[name])
    return model, sources
