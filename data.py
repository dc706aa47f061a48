"""From files to tensors: frames for the encoders, token ids and labels for LLaMA, batches.

    a video, GIF, image, folder of images  -> load_video   -> uint8 (T, 3, H, W)
    those frames, for one encoder          -> preprocess   -> float32 (T_e, 3, 224, 224)
    a conversation                         -> render_prompt, tokenize -> ids and labels
    a JSON file of conversations           -> ConversationDataset, collate         -> Batch

    python data.py DIR --check                                 list unusable rows and the reasons
    python data.py DIR --show 3 --tokenizer tokenizer.model    print the tokens and labels of rows

Shapes: T frames loaded, T_e frames of one encoder e, b rows of a batch, v rows with a video or
image, s tokens of the longest row, k tokens with a loss; pooled features have t x h x w places.
Read before: encoders.py (what each encoder expects), llama.py (the tokenizer). Read next: merv.py.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler

from encoders import EncoderConfig
from llama import Tokenizer
from support.cli import option, parse_options, progress
from support.errors import DataError, UserError
from support.features import FeatureCache
from support.records import clean
from support.rows import Rows, find_media, modality_of, require_text, tidy
from support.video import is_still, load_frames, load_video

# --------------------------------------------------------------------------------- frames -> pixels


def preprocess(frames: Tensor, config: EncoderConfig) -> Tensor:
    """Sample, resize and normalise frames for one encoder.

    frames: uint8 (T, 3, H, W), T a multiple of T_e. Returns float32 (T_e, 3, side, side).

    Keeps every (T / T_e)-th frame. Of 32 frames ViViT takes all and the others every second one:

        ViViT    (0 1) (2 3) (4 5) ... (30 31)     pairs of frames, its tubelets
        others    0     2     4    ...  30         so frame i begins tubelet i

    A single frame (a still image) stays a single frame.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        what = f"Frames are {frames.dtype} {tuple(frames.shape)}, expected uint8 (T, 3, H, W)."
        raise DataError(what, "other numbers would be read as other colours.", "use load_video.")
    # QUIRK: of frames 0..31 this keeps 0, 2 ... 30; the last frame is never seen (ledger K7).
    return scale(frames[:: step_of(len(frames), config)], config)


def step_of(num_frames: int, config: EncoderConfig) -> int:
    """The step between the frames that one encoder takes from a clip; DataError if not whole."""
    wanted = config.num_frames
    if num_frames == 1:
        return 1
    if num_frames % wanted != 0:
        what = f"{config.name} wants {wanted} frames, got {num_frames}."
        why = "all encoders must see the same moments."
        raise DataError(what, why, f"load a multiple of {wanted} frames.")
    return num_frames // wanted


def scale(frames: Tensor, config: EncoderConfig) -> Tensor:
    """Resize and normalise frames for one encoder, each by itself.

    frames: uint8 (T, 3, H, W). Returns float32 (T, 3, side, side).
    """
    side = config.image_size
    if frames.shape[-2:] == (side, side):
        pixels = frames / 255
    elif config.resize == "squash":
        # On uint8 with antialias=True, torch computes the same resize as Pillow.
        size = (side, side)
        squashed = F.interpolate(frames, size, mode=config.interpolation, antialias=True)
        pixels = squashed.float() / 255
    else:
        pixels = torch.stack([_crop(frame, side, config.interpolation) for frame in frames])
    mean = torch.tensor(config.pixel_mean).view(3, 1, 1)
    std = torch.tensor(config.pixel_std).view(3, 1, 1)
    return (pixels.contiguous() - mean) / std


