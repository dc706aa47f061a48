"""Saving and loading a MERV, and what happens if a file is missing, damaged or foreign."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file
from tiny_merv import QUESTIONS, TINY, random_pixels

import merv
from merv import MERV, MERVS
from support import weights
from support.errors import CheckpointError, UserError
from support.features import FeatureCache
from support.video import sample_indices

pytest_plugins = ["tiny_merv"]  # fixtures: model, saved, short_clip, tokenizer
pytestmark = pytest.mark.usefixtures("no_hub")

# -------------------------------------------------------------------------------------- checkpoints


def test_a_saved_model_is_loaded_exactly(model, saved, short_clip):
    """Config, every tensor and every answer; encoders without a hub id are copied along."""
    loaded = MERV.from_pretrained(saved)
    assert not loaded.training
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name
    assert loaded.config == model.config
    answers = loaded.answer(short_clip, QUESTIONS, max_new_tokens=6)
    for found, wanted in zip(
        answers, model.answer(short_clip, QUESTIONS, max_new_tokens=6), strict=True
    ):
        assert found.text == wanted.text
        assert torch.equal(found.weights, wanted.weights)


def test_a_loaded_model_trains_what_was_trained(saved):
    """Only the encoders are frozen."""
    loaded = MERV.from_pretrained(saved)
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad != name.startswith("encoders."), name


def test_a_saved_folder_can_be_moved(model, saved, tmp_path, monkeypatch):
    """No file in it refers to its former place."""
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(saved, moved)
    monkeypatch.chdir(tmp_path)
    assert str(saved) not in (moved / "config.json").read_text()
    loaded = MERV.from_pretrained(moved)
    assert torch.equal(loaded.mixer.query, model.mixer.query)
    name = TINY.encoders[0].name
    for key, tensor in model.encoders[name].state_dict().items():
        assert torch.equal(loaded.encoders[name].state_dict()[key], tensor)


def test_a_run_of_training_can_be_named_instead_of_its_checkpoint(model, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run" / "checkpoint")
    loaded = MERV.from_pretrained(tmp_path / "run")
    assert torch.equal(loaded.mixer.query, model.mixer.query)


def test_a_loaded_model_can_be_saved_again(model, saved, tmp_path):
    """Saving elsewhere, or over the folder it came from, copies the encoders both times."""
    first = tmp_path / "first"
    shutil.copytree(saved, first)
    MERV.from_pretrained(first).save_pretrained(tmp_path / "second")
    MERV.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "second")
    state = MERV.from_pretrained(tmp_path / "second").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_encoders_of_the_hub_stay_a_reference_to_it(model, tokenizer, tmp_path):
    """The 1.5 GB that are in the hub's cache are not written with every checkpoint."""
    hub = replace(TINY.encoders[1], source="owner/name@revision")
    config = replace(TINY, encoders=(hub,))
    single = MERV(config, [model.encoders[hub.name]], model.llm, tokenizer)
    single.save_pretrained(tmp_path / "single")
    assert not (tmp_path / "single" / "encoders").exists()
    found = json.loads((tmp_path / "single" / "config.json").read_text())
    assert found["merv"]["encoders"][0]["source"] == "owner/name@revision"


def test_a_model_without_tokenizer_is_not_saved(model, tmp_path):
    """It could not be used; nothing is left behind."""
    bare = MERV(TINY, list(model.encoders.values()), model.llm, None)
    with pytest.raises(UserError, match="Only a model with a tokenizer is saved"):
        bare.save_pretrained(tmp_path / "bare")
    assert list(tmp_path.iterdir()) == []


def test_a_complete_folder_replaces_the_old_one(model, tmp_path):
    """Saving again leaves neither old files nor a .partial, and clears what a broken save left."""
    folder = tmp_path / "model"
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "rest").write_text("of a save that was interrupted")
    for _ in range(2):
        model.save_pretrained(folder)
        (folder / "old").write_text("")
    model.save_pretrained(folder)
    names = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    encoders = {f"encoders/{e.name}.safetensors" for e in TINY.encoders}
    assert names == {"config.json", "model.safetensors", "tokenizer.model"} | encoders
    assert list(tmp_path.rglob("*.partial")) == []


