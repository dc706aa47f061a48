"""Weights: how files are found, read, renamed, checked strictly and written.

test_hub.py tests downloads with the real client; test_released.py tests the authors' checkpoints.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.errors as hub_errors
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import FULL_SIZE, build, clip, tiny
from torch import Tensor

import encoders
from encoders import ENCODERS, FAMILIES, Encoder, load_encoder, save_encoder
from merv import MERVS, Checkpoint
from support import weights
from support.errors import CheckpointError, UserError
from support.released import resize_positions
from support.weights import FILES, find_file, read_tensors, released_names, save_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

# -------------------------------------------------------------------------------- files and folders


def test_the_first_name_that_exists_is_found(tmp_path):
    for name in ("b", "c"):
        (tmp_path / name).touch()
    assert find_file(tmp_path, ("a", "c", "b")) == tmp_path / "c"
    assert find_file(tmp_path / "b", ("a",)) == tmp_path / "b"
    assert find_file(tmp_path, ("a",), required=False) is None


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"Found no model.safetensors .*nowhere"):
        load_encoder(tiny("vivit"), tmp_path / "nowhere" / "model.safetensors")


def test_a_folder_without_weights_is_an_error_with_all_names_tried(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"Found no model\.safetensors or .*pytorch_model\.bin"
    ):
        load_encoder(tiny("vivit"), tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_reported(file, tmp_path):
    good = {"x": torch.randn(1000)}
    path = tmp_path / file
    if path.suffix == ".bin":
        torch.save(good, path)
    else:
        save_file(good, path)
    assert torch.equal(read_tensors(tmp_path, (file,))["x"], good["x"])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=f"Cannot read .*{file}"):
        read_tensors(tmp_path, (file,))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', "{"])
def test_an_index_without_shards_is_reported_as_damaged(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"Cannot read .*index\.json"):
        read_tensors(tmp_path, FILES)


@pytest.mark.parametrize(
    "shard",
    ["model.safetensors.index.json", "../model.safetensors", "/etc/passwd", "sub/a.safetensors", 7,
     "..\\a.safetensors", ""],
)  # fmt: skip
def test_an_index_names_files_beside_it_and_never_itself(shard, tmp_path):
    """An index that named itself was read until Python gave up."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    index = {"weight_map": {"x": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"Cannot read .*index\.json"):
        read_tensors(folder, FILES)


@pytest.mark.parametrize("name", ["languagebind", "dinov2", "vivit", "siglip"])
def test_weights_of_each_encoder_stay_mapped_to_their_file(name, tmp_path, monkeypatch):
    """DINOv2 and SigLIP were copied into memory as a whole, because of their positions."""
    file = tmp_path / "encoder.safetensors"
    save_encoder(load_encoder(f"miniature-{name}"), file)
    read = []
    assign = weights.assign_weights
    monkeypatch.setattr(
        weights, "assign_weights", lambda *how: read.append(type(how[1])) or assign(*how)
    )
    load_encoder(f"miniature-{name}", file, dtype=None)
    assert read == [weights.Mapped]


def test_shards_of_two_formats_are_not_taken_for_mapped_ones(tmp_path):
    """A model that is trained would otherwise write into the pickle's file."""
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"y": torch.zeros(2)}, tmp_path / "b.bin")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.bin"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = read_tensors(tmp_path, FILES)
    assert sorted(tensors) == ["x", "y"]
    assert type(tensors) is dict


@pytest.mark.parametrize("read", [weights.read_json, lambda path: read_tensors(path, FILES)])
def test_a_file_that_cannot_be_opened_is_named(read, tmp_path, monkeypatch):
    """Without permission to read it, for example."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"{}")

    def refuse(*how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors(?s:.*)Permission denied"):
        read(path)


def test_a_pickle_of_before_torch_1_6_is_read(tmp_path):
    """It is no zip archive, so it cannot be mapped."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.arange(5.0)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(tmp_path, FILES)["x"], torch.arange(5.0))


def test_code_inside_an_old_pickle_never_runs(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    dangerous = {"x": Dangerous(tmp_path / "owned")}
    torch.save(dangerous, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path, FILES)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_pointer_of_git_lfs_is_explained(name, tmp_path):
    """`git clone` leaves it in place of a large file if Git LFS is not installed."""
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_tensors(tmp_path, FILES)


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], 7])
def test_a_pickle_without_names_is_no_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="instead of named tensors"):
        read_tensors(tmp_path, FILES)


