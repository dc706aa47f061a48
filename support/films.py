"""Read video files with PyAV: find the film in the file, and decode only what is needed.

    _read_packets     one pass without decoding: how many frames, and when each is shown
    _decode_at        if the file can be trusted: jump to the key frame before each wanted frame
    _load_from_start  otherwise, or if that fails: decode the whole file and count what is shown

WHY two ways: the marks and times in a file are often wrong (clips that were cut without
re-encoding, every sample marked as a key frame, hidden frames, damage), and a frame decoded from
the wrong start is grey or belongs to another time. A jump counts only if the decoder really began
at a key frame and then showed every frame at the time that its packet announced.
"""

from __future__ import annotations

import os
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.frame import PictureType
from PIL import Image

from support.errors import VideoError
from support.pictures import DAMAGED, MAX_FILM_PIXELS, check_size, flatten

# Total frames, frames per second, the second at which each is shown or None -> numbers to load.
Pick = Callable[[int, float, list[float] | None], list[int]]
# A frame as RGB (H, W, 3), its places in the clip -> what is kept of it, such as a smaller one.
Keep = Callable[[np.ndarray, list[int]], object]

SMALL_FRAME = 128 * 128  # pixels

# WHY: a list of what may be opened. FFmpeg also reads playlists, which name other files, and would
# open addresses on the internet, screens and cameras.
CONTAINERS = (
    "mov,matroska,avi,gif,mpegts,mpeg,mpegvideo,m4v,flv,live_flv,asf,ogg,mxf,rm,dv,nut,"
    "yuv4mpegpipe,mjpeg,h264,hevc,ivf,obu,mp3,wav,flac,aac"
)
# WHY: only these two formats seek by the time a frame is shown. Others (AVI, TS, FLV) seek by the
# time it is decoded, which can lie behind the frame.
SEEKABLE = {"mov", "matroska"}
# In these codecs one packet is one frame. In others it may be half a frame, two or none.
ONE_FRAME_A_PACKET = {"h264", "hevc", "av1", "vp8", "vp9"}
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Streams that belong to a file without being its film: covers, thumbnails, tiles of a picture.
PREVIEWS = (
    Disposition.attached_pic
    | Disposition.timed_thumbnails
    | Disposition.non_diegetic
    | Disposition.dependent
)
DURATION_STATED = {"matroska", "flv"}  # in the header, which is there even if the end is not
MAX_STEP = 10  # seconds between two frames of a broadcast; more means that the clock was set anew


@dataclass
class Packets:
    """What the packets of a video stream say about its frames, before any is decoded."""

    fps: float  # on average; 0 if unknown
    tick: float  # the unit of times, in seconds
    has_times: bool  # AVI states only a frame rate, and PyAV makes times up
    broadcast: bool  # a transport stream: begins and ends anywhere, and its clock may jump
    times: list[int | None] = field(default_factory=list)  # of one frame a packet, in file order
    keyframes: list[int | None] = field(default_factory=list)  # the times of key frames
    damaged: int = 0
    missing: int = 0  # packets after the end of a file that was cut off
    trusted: bool = False  # each packet is a frame with a time of its own, and seeking works


@dataclass
class Decoded:
    """What a decoder shows of a whole file."""

    times: list[int | None] = field(default_factory=list)  # of all frames shown, in ticks
    frames: dict[int, object] = field(default_factory=dict)  # number -> what is kept, if wanted
    rejected: int = 0  # packets
    concealed: int = 0  # frames with damaged parts, which the decoder filled from others


class SeekError(Exception):
    """After a jump, the decoder did not show the frames that the packets announce."""


