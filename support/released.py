"""Read released checkpoints: what each source calls the tensors and settings of our models.

A table maps our names to theirs. "*" stands for the number of a block, and one of our tensors may
be several of theirs, which are stacked by rows:

    "blocks.*.mlp.up_proj": "encoder.layers.*.mlp.fc1"
    "blocks.*.attention.qkv_proj": ("layers.*.q_proj", "layers.*.k_proj", "layers.*.v_proj")

A name covers its weight and bias. `weights.released_names` applies a table, and
`weights.assign_weights` reports every tensor that does not fit.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.errors import CheckpointError
from support.weights import (
    assign_weights,
    check_fields,
    field_error,
    find_file,
    read_json,
    read_tensors,
    released_names,
)

Table = dict[str, str | tuple[str, ...]]  # our name -> theirs

# ----------------------------------------------------------------------------------------- encoders


@dataclass(frozen=True)
class Names:
    """How the checkpoints of one family of encoders name their tensors."""

    table: Table = field(default_factory=dict)  # a name that is not in it is the same as ours
    blocks: str = "blocks.*"  # what their blocks are called
    prefixes: tuple[str, ...] = ("",)  # in front of their names; we write the first
    skip: dict[str, str] = field(default_factory=dict)  # pattern of names not read -> why

    def without_prefixes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under the names that the table uses."""
        bare = type(tensors)()  # Mapped stays Mapped
        for name, tensor in tensors.items():
            for prefix in self.prefixes:
                name = name.removeprefix(prefix)
            bare[name] = tensor
        return bare


OUR_NAMES = Names()  # for a family that has no released checkpoint

TIMM = Names(  # DINOv2 and SigLIP: https://github.com/huggingface/pytorch-image-models
    table={
        "class_token": "cls_token",
        "register_tokens": "reg_token",
        "position_embedding": "pos_embed",
        "patch_embedding": "patch_embed.proj",
        "blocks.*.attention_norm": "blocks.*.norm1",
        "blocks.*.attention.qkv_proj": "blocks.*.attn.qkv",
        "blocks.*.attention.out_proj": "blocks.*.attn.proj",
        "blocks.*.attention_scale": "blocks.*.ls1.gamma",
        "blocks.*.mlp_norm": "blocks.*.norm2",
        "blocks.*.mlp.up_proj": "blocks.*.mlp.fc1",
        "blocks.*.mlp.down_proj": "blocks.*.mlp.fc2",
        "blocks.*.mlp_scale": "blocks.*.ls2.gamma",
    },
    prefixes=("", "visual.trunk."),  # the second: SigLIP as open_clip saves it
    skip={
        "mask_token": "stands for hidden patches in pre-training",
        "norm.*": "features are taken before the final norm",
        "attn_pool.*": "SigLIP's head pools an image to one vector; MERV needs the grid",
        "text*": "the text tower",
        "logit_*": "the contrastive loss",
    },
)

META_DINOV2 = replace(  # https://github.com/facebookresearch/dinov2
    TIMM,
    table=TIMM.table | {"register_tokens": "register_tokens"},
    prefixes=("", "backbone."),  # the second: with a head, such as the classifier of ImageNet
    skip=TIMM.skip | {"linear_head.*": "classifies images"},
)

META_DINOV2_GIANT = replace(  # the giant's MLP is gated, and has other names
    META_DINOV2,
    table=META_DINOV2.table
    | {"blocks.*.mlp.up_proj": "blocks.*.mlp.w12", "blocks.*.mlp.down_proj": "blocks.*.mlp.w3"},
)

HF_VIT: Table = {  # what Hugging Face's ViTs have in common
    "class_token": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "blocks.*.attention.qkv_proj": (
        "encoder.layer.*.attention.attention.query",
        "encoder.layer.*.attention.attention.key",
        "encoder.layer.*.attention.attention.value",
    ),
    "blocks.*.attention.out_proj": "encoder.layer.*.attention.output.dense",
}

