"""From files to tensors: frames for the encoders, token ids and labels for LLaMA.

    a video, GIF, image, folder of images  -> load_video   -> uint8 (T, 3, H, W)
    those frames, for one encoder          -> preprocess   -> float (T_e, 3, 224, 224)
    a conversation                         -> render_prompt, tokenize -> ids and labels
    a JSON file of conversations           -> ConversationDataset, collate         -> Batch

Read before: encoders.py (what each encoder wants), llama.py (the tokenizer). Read next: merv.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from encoders import EncoderConfig, UserError, save_tensors
from llama import Tokenizer

# ------------------------------------------------------------------------------------------- frames

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class VideoError(UserError):
    """A video that is missing, cannot be decoded, or has no frames where they are wanted."""


class DataError(UserError):
    """A dataset or a conversation that is not as it should be."""


def sample_indices(
    total: int,
    num_frames: int,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    end_frame: int | None = None,
) -> list[int]:
    """Numbers of `num_frames` frames spread evenly over a clip, first and last included.

    start, end: seconds, the whole clip by default. end_frame: the last frame allowed (Perception
    Test). 300 frames, 4 wanted -> [0, 99, 199, 299]. Repeats frames if there are too few.
    """
    first, last = 0.0, float(total - 1)
    if start is not None:
        first = min(max(0.0, start * fps), last)
    if end_frame is not None:
        last = min(last, end_frame)
    elif end is not None:
        last = min(last, end * fps - 1)
    return np.linspace(first, max(first, last), num_frames).astype(int).tolist()


def load_video(
    path: str | Path,
    num_frames: int,
    start: float | None = None,
    end: float | None = None,
    end_frame: int | None = None,
    fps: float | None = None,
) -> Tensor:
    """Evenly sampled RGB frames: uint8 (T, 3, H, W) with T = num_frames.

    path: anything PyAV decodes (mp4, avi, mkv, webm, gif ...), a folder of numbered images, or a
    still image, which is a video of identical frames. start, end, end_frame: see sample_indices.
    fps: frames per second of a folder. Raises VideoError.
    """
    path = Path(path)
    if start is not None and end is not None and end <= start:
        raise VideoError(
            f"{path}: a clip from {start} s to {end} s is empty.",
            "the end is not after the start.",
            "swap or correct the two times.",
        )
    clip = (num_frames, start, end, end_frame)
    if path.is_dir():
        frames = _load_folder(path, fps, *clip)
    elif not path.is_file():
        raise VideoError(
            f"{path}: no such video.",
            "there is no file or folder of that name.",
            "check the path; relative paths start at the current folder.",
        )
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        frames = [_load_image(path)] * num_frames
        return torch.from_numpy(frames[0]).permute(2, 0, 1).expand(num_frames, -1, -1, -1)
    else:
        try:
            frames = _load_container(path, *clip)
        except av.FFmpegError as error:
            raise VideoError(
                f"{path}: cannot be decoded: {error.strerror}.",
                "the file is damaged, cut off, or no video.",
                "see how far a player gets; download or convert it again.",
            ) from error
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _load_container(
    path: Path, num_frames: int, start: float | None, end: float | None, end_frame: int | None
) -> list[np.ndarray]:
    """RGB frames (H, W, 3) of a video file; reads all packets but decodes only what it must."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise VideoError(
                f"{path}: has no video stream.",
                "it holds only sound or text.",
                "give a file with pictures.",
            )
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        packets = [
            (p.pts, p.is_keyframe, p.is_corrupt)  # not the packet: it holds its compressed data
            for p in container.demux(stream)
            if p.size and not p.is_discard
        ]
        if not packets or any(corrupt for _, _, corrupt in packets):
            raise VideoError(
                f"{path}: is cut off or has no frames.",
                f"of {len(packets)} packets of pictures, some are incomplete or all are missing.",
                "download or convert it again.",
            )
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if not fps and (start is not None or end is not None):
            raise VideoError(
                f"{path}: does not say its frame rate.",
                "times in seconds need one.",
                "convert it, or ask without start and end.",
            )
        indices = sample_indices(len(packets), num_frames, fps, start, end, end_frame)
        times, wanted = [pts for pts, _, _ in packets], set(indices)
        container.seek(0, stream=stream) if None not in times else container.seek(0)
        # WHY: only these two seek by the time a frame is shown; others (AVI, TS, FLV) by the time
        # it is decoded, which lands behind the frame where the two differ.
        seekable = {"mov", "matroska"} & set(container.format.name.split(","))
        if not seekable or None in times or len(set(times)) < len(times):
            frames = enumerate(container.decode(stream))  # no usable times: count
            decoded = {i: _to_rgb(frame) for i, frame in frames if i in wanted}
        else:
            order = sorted(times)  # packets come in decoding order, frames are shown by time
            keyframes = sorted(pts for pts, is_key, _ in packets if is_key)
            decoded = _decode_at(container, stream, {i: order[i] for i in indices}, keyframes)
        if missing := wanted - set(decoded):
            raise VideoError(
                f"{path}: frame {min(missing)} of {len(packets)} cannot be decoded.",
                "the file is damaged or cut off.",
                "download or convert it again.",
            )
        return [decoded[index] for index in indices]


