"""Load evenly sampled frames of a video, a GIF, an image or a folder of images.

PyAV decodes videos and Pillow images. A long video costs little more than a short one: only the
frames that are sampled, and those that they depend on, are decoded.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from support.errors import VideoError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
DAMAGED = ("the file is damaged, cut off or not a video.", "download or convert it again.")


def sample_indices(total, num_frames, fps=None, start=None, end=None, end_frame=None) -> list[int]:
    """Spread the numbers of `num_frames` frames evenly over a clip, first and last included.

    total: frames of the video. fps: frames per second, needed with start or end. start, end:
    seconds (default: the whole video). end_frame: the last frame allowed (Perception Test).
    300 frames, 4 wanted -> [0, 99, 199, 299]. A clip with too few frames repeats some.
    """
    last = float(total - 1)
    first = 0.0
    if start is not None:
        first = min(max(0.0, start * fps), last)
    if end_frame is not None:
        last = min(last, end_frame)
    elif end is not None:
        last = min(last, end * fps - 1)
    return np.linspace(first, max(first, last), num_frames).astype(int).tolist()


def load_video(
    path: str | Path, num_frames: int, start=None, end=None, end_frame=None, fps=None
) -> Tensor:
    """Load `num_frames` evenly sampled RGB frames as uint8 (num_frames, 3, H, W).

    path: any video that PyAV decodes (mp4, avi, mkv, webm, gif ...), a folder of numbered images,
    or a still image, whose one frame is repeated. start, end (seconds), end_frame: the part to
    sample, see sample_indices. fps: the frame rate of a folder; a video file states its own.
    Raises VideoError if the file is missing or damaged, or the part is empty.
    """
    path = Path(path)
    span = Span(path, num_frames, start, end, end_frame)
    if path.is_dir():
        frames = _load_folder(path, span, fps)
    elif not path.is_file():
        raise VideoError(f"{path}: no such video.", "no file has this name.", "check the path.")
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        frames = [_load_image(path)]
    else:
        try:
            frames = _load_container(path, span)
        except av.FFmpegError as error:
            raise VideoError(f"{path}: cannot be decoded: {error.strerror}.", *DAMAGED) from error
    if len({frame.shape for frame in frames}) > 1:
        what = f"{path}: has frames of different sizes."
        raise VideoError(what, "frames of one video must match.", "resize them to one size.")
    video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return video.expand(num_frames, -1, -1, -1)  # repeats the one frame of a still image


@dataclass(frozen=True)
class Span:
    """The part of a video to sample, and how many frames of it. Times are in seconds."""

    path: Path
    num_frames: int
    start: float | None
    end: float | None
    end_frame: int | None

    def __post_init__(self):
        if self.start is not None and self.end is not None and self.end <= self.start:
            what = f"{self.path}: the clip from {self.start} s to {self.end} s is empty."
            raise VideoError(what, "it ends before it starts.", "swap or correct the times.")

    def pick(self, total: int, fps: float | None) -> list[int]:
        """Return the numbers of the frames to load from a video of `total` frames."""
        if not fps and (self.start is not None or self.end is not None):
            what = f"{self.path}: its frame rate is unknown."
            fix = "pass fps, for example 3 for VLEP."
            raise VideoError(what, "start and end in seconds need a frame rate.", fix)
        times = (self.start, self.end, self.end_frame)
        return sample_indices(total, self.num_frames, fps, *times)


# ------------------------------------------------------------------------------------- video files


def _load_container(path: Path, span: Span) -> list[np.ndarray]:
    """Load RGB frames (H, W, 3) of a video file: read all packets, decode as few as possible."""
    # metadata_errors: titles may be in any encoding.
    with av.open(str(path), metadata_errors="replace") as container:
        if not container.streams.video:
            raise VideoError(f"{path}: has no video stream.", *DAMAGED)
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        times, keyframes = _read_packets(path, container, stream)
        indices = span.pick(len(times), float(stream.average_rate or stream.guessed_rate or 0))
        # WHY: only these two formats seek by the time a frame is shown. Others (AVI, TS, FLV) seek
        # by the time it is decoded, which can lie behind the frame.
        seekable = not {"mov", "matroska"}.isdisjoint(container.format.name.split(","))
        if not seekable or None in times or len(set(times)) < len(times):
            decoded = _decode_all(container, stream, set(indices))
        else:
            in_order = sorted(times)  # packets come in decoding order, which differs with B-frames
            targets = {index: in_order[index] for index in indices}
            decoded = _decode_at(container, stream, targets, sorted(keyframes) or in_order[:1])
        for index in indices:
            if index not in decoded:
                raise VideoError(f"{path}: frame {index} cannot be decoded.", *DAMAGED)
        return [decoded[index] for index in indices]


def _read_packets(path: Path, container, stream) -> tuple[list, list]:
    """Return the time (in ticks) of every packet, one a frame, and the times of key frames.

    Keeps times only, since a packet would keep its compressed data in memory.
    """
    times = []
    keyframes = []
    corrupt = False
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            times.append(packet.pts)
            corrupt = corrupt or packet.is_corrupt
            if packet.is_keyframe:
                keyframes.append(packet.pts)
    if not times or corrupt:
        raise VideoError(f"{path}: has no frames, or incomplete ones.", *DAMAGED)
    return times, keyframes


def _decode_all(container, stream, wanted: set[int]) -> dict[int, np.ndarray]:
    """Decode from the beginning and count: number -> frame. For files without usable times."""
    container.seek(0)
    decoded = {}
    for number, frame in enumerate(container.decode(stream)):
        if number in wanted:
            decoded[number] = _to_rgb(frame)
    return decoded


def _decode_at(container, stream, times: dict[int, int], keyframes: list[int]) -> dict:
    """Decode the frames shown at given times: number -> frame.

    Decoding a frame starts at the last key frame before it. Jumps there if that skips frames.
    """
    decoded = {}
    position = None  # the time of the frame decoded last
    frames = iter(())
    for index, time in sorted(times.items()):
        keyframe = keyframes[max(0, bisect_right(keyframes, time) - 1)]
        if position is None or keyframe > position:
            container.seek(keyframe, stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            position = frame.pts
            if position == time:
                decoded[index] = _to_rgb(frame)
                break
    return decoded


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Convert to (H, W, 3), upright if the camera was turned. More threads would be slower."""
    return np.rot90(frame.to_ndarray(format="rgb24", threads=1), frame.rotation // 90)


# ------------------------------------------------------------------------------------------ images


def _load_image(path: Path) -> np.ndarray:
    """Load an image as RGB (H, W, 3)."""
    try:
        return np.array(Image.open(path).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: is no readable image: {error}.", *DAMAGED) from error


def _load_folder(path: Path, span: Span, fps: float | None) -> list[np.ndarray]:
    """Load RGB frames of a folder of numbered images; 2.jpg comes before 10.jpg."""
    files = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    files.sort(key=_numbers)
    if not files:
        why = "a folder stands for a video if it holds numbered images."
        raise VideoError(f"{path}: no images.", why, "check the path.")
    return [_load_image(files[index]) for index in span.pick(len(files), fps)]


def _numbers(file: Path) -> list[int]:
    """Return the numbers in a file name: img_2_10.jpg -> [2, 10]."""
    return [int(digits) for digits in re.findall(r"\d+", file.stem)]