HF_DINOV2 = Names(  # https://huggingface.co/facebook/dinov2-large, also -with-registers
    table=HF_VIT
    | {
        "register_tokens": "embeddings.register_tokens",
        "blocks.*.attention_norm": "encoder.layer.*.norm1",
        "blocks.*.attention_scale": "encoder.layer.*.layer_scale1.lambda1",
        "blocks.*.mlp_norm": "encoder.layer.*.norm2",
        "blocks.*.mlp.up_proj": "encoder.layer.*.mlp.fc1",
        "blocks.*.mlp.down_proj": "encoder.layer.*.mlp.fc2",
        "blocks.*.mlp_scale": "encoder.layer.*.layer_scale2.lambda1",
    },
    blocks="encoder.layer.*",
    prefixes=("dinov2.", "dinov2_with_registers."),
    skip={
        "embeddings.mask_token": "stands for hidden patches in pre-training",
        "layernorm.*": "features are taken before the final norm",
        "classifier.*": "classifies images",
    },
)

HF_DINOV2_GIANT = replace(
    HF_DINOV2,
    table=HF_DINOV2.table
    | {
        "blocks.*.mlp.up_proj": "encoder.layer.*.mlp.weights_in",
        "blocks.*.mlp.down_proj": "encoder.layer.*.mlp.weights_out",
    },
)

HF_CLIP: Table = {  # what Hugging Face's CLIP, SigLIP and LanguageBind have in common
    "position_embedding": "embeddings.position_embedding.weight",
    "patch_embedding": "embeddings.patch_embedding",
    "blocks.*.attention_norm": "encoder.layers.*.layer_norm1",
    "blocks.*.attention.qkv_proj": (
        "encoder.layers.*.self_attn.q_proj",
        "encoder.layers.*.self_attn.k_proj",
        "encoder.layers.*.self_attn.v_proj",
    ),
    "blocks.*.attention.out_proj": "encoder.layers.*.self_attn.out_proj",
    "blocks.*.mlp_norm": "encoder.layers.*.layer_norm2",
    "blocks.*.mlp.up_proj": "encoder.layers.*.mlp.fc1",
    "blocks.*.mlp.down_proj": "encoder.layers.*.mlp.fc2",
}

HF_SIGLIP = Names(  # https://huggingface.co/google/siglip-base-patch16-224, also SigLIP 2
    table=HF_CLIP,
    blocks="encoder.layers.*",
    prefixes=("vision_model.",),
    skip={
        "embeddings.position_ids": "counts from 0",
        "post_layernorm.*": "features are taken before the final norm",
        "head.*": "SigLIP's head pools an image to one vector; MERV needs the grid",
        "text*": "the text tower",
        "logit_*": "the contrastive loss",
    },
)

OTHER_VITS = (META_DINOV2, META_DINOV2_GIANT, HF_DINOV2, HF_DINOV2_GIANT, HF_SIGLIP)

LANGUAGEBIND = Names(  # https://huggingface.co/LanguageBind/LanguageBind_Video_merge
    table=HF_CLIP
    | {
        "class_token": "embeddings.class_embedding",
        "embedding_norm": "pre_layrnorm",  # [sic]
        "blocks.*.temporal_embedding": "encoder.layers.*.temporal_embedding",
        "blocks.*.temporal_norm": "encoder.layers.*.temporal_layer_norm1",
        "blocks.*.temporal_attention.qkv_proj": (
            "encoder.layers.*.temporal_attn.q_proj",
            "encoder.layers.*.temporal_attn.k_proj",
            "encoder.layers.*.temporal_attn.v_proj",
        ),
        "blocks.*.temporal_attention.out_proj": "encoder.layers.*.temporal_attn.out_proj",
    },
    blocks="encoder.layers.*",
    prefixes=("vision_model.",),
    skip={
        "post_layernorm.*": "norms the class token for the contrastive loss",
        "*_projection.weight": "the contrastive loss",
        "logit_*": "the contrastive loss",
        "text*": "the text tower",
    },
)

