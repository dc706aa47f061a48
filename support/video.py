"""Frames of any file people have: a video, GIF, image or folder of images."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from support.errors import VideoError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


DAMAGED = ("the file is damaged, cut off or of another kind.", "download or convert it again.")


def sample_indices(total, num_frames, fps=None, start=None, end=None, end_frame=None) -> list[int]:
    """Numbers of `num_frames` frames spread evenly over a clip, first and last included.

    start, end: seconds, the whole clip by default. end_frame: the last frame allowed (Perception
    Test). 300 frames, 4 wanted -> [0, 99, 199, 299]. Repeats frames if there are too few.
    """
    last = float(total - 1)
    first = 0.0 if start is None else min(max(0.0, start * fps), last)
    if end_frame is not None:
        last = min(last, end_frame)
    elif end is not None:
        last = min(last, end * fps - 1)
    return np.linspace(first, max(first, last), num_frames).astype(int).tolist()


def load_video(
    path: str | Path, num_frames: int, start=None, end=None, end_frame=None, fps=None
) -> Tensor:
    """Evenly sampled RGB frames: uint8 (T, 3, H, W) with T = num_frames.

    path: anything PyAV decodes (mp4, avi, mkv, webm, gif ...), a folder of numbered images, or a
    still image, which is a video of identical frames. start, end, end_frame: see sample_indices.
    fps: frames per second, where the file does not say: in a folder. Raises VideoError.
    """
    path, seconds = Path(path), start is not None or end is not None
    if start is not None and end is not None and end <= start:
        what = f"{path}: the clip from {start} s to {end} s is empty."
        raise VideoError(what, "its end is not after its start.", "swap or correct the times.")

    def pick(total: int, rate: float) -> list[int]:
        if seconds and not rate:
            what = f"{path}: does not say its frame rate."
            raise VideoError(what, "times in seconds need one.", "pass fps, such as 3 for VLEP.")
        return sample_indices(total, num_frames, rate, start, end, end_frame)

    if path.is_dir():
        frames = _load_folder(path, pick, fps)
    elif not path.is_file():
        raise VideoError(f"{path}: no such video.", "nothing has that name.", "check the path.")
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        frames = [_load_image(path)]
    else:
        try:
            frames = _load_container(path, pick)
        except av.FFmpegError as error:
            raise VideoError(f"{path}: cannot be decoded: {error.strerror}.", *DAMAGED) from error
    if len({frame.shape for frame in frames}) > 1:
        what = f"{path}: has frames of different sizes."
        raise VideoError(what, "a video has frames of one size.", "resize them alike.")
    video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return video.expand(num_frames, -1, -1, -1)  # a still: one frame becomes all


def _load_container(path: Path, pick: Callable[[int, float], list[int]]) -> list[np.ndarray]:
    """RGB frames (H, W, 3) of a video file; reads all packets but decodes only what it must."""
    with av.open(str(path), metadata_errors="replace") as container:  # titles in any encoding
        if not container.streams.video:
            raise VideoError(f"{path}: has no video stream.", *DAMAGED)
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        packets = [
            (p.pts, p.is_keyframe, p.is_corrupt)  # not the packet: it holds its compressed data
            for p in container.demux(stream)
            if p.size and not p.is_discard
        ]
        if not packets or any(corrupt for _, _, corrupt in packets):
            raise VideoError(f"{path}: has no frames, or incomplete ones.", *DAMAGED)
        indices = pick(len(packets), float(stream.average_rate or stream.guessed_rate or 0))
        times, wanted = [pts for pts, _, _ in packets], set(indices)
        # WHY: only these two seek by the time a frame is shown; others (AVI, TS, FLV) by the time
        # it is decoded, which lands behind the frame where the two differ.
        seekable = {"mov", "matroska"} & set(container.format.name.split(","))
        if not seekable or None in times or len(set(times)) < len(times):
            container.seek(0)
            frames = enumerate(container.decode(stream))  # no usable times: count
            decoded = {i: _to_rgb(frame) for i, frame in frames if i in wanted}
        else:
            order = sorted(times)  # packets come in decoding order, frames are shown by time
            keyframes = sorted(pts for pts, is_key, _ in packets if is_key) or order[:1]
            decoded = _decode_at(container, stream, {i: order[i] for i in indices}, keyframes)
        if missing := wanted - set(decoded):
            raise VideoError(f"{path}: frame {min(missing)} cannot be decoded.", *DAMAGED)
        return [decoded[index] for index in indices]


def _decode_at(container, stream, times: dict[int, int], keyframes: list[int]) -> dict:
    """Frames by number, given their times; jumps to a key frame where that skips something."""
    decoded, position, frames = {}, None, iter(())
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
    """(H, W, 3), upright if the camera lay on its side. One thread: starting more costs more."""
    return np.rot90(frame.to_ndarray(format="rgb24", threads=1), frame.rotation // 90)


def _load_image(path: Path) -> np.ndarray:
    try:
        return np.array(Image.open(path).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path}: is no readable image: {error}.", *DAMAGED) from error


def _load_folder(path: Path, pick: Callable[[int, float], list[int]], fps) -> list[np.ndarray]:
    """RGB frames of a folder of numbered images: 2.jpg comes before 10.jpg."""
    files = [f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES]
    files.sort(key=lambda f: [int(n) for n in re.findall(r"\d+", f.stem)])
    if not files:
        raise VideoError(f"{path}: no images.", "a folder holds numbered ones.", "check the path.")
    return [_load_image(files[index]) for index in pick(len(files), fps)]
