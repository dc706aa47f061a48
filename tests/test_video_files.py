"""support/video.py: video files as people have them are read right, or refused clearly.

tests/cases/ holds small drawn files: frame n is grey of level 16 + 4 n, and its top left corner is
white. expected.json has the mean levels of three corners and of whole frames.
"""

from __future__ import annotations

import json
import os
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import SIZE, decode_everything, numbered_frames, write_video
from PIL import Image
from torch import Tensor

from support.errors import VideoError
from support.video import load_video, sample_indices

CASES = Path(__file__).parent / "cases"
EXPECTED = json.loads((CASES / "expected.json").read_text())


@pytest.mark.filterwarnings("ignore:.*concealed")
@pytest.mark.parametrize("name", [name for name, value in EXPECTED.items() if type(value) is dict])
def test_a_file_as_people_have_it_shows_the_frames_of_a_player(name):
    """Each file once gave other frames, other sizes or an error."""
    expected = EXPECTED[name]
    frames = load_video(CASES / name, expected["frames"])
    assert frames.shape == (expected["frames"], 3, expected["height"], expected["width"])
    few = load_video(CASES / name, 3)
    for frame, moment in zip(few, ("first", "middle", "last"), strict=True):
        assert shown_levels(frame) == pytest.approx(expected[moment], abs=6), moment
    assert torch.equal(few, frames[sample_indices(expected["frames"], 3)])


def shown_levels(frame: Tensor) -> list[float]:
    """The means of the top left, top right and bottom left corners, and of the frame (3, H, W)."""
    frame = frame.float()
    side = min(frame.shape[1:]) // 4
    corners = (frame[:, :side, :side], frame[:, :side, -side:], frame[:, -side:, :side])
    return [part.mean().item() for part in (*corners, frame)]


@pytest.mark.parametrize("name", [name for name, value in EXPECTED.items() if type(value) is str])
def test_a_song_is_no_video_although_its_cover_is_a_video_stream(name):
    """FFmpeg shows the cover of an mp3 as a video of one frame."""
    with pytest.raises(VideoError, match="cover"):
        load_video(CASES / name, 4)


# ------------------------------------------------------------------------------------------ jumping


MISMARKED = {
    "h264": ("libx264", {"bf": "2"}),
    "h264, intra refresh": ("libx264", {"x264-params": "intra-refresh=1:keyint=10"}),
    "mpeg4": ("mpeg4", {"bf": "2"}),
    "vp9": ("libvpx-vp9", {"cpu-used": "8"}),
    "av1": ("libsvtav1", {"preset": "12"}),
}


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("name", MISMARKED)
def test_a_key_frame_is_believed_only_if_the_decoder_began_there(tmp_path, name, container):
    """Recorders and some editors mark every frame. A jump then begins with grey or no frames."""
    codec, options = MISMARKED[name]
    path = write_with_every_packet_marked(tmp_path / f"all.{container}", codec, **options)
    reference = decode_everything(path)
    assert len(reference) == 40
    for num_frames in (2, 5, 40):
        wanted = reference[sample_indices(40, num_frames)]
        assert torch.equal(load_video(path, num_frames), wanted), f"{num_frames} frames"