GOOGLE_VIVIT = Names(  # https://huggingface.co/google/vivit-b-16x2-kinetics400
    table=HF_VIT
    | {
        "blocks.*.attention_norm": "encoder.layer.*.layernorm_before",
        "blocks.*.mlp_norm": "encoder.layer.*.layernorm_after",
        "blocks.*.mlp.up_proj": "encoder.layer.*.intermediate.dense",
        "blocks.*.mlp.down_proj": "encoder.layer.*.output.dense",
        "final_norm": "layernorm",
    },
    blocks="encoder.layer.*",
    prefixes=("vivit.",),
    skip={
        "pooler.*": "pools the class token for classification",
        "classifier.*": "classifies the 400 actions of Kinetics-400",
    },
)


def choose_names(
    formats: Iterable[Names], ours: list[str], tensors: dict[str, Tensor]
) -> tuple[Names, dict[str, Tensor]]:
    """The names, one of `formats`, under which a file has most of our tensors, and its tensors
    without prefixes. `assign_weights` then reports what does not fit."""
    most = -1
    for names in formats:
        bare = names.without_prefixes(tensors)
        found = 0
        for name in ours:
            if all(theirs in bare for theirs in released_names(name, names.table)):
                found += 1
        if found > most:
            most = found
            chosen = names, bare
    return chosen


def convert_positions(
    tensors: dict[str, Tensor],
    table: Table,
    has_class_position: bool,
    size: tuple[int, int],
    antialias: bool,
) -> dict[str, Tensor]:
    """The tensors of a ViT with its position embeddings in our form: (1, h*w, d_e).

    size: (h, w). antialias: as in `resize_positions`. has_class_position: whether the first
    position may be that of the class token, (1, 1, d_e), to which it is then added. Hugging Face's
    SigLIP has positions (h*w, d_e).
    """
    (position,) = released_names("position_embedding", table)
    (class_token,) = released_names("class_token", table)
    if position not in tensors:
        return tensors
    converted = type(tensors)(tensors)  # Mapped stays Mapped
    positions = tensors[position]
    if positions.ndim == 2:
        positions = positions[None]
    if has_class_position and class_token in tensors:
        folded = fold_class_position(positions, tensors[class_token])
        positions, converted[class_token] = folded
    converted[position] = resize_positions(positions, *size, antialias)
    return converted


def fold_class_position(positions: Tensor, class_token: Tensor) -> tuple[Tensor, Tensor]:
    """Add the class token's position to the token itself: (1, 1 + side*side, d_e), (1, 1, d_e) ->
    (1, side*side, d_e), (1, 1, d_e).

    DINOv2 was trained with such a position; timm's files with registers have it folded in already.
    Positions of a square grid, or of any other shape, are returned as they are.
    """
    if positions.ndim != 3 or class_token.shape != positions[:, :1].shape:
        return positions, class_token
    patches = positions.shape[1] - 1
    if patches == 0 or math.isqrt(patches) ** 2 != patches:
        return positions, class_token
    return positions[:, 1:], class_token + positions[:, :1]


def resize_positions(positions: Tensor, h: int, w: int, antialias: bool = True) -> Tensor:
    """Resize position embeddings of a square grid: (1, side*side, d_e) -> (1, h*w, d_e).

    DINOv2 is released for 518 pixels, so 37x37 positions become 16x16. Bicubic, in float32,
    with antialiasing as in timm, or without. Any other shape is returned as it is;
    `assign_weights` reports it.
    """
    if positions.ndim != 3:
        return positions
    side = math.isqrt(positions.shape[1])
    if side == 0 or side * side != positions.shape[1] or (side, side) == (h, w):
        return positions
    grid = positions.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, d_e, side, side)
    grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=antialias)
    return grid.flatten(2).mT


# -------------------------------------------------------------------------------------------- LLaMA

