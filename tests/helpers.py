"""What several test files share: small videos, images, a tokenizer and datasets."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import sentencepiece
import torch
from PIL import Image
from torch import Tensor

from data import TEMPLATES, ConversationDataset
from encoders import ENCODERS
from llama import Tokenizer

SIZE = (32, 48)  # height, width of the clips: tiny, and not square


def numbered_frames(count: int) -> list[np.ndarray]:
    """Make grey frames whose level is 5 times their number, with a moving white bar."""
    frames = []
    for number in range(count):
        frame = np.full((*SIZE, 3), 5 * number, np.uint8)
        frame[:4, 3 * number % SIZE[1] :][:, :6] = 255
        frames.append(frame)
    return frames


def write_video(
    path: Path,
    frames: list[np.ndarray],
    codec: str = "libx264",
    rate: Fraction | int = 25,
    pixel_format: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 0,
    times: list[int] | None = None,
    **options: str,
) -> Path:
    """Encode RGB frames; `times` in milliseconds makes the frame rate variable."""
    index_first = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=index_first) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size = pixel_format, gop
        stream.codec_context.max_b_frames = b_frames
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode_everything(path: Path) -> Tensor:
    """Every frame of a file, in the order in which they are shown: uint8 (N, 3, H, W)."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def write_images(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        Image.fromarray(numbered_frames(len(names))[number]).save(folder / name)
    return folder


def cut_in_half(folder: Path) -> Path:
    """The index comes first, so the header is complete and the frames are not."""
    path = write_video(folder / "half.mp4", numbered_frames(40), gop=1)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    path.write_bytes(content[: (content.index(b"mdat") + len(content)) // 2])
    return path


def noise(height: int, width: int, count: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def train_tokenizer(path: Path, **options: object) -> Path:
    """Train a tokenizer with LLaMA-2's settings: unk 0, bos 1, eos 2, bytes for unknown text."""
    words = ["red", "blue", "square", "circle", "moves", "left", "right", "what", "the", "In Out"]
    rng = random.Random(0)
    text = [" ".join(rng.choices(words, k=8)) for _ in range(200)]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, model_type="bpe", vocab_size=320,
            byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
            remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            num_threads=1, minloglevel=2, **options,
        )  # fmt: skip
    return path


def talk(*turns: str) -> list[dict[str, str]]:
    """talk("Q", "A") -> [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]"""
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(turns)]


SMALL = [ENCODERS[f"miniature-{name}"] for name in ("languagebind", "dinov2", "vivit", "siglip")]


MALFORMED = {
    "a number": 7,
    "nothing": None,
    "a list": ["id", "conversations"],
    "no conversations": {"id": "bad-8"},
    "a conversation that is text": {"id": "bad-8", "conversations": "what"},
    "a conversation that is a number": {"id": "bad-8", "conversations": 7},
    "a conversation that is a dictionary": {"id": "bad-8", "conversations": {"from": "human"}},
    "no turns": {"id": "bad-8", "conversations": []},
    "a turn that is text": {"id": "bad-8", "conversations": ["what"]},
    "a turn without text": {"id": "bad-8", "conversations": [{"from": "human"}]},
    "a turn whose text is a number": {"id": "bad-8", "conversations": talk("what", 7)},
    "half an emoji": {"id": "bad-8", "conversations": talk("what", "\ud83d")},
    "a video whose name is true": {"id": "bad-8", "video": True, "conversations": talk("a", "b")},
    "a video with a number for a name": {"video": 7, "conversations": talk("a", "b")},
    "two videos": {"video": ["clip.mp4", "b.mp4"], "conversations": talk("a", "b")},
}


def dataset_of(folder: Path, tokenizer: Tokenizer, content: str, **options) -> ConversationDataset:
    (folder / "rows.json").write_text(content)
    return ConversationDataset(folder / "rows.json", tokenizer, TEMPLATES["base"], SMALL, **options)


def load_dataset(file: Path, tokenizer: Tokenizer) -> ConversationDataset:
    return ConversationDataset(file, tokenizer, TEMPLATES["base"], SMALL)
