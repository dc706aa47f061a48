"""data.py: rows become padded batches; the sampler groups rows by modality and length."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import SMALL, load_dataset
from torch.utils.data import DataLoader

from data import IGNORE, Example, GroupedBatchSampler, collate
from support.errors import DataError

# ------------------------------------------------------------------------------ rows become a batch


def test_text_image_and_video_rows_share_a_batch(mixed):
    """Rows 0, 2 and 3 have a video or image; row 1 is text and has no pixels."""
    batch = collate([mixed[i] for i in range(4)])
    assert mixed.modalities == ["video", "text", "image", "video"]
    assert batch.visual_rows == [0, 2, 3]
    for config in SMALL:
        assert batch.pixels[config.name].shape == (3, config.num_frames, 3, 32, 32)
    assert batch.num_labels == sum(int((mixed[i].labels != IGNORE).sum()) for i in range(4))


def test_a_still_is_one_frame_alone_and_repeated_beside_clips(mixed):
    """One frame until a clip stands beside it; then T_e identical ones."""
    alone = collate([mixed[2], mixed[2]])
    beside = collate([mixed[2], mixed[0]])
    for config in SMALL:
        still = mixed[2].pixels[config.name]
        assert still.shape == (1, 3, 32, 32)
        assert alone.pixels[config.name].shape == (2, 1, 3, 32, 32)
        repeated = beside.pixels[config.name][0]
        assert torch.equal(repeated, still.expand(config.num_frames, -1, -1, -1))


def test_padding_changes_nothing_in_the_real_part(mixed):
    """Up to its length, a row keeps its ids and labels; the padding has no loss."""
    examples = [mixed[i] for i in range(4)]
    batch = collate(examples)
    assert len(set(batch.lengths)) > 1
    for row, example in enumerate(examples):
        length = batch.lengths[row]
        assert torch.equal(batch.input_ids[row, :length], example.input_ids)
        places = batch.labelled[1][batch.labelled[0] == row].tolist()
        assert places == [i for i, label in enumerate(example.labels.tolist()) if label != IGNORE]
        assert example.input_ids[places].tolist() == example.labels[places].tolist()


def test_a_batch_of_text_has_no_pixels(mixed):
    batch = collate([mixed[1], mixed[1]])
    assert batch.visual_rows == []
    assert batch.pixels == {}
    assert batch.pooled == {}


def test_cached_features_and_pixels_may_stand_in_one_batch():
    """Rows with cached features come first among the visual rows, then those with pixels."""
    ids = torch.tensor([1, 5])
    cached = Example(ids, ids, pooled={"x": torch.zeros(1)})
    seen = Example(ids, ids, pixels={"x": torch.ones(1)})
    batch = collate([seen, Example(ids, ids), cached, seen])
    assert batch.visual_rows == [2, 0, 3]
    assert len(batch.pooled["x"]) == 1
    assert len(batch.pixels["x"]) == batch.num_to_encode == 2


def test_a_batch_moves_to_a_device_with_all_its_tensors(mixed):
    batch = collate([mixed[0], mixed[1]]).to("meta")
    tensors = [batch.input_ids, batch.labelled, *batch.pixels.values()]
    assert all(t.device.type == "meta" for t in tensors)


def test_a_worker_process_gives_the_same_batch(mixed):
    (batch,) = DataLoader(mixed, batch_size=4, collate_fn=collate, num_workers=1)
    expected = collate([mixed[i] for i in range(4)])
    assert torch.equal(batch.input_ids, expected.input_ids)
    for config in SMALL:
        assert torch.equal(batch.pixels[config.name], expected.pixels[config.name])


def test_a_batch_collects_the_unusable_rows_of_its_examples(damaged, tiny_tokenizer):
    """Also through a worker process; moving the batch to another device keeps the list."""
    data = load_dataset(damaged, tiny_tokenizer)
    rows = [0, 3, 1, 6]
    (batch,) = DataLoader(data, batch_sampler=[rows], collate_fn=collate, num_workers=1)
    assert len(batch.input_ids) == 4
    assert batch.visual_rows == [0, 1, 3]
    assert batch.bad == data[3].bad + data[6].bad
    assert batch.to("meta").bad == batch.bad
    assert collate([data[0]]).bad == []


# ----------------------------------------------------------------------------- the order of batches


def test_batches_depend_on_seed_and_epoch_alone():
    rows = Rows()

    def order(seed: int, epoch: int) -> list[list[int]]:
        return list(GroupedBatchSampler(rows, 8, 2, seed=seed, epoch=epoch))

    state = torch.get_rng_state()
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_every_row_is_seen_in_every_epoch(epoch):
    """103 rows in batches of 8: every row once, plus one repeat that fills the last batch."""
    seen = [i for batch in GroupedBatchSampler(Rows(), 8, 8, epoch=epoch) for i in batch]
    assert set(seen) == set(range(103))
    assert len(seen) == 104


def test_fewer_rows_than_a_batch_fill_it():
    seen = [i for batch in GroupedBatchSampler(Rows(1, 1, 1), 8, 8) for i in batch]
    assert len(seen) == 8
    assert set(seen) == {0, 1, 2}


def test_a_batch_has_one_modality_except_for_leftovers():
    """45 images, 21 texts, 37 videos by 8: 5 + 2 + 4 whole batches; the 15 others make 2 mixed."""
    rows = Rows()
    kinds = [
        {rows.modalities[i] for i in batch}
        for batch in GroupedBatchSampler(rows, 8, 8).global_batches()
    ]
    assert len(kinds) == 13
    assert sum(len(kind) == 1 for kind in kinds) >= 11


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_any_number_of_processes_makes_the_same_steps(world_size, micro_batch):
    """Moving a run from one GPU to eight, or to smaller micro-batches, does not change it."""
    if micro_batch * world_size <= 8:
        assert steps(Rows(), 8, micro_batch, world_size) == steps(Rows(), 8, 8, 1)
    else:
        with pytest.raises(DataError, match="multiple of"):
            GroupedBatchSampler(Rows(), 8, micro_batch, 0, world_size)


def test_a_global_batch_that_cannot_be_dealt_out_is_an_error():
    with pytest.raises(DataError) as caught:
        GroupedBatchSampler(Rows(), 10, 4)
    assert "global batch of 10" in str(caught.value)
    assert "Fix: choose a multiple of 4" in str(caught.value)


def test_rows_of_similar_length_share_a_batch():
    """Compares the number of padded positions with that of random batches."""

    def padding(batches: list[list[int]]) -> int:
        lengths = [[rows.lengths[i] for i in batch] for batch in batches]
        return sum(max(b) * len(b) - sum(b) for b in lengths)

    rows = Rows(image=160, text=80, video=160)
    shuffled = list(range(400))
    random.Random(1).shuffle(shuffled)
    at_random = [shuffled[i : i + 8] for i in range(0, 400, 8)]
    assert padding(GroupedBatchSampler(rows, 8, 8).global_batches()) < 0.3 * padding(at_random)


class Rows:
    """The parts of a dataset that the sampler reads: lengths and modalities."""

    def __init__(self, image: int = 45, text: int = 21, video: int = 37):
        rng = random.Random(0)
        self.modalities = ["image"] * image + ["text"] * text + ["video"] * video
        rng.shuffle(self.modalities)
        self.lengths = [rng.randint(1, 500) for _ in self.modalities]


def steps(rows: Rows, global_batch: int, micro_batch: int, world_size: int, **more) -> list[set]:
    """The set of rows of every optimizer step, put together from all ranks' micro-batches."""
    ranks = [
        list(GroupedBatchSampler(rows, global_batch, micro_batch, rank, world_size, **more))
        for rank in range(world_size)
    ]
    per_step = global_batch // (micro_batch * world_size)
    assert {len(batches) for batches in ranks} == {len(ranks[0])}
    assert all(len(b) == micro_batch for batches in ranks for b in batches)
    return [
        {row for batches in ranks for micro in batches[i : i + per_step] for row in micro}
        for i in range(0, len(ranks[0]), per_step)
    ]
