"""Loading LLaMA: Hugging Face folders, Meta's files, and errors that name what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_llama import GROUPED, assert_close, build, ids_of, transformers_llama
from torch import Tensor

from llama import LLAMAS, Llama, load_llama, read_config, rope, rotate
from support.errors import CheckpointError
from support.released import LLAMA_HF, read_meta
from support.weights import released_names

pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------- in a good folder


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
@torch.no_grad()
def test_a_hugging_face_folder_has_the_configuration_and_the_weights(form, tmp_path):
    model = build()
    write(tmp_path, released(model), form)
    loaded = load_llama(tmp_path)
    expected = replace(GROUPED, name=tmp_path.name, source=str(tmp_path))
    assert loaded.config == expected
    state = model.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in loaded.state_dict().items())
    assert torch.equal(loaded(ids_of(2, 5)), model(ids_of(2, 5)))


@pytest.mark.parametrize("theta", [10000.0, 50000.0])
@torch.no_grad()
def test_a_folder_written_by_transformers_gives_the_same_logits(theta, tmp_path):
    """Version 5 of transformers writes RoPE's base as rope_parameters.rope_theta."""
    rope_parameters = {"rope_type": "default", "rope_theta": theta}
    theirs = transformers_llama(rope_parameters=rope_parameters)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_llama(tmp_path)
    assert_close(ours(ids_of(2, 40)), theirs(ids_of(2, 40)).logits)


def test_rope_theta_is_also_read_where_older_versions_write_it(tmp_path):
    write(tmp_path, {}, "bin", rope_theta=50000.0)
    assert read_config(tmp_path).rope_theta == 50000.0


def test_the_released_config_of_llama2_7b_equals_the_preset(tmp_path):
    """LLAMAS agrees with config.json of meta-llama/Llama-2-7b-hf."""
    released_config = hf_config(
        hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, vocab_size=32000,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(released_config))
    preset = LLAMAS["llama2-7b"]
    assert replace(read_config(tmp_path), name=preset.name, source=preset.source) == preset


def test_without_num_key_value_heads_every_head_has_its_own(tmp_path):
    """LLaMA-1 and Vicuna were released before config.json had a field for them."""
    config = hf_config()
    del config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).num_kv_heads == 4


def test_a_folder_named_like_a_preset_uses_its_prompt_template(tmp_path):
    folder = tmp_path / "vicuna-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config()))
    assert read_config(folder).template == "vicuna"
    assert read_config(folder).hidden_size == 32, "all sizes still come from its config.json"


