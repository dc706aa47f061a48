"""support/features.py: the cache of pooled features finds what was stored, and nothing stale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import SMALL, write_images
from PIL import Image
from safetensors.torch import save_file

from data import TEMPLATES, ConversationDataset, collate
from support.errors import CheckpointError
from support.features import FeatureCache


def test_features_are_read_back_as_they_were_stored(tmp_path, clip):
    """In bfloat16: half the size of float32, and the dtype in which the model runs."""
    cache = FeatureCache(tmp_path, {"a": "print-a", "b": "print-b"})
    assert cache.get(clip) is None
    features = {"a": torch.randn(4, 2, 2, 8), "b": torch.randn(4, 2, 2, 6)}
    cache.put(clip, features)
    found = cache.get(clip)
    assert found.keys() == features.keys()
    for name in features:
        assert torch.equal(found[name], features[name].bfloat16())
    assert not list(tmp_path.rglob("*.partial"))


def test_copies_of_an_encoder_share_its_cached_features(tmp_path, clip):
    """A control with four copies of one encoder is cached once."""
    cache = FeatureCache(tmp_path, {"a": "print-a", "b": "print-b"})
    cache.put(clip, {"a": torch.randn(4, 2, 2, 8), "b": torch.randn(4, 2, 2, 6)})
    copies = FeatureCache(tmp_path, {"b-1": "print-b", "b-2": "print-b"}).get(clip)
    assert torch.equal(copies["b-1"], cache.get(clip)["b"])
    assert torch.equal(copies["b-2"], copies["b-1"])


def test_other_bytes_or_other_weights_miss_the_cache(tmp_path, clip):
    """An entry is named by a hash of everything that determines it, so none is ever stale."""
    video = tmp_path / "clip.mp4"
    video.write_bytes(clip.read_bytes())
    cache = FeatureCache(tmp_path / "cache", {"a": "print"})
    cache.put(video, {"a": torch.ones(1, 1, 1, 4)})
    assert cache.get(video) is not None
    assert FeatureCache(tmp_path / "cache", {"a": "other weights"}).get(video) is None
    assert FeatureCache(tmp_path / "cache", {"a": "print", "b": "one more"}).get(video) is None
    (tmp_path / "copy.mp4").write_bytes(clip.read_bytes())
    assert cache.get(tmp_path / "copy.mp4") is not None  # the same bytes under another name
    video.write_bytes(clip.read_bytes() + b"\0")
    assert cache.get(video) is None


def test_a_folder_of_images_is_cached_by_its_images(tmp_path):
    folder = write_images(tmp_path / "frames", ["0.png", "1.png"])
    cache = FeatureCache(tmp_path / "cache", {"a": "print"})
    cache.put(folder, {"a": torch.ones(1, 1, 1, 4)})
    assert cache.get(folder) is not None
    Image.new("RGB", (5, 5)).save(folder / "1.png")
    assert cache.get(folder) is None


def test_a_dataset_takes_features_from_the_cache(mixed_folder, tiny_tokenizer):
    """No video of a cached row is decoded; text rows have no entry."""
    cache = FeatureCache(mixed_folder / "cache", {c.name: c.name for c in SMALL})
    stored = {c.name: torch.randn(4, 2, 2, c.hidden_size) for c in SMALL}
    cache.put(mixed_folder / "clip.mp4", stored)
    data = ConversationDataset(
        mixed_folder / "rows.json", tiny_tokenizer, TEMPLATES["base"], SMALL, cache=cache
    )
    batch = collate([data[0], data[1], data[3]])
    assert batch.pixels == {}
    assert batch.visual_rows == [0, 2]
    for config in SMALL:
        expected = stored[config.name].bfloat16().expand(2, -1, -1, -1, -1)
        assert torch.equal(batch.pooled[config.name], expected)
    assert data[2].pixels  # the image is not in the cache


def test_an_unchanged_clip_is_read_once_ever(tmp_path, monkeypatch):
    """Its hash is remembered on disk, also by a later process; a changed file is read again."""
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"a film")
    FeatureCache(tmp_path / "cache", {"a": "print"}).put(clip, {"a": torch.ones(1, 1, 1, 4)})
    reads = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read_bytes(path))
    again = FeatureCache(tmp_path / "cache", {"a": "print"})
    assert again.get(clip) is not None
    assert clip not in reads
    clip.write_bytes(b"another film")
    assert again.get(clip) is None
    assert reads.count(clip) == 1


def test_frames_in_another_order_are_another_clip(tmp_path):
    """Frames are shown in natural order, so a 10.png that sorts before 2.png is the last one."""
    cache = FeatureCache(tmp_path / "cache", {"a": "print"})
    for folder, names in (
        ("first", ("1.png", "10.png", "2.png")),
        ("second", ("1.png", "2.png", "3.png")),
    ):
        (tmp_path / folder).mkdir()
        for name, content in zip(names, (b"A", b"B", b"C"), strict=True):
            (tmp_path / folder / name).write_bytes(content)
    cache.put(tmp_path / "first", {"a": torch.ones(1, 1, 1, 4)})
    assert cache.get(tmp_path / "first") is not None
    assert cache.get(tmp_path / "second") is None


def test_a_clip_that_cannot_be_read_is_not_in_the_cache(tmp_path, monkeypatch):
    """Decoding it then fails with a DataError, which counts as a bad row and does not end a run."""
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"a film")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert FeatureCache(tmp_path / "cache", {"a": "print"}).get(clip) is None


def test_a_still_is_stored_once_and_read_as_a_clip(tmp_path):
    """Its 16 time steps are alike; stored 16 times, stills would fill most of the disk."""
    cache = FeatureCache(tmp_path, {"a": "print"})
    still = tmp_path / "still.png"
    still.write_bytes(b"a picture")
    step = torch.randn(1, 8, 8, 32).bfloat16()
    cache.put(still, {"a": step.expand(16, -1, -1, -1)})
    assert torch.equal(cache.get(still)["a"], step.expand(16, -1, -1, -1))
    assert cache.paths(still)["a"].stat().st_size < 2 * step.nbytes
    cache.put(still, {"a": torch.randn(16, 8, 8, 32)})
    assert cache.paths(still)["a"].stat().st_size > 16 * step.nbytes


def test_a_folder_of_frames_may_contain_folders(tmp_path):
    """Such as .ipynb_checkpoints; they are no frames and belong to no hash."""
    folder = tmp_path / "frames"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "1.png").write_bytes(b"one")
    cache = FeatureCache(tmp_path / "cache", {"a": "print"})
    cache.put(folder, {"a": torch.ones(1, 1, 1, 4)})
    assert cache.get(folder) is not None


@pytest.mark.parametrize(
    "content",
    [
        "cut",
        "empty",
        "whole numbers",
        "nothing finite",
        "three axes",
        "no clip",
        "too long",
        "none",
    ],
)
def test_a_damaged_entry_is_named_with_its_remedy(content, tmp_path):
    """A cut file, or one of another program, must neither train nor end in a traceback."""
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"a clip")
    cache = FeatureCache(tmp_path / "cache", {"a": "print"})
    cache.put(clip, {"a": torch.randn(4, 2, 2, 8)})
    path = cache.paths(clip)["a"]
    tensors = {
        "whole numbers": {"features": torch.ones(4, 2, 2, 8, dtype=torch.int32)},
        "nothing finite": {"features": torch.full((4, 2, 2, 8), torch.nan)},
        "three axes": {"features": torch.ones(4, 2, 8)},
        "no clip": {"steps": torch.tensor(4)},
        "too long": {"features": torch.ones(1, 2, 2, 8), "steps": torch.tensor(2**40)},
        "none": {"features": torch.ones(1, 2, 2, 8), "steps": torch.tensor(0)},
    }
    if content in tensors:
        save_file(tensors[content], path)
    else:
        path.write_bytes(path.read_bytes()[:50] if content == "cut" else b"")
    with pytest.raises(CheckpointError, match="delete this file") as caught:
        cache.get(clip)
    assert str(path) in str(caught.value)
    path.unlink()
    assert cache.get(clip) is None


def test_a_damaged_hash_is_computed_again(tmp_path):
    """What a file of hashes says becomes part of a path, so only a hash may stand there."""
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"a clip")
    cache = FeatureCache(tmp_path / "cache", {"a": "print"})
    name = cache.hash_of(clip)
    for content in ("", "../../elsewhere", name[:-1]):
        cache.memory_of(clip).write_text(content)
        assert cache.hash_of(clip) == name
        assert cache.memory_of(clip).read_text() == name
