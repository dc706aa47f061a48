"""The authors' checkpoints: their fusion module equals one query, and their files load exactly."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import merv
from encoders import load_encoder
from llama import LLAMAS, Llama, load_llama
from merv import FOUR, MERV, CrossAttentionMixer
from support import released, weights
from support.errors import CheckpointError
from support.released import AUTHORS_ENCODERS, fold_query
from tests.foreign_files import INNER, fusion_weights, random, write_checkpoint

D, LAYERS = 64, 2


def test_the_authors_fusion_is_one_query():
    """Their 1-head attention gives the mixing weights of eq. 2 with the folded query (K5)."""
    weights = {name: tensor.double() for name, tensor in fusion_weights(D, INNER).items()}
    attention = nn.MultiheadAttention(INNER, 1, kdim=D, vdim=D, batch_first=True).double()
    names = {name.removeprefix("attention."): t for name, t in weights.items() if name != "Q"}
    attention.load_state_dict(names)
    x_bend = random(3, 4, 5, D).double()
    keys = x_bend.mean(2)
    query = weights["Q"].expand(3, 1, INNER)
    theirs = attention(query, keys, keys)[1].squeeze(1)
    ours = CrossAttentionMixer(D).double()
    ours.query.data = fold_query(weights)
    # eq. 2 ends in a float32 softmax here; compare the scores to float64 rounding before it.
    score = keys @ ours.query / math.sqrt(D)
    assert theirs.std(1).min() > 1e-3  # the weights do differ between encoders
    torch.testing.assert_close(score.softmax(-1), theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours(x_bend)[1], theirs.float(), rtol=0, atol=1e-6)


@pytest.fixture
def small(monkeypatch):
    """The authors' format at a tiny width; full-size names mean the miniature encoders."""
    llama = replace(
        LLAMAS["miniature"], num_layers=LAYERS, hidden_size=D, vocab_size=32064, name="llama2-7b"
    )
    monkeypatch.setitem(merv.LLAMAS, "llama2-7b", llama)
    for name in FOUR:
        tiny = replace(merv.ENCODERS[f"miniature-{name}"], name=name)
        monkeypatch.setitem(merv.ENCODERS, name, tiny)
    return llama


def test_an_authors_checkpoint_loads_exactly(small, tmp_path, shared_folder):
    """Projectors go by order, the LLM by name; the fusion is folded; RoPE is rounded (K1), and the
    vocabulary has 32064 rows (K9)."""
    model, sources = write_checkpoint(tmp_path, small, list(AUTHORS_ENCODERS))
    tokenizer = shared_folder / "data" / "llama2_tokenizer.model"
    loaded = MERV.from_pretrained(tmp_path, tokenizer=tokenizer, sources=sources)
    assert tuple(loaded.encoders) == FOUR and loaded.config.pooled_side == 2
    assert loaded.config.llm.rope_bf16 and loaded.config.llm.vocab_size == 32064
    for index, projector in enumerate(loaded.projectors.values()):
        wanted = model["projectors"][f"{index}.projector.projector.weight"]
        assert torch.equal(projector.linear.weight, wanted)
    head = loaded.llm.lm_head.weight
    assert torch.equal(head, model["llm_backbone"]["llm.lm_head.weight"])
    folded = fold_query(model["feature_fusion"]).float()
    assert torch.equal(loaded.mixer.query, folded)


def test_a_local_folder_goes_before_a_released_name(small, tmp_path, shared_folder, monkeypatch):
    """`hf download tyleryzhu/merv --local-dir .` makes a folder merv-frozen."""
    monkeypatch.chdir(tmp_path)
    _, sources = write_checkpoint(tmp_path / "merv-frozen", small, list(AUTHORS_ENCODERS))
    tokenizer = shared_folder / "data" / "llama2_tokenizer.model"
    loaded = MERV.from_pretrained("merv-frozen", tokenizer=tokenizer, sources=sources)
    assert tuple(loaded.encoders) == FOUR


def test_an_older_single_encoder_checkpoint_loads(small, tmp_path, shared_folder):
    """Older files call the part `projector`, number nothing, and have no fusion."""
    model, sources = write_checkpoint(tmp_path, small, [list(AUTHORS_ENCODERS)[1]], old_names=True)
    tokenizer = shared_folder / "data" / "llama2_tokenizer.model"
    loaded = MERV.from_pretrained(tmp_path, tokenizer=tokenizer, sources=sources)
    assert list(loaded.encoders) == ["dinov2"]
    wanted = model["projector"]["projector.projector.weight"]
    assert torch.equal(loaded.projectors["dinov2"].linear.weight, wanted)
    frames = torch.zeros(8, 3, 20, 30, dtype=torch.uint8)
    tokens, weights = loaded.encode({k: v[None] for k, v in loaded.pixels(frames).items()})
    assert tokens.shape == (1, 16, D) and weights.tolist() == [[1.0]]


