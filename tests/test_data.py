"""data.py: which frames of a file are seen, what each encoder gets of them, what text costs a loss.

All videos are made here, with real encoders, and their frames say their number (grey = 5 * number).
The reference for every container is the dumbest loader there is: decode all, then index.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data import (
    IGNORE,
    TEMPLATES,
    ConversationDataset,
    Example,
    GroupedBatchSampler,
    collate,
    load_pixels,
    preprocess,
    render_prompt,
    tokenize,
)
from encoders import ENCODERS
from llama import Tokenizer
from support.benchmarks import mcq_prompt
from support.errors import DataError, VideoError
from support.features import FeatureCache
from support.video import load_video, sample_indices

# ------------------------------------------------------------------------------------ making videos

SIZE = (32, 48)  # height, width of the clips: tiny, and not square


def numbered_frames(count: int) -> list[np.ndarray]:
    """Grey frames whose level is 5 times their number, with a white bar that moves."""
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


ODD_RATE = Fraction(24000, 1001)
UNEVEN = np.cumsum([[7, 40, 33, 100, 250][i % 5] for i in range(40)]).tolist()
CONTAINERS = {
    "h264, B-frames, four key frames.mp4": {"b_frames": 3, "x264-params": "scenecut=0"},
    "h264, all key frames.mp4": {"gop": 1},
    "h264, a single key frame.mp4": {"gop": 250, "b_frames": 2, "x264-params": "scenecut=0"},
    "h264, open GOPs.mp4": {"b_frames": 2, "x264-params": "open-gop=1:keyint=6:scenecut=0"},
    "h264, 23.976 fps.mp4": {"rate": ODD_RATE, "b_frames": 2},
    "mpeg4, B-frames.mp4": {"codec": "mpeg4", "b_frames": 2, "qmax": "2"},
    "h264, 23.976 fps.mkv": {"rate": ODD_RATE, "b_frames": 2},
    "h264, uneven times.mkv": {"times": UNEVEN, "b_frames": 2},
    "vp8, hidden frames.webm": {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "vp9.webm": {"codec": "libvpx-vp9", "cpu-used": "8", "deadline": "realtime"},
    "mpeg4.avi": {"codec": "mpeg4", "qmax": "2"},
    "mpeg4, B-frames.avi": {"codec": "mpeg4", "b_frames": 2, "qmax": "2"},
    "mjpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "h264, B-frames.avi": {"b_frames": 2},
    "animated.gif": {"codec": "gif", "pixel_format": "rgb8"},
}


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> dict[str, Path]:
    """Name -> a file of 40 numbered frames, in every container and codec of CONTAINERS."""
    folder = tmp_path_factory.mktemp("videos")
    return {
        name: write_video(folder / name, numbered_frames(40), **options)
        for name, options in CONTAINERS.items()
    }


@pytest.fixture(scope="session")
def clip(videos) -> Path:
    """An ordinary clip: 40 frames at 25 per second, H.264 with B-frames and four key frames."""
    return videos["h264, B-frames, four key frames.mp4"]


def train_tokenizer(path: Path) -> Path:
    """LLaMA-2's choices on a handful of words: unk 0, bos 1, eos 2, bytes for what is unknown."""
    words = ["red", "blue", "square", "circle", "moves", "left", "right", "what", "the", "In Out"]
    rng = random.Random(0)
    text = [" ".join(rng.choices(words, k=8)) for _ in range(200)]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, model_type="bpe", vocab_size=320,
            byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
            remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            num_threads=1, minloglevel=2,
        )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


@pytest.fixture(scope="session")
def llama2_tokenizer(shared_folder) -> Tokenizer:
    return Tokenizer(shared_folder / "data" / "llama2_tokenizer.model")


# ------------------------------------------------------------------------------------- which frames


def test_frames_are_spread_evenly_and_both_ends_are_seen():
    """linspace(0, N - 1, T), truncated: the example of the docstring, and one that truncates."""
    assert sample_indices(300, 4) == [0, 99, 199, 299]
    assert sample_indices(10, 4) == [0, 3, 6, 9]
    assert sample_indices(11, 4) == [0, 3, 6, 10]  # 3.33 and 6.67 are cut, not rounded


@pytest.mark.parametrize("total", [1, 7, 32, 146, 999])
@pytest.mark.parametrize("fps", [10.0, 24000 / 1001])
def test_start_and_end_follow_the_formula_of_the_specification(total, fps):
    """linspace(start * fps, min(N - 1, end * fps - 1), T), truncated to integers."""
    seconds = total / fps
    for start, end in [(0, seconds), (0.25 * seconds, 0.8 * seconds), (0, 2 * seconds)]:
        last = min(total - 1, end * fps - 1)
        expected = [int(i) for i in np.linspace(start * fps, max(last, start * fps), 32)]
        assert sample_indices(total, 32, fps, start, end) == expected
    from_the_middle = np.linspace(0.5 * seconds * fps, max(total - 1, 0.5 * total), 8)
    if total > 1:
        expected = [int(i) for i in from_the_middle]
        assert sample_indices(total, 8, fps, 0.5 * seconds) == expected


def test_end_frame_is_the_last_frame_allowed():
    """Perception Test asks what happens next, so nothing after end_frame may be seen."""
    assert sample_indices(300, 4, end_frame=30) == [0, 10, 20, 30]
    assert sample_indices(300, 4, end_frame=5000) == [0, 99, 199, 299]
    assert sample_indices(300, 3, end_frame=0) == [0, 0, 0]


def test_a_clip_with_too_few_frames_repeats_them_in_order():
    """3 frames, 6 wanted: every frame is used, none is invented."""
    assert sample_indices(3, 6) == [0, 0, 0, 1, 1, 2]
    assert sample_indices(1, 4) == [0, 0, 0, 0]


def test_indices_never_leave_the_clip():
    """Whatever the times asked for, every index is a frame, and they do not run backwards."""
    rng = random.Random(0)
    for _ in range(300):
        total, fps = rng.randint(1, 90), rng.choice([1.0, 12.5, 24000 / 1001, 60.0])
        start, end = rng.uniform(-1, 9), rng.choice([None, rng.uniform(-1, 9)])
        end_frame = rng.choice([None, rng.randint(0, 99)])
        indices = sample_indices(total, 16, fps, start, end, end_frame)
        assert len(indices) == 16
        assert indices == sorted(indices)
        assert indices[0] >= 0
        assert indices[-1] < total