def places_of(indices: list[int]) -> dict[int, list[int]]:
    """The places of each frame in a clip: [0, 0, 3] -> {0: [0, 1], 3: [2]}."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    return places


class Loader:
    """Turn decoded frames into RGB, and keep what `keep` makes of them.

    WHY at once: 32 frames of 8K video take 3 GB.
    """

    def __init__(self, indices: list[int], keep: Keep):
        self.keep = keep
        self.size = None  # of the first frame; later ones are scaled to it
        self.places = places_of(indices)

    def load(self, number: int, frame: av.VideoFrame) -> object:
        """What is kept of frame `number`, one of the indices."""
        pixels = _to_rgb(frame, self.size)
        self.size = pixels.shape
        return self.keep(pixels, self.places[number])


def load_film(path: Path, pick: Pick, keep: Keep) -> list:
    """Load the frames of a video file that `pick` chooses: what `keep` makes of each.

    Warns if damaged packets were concealed. Raises VideoError if the file holds no film or if a
    frame to load is lost, and whatever PyAV raises for files that it cannot read.
    """
    with _open(path) as container:
        stream = _main_stream(path, container)
        packets = _read_packets(path, container, stream)
        if packets.trusted:
            in_order = sorted(packets.times)  # B-frames are stored after later frames
            indices = pick(len(in_order), packets.fps, _seconds(in_order, packets))
            try:
                loader = Loader(indices, keep)
                frames = _decode_at(container, stream, loader, in_order, packets.keyframes)
                return [frames[index] for index in indices]
            except (SeekError, av.FFmpegError):
                pass  # the marks are wrong, or a part is damaged
    return _load_from_start(path, pick, keep, packets)


# ------------------------------------------------------------------------------ what is in the file


def _open(path: Path) -> av.container.InputContainer:
    """Open a local video file, never a playlist or an address."""
    # WHY: without "file:", FFmpeg takes "a:b.mp4" for an address of protocol "a".
    name = f"file:{path.absolute()}"
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    lenient = {}
    if int(av.__version__.split(".")[0]) < 19:
        # Titles may be in any encoding. Later versions replace what they cannot decode anyway.
        lenient["metadata_errors"] = "replace"
    try:
        return av.open(name, options=options, **lenient)
    except av.ArgumentError as error:
        why = "its content has none of the formats that are read (docs/files.md)."
        raise VideoError(f"{path}: is not a video file.", why, "convert it to mp4.") from error


def _main_stream(path: Path, container) -> av.VideoStream:
    """Choose the film among the video streams, and prepare its decoder."""
    films = []
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & PREVIEWS:
            films.append(stream)
    if not films:
        why = "it has no video stream that can be decoded; a cover picture is not a video."
        raise VideoError(f"{path}: is not a video.", why, "check the file.")

    def rank(stream: av.VideoStream) -> tuple:
        """A stream of one frame is a thumbnail. Then comes the file's choice, then the largest."""
        default = bool(stream.disposition & Disposition.default)
        return stream.frames != 1, default, stream.width * stream.height

    film = max(films, key=rank)
    check_size(path, film.width, film.height, MAX_FILM_PIXELS)
    film.codec_context.options = {"max_pixels": str(MAX_FILM_PIXELS)}  # the size may change later
    # WHY: to start threads takes longer than to decode a clip of a few small frames.
    film.thread_type = "AUTO" if film.width * film.height > SMALL_FRAME else "NONE"
    # Each thread decodes a frame of its own. 0 would mean one for each core, however large.
    at_once = MAX_FILM_PIXELS // max(1, film.width * film.height)
    film.codec_context.thread_count = max(1, min(at_once, os.cpu_count() or 1, 16))
    return film


def _read_packets(path: Path, container, stream) -> Packets:
    """Read the whole file without decoding it. Keeps times only, since packets hold their data."""
    formats = set(container.format.name.split(","))
    codec = stream.codec_context.name
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    packets = Packets(fps, float(stream.time_base), "avi" not in formats, "mpegts" in formats)
    count = 0
    end = 0.0  # the second at which the last packet of any stream ends
    discarded = False
    corrupt = False
    for packet in _demux(container):
        if packet.pts is not None and packet.time_base:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if not packet.size or packet.stream.index != stream.index:
            continue
        count += 1
        corrupt = packet.is_corrupt
        packets.damaged += corrupt
        if packet.is_discard:  # decoded and not shown, in a clip that was cut without re-encoding
            discarded = True
        elif codec == "vp8" and not memoryview(packet)[0] & 0x10:
            pass  # show_frame is 0 (RFC 6386, section 9.1): others are predicted from this frame
        else:
            packets.times.append(packet.pts)
            if packet.is_keyframe:
                packets.keyframes.append(packet.pts)
    if not packets.times:
        raise VideoError(f"{path}: has no frames, or incomplete ones.", *DAMAGED)
    if "mov" in formats:  # the index comes with the header and lists what should follow
        packets.missing = len(stream.index_entries) - count
    elif corrupt and not packets.broadcast:  # the last packet is incomplete
        packets.missing = max(1, stream.frames - count)
    elif not formats.isdisjoint(DURATION_STATED) and container.duration:
        packets.missing = _missing_at_the_end(packets, container.duration / av.time_base - end)
    times_differ = None not in packets.times and len(set(packets.times)) == len(packets.times)
    whole = not (discarded or packets.damaged or packets.missing)
    known = codec in ONE_FRAME_A_PACKET and not SEEKABLE.isdisjoint(formats)
    packets.trusted = times_differ and whole and known and not _has_alpha_layer(stream)
    return packets