@pytest.mark.parametrize("part", ["projectors", "feature_fusion", "llm_backbone"])
def test_each_missing_renamed_or_mis_shaped_tensor_is_named(small, tmp_path, shared_folder, part):
    """Each kind of damage to each part raises a CheckpointError that contains the name."""
    model, sources = write_checkpoint(tmp_path, small, list(AUTHORS_ENCODERS))
    tokenizer = shared_folder / "data" / "llama2_tokenizer.model"
    file = tmp_path / "checkpoints" / "latest-checkpoint.pt"
    used = [n for n in model[part] if n.split(".")[-2:] != ["out_proj", "weight"]]
    for name in (used[0], used[-1]):
        for damage in ("lost", "renamed", "misshaped"):
            changed = dict(model[part])
            tensor = changed.pop(name)
            if damage == "renamed":
                changed[name + "x"] = tensor
            elif damage == "misshaped":
                changed[name] = tensor[..., :-1]
            torch.save({"model": {**model, part: changed}}, file)
            with pytest.raises(CheckpointError) as caught:
                MERV.from_pretrained(tmp_path, tokenizer=tokenizer, sources=sources)
            assert name.removeprefix("llm.") in str(caught.value), (name, damage)


@pytest.mark.parametrize(
    ("length", "projector"), [(1024, "avg2d"), (16 * 14 * 14, "all"), (None, "avg2d")]
)
def test_the_number_of_visual_tokens_determines_the_projector(length, projector):
    """The authors' single encoders may use all patches: 16 x 196 tokens instead of 16 x 64."""
    settings = {"video_backbone_ids": [list(AUTHORS_ENCODERS)[3]], "visual_feature_length": length}
    assert merv.authors_config("siglip-single", {"model": settings}).projector == projector


def test_an_impossible_number_of_visual_tokens_is_an_error():
    """257 tokens per frame would include LanguageBind's class token, which is not in its grid."""
    settings = {"video_backbone_ids": [next(iter(AUTHORS_ENCODERS))], "visual_feature_length": 4112}
    with pytest.raises(CheckpointError, match="4112 visual tokens"):
        merv.authors_config("languagebind-single", {"model": settings})


def test_unknown_encoders_are_named(small, tmp_path):
    """The authors have ablations with other encoders; the error says which encoder is missing."""
    write_checkpoint(tmp_path, small, ["hiera-base-plus-video"])
    with pytest.raises(CheckpointError, match="hiera-base-plus-video"):
        MERV.from_pretrained(tmp_path)


def test_code_inside_an_authors_checkpoint_never_runs(small, tmp_path):
    """The authors' checkpoints are pickles, of which we read tensors only (F11)."""

    class Evil:
        def __reduce__(self):
            return print, ("this must never run",)

    write_checkpoint(tmp_path, small, list(AUTHORS_ENCODERS))
    torch.save({"model": Evil()}, tmp_path / "checkpoints" / "latest-checkpoint.pt")
    with pytest.raises(CheckpointError, match="Cannot read"):
        MERV.from_pretrained(tmp_path)


def test_the_manifest_of_the_authors_fits_the_full_size_model(shared_folder):
    """At full size, on the meta device, each tensor of merv-frozen is used or skipped by name."""
    manifest = json.loads((shared_folder / "manifests" / "merv.json").read_text())
    parts = {
        part: {name: torch.empty(shape, device="meta") for name, (shape, _) in tensors.items()}
        for part, tensors in manifest.items()
    }
    found = {"model": {"video_backbone_ids": list(AUTHORS_ENCODERS)}}
    config = merv.authors_config("merv-frozen", found)
    tensors, names = released.authors_tensors(FOUR, config.llm.hidden_size, parts)
    with torch.device("meta"):
        model = MERV(config, [nn.Module() for _ in FOUR], Llama(config.llm), None)
    merv.assign_weights(model, tensors, names, merv.LLAMA_SKIP, "manifest", torch.bfloat16)
    assert sum(p.numel() for p in model.llm.parameters()) == 6_738_939_904
    assert model.mixer.query.shape == (4096,) and config.grid == (16, 8, 8)


# Tensors of the first block, of the last block that we use, and outside the blocks.
KINDS = {
    "dinov2": r"blocks\.(0|22)\.|cls_token|reg_token|pos_embed|patch_embed",
    "siglip": r"blocks\.(0|10)\.|pos_embed|patch_embed",
    "vivit": r"vivit\.(encoder\.layer\.(0|11)\.|embeddings|layernorm)",
    "languagebind": r"vision_model\.(encoder\.layers\.(0|22)\.|embeddings|pre_layrnorm)",
    "llama2-7b": r"model\.layers\.(0|31)\.|model\.embed_tokens|model\.norm|lm_head",
}


SLOW = {"languagebind", "vivit", "llama2-7b"}  # hundreds of loads each


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS]
)
def test_a_full_size_manifest_loads_and_damaged_tensors_are_named(name, shared_folder, monkeypatch):
    """The released names and shapes fit. A missing, renamed or cut tensor is named in the error."""
    manifest = json.loads((shared_folder / "manifests" / f"{name}.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, (shape, _) in manifest.items()}
    load = load_llama if name in LLAMAS else load_encoder
    changed = dict(tensors)
    monkeypatch.setattr(weights, "read_tensors", lambda *_: dict(changed))
    monkeypatch.setattr(weights, "find_file", lambda *_, **__: None)
    load(name, "a/b", device="meta")
    used = [key for key in tensors if re.match(KINDS[name], key)]
    assert len(used) > 20
    for key in used:
        for damage in ("lost", "renamed", "cut"):
            changed = dict(tensors)
            tensor = changed.pop(key)
            if damage == "renamed":
                changed[key + "x"] = tensor
            elif damage == "cut":
                changed[key] = torch.empty(*tensor.shape[:-1], tensor.shape[-1] - 1, device="meta")
            with pytest.raises(CheckpointError) as caught:
                load(name, "a/b", device="meta")
            inner = key.removeprefix("vivit.").removeprefix("vision_model.")
            assert inner in str(caught.value), (key, damage)