def _crop(frame: Tensor, side: int, interpolation: str) -> Tensor:
    """Scale the short side of a frame to `side` and crop the centre.

    frame: uint8 (3, H, W). Returns float32 (3, side, side) in [0, 1].
    """
    # QUIRK: LanguageBind keeps the aspect ratio and crops, without antialiasing; the other three
    # are squashed. On wide video their grids show different places (ledger K3).
    # FIX: the released transform also flips half of all clips, at inference too (ledger F1).
    _, h, w = frame.shape
    short = min(h, w)
    size = (h * side // short, w * side // short)  # the long side is rounded down
    channels = []
    for channel in frame:  # one by one, because as floats a large frame takes much memory
        pixels = channel[None, None] / 255
        channels.append(F.interpolate(pixels, size, mode=interpolation, align_corners=False)[0])
    scaled = torch.cat(channels)
    top = round((size[0] - side) / 2)
    left = round((size[1] - side) / 2)
    return scaled[:, top : top + side, left : left + side]


def load_pixels(
    path, encoders: Sequence[EncoderConfig], start=None, end=None, end_frame=None, fps=None
) -> dict[str, Tensor]:
    """Load a video or image for several encoders: encoder name -> float32 (T_e, 3, side, side).

    start, end (seconds), end_frame, fps: the part of the video to load, see load_video.
    Raises VideoError if the file is missing or damaged.
    """
    num_frames = 1 if is_still(path) else max(config.num_frames for config in encoders)
    steps = {config: step_of(num_frames, config) for config in encoders}

    def scale_for_each(frame: np.ndarray, places: list[int]) -> dict[str, Tensor]:
        """Scale a frame (H, W, 3) for the encoders that see it."""
        pixels = torch.from_numpy(frame).permute(2, 0, 1)[None]
        scaled = {}
        for config, step in steps.items():
            if any(place % step == 0 for place in places):
                scaled[config.name] = scale(pixels, config)
        return scaled

    # WHY frame by frame: 32 frames of 8K video take 3 GB before they are scaled.
    frames = load_frames(path, num_frames, scale_for_each, start, end, end_frame, fps)
    clips = {}
    for config, step in steps.items():
        clips[config.name] = torch.cat([frame[config.name] for frame in frames[::step]])
    return clips


# ------------------------------------------------------------------ conversations -> ids and labels

IGNORE = -100  # the label of a position without a loss; torch's cross_entropy skips it by default


# A template is a pair of prompts: one for the first question, one for each later question.
BASE = "In: {question}\nOut:"
TEMPLATES: dict[str, tuple[str, str]] = {
    "base": (BASE, BASE),
    # QUIRK: the released models saw a literal <video> in training but not in inference (K4).
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
    "caption": ("", ""),  # stage 1 has no prompt: the caption follows the visual tokens
}


def render_prompt(
    conversation: list[dict], template: tuple[str, str], visual: bool = True
) -> list[tuple[str, bool]]:
    """Render a conversation as (text, is_answer) pairs; the loss covers answers only.

    conversation: [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]

        human "What?"   ->  ("In: What?\\nOut:", False)
        gpt   "A cat"   ->  ("A cat", True)

    The placeholders <image> and <video> are removed: visual tokens stand before all text. In a row
    of text alone (visual=False) they are words, as in a question about HTML. Raises DataError
    unless the turns alternate, starting with human.
    FIX: training and inference share this renderer; inference just leaves out the last answer. The
    authors have two that differ, for example in the system prompt (ledger F12).
    """
    roles = [turn.get("from") for turn in conversation]
    expected = ["human", "gpt"] * len(roles)  # human, gpt, human, gpt ... and longer than needed
    if not roles or roles != expected[: len(roles)]:
        why = "human and gpt must alternate, and human comes first."
        raise DataError(f"The roles are {roles}.", why, 'correct "from" in the conversation.')

    first, later = template
    turns = []
    for number, turn in enumerate(conversation):
        text = turn["value"]
        if visual:
            text = re.sub(r"\s*<(image|video)>\s*", " ", text)
        text = text.strip()
        if turn["from"] == "gpt":
            turns.append((text, True))
        else:
            prompt = first if number == 0 else later
            # WHY: not str.format, because a question may contain braces.
            turns.append((prompt.replace("{question}", text), False))
    return turns


def tokenize(turns: list[tuple[str, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Turn rendered text into token ids and labels, two lists of one length.

    <s> comes first and </s> after each answer. Each turn is tokenized separately, so a prompt has
    the same ids whether an answer follows or not. With LLaMA-2's tokenizer, - standing for IGNORE:

        turns    ("In: Hi\\nOut:", False)   ("Yes", True)
        ids      <s> ▁In : ▁Hi \\n Out :     ▁Yes </s>
        labels    -   -  -  -   -  -  -     ▁Yes </s>

    A label belongs to the token at its own position. The loss (merv.py) predicts it from the
    position before, so `:` learns to predict ▁Yes, and ▁Yes learns to predict </s>.
    """
    input_ids = [tokenizer.bos_id]
    labels = [IGNORE]
    for text, is_answer in turns:
        ids = tokenizer.encode(text.rstrip())
        if is_answer:
            ids = [*ids, tokenizer.eos_id]
            labels.extend(ids)
        else:
            labels.extend([IGNORE] * len(ids))
        input_ids.extend(ids)
    return input_ids, labels


# -------------------------------------------------------------------------------- rows of a dataset


@dataclass
class Example:
    """One row of a dataset, as tensors.

    A row with a video or image fills either `pixels` or `pooled`; a text row fills neither.
    """

    input_ids: Tensor  # (s,)
    labels: Tensor  # (s,), IGNORE where there is no loss
    pixels: dict[str, Tensor] = field(default_factory=dict)  # encoder -> (T_e or 1, 3, H, W)
    pooled: dict[str, Tensor] = field(default_factory=dict)  # encoder -> (t, h, w, d_e), cached
    # {"row", "id", "file", "reason"} of each row it replaces
    bad: list[dict] = field(default_factory=list)


ROW = '{"id", "image" | "video" | neither, "conversations": [{"from", "value"}, ...]}'
TRIES = 8  # rows to try; the others are drawn at random, as neighbours may share a broken clip
MALFORMED = (KeyError, TypeError, AttributeError, UnicodeEncodeError)  # raised by malformed rows


@dataclass(eq=False)
class ConversationDataset(Dataset):
    """Read rows of a JSON file in Video-LLaVA's layout: a list of ROW.

    Paths are relative to the JSON file and must stay in its folder (support/rows.py). Raises
    DataError if the file cannot be read; a malformed row is found only when it is used.
    """

    file: str | Path
    tokenizer: Tokenizer
    template: tuple[str, str]  # one of TEMPLATES
    encoders: list[EncoderConfig]
    max_length: int = 2048  # text tokens; longer conversations are cut
    cache: FeatureCache | None = None
    allow_outside: bool = False  # whether paths may lead out of the folder

    def __post_init__(self):
        file = Path(self.file)
        try:
            if file.exists() and not file.is_file():
                raise ValueError("it is not a file.")
            rows = json.loads(file.read_bytes())
            if not isinstance(rows, list):
                raise ValueError("it holds no list.")
            if not rows:
                raise ValueError("it holds no rows.")
            self.rows = Rows(map(tidy, rows))
        except (OSError, ValueError, RecursionError) as error:
            fix = f"check the path and the file: a dataset is a JSON list of {ROW}."
            raise DataError(f"Cannot read {self.file}.", str(error), fix) from error
        self.modalities = []
        self.lengths = []
        self.rows_of: dict[str, list[int]] = {"video": [], "image": [], "text": []}
        for index, row in enumerate(self.rows):
            modality = modality_of(row)
            self.modalities.append(modality)
            self.lengths.append(self.approximate_length(row))
            self.rows_of[modality].append(index)

    def media(self, row: dict) -> tuple[str, Path | None]:
        """Return the modality of a row ("video", "image" or "text") and its file, if any.

        A row whose file may not be read counts as text here; `parse` says what is wrong with it.
        """
        try:
            path = find_media(row, Path(self.file).parent, self.allow_outside)
        except (DataError, *MALFORMED):
            path = None
        return (modality_of(row), path) if path else ("text", None)

    def approximate_length(self, row: dict) -> int:
        """Approximate the number of tokens by that of words, which is enough to group rows."""
        try:
            return sum(len(turn["value"].split()) for turn in row["conversations"])
        except MALFORMED:
            return 0

    def parse(self, index: int) -> tuple[list[tuple[str, bool]], Path | None]:
        """The rendered conversation of row `index` and its file; DataError if it is malformed."""
        row = self.rows[index]
        why, fix = f"a row is {ROW}.", "correct or remove the row."
        try:
            path = find_media(row, Path(self.file).parent, self.allow_outside)
            turns = render_prompt(row["conversations"], self.template, visual=path is not None)
            if path is None:
                require_text(row)
            for text, _ in turns:
                text.encode()  # rejects unpaired surrogates, which the tokenizer cannot read
            return turns, path
        except (DataError, *MALFORMED) as error:
            what = f"{self.file}, row {index} (id {row.get('id')}) is malformed: {error.args[0]}"
            if isinstance(error, DataError):
                why, fix = error.args[1:]
            raise DataError(what, why, fix) from error

    def encode(self, turns: list[tuple[str, bool]]) -> Example:
        """The ids and labels of a rendered conversation, cut to max_length."""
        ids, labels = tokenize(turns, self.tokenizer)
        size = self.max_length
        return Example(torch.tensor(ids)[:size], torch.tensor(labels)[:size])

    def read(self, index: int) -> Example:
        """Read row `index`. Raises DataError or VideoError if it cannot be used."""
        turns, path = self.parse(index)
        example = self.encode(turns)
        if path and self.cache:
            example.pooled = self.cache.get(path) or {}
        if path and not example.pooled:
            example.pixels = load_pixels(path, self.encoders)
        return example

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Read row `index`; if it cannot be used, read another row of its modality instead.

        `Example.bad` lists the rows that failed. Raises the first error if all tries fail. The
        replacements depend on the index alone, so a resumed run sees the same rows.
        FIX: the authors replace a bad example silently by a random one, without end (ledger F4).
        """
        same_modality = self.rows_of[self.modalities[index]]
        count = min(TRIES, len(same_modality))
        others = random.Random(int(index)).sample(same_modality, count)
        if index in others:
            others.remove(index)
        bad = []
        first_error = None
        for row in [index, *others][:TRIES]:
            try:
                return replace(self.read(row), bad=bad)
            except DataError as error:
                first_error = first_error or error
                bad.append(self.describe_bad_row(row, error))
        raise first_error

    def describe_bad_row(self, index: int, error: DataError) -> dict:
        """Describe a row that cannot be used, for bad_examples.jsonl and `data.py --check`."""
        row = self.rows[index]
        _, path = self.media(row)
        file = str(path) if path else None
        return {"row": index, "id": row.get("id"), "file": file, "reason": str(error)}

    def find_fault(self, index: int) -> dict | None:
        """Describe what is wrong with row `index`, or return None.

        Decodes four frames of the video, including the first and the last. A row without a label
        is a fault too, although training accepts it: nothing is learned from it. An answer beyond
        max_length is noticed only with a tokenizer.
        """
        try:
            turns, path = self.parse(index)
            labelled = any(is_answer for _, is_answer in turns)
            if labelled and self.tokenizer:
                labelled = bool((self.encode(turns).labels != IGNORE).any())
            if not labelled:
                what = f"{self.file}, row {index} has no label."
                why = f"it has no answer, or none within the first {self.max_length} tokens."
                raise DataError(what, why, "shorten the question, add an answer or remove the row.")
            if path:
                load_video(path, 4)
        except DataError as error:
            return self.describe_bad_row(index, error)
        return None


# ---------------------------------------------------------------------------------- rows -> batches


@dataclass
class Batch:
    """Several examples, padded on the right to the length s of the longest."""

    input_ids: Tensor  # (b, s)
    labelled: Tensor  # (2, k): row and position of each token that the loss predicts
    lengths: list[int]  # tokens of each of the b rows, without padding
    visual_rows: list[int]  # the v rows with a video or image: those in `pooled` come first
    pixels: dict[str, Tensor]  # encoder -> (rows, T_e, 3, H, W)
    pooled: dict[str, Tensor]  # encoder -> (rows, t, h, w, d_e)
    bad: list[dict] = field(default_factory=list)  # rows that could not be used

    @property
    def num_to_encode(self) -> int:
        """Rows whose video or image must still go through the encoders."""
        return len(self.visual_rows) - len(next(iter(self.pooled.values()), ()))

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        # tree_map_only also reaches the tensors inside the dictionaries.
        return Batch(**tree_map_only(Tensor, move, vars(self)))

    @property
    def num_labels(self) -> int:
        """The number of tokens k that the loss predicts."""
        return self.labelled.shape[1]


def collate(examples: list[Example]) -> Batch:
    """Combine examples into a Batch; text, image and video rows may be mixed.

        row 0, text    ids 1 5 9      labels - 5 9         input_ids  1 5 9 0    lengths 3
        row 1, video   ids 1 7 8 2    labels - - 8 2                  1 7 8 2            4

        labelled = [[0, 0, 1, 1], [1, 2, 2, 3]] (rows, positions);  visual_rows = [1]

    Rows with cached features come first in visual_rows, then those with pixels.
    """
    cached_rows, pixel_rows, pooled, pixels = [], [], [], []
    for row, example in enumerate(examples):
        if example.pooled:
            cached_rows.append(row)
            pooled.append(example.pooled)
        elif example.pixels:
            pixel_rows.append(row)
            pixels.append(example.pixels)

    ids = [example.input_ids for example in examples]
    labels = pad_sequence([e.labels for e in examples], batch_first=True, padding_value=IGNORE)
    return Batch(
        # WHY: LLaMA-2 has no padding token, so 0 is a real token (<unk>). None is needed: lengths
        # tell which positions are real.
        input_ids=pad_sequence(ids, batch_first=True, padding_value=0),
        labelled=(labels != IGNORE).nonzero().T,
        lengths=[len(row_ids) for row_ids in ids],
        visual_rows=cached_rows + pixel_rows,
        pixels=stack(pixels),
        pooled=stack(pooled),
        bad=list(itertools.chain.from_iterable(e.bad for e in examples)),
    )


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the tensors of v rows: [{encoder: (T_e, ...)}] -> {encoder: (v, T_e, ...)}.

    A still has one frame. Beside clips it is repeated to T_e frames; among stills it stays one.
    """
    if not rows:
        return {}
    stacked = {}
    for encoder in rows[0]:
        tensors = [row[encoder] for row in rows]
        length = max(len(tensor) for tensor in tensors)
        stacked[encoder] = torch.stack([x.expand(length, *x.shape[1:]) for x in tensors])
    return stacked


# ----------------------------------------------------------------------------- the order of batches


class GroupedBatchSampler(Sampler[list[int]]):
    """The micro-batches of one epoch for one rank, grouped by modality and by length.

    Grouping saves padding, and a batch of text runs no encoder. For example, with five videos,
    four texts and global_batch=2:

        shuffle each modality         video 3 0 8 5 6     text 7 1 4 2
        cut whole batches             [3 0] [8 5]         [7 1] [4 2]
        (before cutting, sort stretches of 16 batches by length)
        mix what is left over, 6      [6 4]               4 is drawn a second time to fill the batch
        shuffle the batches           [4 2] [3 0] [6 4] [7 1] [8 5]
        deal each batch to 2 ranks    rank 0: [4] [3] [6] [7] [8]     rank 1: [2] [0] [4] [1] [5]

    Everything follows from (seed, epoch). Global batches are made before they are dealt out, so the
    optimizer sees the same ones in the same order for any number of ranks and any micro_batch.
    Raises DataError unless global_batch is a multiple of micro_batch * world_size.
    """

    def __init__(self, dataset, global_batch, micro_batch, rank=0, world_size=1, seed=0, epoch=0):
        rows_at_once = micro_batch * world_size
        if global_batch % rows_at_once != 0:
            what = f"A global batch of {global_batch} cannot be dealt out evenly."
            why = f"{world_size} processes run whole micro-batches of {micro_batch}."
            raise DataError(what, why, f"choose a multiple of {rows_at_once}.")
        self.lengths = dataset.lengths
        self.modalities = dataset.modalities
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = epoch

    def global_batches(self) -> list[list[int]]:
        """Return every global batch of the epoch, in order: each a list of row numbers."""
        rng = np.random.default_rng([self.seed, self.epoch])
        size = self.global_batch
        batches = []
        leftovers = []
        for modality in sorted(set(self.modalities)):
            rows = [row for row, m in enumerate(self.modalities) if m == modality]
            rng.shuffle(rows)
            whole = len(rows) // size * size  # rows that fill whole batches
            leftovers += rows[whole:]
            # WHY: stretches of 16 batches are long enough to find rows of similar lengths. Sorting
            # all rows at once would put the same rows together in every epoch.
            for stretch in _cut(rows[:whole], 16 * size):
                batches += _cut(sorted(stretch, key=self.lengths.__getitem__), size)
        rng.shuffle(leftovers)
        if leftovers:
            drawn_again = itertools.cycle(rng.permutation(len(self.lengths)).tolist())
            while len(leftovers) % size != 0:
                leftovers.append(next(drawn_again))
            batches += _cut(leftovers, size)
        rng.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            mine = batch[self.rank :: self.world_size]
            yield from _cut(mine, self.micro_batch)


def _cut(rows: list[int], size: int) -> list[list[int]]:
    """Cut a list into pieces: [3, 0, 8, 5, 6], 2 -> [[3, 0], [8, 5], [6]]."""
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


# ------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class DataOptions:
    """The command line of `python data.py`."""

    folders: tuple[str, ...] = option((), "folders, as for train.py --data")
    check: bool = option(False, "list the rows that cannot be used")
    show: int = option(0, "number of rows of each file to print, with tokens and labels")
    tokenizer: str = option("tokenizer.model", "LLaMA-2's, for --show; --check uses it if present")
    workers: int = option(2, "processes that decode videos, for --check")
    allow_outside: bool = option(False, "follow paths and links that leave the folder")


def read_options(arguments: list[str] | None = None) -> DataOptions:
    """Read the command line (None: of this process)."""
    about = "Inspect the training data of a folder: its stage1.json and its stage2.json."
    return parse_options(DataOptions, arguments, about)


def print_bad_rows(dataset: ConversationDataset, workers: int) -> int:
    """Print the rows that cannot be used, and return their number. Decodes in parallel."""
    indices = range(len(dataset))
    faults = DataLoader(indices, None, collate_fn=dataset.find_fault, num_workers=workers)
    bad = [fault for fault in progress(faults, f"check {dataset.file.name}") if fault]
    for fault in bad:
        print(clean(f"row {fault['row']}  id {fault['id']}  file {fault['file']}"))
        print(clean(f"{fault['reason']}\n"))
    print(f"{dataset.file}: {len(dataset)} rows, {len(bad)} of them cannot be used")
    return len(bad)


def print_rows(dataset: ConversationDataset, count: int) -> None:
    """Print the first rows: the file, the text, and each token with its label (- for none)."""
    for index, row in enumerate(dataset.rows[:count]):
        modality, path = dataset.media(row)
        turns, _ = dataset.parse(index)
        name = f"{dataset.file}, row {index}  id {row.get('id')}  {modality} {path or ''}"
        print(f"\n{clean(name)}")
        for text, is_answer in turns:
            kind = "answer" if is_answer else "prompt"
            print(f"  {kind}  {text!r}")
        print(f"  {'id':>6}  {'piece':<16}  label")
        for token_id, label in zip(*tokenize(turns, dataset.tokenizer), strict=True):
            piece = dataset.tokenizer.pieces.id_to_piece(token_id)
            escaped = repr(piece)[1:-1]  # a newline as \n: the table keeps one line a token
            shown = "-" if label == IGNORE else label
            print(f"  {token_id:>6}  {escaped:<16}  {shown}")


def main(arguments: list[str] | None = None) -> None:
    """Run `python data.py`; the exit status is 1 if --check finds unusable rows."""
    options = read_options(arguments)
    num_bad, datasets = 0, []
    try:
        if not options.folders:
            raise UserError("Which folder?", "none was given.", "python data.py DIR --check")
        tokenizer = None
        if options.show or Path(options.tokenizer).is_file():
            tokenizer = Tokenizer(options.tokenizer)
        for folder in options.folders:
            # Recipe frozen needs no stage1.json, and align no stage2.json.
            stages = [Path(folder, "stage1.json"), Path(folder, "stage2.json")]
            found = [file for file in stages if file.exists()]
            for file in found or stages[1:]:
                template = TEMPLATES["caption" if file.name == "stage1.json" else "base"]
                how = {"allow_outside": options.allow_outside}
                dataset = ConversationDataset(file, tokenizer, template, encoders=[], **how)
                datasets.append(dataset)
                if options.check:
                    num_bad += print_bad_rows(dataset, options.workers)
        for dataset in datasets:
            print_rows(dataset, options.show)
    except UserError as error:
        sys.exit(f"error: {error}")
    if num_bad > 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