def test_a_value_that_is_no_tensor_is_named(tmp_path):
    """Such as the text of a configuration inside a pickle of weights."""
    _, tensors = released("vivit", tmp_path)
    tensors[SOME_TENSOR["vivit"]] = "text"
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no tensor   .*key\.weight: a str"):
        load_encoder(tiny("vivit"), tmp_path)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"pooled_side": 0}, "pooled_side is 0"),
        ({"projector": "conv9d"}, "projector is 'conv9d'"),
        ({"mixer": ["mean"]}, "mixer is"),
        ({"encoders": []}, "encoders is []"),
        ({"llm": {"num_layers": 10**9}}, "num_layers is 1000000000"),
        ({"llm": {"hidden_size": 130}}, "hidden_size is 130"),
        ({"llm": {"template": "none"}}, "template is 'none'"),
        ({"encoders": [{"family": "clip"}]}, "family is 'clip'"),
        ({"encoders": [{"pixel_mean": [0.5]}]}, "pixel_mean is [0.5]"),
        ({"encoders": [{"pixel_mean": [10**400, 0, 0]}]}, "pixel_mean is [1000"),
        ({"encoders": [{"pixel_std": [0.5, 0.5, 0]}]}, "pixel_std is [0.5, 0.5, 0]"),
        ({"encoders": [{"image_size": -1}]}, "image_size is -1"),
        ({"encoders": [{"mlp_size": {}}]}, "mlp_size is {}"),
        ({"encoders": [{"source": "x" * 300}]}, "source is 'xxx"),
        ({"encoders": [{"num_frames": 8}]}, "num_frames is [8, 4, 8, 4]"),
        ({"encoders": [{"tubelet_frames": 3}]}, "num_frames is 4"),
        ({"encoders": [{"temporal_window": 3}]}, "num_frames is 4"),
    ],
)
def test_a_wrong_field_in_the_config_of_a_merv_is_named(change, wanted, tmp_path):
    """Before any part of the model is built."""
    config = json.loads(json.dumps(asdict(MERVS["miniature"])))
    for key, value in change.items():
        if isinstance(value, dict):
            config[key] |= value
        elif key == "encoders" and value:
            config[key][0] |= value[0]
        else:
            config[key] = value
    (tmp_path / "config.json").write_text(json.dumps({"merv": config}))
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        Checkpoint(tmp_path).build_skeleton()
    assert wanted in str(caught.value)


@pytest.mark.parametrize("part", ["", "llm", "encoders"])
def test_a_field_that_is_missing_in_the_config_of_a_merv_is_named(part, tmp_path):
    """pooled_side 8 was taken for the miniature's 3, gelu for ViViT's activation."""
    whole = asdict(MERVS["miniature"])
    names = set({"": whole, "llm": whole["llm"], "encoders": whole["encoders"][0]}[part])
    for name in names - {"label", "mlp_size"}:  # which older versions did not write
        config = json.loads(json.dumps(whole))
        inside = config[part] if part else config
        del (inside[2] if part == "encoders" else inside)[name]
        (tmp_path / "config.json").write_text(json.dumps({"merv": config}))
        with pytest.raises(CheckpointError, match=rf"config\.json: {name} is None") as caught:
            Checkpoint(tmp_path).build_skeleton()
        assert "\nFix: " in str(caught.value)