LLAMA_META: Table = {  # Meta's own format
    "embed_tokens": "tok_embeddings",
    "norm": "norm",
    "lm_head": "output",
    "layers.*.input_layernorm": "layers.*.attention_norm",
    "layers.*.self_attn.q_proj": "layers.*.attention.wq",
    "layers.*.self_attn.k_proj": "layers.*.attention.wk",
    "layers.*.self_attn.v_proj": "layers.*.attention.wv",
    "layers.*.self_attn.o_proj": "layers.*.attention.wo",
    "layers.*.post_attention_layernorm": "layers.*.ffn_norm",
    "layers.*.mlp.gate_proj": "layers.*.feed_forward.w1",
    "layers.*.mlp.up_proj": "layers.*.feed_forward.w3",
    "layers.*.mlp.down_proj": "layers.*.feed_forward.w2",
}

LLAMA_HF: Table = {}  # Hugging Face's format, also Vicuna's: "model." and the same names
for _ours in LLAMA_META:
    LLAMA_HF[_ours] = f"model.{_ours}"
LLAMA_HF["lm_head"] = "lm_head"

LLAMA_SKIP = {  # pattern of names not read -> why
    "*inv_freq": "llama.rope computes these frequencies",  # of a layer or of the model
    "rope.freqs": "llama.rope computes these frequencies",
}

META_FILE = "consolidated.00.pth"  # the first, or only, shard of Meta's format