def _has_alpha_layer(stream) -> bool:
    """Return whether WebM keeps the transparency of a film beside its pictures.

    FFmpeg's own decoders leave it out and show what colours the transparent parts happen to have.
    """
    stated = stream.metadata.get("alpha_mode") == "1"
    return stated and stream.codec_context.name in ALPHA_DECODERS


def _demux(container, *streams) -> Iterator[av.Packet]:
    """Yield the packets of the given streams, or of all."""
    try:
        yield from container.demux(*streams)
    except IndexError:
        # WHY: a stream that appeared in the middle of a file. PyAV stumbles over it at the end,
        # after the last packet of the streams that it knows.
        return


def _missing_at_the_end(packets: Packets, seconds: float) -> int:
    """Return how many frames are missing if a file ends so many seconds before it should.

    WHY the conditions: stated durations are rounded, and the last frame of a screen recording may
    stay for minutes.
    """
    if seconds < 1 or None in packets.times:
        return 0
    times = _seconds(sorted(packets.times), packets)
    if times is None or not evenly_spaced(times, packets.fps):
        return 0
    frames = round(seconds * packets.fps)
    return frames if frames > len(times) / 10 else 0


def evenly_spaced(times: list[float], fps: float | None) -> bool:
    """Return whether frame i is shown at i / fps, give or take a third of a frame.

    WHY a third: files round times, GIFs to 1/100 s, which is 0.3 frames at 30 frames per second.
    """
    if not fps:
        return False
    return all(abs(time * fps - number) <= 1 / 3 for number, time in enumerate(times))


def _seconds(times: list[int | None], packets: Packets) -> list[float] | None:
    """Convert ticks to seconds after the first frame; None if the file does not time its frames.

    Where the clock is set back, as between two streams that were joined, the next frame follows
    after the usual time.
    """
    if None in times or not packets.has_times:
        return None
    period = 1 / (packets.fps or 25)
    seconds = [0.0]
    for before, after in pairwise(times):
        step = (after - before) * packets.tick
        if step < 0 or (packets.broadcast and step > MAX_STEP):
            step = period
        seconds.append(seconds[-1] + step)
    return seconds


# -------------------------------------------------------------------------------- decode by jumping


def _decode_at(container, stream, loader: Loader, in_order, keyframes) -> dict[int, object]:
    """Decode the frames that the loader wants: number -> what is kept of it.

    in_order: the time of each frame, in ticks. keyframes: the times of key frames. Decoding starts
    at the last key frame before a wanted frame, and jumps there if that skips frames.
    Raises SeekError unless every frame on the way has the time that is expected.
    """
    keyframes = sorted(keyframes)
    decoded = {}
    position = -1  # the number of the frame decoded last
    frames = iter(())
    for index in sorted(loader.places):
        before = bisect_right(keyframes, in_order[index])
        if before == 0:
            raise SeekError
        start = bisect_left(in_order, keyframes[before - 1])
        if start > position:
            frames = _frames_from(container, stream, in_order[start])
            position = start - 1
        while position < index:
            frame = next(frames, None)
            position += 1
            if frame is None or frame.pts != in_order[position] or frame.is_corrupt:
                raise SeekError
        decoded[index] = loader.load(index, frame)
    return decoded


def _frames_from(container, stream, keyframe: int) -> Iterator[av.VideoFrame]:
    """Jump to the key frame of the given time and decode from there.

    Raises SeekError unless the decoder begins there with a picture that needs no other.
    """
    container.seek(keyframe, stream=stream)
    started = False
    for frame in container.decode(stream):
        if not started:
            if frame.pts is not None and frame.pts < keyframe:
                continue  # B-frames that are decoded after the key frame and shown before it
            complete = frame.key_frame and frame.pict_type == PictureType.I
            if frame.pts != keyframe or not complete:
                raise SeekError
            started = True
        yield frame


# ---------------------------------------------------------------------------- decode from the start