def test_what_lies_beside_a_checkpoint_is_left_alone(model, saved, tmp_path):
    """A backup called model.old, and eval.py's answers in a checkpoint's folder."""
    backup = shutil.copytree(saved, tmp_path / "model.old")
    model.save_pretrained(tmp_path / "model")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "model.old"]
    assert (backup / "model.safetensors").is_file()
    (tmp_path / "model" / "eval").mkdir()
    with pytest.raises(UserError, match="is not empty"):
        model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["thesis.txt", "config.json"])
def test_a_folder_of_something_else_is_not_replaced(model, tmp_path, name):
    """Saving into one's documents, or into a run's own folder, deleted everything there."""
    (tmp_path / name).write_text('{"model": "merv", "recipe": "frozen"}')
    with pytest.raises(UserError, match="is not empty"):
        model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_model_is_saved_into_the_folder_it_came_from(saved, tmp_path):
    """Its weights are mapped to the files that are replaced."""
    folder = shutil.copytree(saved, tmp_path / "model")
    model = MERV.from_pretrained(folder)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    found = MERV.from_pretrained(folder).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_encoders_from_elsewhere_are_saved_with_the_model(saved, tmp_path):
    """The saved model had the original ones again."""
    name = TINY.encoders[0].name
    file = saved / "encoders" / f"{name}.safetensors"
    tensors = {key: tensor + 1 for key, tensor in load_file(file).items()}
    weights.save_tensors(tensors, tmp_path / "mine.safetensors")
    sources = {name: str(tmp_path / "mine.safetensors")}
    model = MERV.from_pretrained(saved, sources=sources)
    model.save_pretrained(tmp_path / "model")
    found = MERV.from_pretrained(tmp_path / "model").encoders[name].state_dict()
    wanted = model.encoders[name].state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_file_of_a_checkpoint_is_no_checkpoint(saved):
    """It was called damaged, and the advice was to delete it."""
    with pytest.raises(CheckpointError, match="name the folder"):
        MERV.from_pretrained(saved / "model.safetensors")