def _decode_at(container, stream, times: dict[int, int], keyframes: list[int]) -> dict:
    """Frames by number, given their times; jumps to a key frame where that skips something."""
    decoded, position, frames = {}, None, iter(())
    for index, time in sorted(times.items()):
        keyframe = keyframes[max(0, bisect_right(keyframes, time) - 1)] if keyframes else None
        if position is None or (keyframe is not None and keyframe > position):
            container.seek(keyframe or 0, stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            position = frame.pts
            if position == time:
                decoded[index] = _to_rgb(frame)
                break
    return decoded


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3), turned upright if the camera was held on its side."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _load_image(path: Path) -> np.ndarray:
    try:
        return np.array(Image.open(path).convert("RGB"))
    except OSError as error:
        raise VideoError(
            f"{path}: is no readable image.", str(error), "download it again."
        ) from error


def _load_folder(
    path: Path, fps: float | None, num_frames, start, end, end_frame
) -> list[np.ndarray]:
    """RGB frames of a folder of numbered images: 2.jpg comes before 10.jpg."""
    files = [f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES]
    files.sort(key=lambda f: [int(n) for n in re.findall(r"\d+", f.stem)])
    if not files:
        raise VideoError(
            f"{path}: is a folder without images.",
            "a folder stands for a video whose frames are numbered images.",
            "check the path.",
        )
    if fps is None and (start is not None or end is not None):
        raise VideoError(
            f"{path}: is a folder of images without a frame rate.",
            "times in seconds need one.",
            "pass fps, such as 3 for VLEP.",
        )
    indices = sample_indices(len(files), num_frames, fps, start, end, end_frame)
    images = {index: _load_image(files[index]) for index in set(indices)}
    if len({image.shape for image in images.values()}) > 1:
        raise VideoError(
            f"{path}: has images of different sizes.",
            "frames of a video have one size.",
            "resize them alike.",
        )
    return [images[index] for index in indices]


def preprocess(frames: Tensor, config: EncoderConfig) -> Tensor:
    """What one encoder wants of a clip: uint8 (T, 3, H, W) -> float32 (T_e, 3, side, side).

    Takes every (T / T_e)-th frame: of 32, ViViT sees all and the others every second one, so that
    tubelet i of ViViT (frames 2i, 2i+1) lines up with frame i of the rest. One frame stays one.
    """
    if len(frames) > 1:
        if len(frames) % config.num_frames:
            raise DataError(
                f"{config.name} wants {config.num_frames} frames, got {len(frames)}.",
                "all encoders must see the same moments, so one takes every k-th frame.",
                f"load a multiple of {config.num_frames} frames.",
            )
        # QUIRK: of frames 0..31 that takes 0, 2 ... 30: the last one is never seen (ledger K7).
        frames = frames[:: len(frames) // config.num_frames]
    side = config.image_size
    if config.resize == "squash":  # antialiased as in Pillow, on uint8
        frames = F.interpolate(frames, (side, side), mode=config.interpolation, antialias=True)
        pixels = frames.float() / 255
    else:
        pixels = torch.stack(
            [_short_side_crop(frame, side, config.interpolation) for frame in frames]
        )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.pixel_mean, config.pixel_std))
    return (pixels.contiguous() - mean) / std


