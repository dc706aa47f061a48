"""From files to tensors: frames for the encoders, token ids and labels for LLaMA.

    a video, GIF, image, folder of images  -> load_video   -> uint8 (T, 3, H, W)
    those frames, for one encoder          -> preprocess   -> float (T_e, 3, 224, 224)
    a conversation                         -> render_prompt, tokenize -> ids and labels
    a JSON file of conversations           -> ConversationDataset, collate         -> Batch

    python data.py DIR --check                              every row that cannot be used, and why
    python data.py DIR --show 3 --tokenizer tokenizer.model    what the model is given, and told

Read before: encoders.py (what each encoder wants), llama.py (the tokenizer). Read next: merv.py.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler

from encoders import EncoderConfig
from llama import Tokenizer
from support.cli import progress
from support.errors import DataError, UserError
from support.features import FeatureCache
from support.video import IMAGE_SUFFIXES, load_video


def preprocess(frames: Tensor, config: EncoderConfig) -> Tensor:
    """What one encoder wants of a clip: uint8 (T, 3, H, W) -> float32 (T_e, 3, side, side).

    Takes every (T / T_e)-th frame: of 32, ViViT sees all and the others every second one, so that
    tubelet i of ViViT (frames 2i, 2i+1) lines up with frame i of the rest. One frame stays one.
    """
    side, wanted = config.image_size, config.num_frames
    if len(frames) > 1:
        if len(frames) % wanted:
            what = f"{config.name} wants {wanted} frames, got {len(frames)}."
            raise DataError(what, "encoders see the same moments.", f"load a multiple of {wanted}.")
        # QUIRK: of frames 0..31 that takes 0, 2 ... 30: the last one is never seen (ledger K7).
        frames = frames[:: len(frames) // wanted]
    if config.resize == "squash":  # antialiased as in Pillow, on uint8
        frames = F.interpolate(frames, (side, side), mode=config.interpolation, antialias=True)
        pixels = frames.float() / 255
    else:
        pixels = torch.stack([_crop(frame, side, config.interpolation) for frame in frames])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.pixel_mean, config.pixel_std))
    return (pixels.contiguous() - mean) / std


def load_pixels(
    path, encoders: Sequence[EncoderConfig], start=None, end=None, end_frame=None, fps=None
) -> dict[str, Tensor]:
    """load_video as each encoder wants it: encoder -> (T_e, 3, side, side)."""
    still = Path(path).suffix.lower() in IMAGE_SUFFIXES  # it stays one frame
    num_frames = 1 if still else max(config.num_frames for config in encoders)
    frames = load_video(path, num_frames, start, end, end_frame, fps)
    return {config.name: preprocess(frames, config) for config in encoders}


def _crop(frame: Tensor, side: int, interpolation: str) -> Tensor:
    """uint8 (3, H, W) -> float (3, side, side) in [0, 1]: scale the short side, crop the centre."""
    # QUIRK: LanguageBind keeps the aspect ratio and crops, without antialiasing; the other three
    # are squashed. On wide video the grids do not show the same places (ledger K3).
    # FIX: the released transform also flips half of all clips left-right, at inference too (F1).
    _, h, w = frame.shape
    size = (side, w * side // h) if h < w else (h * side // w, side)
    pixels = F.interpolate(frame[None] / 255, size, mode=interpolation, align_corners=False)[0]
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return pixels[:, top : top + side, left : left + side]


# ---------------------------------------------------------------------------------- prompts, tokens

IGNORE = -100  # the label of a position without loss


# How a question becomes text, as (the first of a conversation, each later one).
BASE = "In: {question}\nOut:"
TEMPLATES: dict[str, tuple[str, str]] = {
    "base": (BASE, BASE),
    # QUIRK: the authors' models were trained with the literal text <video>, and asked without (K4).
    "base_video_tag": ("In: <video>\n{question}\nOut:", BASE),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: {question} ASSISTANT:",
        "USER: {question} ASSISTANT:",
    ),
    "llama2_chat": (
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a variety "
        "of tasks using natural language.\n<</SYS>>\n\n{question} [/INST]",
        "[INST] {question} [/INST]",
    ),
    "caption": ("", ""),  # stage 1: the picture, then its caption
}


def render_prompt(conversation: list[dict], template: tuple[str, str]) -> list[tuple[str, bool]]:
    """The turns as text, each with whether it is an answer, which is what the loss is taken on.

    conversation: [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]
    [human "What?", gpt "A cat"] -> [("In: What?\\nOut:", False), ("A cat", True)]
    FIX: one renderer for training and, without the last answer, for asking; the authors have two
    that differ, for example in the system prompt (ledger F12).
    """
    roles = [turn.get("from") for turn in conversation]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2) + ["human"] * (len(roles) % 2):
        raise DataError(f"The roles are {roles}.", "human and gpt alternate.", 'correct "from".')
    turns = []
    for number, turn in enumerate(conversation):
        text = re.sub(r"\s*<(image|video)>\s*", " ", turn["value"]).strip()
        if number % 2 == 0:
            text = template[number > 0].replace("{question}", text)
        turns.append((text, number % 2 == 1))
    return turns


def tokenize(turns: list[tuple[str, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids and labels: BOS, then each turn tokenized on its own, </s> after each answer.

    [("In: Hi\\nOut:", False), ("Yes", True)]
      ids     <s>  ▁In : ▁Hi \\n Out :  ▁Yes </s>
      labels   -    -  -  -   -  -  -   ▁Yes </s>       (- is IGNORE)
    """
    input_ids, labels = [tokenizer.bos_id], [IGNORE]
    for text, is_answer in turns:
        ids = tokenizer.encode(text.rstrip()) + [tokenizer.eos_id] * is_answer
        input_ids += ids
        labels += ids if is_answer else [IGNORE] * len(ids)
    return input_ids, labels