def test_rotary_tables_in_old_files_are_skipped(tmp_path):
    """Early conversions stored inv_freq in each layer; rope() computes it."""
    tensors = released(build())
    for index in range(3):
        tensors[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write(tmp_path, tensors, "bin")
    assert load_llama(tmp_path).config.num_layers == 3


def test_a_padded_vocabulary_loads(tmp_path):
    """The authors' checkpoint has 32064 embeddings for 32000 pieces (ledger K9)."""
    write(tmp_path, released(build(vocab_size=128)), "safetensors", vocab_size=128)
    assert load_llama(tmp_path)(ids_of(1, 3)).shape == (1, 3, 128)


def test_a_checkpoint_with_tied_embeddings_loads_with_or_without_a_head(tmp_path):
    model = build(tie_word_embeddings=True)
    tensors = released(model)
    for extra in ({}, {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}):
        write(tmp_path, tensors | extra, "safetensors", tie_word_embeddings=True)
        with torch.no_grad():
            assert torch.equal(load_llama(tmp_path)(ids_of(1, 4)), model(ids_of(1, 4)))


def test_weights_are_cast_to_the_requested_dtype(tmp_path):
    write(tmp_path, released(build()), "safetensors")
    model = load_llama(tmp_path, dtype=torch.bfloat16)
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    assert model(ids_of(1, 4)).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------- errors


def test_one_error_lists_every_tensor_that_does_not_fit(tmp_path):
    tensors = released(build())
    del tensors["model.norm.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(2)
    tensors["lm_head.weight"] = torch.ones(96, 32)
    write(tmp_path, tensors, "safetensors")
    with pytest.raises(CheckpointError) as error:
        load_llama(tmp_path)
    for problem in (
        "missing     model.norm.weight",
        "missing     model.layers.2.mlp.up_proj.weight",
        "mis-shaped  lm_head.weight: [96, 32], wanted [97, 32]",
        "unexpected  model.layers.3.mlp.up_proj.weight",
    ):
        assert problem in str(error.value)
    assert "layers.0" not in str(error.value)


def test_the_error_for_a_missing_shard_names_it(tmp_path):
    write(tmp_path, released(build()), "sharded safetensors")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        load_llama(tmp_path)


def test_the_error_for_a_damaged_config_names_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config())[:-40])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_llama(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral"}, "mistral"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 2.0}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_other_architectures_are_rejected_with_the_field_that_differs(change, named, tmp_path):
    write(tmp_path, released(build()), "bin", **change)
    with pytest.raises(CheckpointError) as error:
        load_llama(tmp_path)
    assert named in str(error.value)
    assert "\nFix: " in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 1}},
        {"rope_scaling": {"rope_type": None, "type": "llama3", "factor": 1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_parameters": None, "attention_bias": None, "mlp_bias": None, "hidden_act": None},
        {"head_dim": 8},
    ],
)
def test_plain_variants_of_a_config_load(change, tmp_path):
    """Converters write the same architecture in many ways; the first six were refused."""
    (tmp_path / "config.json").write_text(json.dumps(hf_config(**change)))
    assert read_config(tmp_path) == replace(GROUPED, name=tmp_path.name, source=str(tmp_path))


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", "model.inv_freq", "inv_freq"])
def test_one_rotary_table_at_the_top_of_a_file_is_skipped(name, tmp_path):
    """Where transformers 4.39 to 4.47 kept it, and converters do."""
    tensors = released(build()) | {name: torch.ones(4)}
    write(tmp_path, tensors, "safetensors")
    assert load_llama(tmp_path).config.num_layers == 3


@pytest.mark.parametrize(
    "field",
    ["hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads"],
)
def test_a_config_without_a_size_names_the_field(field, tmp_path):
    """The sizes of LLaMA-2 7B were taken for it, or a KeyError was shown."""
    config = hf_config()
    del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} is None"):
        read_config(tmp_path)


def test_what_a_config_may_leave_out_has_the_usual_value(tmp_path):
    """Those of Hugging Face, whose file it is."""
    config = hf_config()
    for field in ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_config(tmp_path)
    assert (read.norm_eps, read.max_positions, read.tie_word_embeddings) == (1e-6, 2048, False)


WRONG_VALUES = {
    "num_hidden_layers": (10**9, 0, -1, "3", 3.5, True, [3], float("inf")),
    "hidden_size": (0, 31, 10**9, None),
    "num_attention_heads": (0, 3, -4),
    "num_key_value_heads": (3, 0, 8),
    "vocab_size": (0, "many", 10**12),
    "rms_norm_eps": (0, -1e-5, 1, "small", float("nan")),
    "rope_theta": (0, -1e4, "10000"),
    "tie_word_embeddings": ("no", 1),
    "head_dim": (16, "8"),
    "rope_scaling": ("linear", [1], 2),
}
CASES = [(field, value) for field, values in WRONG_VALUES.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES)
def test_a_wrong_value_in_a_config_is_named_before_anything_is_built(field, value, tmp_path):
    """10^9 layers used to be built for days; a text ended in a traceback."""
    (tmp_path / "config.json").write_text(json.dumps(hf_config(**{field: value})))
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert "config.json" in str(caught.value)
    assert field in str(caught.value) or "heads" in str(caught.value)
    assert "\nFix: " in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "7", "null", "{", "\xff", "[" * 100_000])