def load_pixels(
    path: str | Path,
    encoders: Sequence[EncoderConfig],
    start: float | None = None,
    end: float | None = None,
    end_frame: int | None = None,
    fps: float | None = None,
) -> dict[str, Tensor]:
    """A file as each encoder wants it: encoder -> (T_e, 3, side, side); a still stays one frame."""
    still = Path(path).suffix.lower() in IMAGE_SUFFIXES
    num_frames = 1 if still else max(config.num_frames for config in encoders)
    frames = load_video(path, num_frames, start, end, end_frame, fps)
    return {config.name: preprocess(frames, config) for config in encoders}


def _short_side_crop(frame: Tensor, side: int, interpolation: str) -> Tensor:
    """uint8 (3, H, W) -> float (3, side, side) in [0, 1]: scale the short side, crop the centre."""
    # QUIRK: LanguageBind keeps the aspect ratio and crops, without antialiasing; the other three
    # are squashed. On wide video the grids do not show the same places (ledger K3).
    # FIX: the released transform also flips half of all clips left-right, at inference too (F1).
    _, h, w = frame.shape
    size = (side, w * side // h) if h < w else (h * side // w, side)
    pixels = F.interpolate(
        frame[None].float() / 255, size, mode=interpolation, align_corners=False
    )[0]
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return pixels[:, top : top + side, left : left + side]


# ---------------------------------------------------------------------------------- prompts, tokens

IGNORE = -100  # the label of a position without loss


@dataclass(frozen=True)
class Template:
    """How the turns of a conversation become text."""

    question: str  # with {question}
    system: str = ""  # in front of the first question
    opening: str = ""  # in front of the first question's text, inside the template


TEMPLATES: dict[str, Template] = {
    "base": Template("In: {question}\nOut:"),
    # QUIRK: the authors' models were trained with the literal text <video>, and asked without (K4).
    "base_video_tag": Template("In: {question}\nOut:", opening="<video>\n"),
    "vicuna": Template(
        "USER: {question} ASSISTANT:",
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. ",
    ),
    "llama2_chat": Template(
        "[INST] {question} [/INST]",
        opening="<<SYS>>\nYou are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a variety "
        "of tasks using natural language.\n<</SYS>>\n\n",
    ),
    "caption": Template(""),  # stage 1: the picture, then its caption
}


def render_prompt(conversation: list[dict[str, str]], template: Template) -> list[tuple[str, bool]]:
    """The turns as text, each with whether it is an answer, which is what the loss is taken on.

    conversation: [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]
    [human "What?", gpt "A cat"] -> [("In: What?\\nOut:", False), ("A cat", True)]
    FIX: one renderer for training and, without the last answer, for asking; the authors have two
    that differ, for example in the system prompt (ledger F12).
    """
    roles = [turn.get("from") for turn in conversation]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2) + ["human"] * (len(roles) % 2):
        raise DataError(
            f"A conversation has the roles {roles}.",
            "turns must alternate human, gpt, human ... and start with human.",
            'correct the "from" fields of this row.',
        )
    turns = []
    for number, turn in enumerate(conversation):
        text = re.sub(r"\s*<(image|video)>\s*", " ", turn["value"]).strip()
        if number % 2:
            turns.append((text, True))
            continue
        system, opening = ("", "") if number else (template.system, template.opening)
        question = system + template.question.replace("{question}", opening + text)
        turns.append((question, False))
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


def mcq_prompt(question: str, options: list[str]) -> str:
    """The multiple-choice prompt of the paper's evaluation."""
    letters = [chr(ord("A") + number) for number in range(len(options))]
    choices = "\n".join(
        f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)
    )
    return (
        f"{question} Select the correct answer from the following options. Write your answer as "
        f"only one of {', '.join(letters)} and nothing else.\n\n    {choices}"
        # QUIRK: the four blanks before the first option are the released prompt's (ledger K10).
    )