# ------------------------------------------------------------------------------------ training data


@dataclass
class Example:
    """One row of a dataset. Of pixels and features at most one is filled; neither for text."""

    input_ids: Tensor  # (s,)
    labels: Tensor  # (s,), IGNORE where there is no loss
    pixels: dict[str, Tensor] = field(default_factory=dict)  # encoder -> (T_e or 1, 3, H, W)
    features: dict[str, Tensor] = field(default_factory=dict)  # encoder -> (t, h, w, d_e), pooled
    bad: list[dict] = field(default_factory=list)  # rows that this one replaces, and why


@dataclass
class Batch:
    """Examples padded on the right to one length s; v of the b rows have a picture."""

    input_ids: Tensor  # (b, s)
    labelled: Tensor  # (2, k): row and place of each token that the loss is taken on
    lengths: list[int]  # tokens of each of the b rows that are real
    visual_rows: list[int]  # which v rows have a video or image
    pixels: dict[str, Tensor]  # encoder -> (v, T_e, 3, H, W)
    features: dict[str, Tensor]  # encoder -> (v, t, h, w, d_e)
    bad: list[dict] = field(default_factory=list)  # {"row", "id", "file", "reason"} of each failure

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        move = partial(Tensor.to, device=device, non_blocking=True)
        return Batch(**tree_map_only(Tensor, move, vars(self)))

    @property
    def num_labels(self) -> int:
        """How many positions the loss is taken on."""
        return self.labelled.shape[1]


TRIES = 8  # rows that are read, at most, to find one that can be used
ROW = '{"id", "image" | "video" | neither, "conversations": [{"from", "value"}, ...]}'
MALFORMED = (KeyError, TypeError, AttributeError, UnicodeEncodeError)  # reading what is no ROW