@pytest.mark.parametrize(
    "file", ["model.safetensors", f"encoders/{TINY.encoders[0].name}.safetensors"]
)
def test_all_misfits_are_listed_in_one_error(saved, tmp_path, file):
    folder, missing, misshaped = _broken(saved, tmp_path / "broken", file)
    with pytest.raises(CheckpointError) as caught:
        MERV.from_pretrained(folder)
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()]
    prefix = "vision_model." if file.startswith("encoders/") else ""
    missing, misshaped = missing.removeprefix(prefix), misshaped.removeprefix(prefix)
    assert f"missing {missing}" in lines
    assert any(line.startswith(f"mis-shaped {misshaped}: [3, 5, 7], wanted ") for line in lines)
    assert "unexpected surprise" in lines
    assert str(folder) in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_a_missing_encoder_is_not_looked_for_on_the_hub(saved, tmp_path, monkeypatch):
    """encoders/NAME.safetensors also has the form of a hub id, which a stranger could register."""
    folder = shutil.copytree(saved, tmp_path / "incomplete")
    (folder / "encoders" / f"{TINY.encoders[0].name}.safetensors").unlink()
    monkeypatch.setattr(weights, "download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=r"Found no .* at encoders/"):
        MERV.from_pretrained(folder)


def test_a_damaged_file_is_a_checkpoint_error(saved, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="Cannot read"):
        MERV.from_pretrained(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_is_a_checkpoint_error(saved, tmp_path, file):
    folder = tmp_path / "incomplete"
    shutil.copytree(saved, folder)
    (folder / file).unlink()
    with pytest.raises(CheckpointError) as caught:
        MERV.from_pretrained(folder)
    assert file in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_an_encoder_that_config_json_names_and_nobody_has_is_explained(saved, tmp_path):
    """The error names the checkpoint too: the user has never heard of the missing file."""
    folder = tmp_path / "moved"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    config["merv"]["encoders"][1]["source"] = "elsewhere.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"elsewhere\.safetensors") as caught:
        MERV.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"merv": ',
        "[]",
        "null",
        '{"merv": null}',
        '{"merv": {"surprise": 1}}',
        '{"model": {}}',
        '{"model": "miniature"}',
        '{"model_type": "llama", "hidden_size": 4096}',
    ],
)
def test_a_config_that_is_not_mervs_is_a_checkpoint_error(tmp_path, text):
    """It is cut off, no object, of another model, or of an unfinished run of train.py."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        MERV.from_pretrained(tmp_path)
    assert "\nWhy: " in str(caught.value) and "\nFix: " in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("released_as", "merv-full"),
        ("encoders.0.released_as", "x"),
        ("llm.surprise", 1),
        ("projector", "avg4d"),
        ("mixer", "vote"),
    ],
)
def test_a_config_of_another_version_names_what_is_unknown(saved, tmp_path, path, value):
    """A field or a projector that this version has not is an error, as it would change results."""
    found = json.loads((saved / "config.json").read_text())
    _set(found["merv"], path, value)
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        MERV.from_pretrained(tmp_path)
    unknown = value if path in ("projector", "mixer") else path.rpartition(".")[2]
    assert unknown in str(caught.value) and "\nFix: " in str(caught.value)


def test_a_model_in_bfloat16_still_answers(saved, short_clip):
    """All parameters are bfloat16; mixing weights stay float32."""
    loaded = MERV.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    (answer,) = loaded.answer(short_clip, "what", max_new_tokens=3)
    assert answer.weights.dtype == torch.float32
    assert float(answer.weights.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("still", [False, True])
def test_features_of_clips_and_stills_go_into_the_cache(saved, short_clip, tmp_path, dtype, still):
    """The cache stores bfloat16, whatever the dtype of the model."""
    loaded = MERV.from_pretrained(saved, dtype=dtype)
    pixels = {name: frames[None] for name, frames in random_pixels(1, still).items()}
    features = {name: value[0] for name, value in loaded.pooled_features(pixels).items()}
    cache = FeatureCache(tmp_path, loaded.fingerprints())
    cache.put(short_clip, features)
    found = cache.get(short_clip)
    for name in features:
        assert torch.equal(found[name], features[name].bfloat16())


def test_an_encoder_that_sees_other_frames_has_another_fingerprint(tokenizer):
    """ViViT wants 8 frames, and beside it the others see every second of them. Alone, an encoder of
    4 frames sees others, so it must not find the features that were cached beside ViViT.
    """
    four = MERV.create(MERVS["miniature"], tokenizer)
    encoders = four.config.encoders
    without_vivit = tuple(e for e in encoders if e.label != "vivit")
    three = MERV.create(replace(four.config, encoders=without_vivit), tokenizer)
    for config in without_vivit:
        three.encoders[config.name].load_state_dict(four.encoders[config.name].state_dict())
        assert three.fingerprints()[config.name] != four.fingerprints()[config.name]
    assert sample_indices(30, 8)[::2] == [0, 8, 16, 24]
    assert sample_indices(30, 4) == [0, 9, 19, 29]


class OwnMixer(torch.nn.Module):
    """A user's mixer that returns every second token, without saying so."""

    def __init__(self, d: int, e: int):
        super().__init__()
        self.step = 1

    def forward(self, x_bend):
        b, e, _, _ = x_bend.shape
        return x_bend.mean(1)[:, :: self.step], torch.full((b, e), 1 / e)


class OwnProjector(merv.PooledProjector):
    """A user's projector."""