def write_with_every_packet_marked(path: Path, codec: str, rate=25, **options: str) -> Path:
    """Encode 40 numbered frames into a file whose index calls each packet a key frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.gop_size = 12
        for picture in [*numbered_frames(40), None]:
            frame = picture
            if picture is not None:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            for packet in stream.encode(frame):
                packet.is_keyframe = True
                container.mux(packet)
    return path


def test_a_fragmented_mp4_is_read_like_any_other(tmp_path):
    """Screen recorders write fragments, which have no index at the beginning."""
    path = tmp_path / "fragments.mp4"
    whole = write_video(tmp_path / "whole.mp4", numbered_frames(40), b_frames=2)
    options = {"movflags": "frag_keyframe+empty_moov"}
    with av.open(str(whole)) as source, av.open(str(path), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert torch.equal(load_video(path, 7), load_video(whole, 7))


def test_a_clip_that_begins_between_key_frames_begins_with_what_a_player_shows(tmp_path):
    """A copy from packet 5 on: nothing can be shown until key frame 12."""
    whole = write_video(tmp_path / "whole.mkv", numbered_frames(40))
    path = tmp_path / "cut.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size and number >= 5:
                packet.stream = stream
                target.mux(packet)
    shown = decode_everything(path)
    assert torch.equal(load_video(path, len(shown)), shown)
    assert torch.equal(load_video(path, 1), decode_everything(whole)[12:13])


# WHY files for HEVC: x265 damages the memory of the process that encodes so small frames with it.
HEVC = ["hevc_every_sample_marked_sync.mp4", "hevc_every_sample_marked_sync.mkv", "raw.hevc"]


@pytest.mark.parametrize("name", [*HEVC, "raw.h264", "every_sample_marked_sync.mp4"])
def test_a_file_without_usable_marks_or_times_is_decoded_and_counted(name):
    """Nothing in a raw stream says when a frame is shown, so its rate does: 25 a second."""
    reference = decode_everything(CASES / name)
    total = len(reference)
    assert total == (40 if name in HEVC else 50)
    for num_frames in (2, 7, total):
        wanted = reference[sample_indices(total, num_frames)]
        assert torch.equal(load_video(CASES / name, num_frames), wanted)
    piece = sample_indices(total, 7, 25, 0.4, 1.2)
    assert torch.equal(load_video(CASES / name, 7, start=0.4, end=1.2), reference[piece])


# ------------------------------------------------------------------------------- packets and frames


def test_frames_that_are_never_shown_do_not_count(tmp_path):
    """VP8 predicts from hidden frames. Here every tenth packet is one: 36 of 40 are shown."""
    whole = write_video(tmp_path / "whole.webm", numbered_frames(40), codec="libvpx")
    path = tmp_path / "hidden.webm"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                data = bytearray(bytes(packet))
                if number % 10 == 5:
                    data[0] &= ~0x10  # the bit show_frame
                copy = av.Packet(bytes(data))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                target.mux(copy)
    reference = decode_everything(path)
    assert len(reference) == 36
    assert torch.equal(load_video(path, 36), reference)
    assert torch.equal(load_video(path, 5), reference[sample_indices(36, 5)])


@pytest.mark.filterwarnings("ignore:.*concealed")
def test_packets_without_a_picture_do_not_count(tmp_path):
    """A packet that holds only a message (SEI) is a packet of the file and no frame."""
    whole = write_video(tmp_path / "whole.mp4", numbered_frames(20), **{"x264-params": "annexb=1"})
    path = tmp_path / "messages.mkv"
    message = b"\x00\x00\x00\x16\x06\x05\x12" + bytes(range(1, 17)) + b"ab\x80"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                packet.stream = stream
                if number == 10:
                    extra = av.Packet(message)
                    extra.pts = extra.dts = packet.pts - 10
                    extra.time_base, extra.stream = packet.time_base, stream
                    target.mux(extra)
                target.mux(packet)
    reference = decode_everything(whole)
    assert torch.equal(load_video(path, 20), reference)
    assert torch.equal(load_video(path, 3), reference[[0, 9, 19]])


# -------------------------------------------------------------------------------------------- times


def test_seconds_choose_by_the_times_of_the_frames():
    """25 frames in the first second, then one a second. The average rate would choose 19 to 47."""
    frames = load_video(CASES / "variable_rate.mp4", 3, start=2, end=5).float()
    levels = frames.mean((1, 2, 3)).tolist()
    assert levels == pytest.approx(EXPECTED["variable_rate.mp4"]["shown_from_2_to_5"], abs=6)


SLOWING = [0, 40, 80, 120, 160, 1000, 2000, 3000, 4000, 5000]  # milliseconds


@pytest.mark.parametrize("extension", ["mkv", "mp4", "webm", "gif", "ts"])
def test_seconds_choose_by_time_in_every_container(tmp_path, extension):
    """Frames at 2, 3 and 4 s are shown from 2 to 5 s, and that of 2 s is on screen at 2.5 s."""
    path = tmp_path / f"slowing.{extension}"
    codec, pixels = {"webm": ("libvpx", "yuv420p"), "gif": ("gif", "rgb8")}.get(
        extension, ("libx264", "yuv420p")
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=100)
        stream.height, stream.width, stream.pix_fmt = *SIZE, pixels
        stream.codec_context.time_base = Fraction(1, 100)
        for time, picture in zip(SLOWING, numbered_frames(10), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time // 10, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reference = decode_everything(path)
    assert len(reference) == 10
    assert torch.equal(load_video(path, 3, start=2, end=5), reference[[6, 7, 8]])
    assert torch.equal(load_video(path, 2, start=2.5, end=4.5), reference[[6, 8]])
    assert torch.equal(load_video(path, 1, start=2.2, end=2.4), reference[[6]])
    assert torch.equal(load_video(path, 5, end=0.2), reference[:5])
    assert torch.equal(load_video(path, 2, start=4.5), reference[[8, 9]])
    assert torch.equal(load_video(path, 3), reference[[0, 4, 9]])


# ------------------------------------------------------------------------------------------ streams


def test_a_thumbnail_that_is_the_first_stream_is_not_the_video(tmp_path):
    """Cameras put a preview of one frame before the film."""
    thumbnail = [np.full((64, 64, 3), 255, np.uint8)]
    path = two_streams(tmp_path / "camera.mp4", thumbnail, numbered_frames(20))
    frames = load_video(path, 20)
    assert frames.shape == (20, 3, *SIZE)
    assert (frames[:, 0, 20, 20].float() - 5 * torch.arange(20)).abs().max() < 4


def two_streams(path: Path, first: list[np.ndarray], second: list[np.ndarray]) -> Path:
    """A file with two video streams: JPEG pictures first, then H.264."""
    with av.open(str(path), "w") as container:
        streams = []
        for codec, pixels, frames in (("mjpeg", "yuvj420p", first), ("libx264", "yuv420p", second)):
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = pixels
            streams.append((stream, frames))
        for stream, frames in streams:
            for picture in frames:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


# -------------------------------------------------------------------------------------- orientation

EIGHT = {  # name -> (a, b, c, d) of the track header, and what shows the stored frame upright
    "as stored": ((1, 0, 0, 1), lambda stored: stored),
    "mirrored": ((-1, 0, 0, 1), lambda stored: stored[:, ::-1]),
    "upside down": ((-1, 0, 0, -1), lambda stored: stored[::-1, ::-1]),
    "flipped": ((1, 0, 0, -1), lambda stored: stored[::-1]),
    "transposed": ((0, 1, 1, 0), lambda stored: stored.transpose(1, 0, 2)),
    "turned right": ((0, 1, -1, 0), lambda stored: np.rot90(stored, -1)),
    "turned left": ((0, -1, 1, 0), lambda stored: np.rot90(stored, 1)),
    "transversed": ((0, -1, -1, 0), lambda stored: np.rot90(stored, 2).transpose(1, 0, 2)),
}


@pytest.mark.parametrize("name", EIGHT)
def test_all_eight_orientations_of_a_film_are_shown_as_a_player_does(tmp_path, name):
    """Selfie cameras mirror. The angle alone, which PyAV offers, took a mirror for a half turn."""
    numbers, show = EIGHT[name]
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :24] = [250, 0, 0]
    stored[:16, 24:] = [0, 250, 0]
    stored[16:, :24] = [0, 0, 250]
    path = write_video(tmp_path / "film.mp4", [stored] * 3)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (number * 0x10000 for number in numbers)
    for place, value in enumerate([a, b, 0, c, d, 0, 0, 0, 0x40000000]):
        begin = matrix + 4 * place
        content[begin : begin + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    wanted = torch.from_numpy(np.ascontiguousarray(show(stored))).permute(2, 0, 1)
    frames = load_video(path, 2)
    assert frames.shape[1:] == wanted.shape
    assert (frames.float() - wanted).abs().mean() < 6  # the colours of H.264 are not exact


# ------------------------------------------------------------------------------------------- damage


def test_a_lost_packet_of_a_broadcast_is_concealed_and_reported():
    """One packet in a thousand is lost on air. It used to cost the whole recording."""
    with pytest.warns(UserWarning, match="one_packet_lost.ts: 1 damaged"):
        frames = load_video(CASES / "one_packet_lost.ts", 50)
    assert (frames.float().mean((1, 2, 3)).diff() > 0).all()  # each frame is lighter


@pytest.mark.filterwarnings("ignore:.*concealed")
@pytest.mark.parametrize("extension", ["ts", "h264"])
def test_two_streams_joined_are_one_film_in_the_size_of_the_first(tmp_path, extension):
    """`cat a.ts b.ts`: the clock starts again, and the size may change."""
    large = [picture.repeat(2, 0).repeat(2, 1) for picture in numbered_frames(20)]
    first = write_video(tmp_path / f"a.{extension}", numbered_frames(20))
    second = write_video(tmp_path / f"b.{extension}", large)
    path = tmp_path / f"joined.{extension}"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    frames = load_video(path, 40)
    assert frames.shape == (40, 3, *SIZE)
    expected = 5 * (torch.arange(40) % 20)
    assert (frames[:, 0, 10:].float().mean((1, 2)) - expected).abs().max() < 4
    piece = load_video(path, 2, start=0.4, end=1.2)  # frames 10 and 29
    assert torch.equal(piece, frames[[10, 29]])


@pytest.mark.filterwarnings("ignore:.*concealed")
def test_damage_inside_a_file_costs_only_the_frames_it_hit(tmp_path):
    """Frames 15 to 17 of 40 are unreadable; every key frame and its other frames still are."""
    whole = write_video(tmp_path / "whole.mp4", numbered_frames(40), gop=1)
    reference = decode_everything(whole)
    path = damaged_inside(whole, 15, 17)
    assert torch.equal(load_video(path, 3), reference[[0, 19, 39]])
    assert torch.equal(load_video(path, 14, end_frame=13), reference[:14])
    assert torch.equal(load_video(path, 8, start=0.72, end=1.04), reference[18:26])
    with pytest.raises(VideoError, match="frame 15 is lost"):
        load_video(path, 40)


def damaged_inside(path: Path, first: int, last: int) -> Path:
    """Overwrite the packets with the given numbers, in place."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for number, packet in enumerate(container.demux(video=0)):
            if packet.size and first <= number <= last:
                content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(content)
    return path