LLAMA_HF_SETTINGS = {  # field of LlamaConfig -> key of Hugging Face's config.json
    "vocab_size": "vocab_size", "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip

LLAMA_META_SETTINGS = {  # field of LlamaConfig -> key of Meta's params.json
    "hidden_size": "dim", "num_layers": "n_layers", "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads", "norm_eps": "norm_eps",
}  # fmt: skip

LLAMA_DEFAULTS = {"max_positions": 2048, "norm_eps": 1e-6}  # of Hugging Face, if not stated

LLAMA_REQUIRED = {  # keys of config.json and the only value that llama.py computes
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "partial_rotary_factor": 1,
}  # fmt: skip


def llama_settings(source: str | Path) -> dict[str, object]:
    """The fields of LlamaConfig that a folder or hub id states in config.json or params.json.

    Sizes must be stated; LLAMA_DEFAULTS and LlamaConfig have the rest. Raises CheckpointError if a
    field is missing or wrong, or if the architecture is not plain LLaMA.
    """
    path = find_file(source, ("config.json", "params.json"))
    stated = read_json(path)
    keys = LLAMA_META_SETTINGS
    if path.name != "params.json":
        keys = LLAMA_HF_SETTINGS
        # Newer files have rope_theta there.
        stated |= as_object(path, "rope_parameters", stated.get("rope_parameters"))
        require_plain_llama(path, stated)
    settings = fields_of(stated, keys)
    for ours in ("hidden_size", "num_layers", "num_heads", "vocab_size", "intermediate_size"):
        if ours in keys and ours not in settings:
            raise field_error(path, keys[ours], stated.get(keys[ours]), "a size of the model")
    settings.setdefault("num_kv_heads", settings["num_heads"])  # no grouped-query attention
    check_fields(settings, str(path), names=keys)
    head_dim = settings["hidden_size"] // settings["num_heads"]
    if head_dim % 2 or stated.get("head_dim") not in (None, head_dim):
        wanted = f"an even hidden_size / num_heads, here {head_dim},"
        raise field_error(path, "head_dim", stated.get("head_dim"), wanted)
    if keys is LLAMA_META_SETTINGS:
        return settings | meta_sizes(source, settings["hidden_size"])
    return LLAMA_DEFAULTS | settings


def as_object(path: Path, field: str, value: object) -> dict:
    """A field that is an object or, if it is missing or null, {}."""
    if not isinstance(value, dict | None):
        raise field_error(path, field, value, "an object {...}")
    return value or {}


def fields_of(stated: dict, keys: dict[str, str]) -> dict[str, object]:
    """Rename the settings that a file states: our field -> its value."""
    found = {ours: stated.get(theirs) for ours, theirs in keys.items()}
    return {ours: value for ours, value in found.items() if value is not None}


def require_plain_llama(source: str | Path, stated: dict) -> None:
    """Raise CheckpointError if config.json describes another architecture than llama.py has."""
    different = []
    for key, required in LLAMA_REQUIRED.items():
        # A file may leave out all but model_type; what is missing or null has the required value.
        value = stated.get(key)
        if value != required and (value is not None or key == "model_type"):
            different.append(f"{key} = {value!r}")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = as_object(source, key, stated.get(key))
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind == "default" or (kind is None and scaling.get("factor") is None):
            continue
        # With factor 1, and no attention_factor, the formulas of these types change nothing.
        scaled = scaling.get("factor") != 1 or "attention_factor" in scaling
        if scaled or kind not in (None, "linear", "dynamic", "llama3", "yarn"):
            different.append(f"{key} = {scaling}")
    if different:
        what = f"{source} is not a plain LLaMA: {', '.join(different)}."
        why = "llama.py has the architecture of LLaMA 1 and 2, Vicuna and TinyLlama only."
        raise CheckpointError(what, why, "choose one of those models.")


def meta_sizes(source: str | Path, hidden_size: int) -> dict[str, object]:
    """The sizes that params.json leaves out, read from the shapes of the first shard."""
    first = read_tensors(source, (META_FILE,))
    with explained(source):
        shards = hidden_size // len(first["layers.0.attention.wq.weight"])  # wq is split by rows
        return {
            "vocab_size": len(first["tok_embeddings.weight"]),
            "intermediate_size": len(first["layers.0.feed_forward.w1.weight"]) * shards,
        }


@contextmanager
def explained(source: str | Path) -> Iterator[None]:
    """Turn the errors that wrong tensors of Meta or the authors raise into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        what = f"The tensors of {source} do not fit together."
        why = f"one is missing or has another shape: {e!r}."
        raise CheckpointError(what, why, "download all of its files again.") from e


def read_meta(source: str | Path, hidden_size: int, head_dim: int) -> dict[str, Tensor]:
    """Join the shards of Meta's format, with the rows of wq and wk in our order.

    WHY: Meta rotates neighbouring channels (0, 1), (2, 3) ... of a head. We, like Hugging Face,
    rotate channel i with channel i + head_dim/2. Taking first the even and then the odd rows of
    each head turns one into the other: [r0 r1 r2 r3] -> [r0 r2 r1 r3].
    """
    folder = Path(source).parent if Path(source).is_file() else source
    first = read_tensors(folder, (META_FILE,))
    with explained(source):
        count = hidden_size // len(first["layers.0.attention.wq.weight"])  # wq is split by rows
        shards = [first]
        for index in range(1, count):
            shards.append(read_tensors(folder, (f"consolidated.{index:02d}.pth",)))
        tensors = {}
        for name, tensor in first.items():
            if tensor.ndim == 2 and count > 1:
                # These three are split by columns, all other matrices by rows; vectors are copies.
                by_columns = name.split(".")[-2] in ("tok_embeddings", "wo", "w2")
                tensor = torch.cat([shard[name] for shard in shards], dim=1 if by_columns else 0)
            if name.endswith(("wq.weight", "wk.weight")):
                pairs = tensor.unflatten(0, (-1, head_dim // 2, 2))  # (heads, head_dim/2, 2, d)
                tensor = pairs.transpose(1, 2).flatten(0, 2)
            tensors[name] = tensor
    return tensors


# ------------------------------------------------------------------------- the authors' checkpoints

AUTHORS = (  # their checkpoints: https://huggingface.co/tyleryzhu/merv
    "merv-frozen", "merv-full",
    "languagebind-single", "dinov2-single", "vivit-single", "siglip-single",
)  # fmt: skip

AUTHORS_ENCODERS = {  # their name of an encoder -> ours
    "languagebind-video-noclass": "languagebind",
    "dinov2-video-all-tokens": "dinov2",
    "vivit-google-b-all-no-cls-16frames": "vivit",
    "siglip-vit-b16-224px-all-no-cls": "siglip",
}


def authors_settings(raw: dict, place: str) -> dict[str, object]:
    """The settings in the authors' config.json: encoders, pooled_side and visual_tokens.

    encoders: our names, in order; visual_tokens: per clip, None if the file does not say.
    place: the file, for errors. Raises CheckpointError for an encoder that we do not have.
    """
    model = raw["model"]
    theirs = model["video_backbone_ids"]
    unknown = [name for name in theirs if name not in AUTHORS_ENCODERS]
    if unknown:
        what = f"{place} needs {reprlib.repr(unknown)}, which is not implemented."
        why = f"of the authors' encoders there are {', '.join(AUTHORS_ENCODERS)}."
        raise CheckpointError(what, why, f"choose one of {', '.join(AUTHORS)}.")
    tokens = model.get("projector_token_length", 64)  # of one frame
    if type(tokens) is not int or not 1 <= tokens <= 10**6:
        raise field_error(place, "projector_token_length", tokens, "a number of tokens")
    return {
        "encoders": tuple(AUTHORS_ENCODERS[name] for name in theirs),
        "pooled_side": math.isqrt(tokens),
        "visual_tokens": model.get("visual_feature_length"),
    }


def authors_tensors(
    encoder_names: list[str], hidden_size: int, parts: dict[str, dict[str, Tensor]]
) -> tuple[dict[str, Tensor], Table]:
    """The tensors of an authors' checkpoint with simpler names, and our names for them.

    encoder_names: the keys of MERV.projectors, in order. parts: the checkpoint's "model".
    """
    llm = parts["llm_backbone"]
    tensors = {name.removeprefix("llm."): tensor for name, tensor in llm.items()}
    # Older files have one encoder, no number in front of its projector, and other part names.
    for name, tensor in parts.get("projectors", parts.get("projector", {})).items():
        numbered = name if name[0].isdigit() else f"0.{name}"
        tensors[f"projectors.{numbered}"] = tensor
    fusion = parts.get("feature_fusion", parts.get("adapter", {}))
    if len(encoder_names) == 1 and not fusion:
        tensors["query"] = torch.zeros(hidden_size)  # unused: the softmax over one encoder is 1
    else:
        tensors["query"] = fold_query(fusion)
    names: Table = {"mixer.query": "query"}
    for ours, theirs in LLAMA_HF.items():
        names[f"llm.{ours}"] = theirs
    for index, encoder in enumerate(encoder_names):
        names[f"projectors.{encoder}.linear"] = f"projectors.{index}.projector.projector"
    return tensors, names


@torch.no_grad()
def fold_query(fusion: dict[str, Tensor]) -> Tensor:
    """Fold the authors' fusion module into one query (d,): W_k^T (W_q Q + b_q) sqrt(d / d_inner).

    QUIRK: of 44 million parameters, inference uses one vector (ledger K5). The authors' score is
    (W_q Q + b_q) . (W_k x + b_k) / sqrt(d_inner). W_k moves over to the query. b_k adds the same
    number to the score of every encoder and cancels in the softmax. The value and output
    projections are not used.
    """
    d_inner, d = fusion.get("attention.k_proj_weight", torch.empty(1, 1)).shape
    with torch.device("meta"):
        module = nn.ParameterDict({"Q": torch.empty(1, d_inner)})
        attention = nn.MultiheadAttention(d_inner, num_heads=1, kdim=d, vdim=d)
        module.attention = attention
    assign_weights(module, fusion, None, {}, "the fusion module", torch.float64)
    query = attention.q_proj_weight @ module.Q[0] + attention.in_proj_bias[:d_inner]
    return attention.k_proj_weight.mT @ query * math.sqrt(d / d_inner)