@dataclass(eq=False)
class ConversationDataset(Dataset):
    """Rows of Video-LLaVA's JSON: {"id", "image" | "video" | neither, "conversations": [...]}."""

    file: str | Path
    tokenizer: Tokenizer
    template: tuple[str, str]  # one of TEMPLATES
    encoders: list[EncoderConfig]
    max_length: int = 2048  # text tokens; longer conversations are cut
    cache: FeatureCache | None = None

    def __post_init__(self):
        try:
            rows = json.loads(Path(self.file).read_bytes())
            if not isinstance(rows, list):
                raise ValueError("it holds no list.")
        except (OSError, ValueError) as error:
            fix = f"check the path and the file: a dataset is a JSON list of {ROW}."
            raise DataError(f"Cannot read {self.file}.", str(error), fix) from error
        self.rows = [row if isinstance(row, dict) else {} for row in rows]
        self.modalities = kinds = [self.media(row)[0] for row in self.rows]
        self.alike = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in set(kinds)}
        self.lengths = [self._words(row) for row in self.rows]

    def media(self, row: dict) -> tuple[str, Path | None]:
        """("video" | "image" | "text", the file)."""
        for kind in ("video", "image"):
            if kind in row:
                return kind, Path(self.file).parent / str(row[kind])
        return "text", None

    def _words(self, row: dict) -> int:
        """Words stand for tokens: good enough to put rows of like length together."""
        try:
            return sum(len(turn["value"].split()) for turn in row["conversations"])
        except MALFORMED:
            return 0

    def turns(self, index: int) -> list[tuple[str, bool]]:
        """The conversation of a row, rendered."""
        row = self.rows[index]
        try:
            turns = render_prompt(row["conversations"], self.template)
            "".join(text for text, _ in turns).encode()  # half an emoji is no text
            return turns
        except (DataError, *MALFORMED) as error:
            what = f"{self.file}, row {index} (id {row.get('id')}) is malformed: {error.args[0]}"
            raise DataError(what, f"a row is {ROW}.", "correct the row or take it out.") from error

    def read(self, index: int) -> Example:
        """Row `index` itself; DataError or VideoError if it cannot be used."""
        ids, labels = map(torch.tensor, tokenize(self.turns(index), self.tokenizer))
        path = self.media(self.rows[index])[1]
        features = self.cache.get(path) if self.cache and path else None
        pixels = load_pixels(path, self.encoders) if path and not features else {}
        return Example(ids[: self.max_length], labels[: self.max_length], pixels, features or {})

    def failure(self, index: int, error: DataError) -> dict:
        """What is written down about a row that cannot be used."""
        row, path = self.rows[index], self.media(self.rows[index])[1]
        return dict(row=index, id=row.get("id"), file=path and str(path), reason=str(error))

    def check(self, index: int) -> dict | None:
        """The failure of a row, or None; decodes four frames of its clip, both ends included."""
        try:
            self.turns(index)
            if path := self.media(self.rows[index])[1]:
                load_video(path, 4)
        except DataError as error:
            return self.failure(index, error)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Row `index`, or another of its modality if it cannot be used; `bad` says which and why.

        FIX: the authors replace a bad example silently by a random one, without end (ledger F4).
        """
        alike, first, bad = self.alike[self.modalities[index]], None, []
        others = random.Random(int(index)).sample(alike, min(TRIES, len(alike)))
        for row in list(dict.fromkeys([index, *others]))[:TRIES]:
            try:
                return replace(self.read(row), bad=bad)
            except DataError as error:
                first = first or error
                bad.append(self.failure(row, error))
        raise first


def collate(examples: list[Example]) -> Batch:
    """Examples -> one Batch: text, image and video rows may stand side by side."""
    rows = [i for i, e in enumerate(examples) if e.pixels or e.features]
    visual = [examples[i] for i in rows]
    if any(e.pixels for e in visual) and any(e.features for e in visual):
        what = "A batch mixes cached features and pixels."
        raise DataError(what, "only some clips are cached.", "cache them all before training.")
    pad = torch.nn.utils.rnn.pad_sequence
    labels = pad([e.labels for e in examples], batch_first=True, padding_value=IGNORE)
    return Batch(
        # WHY: 0 is a real token (<unk>), not a pad token. LLaMA-2 has none, and none is needed:
        # lengths say what is real.
        input_ids=pad([e.input_ids for e in examples], batch_first=True, padding_value=0),
        labelled=(labels != IGNORE).nonzero().T,
        lengths=[len(e.input_ids) for e in examples],
        visual_rows=rows,
        pixels=stack([e.pixels for e in visual]),
        features=stack([e.features for e in visual]),
        bad=[failure for e in examples for failure in e.bad],
    )


def stack(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[{encoder: (T_e, ...)}] -> {encoder: (v, T_e, ...)}; stills beside clips repeat to T_e."""
    stacked = {}
    for encoder in dicts[0] if dicts else ():
        tensors = [d[encoder] for d in dicts]
        length = max(len(tensor) for tensor in tensors)
        stacked[encoder] = torch.stack([t.expand(length, *t.shape[1:]) for t in tensors])
    return stacked