# ---------------------------------------------------------------------------------- every container


@pytest.mark.parametrize("name", CONTAINERS)
def test_sampled_frames_are_those_of_decoding_the_whole_file(videos, name):
    """Seeking saves work and changes nothing: equal to the bit, few frames or many."""
    reference = decode_everything(videos[name])
    assert len(reference) == 40
    for num_frames in (1, 2, 5, 32, 40, 50):
        got = load_video(videos[name], num_frames)
        wanted = reference[sample_indices(40, num_frames)]
        assert torch.equal(got, wanted), f"{num_frames} frames"


@pytest.mark.parametrize("name", CONTAINERS)
def test_frame_number_i_is_the_frame_that_was_written_as_number_i(videos, name):
    """The grey level says the number, so an off-by-one of the reference itself would show, too."""
    frames = load_video(videos[name], 40).float()
    levels = frames[:, :, 10:, :].mean((1, 2, 3))  # below the white bar
    tolerance = 20 if name.endswith("gif") else 2.4  # GIF has 4 to 8 shades of each colour here
    assert (levels - 5 * torch.arange(40)).abs().max() < tolerance


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_piece_of_a_video_is_cut_by_its_times(videos, name):
    """From 0.4 s to 1.2 s at 25 frames per second: frames 10 to 29."""
    if "23.976" in name or "uneven" in name:
        with av.open(str(videos[name])) as container:
            fps = float(container.streams.video[0].average_rate)
    else:
        fps = 25.0
    got = load_video(videos[name], 8, start=0.4, end=1.2)
    wanted = decode_everything(videos[name])[sample_indices(40, 8, fps, 0.4, 1.2)]
    assert torch.equal(got, wanted)


class CountingContainer:
    """An open video file that counts the frames it decodes."""

    def __init__(self, container: av.container.InputContainer):
        self.container, self.decoded = container, 0

    def __enter__(self) -> CountingContainer:
        return self

    def __exit__(self, *_) -> None:
        self.container.close()

    def __getattr__(self, name: str):
        return getattr(self.container, name)

    def decode(self, *streams):
        for frame in self.container.decode(*streams):
            self.decoded += 1
            yield frame


def test_the_decoder_jumps_over_what_is_not_wanted(videos, monkeypatch):
    """Frames 0 and 39, key frames 0, 12, 24 and 36: five frames are decoded instead of 40.

    Where the last frame hangs on the first one, there is nothing to jump to, and all 40 are.
    """
    opened, open_file = [], av.open

    def open_and_count(*args, **options) -> CountingContainer:
        opened.append(CountingContainer(open_file(*args, **options)))
        return opened[-1]

    monkeypatch.setattr(av, "open", open_and_count)
    load_video(videos["h264, B-frames, four key frames.mp4"], 2)
    load_video(videos["h264, a single key frame.mp4"], 2)
    assert [container.decoded for container in opened] == [5, 40]


def test_a_video_of_one_frame_is_that_frame_repeated(tmp_path):
    path = write_video(tmp_path / "one.mp4", numbered_frames(1))
    frames = load_video(path, 4)
    assert torch.equal(frames, decode_everything(path).expand(4, -1, -1, -1))


def test_frames_are_bytes_in_the_order_time_channel_height_width(clip):
    """T = num_frames, whatever the clip is; uint8, because that is what was decoded."""
    for num_frames in (1, 7, 32):
        frames = load_video(clip, num_frames)
        assert frames.shape == (num_frames, 3, *SIZE)
        assert frames.dtype == torch.uint8


def test_the_same_video_twice_is_bit_identical(clip):
    assert torch.equal(load_video(clip, 32), load_video(clip, 32))


@pytest.mark.parametrize("name", ["clip_a.mp4", "clip_b.mp4"])
def test_real_clips_decode_as_decoding_them_completely(shared_folder, name):
    """Clips of 146 and 219 frames at 24000/1001, from a camera and not from this file."""
    path = shared_folder / "data" / name
    reference = decode_everything(path)
    for num_frames in (3, 32):
        wanted = reference[sample_indices(len(reference), num_frames)]
        assert torch.equal(load_video(path, num_frames), wanted)
    piece = sample_indices(len(reference), 8, 24000 / 1001, 2.0, 4.0)
    assert torch.equal(load_video(path, 8, start=2.0, end=4.0), reference[piece])


QUARTER_TURNS = {  # clockwise turns a player must make -> matrix (a, b, c, d) of the track header
    1: (0, 1, -1, 0),
    2: (-1, 0, 0, -1),
    3: (0, -1, 1, 0),
}