def test_a_file_that_was_cut_off_still_shows_its_beginning(tmp_path):
    """Its index promises 40 frames; a clip from the first half needs no others."""
    whole = write_video(tmp_path / "whole.mp4", numbered_frames(40), gop=1)
    reference = decode_everything(whole)
    content = whole.read_bytes()
    whole.write_bytes(content[: (content.index(b"mdat") + len(content)) // 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(load_video(whole, 5, end=0.2), reference[:5])
    with pytest.raises(VideoError, match="lost"):
        load_video(whole, 5)


@pytest.mark.filterwarnings("ignore:.*concealed")
@pytest.mark.parametrize("extension", ["mkv", "webm", "flv"])
def test_a_download_that_broke_off_is_not_a_shorter_film(tmp_path, extension):
    """The header still states 4 s. The frames of the first second can be shown; the rest are lost.

    Half a film used to be sampled as if it were the whole.
    """
    codec = "libvpx" if extension == "webm" else "libx264"
    path = write_video(tmp_path / f"half.{extension}", numbered_frames(50) * 2, codec)
    whole = load_video(path, 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert torch.equal(load_video(path, 25, end=1), whole[:25])
    with pytest.raises(VideoError, match="lost"):
        load_video(path, 4)


class StumblingContainer:
    """An open video file in which PyAV stumbles over a late stream after the last packet."""

    def __init__(self, container: av.container.InputContainer):
        self.container = container

    def __enter__(self) -> StumblingContainer:
        return self

    def __exit__(self, *_) -> None:
        self.container.close()

    def __getattr__(self, name: str):
        return getattr(self.container, name)

    def demux(self, *streams):
        yield from self.container.demux(*streams)
        raise IndexError("list index out of range")


def test_a_stream_that_appears_late_does_not_cost_the_film(tmp_path, monkeypatch):
    """The sound of a broadcast may begin minutes after the picture."""
    path = write_video(tmp_path / "film.ts", numbered_frames(20))
    reference = decode_everything(path)
    open_file = av.open
    monkeypatch.setattr(av, "open", lambda *a, **o: StumblingContainer(open_file(*a, **o)))
    assert torch.equal(load_video(path, 20), reference)


# ------------------------------------------------------------------------------------ names, trust


@pytest.mark.parametrize("name", ["a:b.mp4", "-i.mp4", "http:x.mp4", "%d.mp4", "é 🎬.mp4"])
def test_any_name_of_a_file_is_a_name(tmp_path, monkeypatch, name):
    """FFmpeg reads "a:b.mp4" as an address, and programs read "-i.mp4" as an option."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "plain.mp4", numbered_frames(3)).rename(tmp_path / name)
    assert load_video(name, 3).shape == (3, 3, *SIZE)
    assert load_video(Path(name), 3).shape == (3, 3, *SIZE)


@pytest.mark.parametrize("name", ["concat:a.mp4", "http://localhost/a.mp4", "file:a.mp4", "a\0b"])
def test_an_address_is_not_a_file(tmp_path, monkeypatch, name):
    """Only files are opened, whatever protocols FFmpeg knows."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", numbered_frames(3))
    with pytest.raises(VideoError):
        load_video(name, 3)


PLAYLISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n",
    "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n",
    "list.ffconcat": "ffconcat version 1.0\nfile a.ts\n",
    "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
    "picture.eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "picture.png": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "subtitles.srt": "1\n00:00:00,000 --> 00:00:01,000\nHello\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_file_that_names_other_files_or_runs_programs_is_refused(tmp_path, name):
    """A playlist can open any file; PostScript is a program."""
    write_video(tmp_path / "a.ts", numbered_frames(3))
    (tmp_path / name).write_text(PLAYLISTS[name])
    with pytest.raises(VideoError, match=name):
        load_video(tmp_path / name, 3)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    """Opening a FIFO that nobody writes to blocks for ever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="not a file"):
        load_video(tmp_path / "pipe.mp4", 3)
    (tmp_path / "frames").mkdir()
    os.mkfifo(tmp_path / "frames" / "1.png")
    with pytest.raises(VideoError, match="not a file"):
        load_video(tmp_path / "frames", 3)


@pytest.mark.parametrize("error", [IndexError("list"), MemoryError(), ValueError("x"), KeyError(1)])
def test_any_error_of_a_decoder_is_a_video_error(tmp_path, monkeypatch, error):
    """PyAV raises IndexError, for example, for some files whose streams appear late."""
    path = write_video(tmp_path / "a.mp4", numbered_frames(3))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(VideoError, match="cannot be decoded") as caught:
        load_video(path, 3)
    assert caught.value.__cause__ is error


def test_frames_that_are_too_large_or_too_narrow_are_refused(tmp_path):
    """A header may claim any size; the memory for it would be reserved first."""
    narrow = [np.zeros((2, 300, 3), np.uint8)] * 3
    path = write_video(tmp_path / "narrow.mp4", narrow)
    with pytest.raises(VideoError, match="300 x 2"):
        load_video(path, 3)
    Image.new("L", (9000, 8000)).save(tmp_path / "large.png")
    with pytest.raises(VideoError, match="9000 x 8000"):
        load_video(tmp_path / "large.png", 3)


# ------------------------------------------------------------------------------------- transparency

TRANSPARENT = {  # a name -> codec, pixel format, options
    "prores.mov": ("prores_ks", "yuva444p10le", {}),
    "animation.mov": ("qtrle", "argb", {}),
    "pictures.mov": ("png", "rgba", {}),
    "archive.mkv": ("ffv1", "yuva420p", {}),
    "sticker.webm": ("libvpx-vp9", "yuva420p", {}),
    "old_sticker.webm": ("libvpx", "yuva420p", {"auto-alt-ref": "0"}),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_parts_of_a_film_are_white(tmp_path, name):
    """As in pictures. They once had the colour that is stored where nothing is to be seen."""
    codec, pixel_format, options = TRANSPARENT[name]
    red = np.zeros((32, 48, 4), np.uint8)
    red[..., 0] = 255
    red[:, :24, 3] = 255  # the right half is transparent
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 48, 32, pixel_format
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(red, format="rgba")))
        container.mux(stream.encode())
    frames = load_video(tmp_path / name, 4)
    for frame in frames:
        assert frame[:, 16, 8].tolist() == pytest.approx([255, 0, 0], abs=6)
        assert frame[:, 16, 40].tolist() == pytest.approx([255, 255, 255], abs=2)
