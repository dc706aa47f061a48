"""Load evenly sampled frames of a video, a GIF, a picture or a folder of pictures.

PyAV decodes videos (support/films.py), and Pillow decodes pictures (support/pictures.py). A long
video costs little more than a short one: only the frames that are sampled, and those that they
depend on, are decoded, unless the file is one of those that say wrong things about themselves.
docs/files.md lists what is read, how, and what is rejected.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.errors import UserError, VideoError
from support.films import Keep, evenly_spaced, load_film, places_of
from support.pictures import (
    DAMAGED,
    IMAGE_SUFFIXES,
    frame_numbers,
    frame_times,
    open_picture,
    to_rgb,
)

VIDEO_SUFFIXES = {
    ".264", ".265", ".3g2", ".3gp", ".apng", ".asf", ".av1", ".avi", ".divx", ".dv", ".f4v",
    ".flv", ".gif", ".h264", ".h265", ".hevc", ".ivf", ".m1v", ".m2ts", ".m2v", ".m4v", ".mjpeg",
    ".mjpg", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mpv", ".mts", ".mxf", ".nut",
    ".obu", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".xvid", ".y4m",
}  # fmt: skip
EPSILON = 1e-3  # seconds; files round the times of frames to this


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
    if end is not None:
        last = min(last, end * fps - 1)
    return np.linspace(first, max(first, last), num_frames).astype(int).tolist()


def load_video(
    path: str | Path, num_frames: int, start=None, end=None, end_frame=None, fps=None
) -> Tensor:
    """Load `num_frames` evenly sampled RGB frames as uint8 (num_frames, 3, H, W).

    path: any video that PyAV decodes (mp4, avi, mkv, webm, gif ...), an animated WebP, PNG or AVIF,
    a folder of numbered pictures, or a still picture, whose one frame is repeated.
    start, end (seconds), end_frame: the part to sample, see sample_indices. If frames are not
    evenly spaced in time, start and end choose by the time of each frame.
    fps: the frame rate of a folder; a video file states its own.
    Warns if damaged parts were concealed. Raises VideoError if the file is missing or no video, if
    a frame to load is lost, or if the part is empty.
    """
    frames = load_frames(path, num_frames, lambda frame, _: frame, start, end, end_frame, fps)
    clip = np.empty((len(frames), *frames[0].shape), np.uint8)
    for number in range(len(frames)):
        clip[number] = frames[number]
        frames[number] = None  # so that each frame is in memory only once
    video = torch.from_numpy(clip).permute(0, 3, 1, 2)
    return video.expand(num_frames, -1, -1, -1)  # repeats the one frame of a still picture


def load_frames(
    path: str | Path, num_frames: int, keep: Keep, start=None, end=None, end_frame=None, fps=None
) -> list:
    """Load the frames that load_video would, and return what `keep` makes of each, in order.

    keep: takes a frame (H, W, 3) and the list of its places in the clip. It is called as soon as
    the frame is decoded, so large frames can be scaled down one by one. A still picture has one
    frame, which stands in all places. Raises as load_video does.
    """
    path = Path(path)
    span = Span(path, num_frames, start, end, end_frame)
    try:
        return _load(path, span, fps, keep)
    except UserError:
        raise
    # WHY: damaged files make decoders raise errors of many classes, MemoryError included.
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise VideoError(f"{path}: cannot be decoded: {reason}.", *DAMAGED) from error


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

    def pick(self, total: int, fps: float | None, times: list[float] | None = None) -> list[int]:
        """Return the numbers of the frames to load from a video of `total` frames.

        times: when each is shown, in seconds after the first one, if that is known.
        """
        start, end = self.start, self.end
        by_seconds = start is not None or end is not None
        if by_seconds and times and not evenly_spaced(times, fps):
            # From the frame on screen at `start` to the last one that appears before `end`. One
            # frame a second, so that the numbers of frames are also their times.
            if start is not None:
                start = bisect_right(times, start + EPSILON) - 1
            if end is not None:
                end = bisect_left(times, end - EPSILON)
            return sample_indices(total, self.num_frames, 1, start, end, self.end_frame)
        if by_seconds and not fps:
            what = f"{self.path}: its frame rate is unknown."
            fix = "pass fps, for example 3 for VLEP."
            raise VideoError(what, "start and end in seconds need a frame rate.", fix)
        return sample_indices(total, self.num_frames, fps, start, end, self.end_frame)


def _load(path: Path, span: Span, fps: float | None, keep: Keep) -> list:
    """Load the frames of anything; only one if it is a still picture."""
    if path.is_dir():
        return _load_folder(path, span, fps, keep)
    _check_file(path)
    picture = open_picture(path)
    if picture is None:
        return load_film(path, span.pick, keep)
    with picture:
        numbers = frame_numbers(picture)
        if len(numbers) == 1:
            frame = to_rgb(path, picture, numbers[0])
            picture.close()  # frees its memory before the frame is scaled
            return [keep(frame, list(range(span.num_frames)))]
        indices = span.pick(len(numbers), None, frame_times(path))
        frames = {}
        for index, places in places_of(indices).items():
            frames[index] = keep(to_rgb(path, picture, numbers[index]), places)
        return [frames[index] for index in indices]


def is_still(path: str | Path) -> bool:
    """Return whether a path is a picture of one frame, which load_video repeats.

    Decided by content: an animated WebP or PNG is a video. Raises VideoError as load_video does.
    """
    path = Path(path)
    if os.path.isdir(path):
        return False
    _check_file(path)
    picture = open_picture(path)
    if picture is None:
        return False
    with picture:
        return len(frame_numbers(picture)) == 1


def _check_file(path: Path) -> None:
    """Raise VideoError unless the path is a file. Reading a pipe would wait for ever."""
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, for example
        raise VideoError(f"{path}: cannot be looked up.", f"{error}.", "check the path.") from error
    if not exists:
        raise VideoError(f"{path}: no such video.", "no file has this name.", "check the path.")
    if not path.is_file():
        why = "it is a pipe or a device."
        raise VideoError(f"{path}: is not a file.", why, "save the video as a file.")


# ----------------------------------------------------------------------------------------- folders


def _load_folder(path: Path, span: Span, fps: float | None, keep: Keep) -> list:
    """Load frames of a folder of pictures, in natural order."""
    files = files_in_order(path, IMAGE_SUFFIXES)
    videos = files_in_order(path, VIDEO_SUFFIXES)
    if not files:
        why = "a folder stands for a video if it holds numbered images."
        raise VideoError(f"{path}: no images.", why, "check the path.")
    if videos:
        what = f"{path}: holds videos ({videos[0].name}) and pictures ({files[0].name})."
        fix = "name one of the videos, or move them elsewhere."
        raise VideoError(what, "a folder stands for a video if it holds only its frames.", fix)
    indices = span.pick(len(files), fps)
    frames = {}
    shapes = set()
    for index, places in places_of(indices).items():
        _check_file(files[index])
        frame = _load_still(files[index])
        shapes.add(frame.shape)
        if len(shapes) > 1:
            what = f"{path}: has frames of different sizes."
            raise VideoError(what, "frames of one video must match.", "resize them to one size.")
        frames[index] = keep(frame, places)
    return [frames[index] for index in indices]


def _load_still(file: Path) -> np.ndarray:
    """Load a picture of a folder as RGB (H, W, 3)."""
    picture = open_picture(file)
    if picture is None:
        raise VideoError(f"{file}: is a GIF.", "frames are still pictures.", "save it as PNG.")
    with picture:
        return to_rgb(file, picture, frame_numbers(picture)[0])


def files_in_order(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """List the files of a folder that have one of the suffixes, in natural order.

    Numbers in a name count as numbers: 2.jpg, 10.jpg; frame_0.25.jpg, frame_0.5.jpg, frame_10.jpg.
    Hidden files are left out: macOS, for example, writes a hidden ._2.jpg beside each 2.jpg.
    """
    files = []
    for file in folder.iterdir():
        if is_visible(file.name) and file.suffix.lower() in suffixes and not file.is_dir():
            files.append(file)
    return sorted(files, key=_natural_key)


def is_visible(name: str) -> bool:
    """Return whether a file or folder was put there by the user, and not by a program."""
    return not name.startswith(".") and name not in ("__MACOSX", "@eaDir")


def _natural_key(file: Path) -> tuple:
    """Split a name into text and numbers: img_2_0.25.jpg -> img_, 2, _, 0.25, "".

    In names such as 1.2.10.jpg, with more than one point between digits, each number is whole.
    """
    parts = re.split(r"((?<!\d)(?<!\d\.)\d+\.\d+(?!\.?\d)|\d+)", file.stem.casefold())
    for position in range(1, len(parts), 2):
        parts[position] = Decimal(parts[position])
    return parts, file.name