@pytest.mark.parametrize("turns", QUARTER_TURNS)
def test_a_clip_filmed_with_the_camera_on_its_side_comes_out_upright(tmp_path, turns):
    """A phone stores what its sensor saw, and how to turn it; players and decord turn it."""
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:24, :16] = [250, 0, 0]  # red top left, blue bottom right
    upright[24:, 16:] = [0, 0, 250]
    stored = np.ascontiguousarray(np.rot90(upright, turns))  # a turn counter-clockwise
    path = write_video(tmp_path / "sideways.mp4", [stored] * 3)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 0x10000 for value in QUARTER_TURNS[turns])
    for position, value in enumerate([a, b, 0, c, d, 0, 0, 0, 0x40000000]):
        begin = matrix + 4 * position
        content[begin : begin + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    frames = load_video(path, 2)
    assert frames.shape == (2, 3, 48, 32)
    difference = frames.float() - torch.from_numpy(upright).permute(2, 0, 1)
    assert difference.abs().mean() < 6  # the colours of H.264 are not exact


# ------------------------------------------------------------------------------------------- images


def write_images(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        Image.fromarray(numbered_frames(len(names))[number]).save(folder / name)
    return folder


def test_a_folder_of_images_is_sorted_by_number_not_by_text(tmp_path):
    """2.png comes before 10.png; other files beside them are no frames."""
    folder = write_images(tmp_path / "frames", [f"{n}.png" for n in range(12)])
    (folder / "notes.txt").write_text("not a frame")
    frames = load_video(folder, 12)
    assert frames[:, 0, 20, 20].tolist() == [5 * number for number in range(12)]


def test_a_folder_of_images_is_cut_by_its_frame_rate(tmp_path):
    """VLEP and TVQA come as 3 frames per second; from second 1 to 3 are frames 3 to 8."""
    folder = write_images(tmp_path / "frames", [f"{n:05d}.jpg" for n in range(12)])
    frames = load_video(folder, 6, start=1, end=3, fps=3)
    expected = torch.tensor([5.0 * number for number in range(3, 9)])
    assert (frames[:, 0, 20, 20].float() - expected).abs().max() <= 2
    last_allowed = load_video(folder, 3, end_frame=2)
    assert (last_allowed[:, 0, 20, 20].float() - torch.tensor([0.0, 5, 10])).abs().max() <= 2


def test_a_still_image_is_a_video_of_identical_frames(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "still.png")
    frames = load_video(tmp_path / "still.png", 5)
    assert frames.shape == (5, 3, 9, 13)
    for frame in frames:
        assert torch.equal(frame, torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_grey_image_gets_three_channels(tmp_path):
    Image.new("L", (8, 6), 77).save(tmp_path / "grey.png")
    assert torch.equal(load_video(tmp_path / "grey.png", 1), torch.full((1, 3, 6, 8), 77).byte())


# ------------------------------------------------------------------------------------ broken videos


def _empty(folder: Path) -> Path:
    (folder / "empty.mp4").write_bytes(b"")
    return folder / "empty.mp4"


def _garbage(folder: Path) -> Path:
    (folder / "garbage.mp4").write_bytes(random.Random(0).randbytes(5000))
    return folder / "garbage.mp4"


def _cut_in_half(folder: Path) -> Path:
    """The index stands first, so that the header is whole and the pictures are not."""
    path = write_video(folder / "half.mp4", numbered_frames(40), gop=1)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    path.write_bytes(content[: (content.index(b"mdat") + len(content)) // 2])
    return path


def _cut_before_the_index(folder: Path) -> Path:
    """As a download that stopped: most MP4 files have their index at the very end."""
    path = folder / "no_index.mp4"
    path.write_bytes(write_video(folder / "whole.mp4", numbered_frames(40)).read_bytes()[:400])
    return path


def _only_sound(folder: Path) -> Path:
    path = folder / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = np.zeros((1, 4096), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _no_frames(extension: str, codec: str):
    def write(folder: Path) -> Path:
        path = folder / f"zero.{extension}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            container.start_encoding()
        return path

    return write


def _folder_without_images(folder: Path) -> Path:
    (folder / "no_images").mkdir()
    (folder / "no_images" / "readme.txt").write_text("nothing here")
    return folder / "no_images"


def _broken_image(folder: Path) -> Path:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    return folder / "broken.jpg"


def _cut_image(folder: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:3000])
    return folder / "cut.png"


def _images_of_two_sizes(folder: Path) -> Path:
    path = write_images(folder / "two_sizes", ["0.png", "1.png"])
    Image.new("RGB", (9, 9)).save(path / "2.png")
    return path


BROKEN = {
    "a missing file": lambda folder: folder / "missing.mp4",
    "an empty file": _empty,
    "garbage": _garbage,
    "an mp4 cut in half": _cut_in_half,
    "an mp4 cut before its index": _cut_before_the_index,
    "a file with sound only": _only_sound,
    "an mp4 without frames": _no_frames("mp4", "libx264"),
    "an avi without frames": _no_frames("avi", "mpeg4"),
    "an mkv without frames": _no_frames("mkv", "libx264"),
    "a folder without images": _folder_without_images,
    "a broken image": _broken_image,
    "a cut image": _cut_image,
    "images of two sizes": _images_of_two_sizes,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_video_gives_one_error_with_file_reason_and_fix(tmp_path, kind):
    """Never a decoder's own exception, never silently another video."""
    path = BROKEN[kind](tmp_path)
    with pytest.raises(VideoError) as caught:
        load_video(path, 8)
    what, why, fix = caught.value.args
    assert str(path) in what
    assert why
    assert fix
    assert str(caught.value) == f"{what}\nWhy: {why}\nFix: {fix}"


@pytest.mark.parametrize(("start", "end"), [(1.0, 1.0), (1.0, 0.5), (-1.0, -2.0)])
def test_a_clip_that_ends_before_it_starts_is_an_error(clip, start, end):
    with pytest.raises(VideoError, match="is empty") as caught:
        load_video(clip, 8, start=start, end=end)
    assert str(clip) in str(caught.value)


def test_a_start_beyond_the_end_gives_the_last_frame(clip):
    """Annotations overrun by a fraction of a second now and then; the nearest frame answers."""
    last = decode_everything(clip)[-1:]
    assert torch.equal(load_video(clip, 3, start=99.0), last.expand(3, -1, -1, -1))
    assert torch.equal(load_video(clip, 3, start=99.0, end=100.0), last.expand(3, -1, -1, -1))


def test_a_folder_without_a_frame_rate_cannot_be_cut_by_seconds(tmp_path):
    folder = write_images(tmp_path / "frames", ["0.png", "1.png"])
    with pytest.raises(VideoError, match="frame rate") as caught:
        load_video(folder, 2, start=1.0)
    assert str(folder) in str(caught.value)


class _Videos(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        return load_video("/nowhere/missing.mp4", 8)


def test_a_video_error_survives_the_way_out_of_a_worker_process():
    """Class and text: the training loop decides by the class and writes the text down."""
    with pytest.raises(VideoError) as caught:
        next(iter(DataLoader(_Videos(), num_workers=1)))
    text = str(caught.value)
    assert "/nowhere/missing.mp4" in text
    assert "Why: " in text
    assert "Fix: " in text


@pytest.mark.parametrize(
    "error", [VideoError("a.mp4: what.", "why.", "fix."), DataError("what.", "why.", "fix.")]
)
def test_an_error_is_the_same_after_pickling(error):
    """Process pools send exceptions by pickle, which calls the class with the exception's args."""
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)


# --------------------------------------------------------------------------------------- preprocess

ODD_SIZES = [(37, 53), (301, 200), (1, 9), (9, 1), (224, 224), (225, 223), (1203, 2001)]


def noise(height: int, width: int, count: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("name", ["dinov2", "siglip", "vivit"])
def test_squashing_is_pillows_antialiased_resize(name, size):
    """The released weights saw Pillow's pixels; ours differ by one level of 256 at most.

    Two resizes, first of the width, then of the height, are what Pillow did when the weights
    were trained; since 13 it does the cheaper one first, and noise is clipped differently between.
    """
    config, frame = ENCODERS[name], noise(*size)
    method = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[config.interpolation]
    assert config.interpolation == ("bilinear" if name == "vivit" else "bicubic")
    image = Image.fromarray(frame[0].permute(1, 2, 0).numpy())
    image = image.resize((224, image.height), method).resize((224, 224), method)
    mean, std = {
        "dinov2": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "siglip": ([0.5] * 3, [0.5] * 3),
        "vivit": ([0.5] * 3, [0.5] * 3),
    }[name]
    got = preprocess(frame, config)
    assert got.shape == (1, 3, 224, 224)
    assert got.dtype == torch.float32
    pixels = got[0].permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)
    expected = torch.from_numpy(np.array(image)).float() / 255
    assert (pixels - expected).abs().max() <= 1 / 255 + 1e-6


def languagebind_pixels(frame: Tensor) -> Tensor:
    """The released order: normalise, scale the short side (long side floored), crop the centre."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    x = ((frame.float() / 255 - mean) / std)[None]
    height, width = frame.shape[1:]
    if height <= width:
        size = (224, int(np.floor(width * 224 / height)))
    else:
        size = (int(np.floor(height * 224 / width)), 224)
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)
    top, left = (round((length - 224) / 2.0) for length in size)
    return x[0, :, top : top + 224, left : left + 224]


@pytest.mark.parametrize("size", ODD_SIZES)
def test_languagebind_is_scaled_by_its_short_side_and_cropped(size):
    """Normalising before or after interpolating is the same (both are linear): within 1e-5."""
    frame = noise(*size)
    got = preprocess(frame, ENCODERS["languagebind"])
    assert got.shape == (1, 3, 224, 224)
    assert (got[0] - languagebind_pixels(frame[0])).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["languagebind", "dinov2", "vivit", "siglip"])
def test_no_encoder_ever_sees_a_flipped_frame(name):
    """FIX F1: the released LanguageBind transform flips half of all clips, also when asked."""
    frame = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    frame[..., :32] = 255  # bright on the left
    for _ in range(8):
        pixels = preprocess(frame, ENCODERS[name])
        assert pixels[..., :100].min() > pixels[..., 124:].max()


def test_preprocessing_uses_no_randomness():
    state = torch.get_rng_state()
    first = preprocess(noise(40, 50), ENCODERS["languagebind"])
    assert torch.equal(first, preprocess(noise(40, 50), ENCODERS["languagebind"]))
    assert torch.equal(state, torch.get_rng_state())


def test_the_encoders_see_the_same_moments():
    """Of 32 frames ViViT sees all, the others 0, 2 ... 30: its tubelet i begins with their frame i.

    QUIRK K7: so the very last frame is never seen by three of the four.
    """
    frames = torch.arange(32, dtype=torch.uint8)[:, None, None, None].expand(32, 3, 32, 32) * 5
    small = {name: replace(ENCODERS[name], image_size=32) for name in ENCODERS}
    levels = {}
    for name in ("languagebind", "dinov2", "vivit", "siglip"):
        config = small[name]
        pixels = preprocess(frames, config)
        assert len(pixels) == config.num_frames
        grey = pixels[:, 0, 0, 0] * config.pixel_std[0] + config.pixel_mean[0]
        levels[name] = (grey * 255 / 5).round().int().tolist()
    assert levels["vivit"] == list(range(32))
    for name in ("languagebind", "dinov2", "siglip"):
        assert levels[name] == list(range(0, 32, 2))
        assert levels[name] == levels["vivit"][::2]  # frame i beside the first of tubelet i


def test_a_single_frame_stays_a_single_frame():
    """A still is encoded once by the encoders of single frames, so nobody repeats it here."""
    for name in ("languagebind", "dinov2", "vivit", "siglip"):
        assert preprocess(noise(20, 30), ENCODERS[name]).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(("name", "count"), [("vivit", 16), ("dinov2", 24), ("siglip", 8)])
def test_a_number_of_frames_that_is_no_multiple_is_an_error(name, count):
    with pytest.raises(DataError) as caught:
        preprocess(noise(20, 30, count), ENCODERS[name])
    assert f"{name} wants {ENCODERS[name].num_frames} frames, got {count}" in str(caught.value)
    assert "Fix: " in str(caught.value)


# ------------------------------------------------------------------------------------------ prompts


def talk(*turns: str) -> list[dict[str, str]]:
    """talk("Q", "A") -> [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]"""
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(turns)]


def test_the_loss_is_on_answers_and_their_ends_only(llama2_tokenizer):
    """By example, with LLaMA-2's own pieces; - is a position without loss."""
    conversation = talk("<video>\nHi", "Yes", "Why?", "No.")
    ids, labels = tokenize(render_prompt(conversation, TEMPLATES["base"]), llama2_tokenizer)
    piece = llama2_tokenizer.pieces.id_to_piece
    shown = ["-" if label == IGNORE else piece(label) for label in labels]
    # fmt: off
    assert [piece(i) for i in ids] == [
        "<s>", "▁In", ":", "▁Hi", "<0x0A>", "Out", ":", "▁Yes", "</s>",
        "▁In", ":", "▁Why", "?", "<0x0A>", "Out", ":", "▁No", ".", "</s>",
    ]
    assert shown == [
        "-", "-", "-", "-", "-", "-", "-", "▁Yes", "</s>",
        "-", "-", "-", "-", "-", "-", "-", "▁No", ".", "</s>",
    ]
    # fmt: on


def test_llamas_special_ids_are_what_the_weights_expect(llama2_tokenizer):
    assert (llama2_tokenizer.bos_id, llama2_tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_asked_is_an_exact_prefix_of_what_was_trained(llama2_tokenizer, template):
    """One renderer for both: at every turn, the ids of asking begin the ids of training."""
    conversation = talk(
        "<image>\nWhat is it? ", " A cat.\n", "  Sure?", "Yes, sure: 100 %", "OK", "So"
    )
    turns = render_prompt(conversation, TEMPLATES[template])
    trained, labels = tokenize(turns, llama2_tokenizer)
    for number in (1, 3, 5):
        asked_turns = render_prompt(conversation[:number], TEMPLATES[template])
        asked, no_labels = tokenize(asked_turns, llama2_tokenizer)
        assert trained[: len(asked)] == asked
        assert labels[len(asked)] == trained[len(asked)] != IGNORE  # and there the answer begins
        assert labels[: len(asked)] == no_labels
        assert no_labels.count(2) == number // 2  # the ends of the answers given so far


@pytest.mark.parametrize("template", TEMPLATES)
def test_there_is_one_beginning_and_an_end_after_each_answer(llama2_tokenizer, template):
    turns = render_prompt(talk("A?", "B", "C?", "D", "E?", "F"), TEMPLATES[template])
    ids, labels = tokenize(turns, llama2_tokenizer)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert ids.count(2) == labels.count(2) == 3
    assert ids[-1] == labels[-1] == 2


def test_the_base_template_is_in_and_out():
    assert render_prompt(talk("What?", "A cat"), TEMPLATES["base"]) == [
        ("In: What?\nOut:", False),
        ("A cat", True),
    ]


def test_the_vicuna_template_has_its_system_text_once():
    turns = render_prompt(talk("What?", "A cat", "Sure?", "Yes"), TEMPLATES["vicuna"])
    assert turns == [
        (
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. "
            "USER: What? ASSISTANT:",
            False,
        ),
        ("A cat", True),
        ("USER: Sure? ASSISTANT:", False),
        ("Yes", True),
    ]


def test_the_llama2_chat_template_puts_its_system_text_inside_the_first_question():
    turns = render_prompt(talk("What?", "A cat", "Sure?", "Yes"), TEMPLATES["llama2_chat"])
    assert turns == [
        (
            "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to "
            "understand the visual content that the user provides, and assist the user with a "
            "variety of tasks using natural language.\n<</SYS>>\n\nWhat? [/INST]",
            False,
        ),
        ("A cat", True),
        ("[INST] Sure? [/INST]", False),
        ("Yes", True),
    ]


def test_a_caption_follows_the_picture_without_a_prompt(llama2_tokenizer):
    """Stage 1: [BOS] visual caption </s>."""
    turns = render_prompt(talk("<image>\nDescribe this.", "A cat"), TEMPLATES["caption"])
    ids, labels = tokenize(turns, llama2_tokenizer)
    caption = [*llama2_tokenizer.encode("A cat"), 2]
    assert ids == [1, *caption]
    assert labels == [IGNORE, *caption]


@pytest.mark.parametrize(
    "text",
    ["<video>\nWhat?", "<image>\nWhat?", "What?\n<video>", " <image> <video> What? ", "What?"],
)
def test_placeholders_leave_no_trace(text):
    """Videos stand in front of the text as embeddings, never as the literal <video> (K4)."""
    (turn,) = render_prompt(talk(text), TEMPLATES["base"])
    assert turn == ("In: What?\nOut:", False)


def test_removing_a_placeholder_glues_no_words_together():
    (turn,) = render_prompt(talk("Look at <video> closely."), TEMPLATES["base"])
    assert turn[0].split() == ["In:", "Look", "at", "closely.", "Out:"]


def test_a_question_with_braces_is_left_alone():
    """Templates are filled in by replacement, so that {x} of a question is text and no field."""
    (turn,) = render_prompt(talk("What is {x} or {question}?"), TEMPLATES["base"])
    assert turn[0] == "In: What is {x} or {question}?\nOut:"


@pytest.mark.parametrize(
    "roles", [[], ["gpt"], ["human", "human"], ["gpt", "human"], ["human", "gpt", "gpt"], ["user"]]
)
def test_turns_that_do_not_alternate_are_an_error(roles):
    with pytest.raises(DataError) as caught:
        render_prompt([{"from": role, "value": "x"} for role in roles], TEMPLATES["base"])
    assert str(roles) in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_the_multiple_choice_prompt_is_the_released_one():
    """With the four blanks before the first option only, as it was released."""
    assert mcq_prompt("What is it?", ["a cat", "a dog", "a fish"]) == (
        "What is it? Select the correct answer from the following options. Write your answer as "
        "only one of A, B, C and nothing else.\n\n    A. a cat\nB. a dog\nC. a fish"
    )


# ----------------------------------------------------------------------------------------- datasets

SMALL = [ENCODERS[f"miniature-{name}"] for name in ("languagebind", "dinov2", "vivit", "siglip")]


@pytest.fixture(scope="session")
def mixed_folder(tmp_path_factory, clip) -> Path:
    """A dataset of a video, a text, an image and a video row, in one folder."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    Image.fromarray(noise(20, 30)[0].permute(1, 2, 0).numpy()).save(folder / "still.png")
    rows = [
        {
            "id": "v",
            "video": "clip.mp4",
            "conversations": talk("<video>\nwhat moves", "red square"),
        },
        {"id": "t", "conversations": talk("left or right", "left")},
        {
            "id": "i",
            "image": "still.png",
            "conversations": talk("<image>\nwhat", "the blue circle"),
        },
        {"id": "w", "video": "clip.mp4", "conversations": talk("the", "red", "left", "right")},
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def mixed(mixed_folder, tiny_tokenizer) -> ConversationDataset:
    return ConversationDataset(mixed_folder / "rows.json", tiny_tokenizer, TEMPLATES["base"], SMALL)


def test_text_image_and_video_rows_stand_in_one_batch(mixed):
    """Rows 0, 2 and 3 have a picture; row 1 is text alone and costs no pixels."""
    batch = collate([mixed[i] for i in range(4)])
    assert mixed.modalities == ["video", "text", "image", "video"]
    assert batch.visual_rows == [0, 2, 3]
    for config in SMALL:
        assert batch.pixels[config.name].shape == (3, config.num_frames, 3, 32, 32)
    assert batch.num_labels == sum(int((mixed[i].labels != IGNORE).sum()) for i in range(4))


def test_a_video_row_holds_what_each_encoder_wants_of_the_clip(mixed, clip):
    example = mixed[0]
    frames = load_video(clip, max(config.num_frames for config in SMALL))
    for config in SMALL:
        assert torch.equal(example.pixels[config.name], preprocess(frames, config))


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
    """Lengths say what is real: up to them the ids and labels of the row, behind them no loss."""
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


def test_features_and_pixels_do_not_mix():
    """A half-filled feature cache is said, not worked around."""
    ids = torch.tensor([1, 5])
    cached = Example(ids, ids, pooled={"x": torch.zeros(1)})
    with pytest.raises(DataError, match="cache"):
        collate([cached, Example(ids, ids, pixels={"x": torch.zeros(1)})])


def test_a_batch_moves_whole(mixed):
    batch = collate([mixed[0], mixed[1]]).to("meta")
    tensors = [batch.input_ids, batch.labelled, *batch.pixels.values()]
    assert all(t.device.type == "meta" for t in tensors)


def test_a_long_conversation_is_cut(mixed_folder, tiny_tokenizer):
    long = ConversationDataset(
        mixed_folder / "rows.json", tiny_tokenizer, TEMPLATES["base"], SMALL, max_length=5
    )
    assert long[1].input_ids.shape == long[1].labels.shape == (5,)


def test_workers_give_what_the_dataset_gives(mixed):
    (batch,) = DataLoader(mixed, batch_size=4, collate_fn=collate, num_workers=1)
    expected = collate([mixed[i] for i in range(4)])
    assert torch.equal(batch.input_ids, expected.input_ids)
    for config in SMALL:
        assert torch.equal(batch.pixels[config.name], expected.pixels[config.name])


def dataset_of(folder: Path, tokenizer: Tokenizer, content: str, **options) -> ConversationDataset:
    (folder / "rows.json").write_text(content)
    return ConversationDataset(folder / "rows.json", tokenizer, TEMPLATES["base"], SMALL, **options)


@pytest.mark.parametrize("content", ["", "[{", "{'id': 1}"])
def test_malformed_json_names_the_file(tmp_path, tiny_tokenizer, content):
    with pytest.raises(DataError) as caught:
        dataset_of(tmp_path, tiny_tokenizer, content)
    assert str(tmp_path / "rows.json") in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_a_missing_dataset_names_the_file(tmp_path, tiny_tokenizer):
    with pytest.raises(DataError, match="absent"):
        ConversationDataset(tmp_path / "absent.json", tiny_tokenizer, TEMPLATES["base"], SMALL)


def test_wrong_roles_name_the_file_and_the_row(tmp_path, tiny_tokenizer):
    rows = [{"id": "bad-7", "conversations": [{"from": "gpt", "value": "red"}]}]
    with pytest.raises(DataError) as caught:
        dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows))[0]
    for part in (str(tmp_path / "rows.json"), "row 0", "bad-7", "['gpt']", "Why: ", "Fix: "):
        assert part in str(caught.value)


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
    "a video without a name": {"id": "bad-8", "video": None, "conversations": talk("a", "b")},
    "a video with a number for a name": {"video": 7, "conversations": talk("a", "b")},
    "two videos": {"video": ["clip.mp4", "b.mp4"], "conversations": talk("a", "b")},
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_row_fails_when_it_is_read_and_no_sooner(tmp_path, tiny_tokenizer, kind):
    """The sampler needs its length and modality before; the error names the file or the row."""
    row = MALFORMED[kind]
    data = dataset_of(tmp_path, tiny_tokenizer, json.dumps([row]))
    visual = isinstance(row, dict) and "video" in row
    assert data.modalities == ["video" if visual else "text"]
    assert len(data.lengths) == 1
    assert [*GroupedBatchSampler(data, 1, 1)] == [[0]]
    with pytest.raises(DataError) as caught:
        data[0]
    what, why, fix = caught.value.args
    assert str(tmp_path) in what
    assert visual or "row 0" in what
    assert why
    assert fix


@pytest.mark.parametrize("content", ['{"id": 1}', "7", "null", '"rows"'])
def test_a_file_that_holds_no_list_is_an_error_at_once(tmp_path, tiny_tokenizer, content):
    with pytest.raises(DataError, match="no list") as caught:
        dataset_of(tmp_path, tiny_tokenizer, content)
    assert str(tmp_path / "rows.json") in str(caught.value)


@pytest.mark.parametrize("with_cache", [False, True])
def test_a_missing_video_of_a_row_is_a_video_error(tmp_path, tiny_tokenizer, with_cache):
    """A bad example has one class, which the loop counts: with a feature cache as without."""
    rows = [{"id": 1, "video": "gone.mp4", "conversations": talk("left", "right")}]
    cache = FeatureCache(tmp_path / "cache", {c.name: c.name for c in SMALL})
    data = dataset_of(
        tmp_path, tiny_tokenizer, json.dumps(rows), cache=cache if with_cache else None
    )
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        data[0]


# ---------------------------------------------------------------------------------------- bad rows


@pytest.fixture
def damaged(tmp_path, clip) -> Path:
    """Rows 0, 3, 6 ... 27 are videos, of which 3, 6 and 9 cannot be used; the others are text."""
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    _cut_in_half(tmp_path)
    rows = []
    for number in range(30):
        row = {"id": f"id-{number}", "conversations": talk(f"what {number}", "left")}
        if number % 3 == 0:
            row["video"] = "clip.mp4"
        rows.append(row)
    rows[3]["video"] = "half.mp4"
    rows[6]["video"] = "gone.mp4"
    rows[9]["conversations"] = [{"from": "gpt", "value": "left"}]
    (tmp_path / "stage2.json").write_text(json.dumps(rows))
    return tmp_path / "stage2.json"


def load(file: Path, tokenizer: Tokenizer) -> ConversationDataset:
    return ConversationDataset(file, tokenizer, TEMPLATES["base"], SMALL)


def test_a_bad_row_is_replaced_by_one_of_its_modality_and_written_down(damaged, tiny_tokenizer):
    """FIX F4: which row, whose, which file and why; the one in its place is a video that works."""
    data = load(damaged, tiny_tokenizer)
    reasons = {3: "half.mp4: has no frames, or incomplete", 6: "gone.mp4: no such video", 9: "gpt"}
    good = {tuple(data.read(i).input_ids.tolist()): i for i in range(0, 30, 3) if i not in reasons}
    for row, reason in reasons.items():
        example = data[row]
        assert example.pixels.keys() == {config.name for config in SMALL}
        assert tuple(example.input_ids.tolist()) in good
        first = example.bad[0]
        file = {3: "half.mp4", 6: "gone.mp4", 9: "clip.mp4"}[row]
        assert (first["row"], first["id"]) == (row, f"id-{row}")
        assert first["file"] == str(damaged.parent / file)
        assert reason in first["reason"]
        assert {failure["row"] for failure in example.bad} <= set(reasons)
    assert json.loads(json.dumps(first)) == first  # the training loop writes it to a file


def test_a_good_row_is_itself_and_nothing_is_written_down(damaged, tiny_tokenizer):
    data = load(damaged, tiny_tokenizer)
    for row in (0, 1, 12):
        assert data[row].bad == []
        assert torch.equal(data[row].input_ids, data.read(row).input_ids)


def test_the_row_in_place_of_a_bad_one_follows_from_its_number_alone(damaged, tiny_tokenizer):
    """A resumed run sees the rows of the straight one, whatever was drawn in between."""
    first, second = load(damaged, tiny_tokenizer), load(damaged, tiny_tokenizer)
    expected = [first[row] for row in (3, 6, 9)]
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    state = random.getstate(), torch.get_rng_state()
    for row, example in reversed(list(zip((3, 6, 9), expected, strict=True))):
        again = second[np.int64(row)]
        assert torch.equal(again.input_ids, example.input_ids)
        assert again.bad == example.bad
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_bad_rows_do_not_all_fall_back_on_one(tmp_path, tiny_tokenizer):
    """Neighbours often show the same broken clip, so the next row would be a poor choice."""
    rows = [{"conversations": talk(f"what {number}", "left")} for number in range(60)]
    rows[:20] = [{"id": number} for number in range(20)]
    data = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows))
    chosen = {tuple(data[number].input_ids.tolist()) for number in range(20)}
    assert len(chosen) > 8


@pytest.mark.parametrize(("count", "tried"), [(30, 8), (8, 8), (3, 3), (1, 1)])
def test_where_every_row_is_bad_the_first_error_comes_out_after_eight_tries(
    tmp_path, tiny_tokenizer, monkeypatch, count, tried
):
    """Bounded, unlike the released code, and no row is tried twice; text rows are not taken."""
    rows = [
        {"id": i, "video": f"gone_{i}.mp4", "conversations": talk("a", "b")} for i in range(count)
    ]
    rows.append({"id": "text", "conversations": talk("left", "right")})
    data, seen = dataset_of(tmp_path, tiny_tokenizer, json.dumps(rows)), []
    read = data.read

    def read_and_note(index: int) -> Example:
        seen.append(index)
        return read(index)

    monkeypatch.setattr(data, "read", read_and_note)
    with pytest.raises(VideoError, match=r"gone_0\.mp4"):
        data[0]
    assert seen[0] == 0
    assert len(seen) == len(set(seen)) == tried
    assert count not in seen


def test_a_batch_gathers_what_was_written_down(damaged, tiny_tokenizer):
    """Through a worker process, and on its way to another device it stays a list of text."""
    data = load(damaged, tiny_tokenizer)
    rows = [0, 3, 1, 6]
    (batch,) = DataLoader(data, batch_sampler=[rows], collate_fn=collate, num_workers=1)
    assert len(batch.input_ids) == 4
    assert batch.visual_rows == [0, 1, 3]
    assert batch.bad == data[3].bad + data[6].bad
    assert batch.to("meta").bad == batch.bad
    assert collate([data[0]]).bad == []


def test_an_index_beyond_the_end_is_no_bad_row(mixed):
    """Python's own protocol for going through a sequence."""
    assert len(list(mixed)) == 4


@pytest.mark.parametrize("kind", ["a bomb", "a broken chunk"])
def test_an_image_that_pillow_refuses_in_its_own_way_is_a_video_error(tmp_path, kind):
    """For a size that it fears and for some damage Pillow raises what is no OSError."""
    path = tmp_path / "still.png"
    Image.new("RGB", (8, 6)).save(path)
    content = bytearray(path.read_bytes())
    if kind == "a bomb":
        content[16:24] = (60000).to_bytes(4, "big") * 2  # width and height of the header
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    else:
        content[8:12] = (3).to_bytes(4, "big")  # the length of the header
        content[19:23] = zlib.crc32(content[12:19]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(VideoError, match="no readable image"):
        load_video(path, 1)


def test_a_title_in_another_encoding_spoils_no_clip(tmp_path, clip):
    """The title of an old AVI is Latin-1; PyAV refuses the whole file unless told otherwise."""
    path = write_video(tmp_path / "old.avi", numbered_frames(10), codec="mpeg4")
    content = path.read_bytes()
    where = content.index(b"Lavf")
    path.write_bytes(content[:where] + b"\xe9\xff" + content[where + 2 :])
    assert load_video(path, 4).shape == (4, 3, *SIZE)


def test_load_pixels_cuts_a_folder_of_images_by_its_frame_rate(tmp_path):
    """VLEP: from second 1 on, at 3 frames per second, is from frame 3 on."""
    folder = write_images(tmp_path / "frames", [f"{n}.png" for n in range(12)])
    pixels = load_pixels(folder, SMALL, start=1, end=3, fps=3)
    frames = load_video(folder, max(c.num_frames for c in SMALL), start=1, end=3, fps=3)
    for config in SMALL:
        assert torch.equal(pixels[config.name], preprocess(frames, config))


# ------------------------------------------------------------------------------------ feature cache


def test_features_come_back_as_they_were_stored(tmp_path, clip):
    """In bfloat16: half the disk, and what the model runs in."""
    cache = FeatureCache(tmp_path, {"a": "print-a", "b": "print-b"})
    assert cache.get(clip) is None
    features = {"a": torch.randn(4, 2, 2, 8), "b": torch.randn(4, 2, 2, 6)}
    cache.put(clip, features)
    found = cache.get(clip)
    assert found.keys() == features.keys()
    for name in features:
        assert torch.equal(found[name], features[name].bfloat16())
    assert not list(tmp_path.rglob("*.partial"))


def test_copies_of_an_encoder_share_what_it_saw(tmp_path, clip):
    """The control with four of one encoder costs no more than that one."""
    cache = FeatureCache(tmp_path, {"a": "print-a", "b": "print-b"})
    cache.put(clip, {"a": torch.randn(4, 2, 2, 8), "b": torch.randn(4, 2, 2, 6)})
    copies = FeatureCache(tmp_path, {"b-1": "print-b", "b-2": "print-b"}).get(clip)
    assert torch.equal(copies["b-1"], cache.get(clip)["b"])
    assert torch.equal(copies["b-2"], copies["b-1"])


def test_other_bytes_or_other_weights_are_not_found(tmp_path, clip):
    """The name of an entry is a hash of all that decides it: a stale one cannot be read."""
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
    """Then no video is decoded for that row; text rows have nothing to look up."""
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


# ------------------------------------------------------------------------------------------ batches


class Rows:
    """What the sampler knows of a dataset: how long each row is and what it shows."""

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


def test_batches_follow_from_seed_and_epoch_alone():
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
    """103 rows in batches of 8: all of them, and a last batch filled up with at most 7 repeats."""
    seen = [i for batch in GroupedBatchSampler(Rows(), 8, 8, epoch=epoch) for i in batch]
    assert set(seen) == set(range(103))
    assert len(seen) == 104


def test_fewer_rows_than_a_batch_fill_it():
    seen = [i for batch in GroupedBatchSampler(Rows(1, 1, 1), 8, 8) for i in batch]
    assert len(seen) == 8
    assert set(seen) == {0, 1, 2}


def test_a_batch_has_one_modality_except_for_leftovers():
    """45 images, 21 texts, 37 videos by 8: 5 + 2 + 4 whole batches; the 15 left make 2 mixed."""
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
    """A run moved from one GPU to eight, or to smaller micro-batches, is the same run."""
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


def test_rows_of_like_length_stand_together():
    """Padding, counted: positions of batches padded to their longest row, less the real ones."""

    def padding(batches: list[list[int]]) -> int:
        lengths = [[rows.lengths[i] for i in batch] for batch in batches]
        return sum(max(b) * len(b) - sum(b) for b in lengths)

    rows = Rows(image=160, text=80, video=160)
    shuffled = list(range(400))
    random.Random(1).shuffle(shuffled)
    at_random = [shuffled[i : i + 8] for i in range(0, 400, 8)]
    assert padding(GroupedBatchSampler(rows, 8, 8).global_batches()) < 0.3 * padding(at_random)


# ------------------------------------------------------------------------------------- command line


def look_at(*arguments: object) -> subprocess.CompletedProcess:
    """python data.py ARGUMENTS, as a user does."""
    script = Path(__file__).parent.parent / "data.py"
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_check_lists_every_bad_row_of_every_stage_and_fails(damaged):
    """Each with its id, file and reason; a video that is cut off, one that is gone, wrong roles."""
    folder = damaged.parent
    rows = [{"id": "c", "video": "clip.mp4", "conversations": talk("a", "b")}, *MALFORMED.values()]
    (folder / "stage1.json").write_text(json.dumps(rows))
    (folder / "notes.json").write_text("[7]")  # is no stage
    done = look_at(folder, "--check")
    assert done.returncode == 1, done.stderr
    captions, instructions = done.stdout.split(f"{len(MALFORMED)} of them cannot be used\n")
    bad = re.findall(r"^row (\d+) ", captions, re.MULTILINE)
    assert bad == [str(row) for row in range(1, 1 + len(MALFORMED))]
    found = re.findall(r"^row (\d+)  id (\S+)  file (\S+)\n(.*)$", instructions, re.MULTILINE)
    assert [(row, name, file) for row, name, file, _ in found] == [
        ("3", "id-3", str(folder / "half.mp4")),
        ("6", "id-6", str(folder / "gone.mp4")),
        ("9", "id-9", str(folder / "clip.mp4")),
    ]
    for (*_, reason), expected in zip(found, ["incomplete", "no such", "['gpt']"], strict=True):
        assert expected in reason
    assert instructions.endswith(f"{damaged}: 30 rows, 3 of them cannot be used\n")
    assert "check stage2.json" in done.stderr and "30/30" in done.stderr  # the bar


def test_show_prints_every_token_with_its_label(mixed_folder, llama2_tokenizer, tmp_path):
    """What a row shows, its text, and - where no loss is taken; captions have no prompt."""
    rows = json.loads((mixed_folder / "rows.json").read_text())
    for stage in ("stage1.json", "stage2.json"):
        (tmp_path / stage).write_text(json.dumps(rows[:2]))
    done = look_at(tmp_path, "--show", 1, "--tokenizer", llama2_tokenizer.path)
    assert done.returncode == 0, done.stderr
    caption, instruction = (part.splitlines() for part in done.stdout.strip().split("\n\n"))
    assert (
        instruction[0] == f"{tmp_path / 'stage2.json'}, row 0  id v  video {tmp_path / 'clip.mp4'}"
    )
    assert instruction[1].split(maxsplit=1) == ["prompt", repr("In: what moves\nOut:")]
    assert instruction[2].split(maxsplit=1) == ["answer", repr("red square")]
    turns = render_prompt(rows[0]["conversations"], TEMPLATES["base"])
    expected = [
        [str(i), llama2_tokenizer.pieces.id_to_piece(i), "-" if label == IGNORE else str(label)]
        for i, label in zip(*tokenize(turns, llama2_tokenizer), strict=True)
    ]
    assert [line.split() for line in instruction[3:]] == [["id", "piece", "label"], *expected]
    labels = [line.split()[-1] for line in caption[4:]]
    assert labels == ["-", *(str(i) for i in [*llama2_tokenizer.encode("red square"), 2])]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--check"], "Cannot read"),
        (["--show", "1"], "Found no tokenizer.model at tokenizer.model"),
    ],
)
def test_a_look_at_what_is_not_there_is_explained(tmp_path, arguments, wanted):
    done = look_at(tmp_path / "nowhere", *arguments)
    assert done.returncode != 0 and wanted in done.stderr and "Traceback" not in done.stderr