# ------------------------------------------------------------------------------------ training data


@dataclass
class Example:
    """One row of a dataset. Of pixels and features at most one is filled; neither for text."""

    input_ids: Tensor  # (s,)
    labels: Tensor  # (s,), IGNORE where there is no loss
    pixels: dict[str, Tensor] = field(
        default_factory=dict
    )  # encoder -> (T_e, 3, H, W); T_e 1: a still
    features: dict[str, Tensor] = field(default_factory=dict)  # encoder -> (t, h, w, d_e), pooled


@dataclass
class Batch:
    """Examples padded on the right to one length s; v of the b rows have a picture."""

    input_ids: Tensor  # (b, s)
    labels: Tensor  # (b, s)
    lengths: Tensor  # (b,) tokens of each row that are real
    visual_rows: Tensor  # (v,) which rows have a video or image
    pixels: dict[str, Tensor]  # encoder -> (v, T_e, 3, H, W)
    features: dict[str, Tensor]  # encoder -> (v, t, h, w, d_e)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""

        def move(value):
            if isinstance(value, dict):
                return {name: move(tensor) for name, tensor in value.items()}
            return value.to(device, non_blocking=True)

        return Batch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})

    @property
    def num_labels(self) -> int:
        """How many positions the loss is taken on."""
        return int((self.labels != IGNORE).sum())


class FeatureCache:
    """Pooled features of clips on disk, so that frozen encoders run once per clip, not per epoch.

    Content-addressed: the name of an entry is a hash of the file's bytes, of the encoder's weights
    and preprocessing and of the pooled size, so a stale entry is never found.
    """

    def __init__(self, folder: str | Path, fingerprints: dict[str, str]):
        self.folder, self.fingerprints = Path(folder), fingerprints  # encoder -> hash

    def path(self, encoder: str, file: Path) -> Path:
        """Where the features of one file by one encoder lie, or would lie."""
        content = hashlib.sha256()
        for part in sorted(file.iterdir()) if file.is_dir() else [file]:
            content.update(part.read_bytes())
        name = content.hexdigest()
        return (
            self.folder
            / f"{encoder}-{self.fingerprints[encoder]}"
            / name[:2]
            / f"{name}.safetensors"
        )

    def get(self, file: Path) -> dict[str, Tensor] | None:
        """encoder -> (t, h, w, d_e), or None if any is missing."""
        if not file.exists():
            return None  # load_pixels will say so
        paths = {encoder: self.path(encoder, file) for encoder in self.fingerprints}
        if not all(path.exists() for path in paths.values()):
            return None
        return {encoder: load_file(path)["features"] for encoder, path in paths.items()}

    def put(self, file: Path, features: dict[str, Tensor]) -> None:
        """Store encoder -> (t, h, w, d_e) in bfloat16."""
        for encoder, tensor in features.items():
            save_tensors(
                {"features": tensor.bfloat16().cpu().contiguous()}, self.path(encoder, file)
            )