def test_code_inside_a_pickle_never_runs(tmp_path):
    torch.save({"x": Dangerous(tmp_path / "owned")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path, ("pytorch_model.bin",))
    assert not (tmp_path / "owned").exists()


class Dangerous:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_an_interrupted_save_leaves_the_old_file_intact(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_tensors({"x": torch.ones(3)}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]

    def half(tensors, where):
        where.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be written\.\nWhy: disk full"):
        save_tensors({"x": torch.zeros(3)}, path)
    assert torch.equal(load_file(path)["x"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_whoever_may_read_a_folder_may_read_the_files_saved_in_it(folder, file, tmp_path):
    """safetensors makes files for their owner only; a shared folder would be of no use."""
    tmp_path.chmod(folder)
    save_tensors({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == file


def test_an_error_keeps_its_message_when_it_leaves_a_worker_process():
    error = CheckpointError("what", "why", "fix")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is CheckpointError
    assert str(again) == str(error) == "what\nWhy: why\nFix: fix"


# ------------------------------------------------------------------------------------------ the hub


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (hub_errors.GatedRepoError, "accept its licence at huggingface.co/owner/name"),
        (hub_errors.RepositoryNotFoundError, "check the name (a local path must exist)"),
        (hub_errors.RevisionNotFoundError, "check the name"),
        (hub_errors.LocalEntryNotFoundError, "hf download owner/name"),
    ],
)
def test_an_error_of_the_hub_is_explained(error, fix, monkeypatch):
    """The message has the hub's own words, here "no", and says what to do."""
    calls = hub_that_raises(error, monkeypatch)
    with pytest.raises(CheckpointError, match=f"Why: {error.__name__}: no\nFix: ") as caught:
        find_file("owner/name@main", ("a.bin", "b.bin"))
    assert fix in str(caught.value)
    assert "Cannot download a.bin or b.bin of owner/name@main." in str(caught.value)
    # The cache may have the next name; after any other error, no name is tried.
    asked = ["a.bin", "b.bin"] if error is hub_errors.LocalEntryNotFoundError else ["a.bin"]
    assert calls == [("owner/name", name, "main") for name in asked]


def test_if_the_repository_lacks_a_file_the_next_name_is_tried(monkeypatch):
    calls = hub_that_raises(hub_errors.RemoteEntryNotFoundError, monkeypatch)
    with pytest.raises(CheckpointError, match=r"Found no a\.bin or b\.bin at owner/name"):
        find_file("owner/name", ("a.bin", "b.bin"))
    assert calls == [("owner/name", "a.bin", None), ("owner/name", "b.bin", None)]


def hub_that_raises(error_class, monkeypatch) -> list[tuple]:
    """Make every download raise this error; return the list of calls."""
    calls = []
    response = SimpleNamespace(headers={}, request=None, status_code=404)

    def download(repo, name, revision=None):
        calls.append((repo, name, revision))
        try:
            error = error_class("no", response=response)
        except TypeError:
            error = error_class("no")
        raise error

    monkeypatch.setattr(weights.huggingface_hub, "hf_hub_download", download)
    return calls


# ----------------------------------------------------------------------------------------- renaming


def test_a_table_translates_our_names():
    table = {"norm": "final", "x": "a.b", "blocks.*.qkv": ("l.*.q", "l.*.k")}
    assert released_names("norm.bias", table) == ["final.bias"]
    assert released_names("x", table) == ["a.b"]
    assert released_names("blocks.12.qkv.weight", table) == ["l.12.q.weight", "l.12.k.weight"]
    assert released_names("blocks.12.qkv.weight", None) == ["blocks.12.qkv.weight"]


# -------------------------------------------------------------------------------- released encoders

# The released name of one tensor of the first block.
SOME_TENSOR = {
    "languagebind": "vision_model.encoder.layers.0.temporal_attn.k_proj.weight",
    "dinov2": "blocks.0.ls1.gamma",
    "vivit": "vivit.encoder.layer.0.attention.attention.key.weight",
    "siglip": "blocks.0.attn.qkv.bias",
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_saving_and_loading_an_encoder_is_bit_exact(name, tmp_path):
    config = tiny(name)
    encoder, frames = build(config, torch.float32), clip(config, dtype=torch.float32)
    save_encoder(encoder, tmp_path / "deeper" / "encoder.safetensors")
    again = load_encoder(config, tmp_path / "deeper" / "encoder.safetensors")
    mine, loaded = encoder.state_dict(), again.state_dict()
    assert list(mine) == list(loaded)
    assert all(torch.equal(mine[key], loaded[key]) for key in mine)
    assert torch.equal(encoder(frames), again(frames))
    assert again.config == config
    assert not any(p.requires_grad for p in again.parameters())
    assert not again.training


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_released_file_loads_without_its_unused_parts(name, tmp_path):
    """The last block (not ViViT's), final norm, pooling heads and text tower are skipped by name.
    The features equal those of the complete encoder at the same block."""
    everything, tensors = released(name, tmp_path)
    save_file(tensors, tmp_path / FILES[0])
    encoder = load_encoder(tiny(name), tmp_path)
    assert len(encoder.blocks) == (3 if name == "vivit" else 2)
    frames = clip(encoder.config, dtype=torch.float32)
    everything.blocks = everything.blocks[: len(encoder.blocks)]
    assert torch.equal(encoder(frames), everything(frames))


@pytest.mark.parametrize("name", ["languagebind", "vivit"])
def test_a_pytorch_bin_in_a_folder_loads_too(name, tmp_path):
    _, tensors = released(name, tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    encoder = load_encoder(tiny(name), tmp_path)
    names = encoder.released
    keys = released_names("blocks.1.mlp.up_proj.weight", names.table)
    assert torch.equal(encoder.blocks[1].mlp.up_proj.weight, tensors[names.prefixes[0] + keys[0]])


def test_a_loaded_encoder_has_the_dtype_asked_for(tmp_path):
    encoder = build(tiny("dinov2"), torch.float32)
    save_encoder(encoder, tmp_path / "model.safetensors")
    again = load_encoder(tiny("dinov2"), tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(again.class_token, encoder.class_token.bfloat16())


def test_siglip_as_saved_by_open_clip_loads(tmp_path):
    """The older release has the same names after `visual.trunk.`, and a text tower."""
    everything, tensors = released("siglip", tmp_path)
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {"text.transformer.x": torch.ones(2), "logit_scale": torch.ones(())}
    tensors["logit_bias"] = torch.ones(1)
    torch.save(tensors, tmp_path / "open_clip_pytorch_model.bin")
    encoder = load_encoder(tiny("siglip"), tmp_path)
    everything.blocks = everything.blocks[:2]
    frames = clip(encoder.config, dtype=torch.float32)
    assert torch.equal(encoder(frames), everything(frames))


def test_languagebinds_window_is_read_from_its_weights(tmp_path):
    """The configuration says 8, but a file with 4 temporal positions makes windows of 4."""
    everything, tensors = released("languagebind", tmp_path, temporal_window=4)
    save_file(tensors, tmp_path / "model.safetensors")
    encoder = load_encoder(tiny("languagebind"), tmp_path)
    assert tiny("languagebind").temporal_window == 8
    assert encoder.config.temporal_window == 4
    frames = clip(encoder.config, dtype=torch.float32)
    everything.blocks = everything.blocks[:2]
    assert torch.equal(encoder(frames[:, :12]), everything(frames[:, :12]))


@pytest.mark.parametrize("point_at_the_file", [False, True])
@pytest.mark.parametrize(
    ("vision_config", "activation"),
    [({"hidden_act": "quick_gelu"}, "quick_gelu"), ({"hidden_act": "gelu"}, "gelu"), ({}, "gelu")],
)
def test_languagebinds_activation_is_read_from_the_config_beside_it(
    vision_config, activation, point_at_the_file, tmp_path
):
    _, tensors = released("languagebind", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision_config}))
    source = tmp_path / "model.safetensors" if point_at_the_file else tmp_path
    encoder = load_encoder(tiny("languagebind"), source)
    assert encoder.config.activation == activation
    assert encoder.blocks[0].mlp.activation is encoders.ACTIVATIONS[activation]


# ----------------------------------------------------------------------------------- strict loading


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_missing_tensor_is_named(name, tmp_path):
    _, tensors = released(name, tmp_path)
    missing = SOME_TENSOR[name]
    del tensors[missing]
    message = loading_error(name, tensors, tmp_path)
    bare = missing.removeprefix("vision_model.").removeprefix("vivit.")
    assert f"missing     {bare}" in message
    assert "unexpected" not in message
    assert "mis-shaped" not in message


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize("stray", ["blocks.3.norm1.weight", "decoder.weight"])
def test_an_unexpected_tensor_is_named(name, stray, tmp_path):
    """A block after the last released one is unexpected too: that file has a larger model."""
    _, tensors = released(name, tmp_path)
    message = loading_error(name, tensors | {stray: torch.ones(2)}, tmp_path)
    assert f"unexpected  {stray}" in message
    assert message.count("unexpected  ") == 1


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_mis_shaped_tensor_is_named_with_both_shapes(name, tmp_path):
    _, tensors = released(name, tmp_path)
    wrong = SOME_TENSOR[name]
    tensors[wrong] = torch.ones(7, *tensors[wrong].shape[1:])
    message = loading_error(name, tensors, tmp_path)
    assert "mis-shaped" in message
    assert wrong.removeprefix("vision_model.").removeprefix("vivit.") in message
    assert "wanted [" in message


@pytest.mark.parametrize(
    "shapes",
    [{"key": (32, 31)}, {"key": (16, 32), "value": (48, 32)}, {"query": ()}],
    ids=["columns", "rows that add up", "a scalar"],
)
def test_each_of_query_key_and_value_must_have_its_own_shape(shapes, tmp_path):
    """They are stacked into one matrix; rows that only add up correctly must not be accepted."""
    _, tensors = released("vivit", tmp_path)
    for part, shape in shapes.items():
        tensors[f"vivit.encoder.layer.0.attention.attention.{part}.weight"] = torch.ones(shape)
    message = loading_error("vivit", tensors, tmp_path)
    assert "mis-shaped" in message
    assert all(f"attention.attention.{part}.weight" in message for part in shapes)


def test_positions_that_do_not_form_a_square_are_mis_shaped(tmp_path):
    """A DINOv2 without registers has such positions, with one more for its class token."""
    _, tensors = released("dinov2", tmp_path)
    tensors["pos_embed"] = torch.ones(1, 7 * 7 + 1, 32)
    message = loading_error("dinov2", tensors, tmp_path)
    assert "mis-shaped" in message
    assert "pos_embed" in message


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("dinov2", "pos_embed"), ("languagebind", "vision_model.encoder.layers.0.temporal_embedding")],
)
def test_positions_with_too_few_dimensions_are_mis_shaped(name, tensor, tmp_path):
    """Code that reads shapes before the strict loader must leave the error to the loader."""
    _, tensors = released(name, tmp_path)
    message = loading_error(name, tensors | {tensor: torch.ones(5)}, tmp_path)
    assert f"mis-shaped  {tensor.removeprefix('vision_model.')}: [5]" in message


def test_one_error_lists_all_problems_with_a_reason_and_a_fix(tmp_path):
    """A user can then repair a conversion in one go. Tensors that fit are not listed."""
    _, tensors = released("dinov2", tmp_path)
    del tensors["cls_token"], tensors["blocks.1.mlp.fc2.bias"]
    tensors |= {"reg_token": torch.ones(1, 5, 32), "surprise": torch.ones(1)}
    message = loading_error("dinov2", tensors, tmp_path)
    for problem in (
        "missing     cls_token",
        "missing     blocks.1.mlp.fc2.bias",
        "mis-shaped  reg_token: [1, 5, 32], wanted [1, 4, 32]",
        "unexpected  surprise",
    ):
        assert problem in message
    assert "blocks.0" not in message
    assert "bad.safetensors" in message
    assert "\nWhy: " in message
    assert "\nFix: " in message


# Examples of what a released file has besides the encoder.
BESIDE = {
    "languagebind": [
        "vision_model.post_layernorm.weight",
        "text_model.embeddings.token_embedding.weight",
        "visual_projection.weight",
        "logit_scale",
    ],
    "dinov2": ["norm.weight", "norm.bias"],
    "vivit": ["vivit.pooler.dense.weight", "classifier.weight"],
    "siglip": ["norm.weight", "attn_pool.latent", "attn_pool.mlp.fc1.weight"],
}


def released(name: str, folder, **changes) -> tuple[Encoder, dict[str, Tensor]]:
    """An encoder with all released blocks, and the tensors of a file in the released format."""
    encoder = build(tiny(name, num_layers=3, **changes), torch.float32)
    save_encoder(encoder, folder / "all_blocks.safetensors")
    tensors = load_file(folder / "all_blocks.safetensors")
    return encoder, tensors | {beside: torch.ones(2) for beside in BESIDE[name]}


def loading_error(name: str, tensors: dict[str, Tensor], folder) -> str:
    """The message of the error that loading these tensors raises."""
    save_file(tensors, folder / "bad.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_encoder(tiny(name), folder / "bad.safetensors")
    return str(error.value)


# ---------------------------------------------------------------------- resized positions of DINOv2


def test_positions_are_resized_by_the_definition_of_antialiased_bicubic_interpolation():
    positions = torch.randn(1, 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    resized = resize_positions(positions, 16, 16)
    assert resized.shape == (1, 256, 5)
    matrix = resize_matrix(37, 16)
    expected = torch.einsum("yi,xj,ijd->yxd", matrix, matrix, positions[0].double().view(37, 37, 5))
    torch.testing.assert_close(resized[0].double(), expected.flatten(0, 1), atol=1e-5, rtol=0)


def test_a_constant_grid_of_positions_stays_constant():
    positions = torch.tensor([0.25, -3.0, 7.0]).expand(1, 37 * 37, 3)
    resized = resize_positions(positions, 16, 16)
    torch.testing.assert_close(resized, positions[:, :256], atol=1e-5, rtol=0)


def test_positions_of_the_right_size_are_unchanged():
    positions = torch.randn(1, 256, 3)
    assert resize_positions(positions, 16, 16) is positions


def test_loading_resizes_dinov2s_positions(tmp_path):
    _, tensors = released("dinov2", tmp_path)
    positions = torch.randn(1, 49, 32, generator=torch.Generator().manual_seed(0))
    save_file(tensors | {"pos_embed": positions}, tmp_path / "model.safetensors")
    encoder = load_encoder(tiny("dinov2"), tmp_path)
    assert torch.equal(encoder.position_embedding, resize_positions(positions, 3, 3))


def resize_matrix(old: int, new: int) -> Tensor:
    """(new, old) weights: a new sample is a mean of old ones; shrinking widens the kernel."""
    scale = old / new
    rows = [
        [cubic((j + 0.5 - (i + 0.5) * scale) / max(scale, 1)) for j in range(old)]
        for i in range(new)
    ]
    weights = torch.tensor(rows, dtype=torch.float64)
    return weights / weights.sum(1, keepdim=True)


def cubic(x: float) -> float:
    """The kernel of an antialiased bicubic resize: Keys, with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


# ----------------------------------------------------------------------------- manifests, full size

# Released names that we do not read.
UNREAD = {
    "languagebind": (
        "text_model.", "vision_model.encoder.layers.23.", "vision_model.post_layernorm.",
        "visual_projection.", "text_projection.", "logit_scale",
    ),
    "dinov2": ("blocks.23.", "norm."),
    "vivit": ("vivit.pooler.", "classifier."),
    "siglip": ("blocks.11.", "norm.", "attn_pool."),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL_SIZE)
def test_we_read_exactly_the_released_names(name, shared_folder):
    manifest = json.loads((shared_folder / "manifests" / f"{name}.json").read_text())
    config = ENCODERS[name]
    with torch.device("meta"):
        encoder = FAMILIES[config.family](config)
    ours = {
        encoder.released.prefixes[0] + theirs
        for key in encoder.state_dict()
        for theirs in released_names(key, encoder.released.table)
    }
    assert ours == {key for key in manifest if not key.startswith(UNREAD[name])}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_released_file_fits_at_full_size(name, shared_folder, tmp_path, monkeypatch):
    """The strict loader accepts the names and shapes of the real file, as meta tensors."""
    manifest = json.loads((shared_folder / "manifests" / f"{name}.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, (shape, _) in manifest.items()}
    monkeypatch.setattr(weights, "read_tensors", lambda source, files: dict(tensors))
    encoder = load_encoder(name, tmp_path, device="meta")
    assert encoder.config == ENCODERS[name]
    missing = SOME_TENSOR[name]
    del tensors[missing]
    with pytest.raises(CheckpointError, match="missing") as error:
        load_encoder(name, tmp_path, device="meta")
    assert missing.removeprefix("vision_model.").removeprefix("vivit.") in str(error.value)


def test_an_index_with_a_name_that_no_file_can_have_is_named(tmp_path):
    """The system refuses to look such a name up, which was an OSError."""
    index = {"weight_map": {"x": "9" * 5000 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not beside it"):
        read_tensors(tmp_path, FILES)