def _load_from_start(path: Path, pick: Pick, keep: Keep, packets: Packets) -> list:
    """Decode the whole file, and load the frames that `pick` chooses.

    How many frames a decoder shows is known only afterwards. The first try takes each packet for a
    frame; where that chooses other frames, the file is decoded a second time.
    """
    times = packets.times
    if None not in times:
        times = sorted(times)
    guess = pick(len(times), packets.fps, _seconds(times, packets))
    decoded = _decode_all(path, Loader(guess, keep), packets.damaged > 0)
    if not decoded.times:
        raise VideoError(f"{path}: has no frames, or incomplete ones.", *DAMAGED)
    times, numbers = _timeline(decoded, packets)
    indices = pick(len(times), packets.fps, _seconds(times, packets))
    for index in indices:
        if numbers[index] is None:
            what = f"{path}: has no frames, or incomplete ones: frame {index} is lost."
            raise VideoError(what, *DAMAGED)
    wanted = [numbers[index] for index in indices]
    faults = max(packets.damaged, decoded.rejected + decoded.concealed)
    if wanted != guess:
        decoded.frames.clear()
        decoded = _decode_all(path, Loader(wanted, keep), faults > 0)
    if faults:
        message = f"{path}: {faults} damaged packets or frames were concealed."
        warnings.warn(message, stacklevel=6)  # at the caller of load_video
    return [decoded.frames[number] for number in wanted]


def _decode_all(path: Path, loader: Loader, one_thread: bool) -> Decoded:
    """Decode from the start and count, keeping the frames that the loader wants.

    one_thread: needed for damaged files. WHY: several threads report a fault late, and drop the
    frames in between.
    """
    decoded = Decoded()
    with _open(path) as container:
        stream = _main_stream(path, container)
        if one_thread:
            stream.thread_type = "NONE"
        decoder = stream.codec_context
        if _has_alpha_layer(stream):
            decoder = av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r")
        for packet in _demux(container, stream):
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError:
                if not one_thread:
                    return _decode_all(path, loader, one_thread=True)
                decoded.rejected += 1
                continue
            for frame in frames:
                number = len(decoded.times)
                if number in loader.places:
                    decoded.frames[number] = loader.load(number, frame)
                decoded.concealed += frame.is_corrupt
                decoded.times.append(frame.pts)
    return decoded


def _timeline(decoded: Decoded, packets: Packets) -> tuple[list, list]:
    """List the time of each frame in ticks, and its number among those shown, None if it is lost.

    A frame is lost if the decoder rejects its packet and shows nothing else then, or if the file
    ends before it. What a decoder skips until it can begin, and what a recording breaks off, was
    never part of the film.
    """
    times = list(decoded.times)
    entries = [(time, number) for number, time in enumerate(times)]
    period = 1 / (packets.fps or 25) / packets.tick
    ascending = None not in times and all(before < after for before, after in pairwise(times))
    if decoded.rejected and ascending and None not in packets.times:
        for time in set(packets.times) - set(times):
            place = bisect_left(times, time)
            around = times[max(0, place - 1) : place + 1]
            # WHY half a period: a packet may hold a message beside a frame that is shown.
            gap = min(abs(time - shown) for shown in around) > period / 2
            broken_off = packets.broadcast and place == len(times)
            if gap and place > 0 and not broken_off:
                entries.append((time, None))
        entries.sort(key=lambda entry: entry[0])
    for _ in range(packets.missing):
        before = entries[-1][0]
        following = None if before is None else before + round(period)
        entries.append((following, None))
    return [time for time, _ in entries], [number for _, number in entries]


# ------------------------------------------------------------------------------------ frames as RGB


def _to_rgb(frame: av.VideoFrame, size: tuple[int, int, int] | None) -> np.ndarray:
    """Convert to RGB (H, W, 3), upright, of a certain size unless it is None.

    Transparent parts become white.
    """
    transparent = any(part.is_alpha for part in frame.format.components)
    if transparent or frame.format.has_palette:
        picture = Image.fromarray(frame.to_ndarray(format="rgba", threads=1))
        pixels = flatten(picture)
    else:
        pixels = frame.to_ndarray(format="rgb24", threads=1)  # more threads would be slower
    pixels = np.ascontiguousarray(_turn_upright(pixels, frame))
    if size in (None, pixels.shape):
        return pixels
    resized = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return resized.to_ndarray(format="rgb24", height=size[0], width=size[1])


def _turn_upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Mirror and turn a frame as its display matrix says.

    The matrix (a, b, 0, c, d, 0, x, y, 1) shows the pixel in column p and row q in column
    a * p + c * q and row b * p + d * q, counted from a new origin.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # WHY: PyAV lists nothing if it does not know one of the kinds of side data
        return np.rot90(pixels, frame.rotation // 90)
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):  # rows become columns
        pixels = pixels.transpose(1, 0, 2)
        a, d = c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    if d < 0:
        pixels = pixels[::-1]
    return pixels