def test_a_config_that_is_no_object_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"Cannot read .*config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("params", [{}, {"dim": 0}, {"dim": 32, "n_layers": 10**9, "n_heads": 4}])
def test_wrong_settings_in_metas_format_are_named(params, tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(params))
    torch.save({"x": torch.ones(2)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"params\.json: (dim|n_layers)"):
        read_config(tmp_path)


def test_metas_format_without_its_tensors_is_an_error(tmp_path):
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}
    (tmp_path / "params.json").write_text(json.dumps(params))
    torch.save({"x": torch.ones(2)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="do not fit together"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("model.norm.weight", float("nan"), "not finite  model.norm.weight"),
        ("model.layers.1.mlp.up_proj.weight", float("inf"), "not finite  model.layers.1.mlp.up"),
        ("lm_head.weight", torch.int8, "mis-typed   lm_head.weight: torch.int8"),
    ],
)
def test_weights_that_cannot_be_computed_with_are_named(name, value, wanted, tmp_path):
    """NaN would make every answer empty; quantised numbers were cast as if they were weights."""
    tensors = released(build())
    if isinstance(value, float):
        tensors[name].fill_(value)
    else:
        tensors[name] = tensors[name].to(value)
    write(tmp_path, tensors, "safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_llama(tmp_path)
    assert wanted in str(caught.value)


# ------------------------------------------------------------------------------------- Meta's files


def test_rotating_neighbours_as_meta_does_equals_rotating_halves_of_reordered_rows(tmp_path):
    """Meta rotates channel pairs (0, 1), (2, 3), ... of a head; we rotate (i, i + head_dim/2).

    The attention scores are the same if the rows of wq and wk are reordered, as read_meta does.
    """
    config = replace(GROUPED, num_kv_heads=GROUPED.num_heads)
    heads, head_dim, d = config.num_heads, config.head_dim, config.hidden_size
    generator = torch.Generator().manual_seed(0)
    wq, wk, x = torch.randn(3, d, d, generator=generator, dtype=torch.float64)
    theirs = {
        "layers.0.attention.wq.weight": wq.clone(),
        "layers.0.attention.wk.weight": wk.clone(),
    }
    torch.save(theirs, tmp_path / "consolidated.00.pth")

    def rotated_neighbours(w: Tensor) -> Tensor:  # (s, heads, head_dim / 2), complex
        pairs = torch.view_as_complex((x @ w.mT).view(d, heads, head_dim // 2, 2))
        frequencies = config.rope_theta ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(d)[:, None] * frequencies
        return pairs * torch.polar(torch.ones(()), angles.float())[:, None]

    def rotated_halves(w: Tensor) -> Tensor:  # (heads, s, head_dim)
        projected = (x @ w.mT).view(1, d, heads, head_dim).transpose(1, 2)
        return rotate(projected, rope(torch.arange(d), config))[0]

    q, k = rotated_neighbours(wq).movedim(1, 0), rotated_neighbours(wk).movedim(1, 0)
    expected = (q @ k.mH).real
    ours = read_meta(tmp_path, d, head_dim)
    q, k = (rotated_halves(w) for w in ours.values())
    scores = q @ k.mT
    assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()


# ------------------------------------------------------------------------------------------ helpers


def hf_config(**changes) -> dict:
    """LLaMA-2 7B's config.json from the hub, with the sizes of the tiny model."""
    return {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 48, "max_position_embeddings": 64, "model_type": "llama",
        "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
        "vocab_size": 97,
    } | changes  # fmt: skip


def released(model: Llama) -> dict[str, Tensor]:
    """The tensors under Hugging Face's names."""
    return {released_names(key, LLAMA_HF)[0]: x.clone() for key, x in model.state_dict().items()}


def write(folder, tensors: dict[str, Tensor], form: str, **changes) -> None:
    """Write a model folder in Hugging Face format. form: one of the four of the first test."""
    (folder / "config.json").write_text(json.dumps(hf_config(**changes)))
    suffix = ".safetensors" if "safetensors" in form else ".bin"
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    save = save_file if suffix == ".safetensors" else torch.save
    if not form.startswith("sharded"):
        save(tensors, folder / f"{stem}{suffix}")
        return
    shards = [f"{stem}-0000{i}-of-00003{suffix}" for i in (1, 2, 3)]
    where = {name: shards[i % 3] for i, name in enumerate(tensors)}
    for shard in shards:
        save({name: x for name, x in tensors.items() if where[name] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