class ConversationDataset(Dataset):
    """Rows of Video-LLaVA's JSON: {"id", "image" | "video" | neither, "conversations": [...]}."""

    def __init__(
        self,
        file: str | Path,
        tokenizer: Tokenizer,
        template: Template,
        encoders: list[EncoderConfig],
        max_length: int = 2048,  # text tokens; longer conversations are cut
        cache: FeatureCache | None = None,
    ):
        self.file, self.root = Path(file), Path(file).parent
        try:
            self.rows = json.loads(self.file.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise DataError(
                f"Cannot read {file}.",
                str(error),
                'a dataset is a JSON list of {"id", "image" | "video", "conversations": [...]}; '
                "check the path and the file.",
            ) from error
        self.tokenizer, self.template, self.encoders = tokenizer, template, encoders
        self.max_length, self.cache = max_length, cache
        self.modalities = [self.media(row)[0] for row in self.rows]
        # Words stand for tokens: good enough to put rows of like length together.
        self.lengths = [
            sum(len(turn.get("value", "").split()) for turn in row.get("conversations", ()))
            for row in self.rows
        ]

    def media(self, row: dict) -> tuple[str, Path | None]:
        """("video" | "image" | "text", the file)."""
        for kind in ("video", "image"):
            if kind in row:
                return kind, self.root / row[kind]
        return "text", None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        try:
            turns = render_prompt(row["conversations"], self.template)
        except (DataError, KeyError) as error:
            raise DataError(f"{self.file}, row {index} (id {row.get('id')}): {error}") from error
        ids, labels = (
            torch.tensor(values[: self.max_length]) for values in tokenize(turns, self.tokenizer)
        )
        path = self.media(row)[1]
        if path is None:
            return Example(ids, labels)
        if self.cache is not None and (features := self.cache.get(path)) is not None:
            return Example(ids, labels, features=features)
        return Example(ids, labels, pixels=load_pixels(path, self.encoders))


def collate(examples: list[Example]) -> Batch:
    """Examples -> one Batch: text, image and video rows may stand side by side."""
    visual = [e for e in examples if e.pixels or e.features]
    if any(e.pixels for e in visual) and any(e.features for e in visual):
        raise DataError(
            "A batch mixes cached features and pixels.",
            "some clips are in the feature cache and some are not.",
            "fill the cache before training (train.py --cache-features does).",
        )
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        # WHY: 0 is a real token (<unk>), not a pad token. LLaMA-2 has none, and none is needed:
        # lengths say what is real.
        input_ids=pad([e.input_ids for e in examples], batch_first=True, padding_value=0),
        labels=pad([e.labels for e in examples], batch_first=True, padding_value=IGNORE),
        lengths=torch.tensor([len(e.input_ids) for e in examples]),
        visual_rows=torch.tensor(
            [i for i, e in enumerate(examples) if e.pixels or e.features]
        ).long(),
        pixels=_stack([e.pixels for e in visual]),
        features=_stack([e.features for e in visual]),
    )


def _stack(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[{encoder: (T_e, ...)}] -> {encoder: (v, T_e, ...)}; stills beside clips repeat to T_e."""
    stacked = {}
    for encoder in dicts[0] if dicts else ():
        tensors = [d[encoder] for d in dicts]
        length = max(len(tensor) for tensor in tensors)
        stacked[encoder] = torch.stack(
            [t.expand(length, *t.shape[1:]) if len(t) == 1 else t for t in tensors]
        )
    return stacked


class GroupedBatchSampler(Sampler[list[int]]):
    """One epoch of micro-batches for one rank: rows of one modality and of like length together.

    All follows from (seed, epoch): global batches are made first, then dealt out, so any number of
    ranks and any micro-batch sees the same ones in the same order. Rows left over by the modalities
    share mixed batches; the last is filled up with rows drawn again.
    """

    def __init__(
        self,
        dataset: ConversationDataset,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
    ):
        if global_batch % (micro_batch * world_size):
            raise DataError(
                f"A global batch of {global_batch} cannot be split over {world_size} processes "
                f"with micro-batches of {micro_batch}.",
                "each process runs whole micro-batches.",
                f"choose a multiple of {micro_batch * world_size}.",
            )
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
            leftovers += rows[whole:]
            # Sort by length within stretches of 16 batches: alike within a batch, mixed over time.
            for begin in range(0, whole, 16 * size):
                stretch = sorted(
                    rows[begin : min(begin + 16 * size, whole)], key=self.lengths.__getitem__
                )
                batches += [stretch[i : i + size] for i in range(0, len(stretch), size)]
        rng.shuffle(leftovers)
        if leftovers:
            everyone = rng.permutation(len(self.lengths)).tolist()
            fill = -len(leftovers) % size
            leftovers += (everyone * (fill // len(everyone) + 1))[:fill]
            batches += [leftovers[i : i + size] for i in range(0, len(leftovers), size)]
        rng.shuffle(batches)
        return batches

    def __len__(self) -> int:
        per_step = self.global_batch // (self.micro_batch * self.world_size)
        return len(self.global_batches()) * per_step

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            mine = batch[self.rank :: self.world_size]
            yield from (
                mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)
            )