class GroupedBatchSampler(Sampler[list[int]]):
    """One epoch of micro-batches for one rank: rows of one modality and of like length together.

    All follows from (seed, epoch): global batches are made first, then dealt out, so any number of
    ranks and any micro-batch sees the same ones in the same order. Rows left over by the modalities
    share mixed batches; the last is filled up with rows drawn again.
    """

    def __init__(self, dataset, global_batch, micro_batch, rank=0, world_size=1, seed=0, epoch=0):
        if global_batch % (micro_batch * world_size):
            what = f"A global batch of {global_batch} cannot be dealt out."
            why = f"{world_size} processes run whole micro-batches of {micro_batch}."
            raise DataError(what, why, f"choose a multiple of {micro_batch * world_size}.")
        self.lengths, self.modalities = dataset.lengths, dataset.modalities
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size, self.seed, self.epoch = rank, world_size, seed, epoch

    def global_batches(self) -> list[list[int]]:
        """Every global batch of the epoch, in order."""
        rng = np.random.default_rng([self.seed, self.epoch])
        size, batches, leftovers = self.global_batch, [], []
        for modality in sorted(set(self.modalities)):
            rows = [i for i, m in enumerate(self.modalities) if m == modality]
            rng.shuffle(rows)
            whole = len(rows) // size * size
            rows, leftovers = rows[:whole], leftovers + rows[whole:]
            # Sort by length within stretches of 16 batches: alike within a batch, mixed over time.
            for begin in range(0, whole, 16 * size):
                stretch = sorted(rows[begin : begin + 16 * size], key=self.lengths.__getitem__)
                batches += [stretch[i : i + size] for i in range(0, len(stretch), size)]
        rng.shuffle(leftovers)
        if leftovers:
            again = np.resize(rng.permutation(len(self.lengths)), -len(leftovers) % size)
            leftovers += again.tolist()
            batches += [leftovers[i : i + size] for i in range(0, len(leftovers), size)]
        rng.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            mine = batch[self.rank :: self.world_size]
            yield from np.reshape(mine, (-1, self.micro_batch)).tolist()


def check(dataset: ConversationDataset, workers: int) -> int:
    """Try every row, in parallel, and print those that cannot be used; how many they are."""
    rows = DataLoader(range(len(dataset)), None, collate_fn=dataset.check, num_workers=workers)
    bad = [failure for failure in progress(rows, f"check {dataset.file.name}") if failure]
    for failure in bad:
        print("row {row}  id {id}  file {file}\n{reason}\n".format(**failure))
    print(f"{dataset.file}: {len(dataset)} rows, {len(bad)} of them cannot be used")
    return len(bad)


def show(dataset: ConversationDataset, count: int) -> None:
    """Print the first rows: the file, the text, and every token with its label."""
    for index, row in enumerate(dataset.rows[:count]):
        turns, (kind, path) = dataset.turns(index), dataset.media(row)
        print(f"\n{dataset.file}, row {index}  id {row.get('id')}  {kind} {path or ''}")
        for text, is_answer in turns:
            print(f"  {'answer' if is_answer else 'prompt'}  {text!r}")
        print(f"  {'id':>6}  {'piece':<16}  label")
        for number, label in zip(*tokenize(turns, dataset.tokenizer), strict=True):
            piece = dataset.tokenizer.pieces.id_to_piece(number)
            print(f"  {number:>6}  {piece:<16}  {'-' if label == IGNORE else label}")


def main(arguments: list[str] | None = None) -> None:
    """`data.py`: find bad rows before a training run does, see what the model is given."""
    parser = argparse.ArgumentParser(description="Look at DIR/stage1.json and DIR/stage2.json.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="what train.py takes as --data")
    parser.add_argument("--check", action="store_true", help="list the rows that cannot be used")
    parser.add_argument("--show", type=int, default=0, help="print so many rows of each file")
    parser.add_argument("--tokenizer", default="tokenizer.model", help="LLaMA-2's, for --show")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode videos")
    args, bad = parser.parse_args(arguments), 0
    try:
        tokenizer = Tokenizer(args.tokenizer) if args.show else None
        for file in (*args.folder.glob("stage1.json"), args.folder / "stage2.json"):
            template = TEMPLATES["caption" if file.name == "stage1.json" else "base"]
            dataset = ConversationDataset(file, tokenizer, template, encoders=[])
            show(dataset, args.show)
            bad += check(dataset, args.workers) if args.check else 0
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