def test_own_mixers_and_projectors_are_used_and_checked(tokenizer, monkeypatch):
    """Attributes that a class does not have are those of the paper's; a wrong number of tokens is
    an error, because the loss would read the wrong places."""
    monkeypatch.setitem(merv.MIXERS, "own", OwnMixer)
    monkeypatch.setitem(merv.PROJECTORS, "own", OwnProjector)
    model = MERV.create(replace(TINY, mixer="own", projector="own"), tokenizer).eval()
    pixels = random_pixels(0)
    assert model.encode({n: clip[None] for n, clip in pixels.items()})[0].shape[1] == 2 * 2 * 4
    plain = MERV.create(TINY, tokenizer).fingerprints()
    found = model.fingerprints()
    assert all(found[name] != plain[name] for name in plain)  # its code is part of them
    model.mixer.step = 2
    with pytest.raises(UserError, match="visual tokens, expected"):
        model.encode({name: clip[None] for name, clip in pixels.items()})


def test_frozen_encoders_are_never_in_training_mode(model):
    """An encoder with dropout would give other features while training than when asked."""
    model.train()
    assert model.llm.training and not any(e.training for e in model.encoders.values())
    model.eval()


def test_fingerprints_follow_weights_and_preprocessing(tokenizer):
    """They are keys of the feature cache, equal only if encoder and grid are equal."""
    one, same = MERV.create(TINY, tokenizer), MERV.create(TINY, tokenizer)
    before = one.fingerprints()
    assert before == same.fingerprints()
    first, second = TINY.encoders[:2]
    with torch.no_grad():
        next(same.encoders[first.name].parameters()).view(-1)[0] += 1e-3
    after = same.fingerprints()
    assert after[first.name] != before[first.name]
    assert after[second.name] == before[second.name]
    finer = MERV.create(replace(TINY, pooled_side=4), tokenizer).fingerprints()
    assert all(finer[name] != before[name] for name in before)


def test_a_run_of_an_older_version_answers_as_it_did(tmp_path):
    """tests/legacy/07e06b2.tar.gz is a run that commit 07e06b2 trained, with its answer."""
    shutil.unpack_archive(REPOSITORY / "tests" / "legacy" / "07e06b2.tar.gz", tmp_path)
    root = tmp_path / "07e06b2"
    run = root / "runs" / "legacy-complete"
    expected = json.loads((run / "answer.json").read_text())
    loaded = MERV.from_pretrained(run)
    video = root / "data" / "videos" / expected["video"]
    (answer,) = loaded.answer(video, [expected["question"]], max_new_tokens=8)
    assert answer.text == expected["text"]
    assert answer.weights.tolist() == pytest.approx(expected["weights"], abs=1e-5)
    videos = {name: frames[None] for name, frames in loaded.pixels(video).items()}
    visual, _ = loaded.encode(videos)
    assert visual.mean().item() == pytest.approx(expected["visual_tokens_mean"], abs=1e-5)
    assert visual.std().item() == pytest.approx(expected["visual_tokens_std"], abs=1e-5)


def _broken(saved: Path, folder: Path, file: str) -> tuple[Path, str, str]:
    """A copy of `saved` in which one tensor of `file` is missing, one mis-shaped and one added."""
    shutil.copytree(saved, folder)
    tensors = load_file(folder / file)
    names = sorted(tensors)
    del tensors[names[0]]
    tensors[names[-1]] = torch.zeros(3, 5, 7)
    tensors["surprise"] = torch.zeros(1)
    save_file(tensors, folder / file)
    return folder, names[0], names[-1]


def _set(values: dict, path: str, value: object) -> None:
    """_set({"llm": {}}, "llm.x", 1) makes it {"llm": {"x": 1}}."""
    *folders, name = path.split(".")
    for folder in folders:
        values = values[int(folder) if folder.isdigit() else folder]
    values[name] = value
