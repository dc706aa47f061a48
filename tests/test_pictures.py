"""Pictures of every kind, animations, folders of frames, and finding a video by its name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import numbered_frames, write_images, write_video
from PIL import Image, features

from support.errors import VideoError
from support.pictures import IMAGE_SUFFIXES
from support.video import files_in_order, is_still, load_video

# ---------------------------------------------------------------------------------------- one frame

FOUR_COLOURS = np.zeros((32, 48, 3), np.uint8)
FOUR_COLOURS[:16, :24] = [250, 0, 0]
FOUR_COLOURS[:16, 24:] = [0, 250, 0]
FOUR_COLOURS[16:, :24] = [0, 0, 250]

RAMP = np.linspace(0, 1, 48)[None].repeat(32, 0)  # from black to white
EIGHT_BITS = np.rint(255 * RAMP).astype(np.uint8)

STORED: dict[int, Callable] = {  # EXIF orientation -> what the camera stored of an upright picture
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
WITH_EXIF = ["jpg", "png", "webp", "tif"] + ["avif"] * features.check("avif")


@pytest.mark.parametrize("extension", WITH_EXIF)
@pytest.mark.parametrize("orientation", STORED)
def test_photos_are_shown_upright(tmp_path, extension, orientation):
    """A phone stores the sensor's picture, and in EXIF how it was held."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](FOUR_COLOURS))
    path = tmp_path / f"photo.{extension}"
    Image.fromarray(stored).save(path, exif=exif, quality=95)
    frame = as_picture(load_video(path, 1)[0])
    assert frame.shape == FOUR_COLOURS.shape
    assert np.abs(frame.astype(int) - FOUR_COLOURS).mean() < 6


def as_picture(frame: torch.Tensor) -> np.ndarray:
    """A frame (3, H, W) as (H, W, 3)."""
    return frame.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "RGB"])
@pytest.mark.parametrize("orientation", STORED)
def test_scans_are_shown_upright_in_every_mode(tmp_path, mode, orientation):
    """Pillow exchanges the sides of grey TIFF files that lie on their side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = np.ascontiguousarray(STORED[orientation](np.repeat(EIGHT_BITS[..., None], 3, 2)))
    if mode == "I;16":
        picture = Image.fromarray(grey[..., 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey).convert(mode)
    for extension in ("tif", "png"):
        picture.save(tmp_path / f"scan.{extension}", exif=exif)
        frame = load_video(tmp_path / f"scan.{extension}", 1)[0]
        assert np.array_equal(frame[0].numpy(), EIGHT_BITS), extension


def test_a_photo_with_a_damaged_exif_block_is_still_a_photo(tmp_path):
    """Editors break EXIF more often than pictures."""
    Image.fromarray(FOUR_COLOURS).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0garbage")
    assert np.array_equal(as_picture(load_video(tmp_path / "a.png", 1)[0]), FOUR_COLOURS)


def test_a_photo_with_one_odd_tag_is_still_turned(tmp_path):
    """Its resolution is a text, which Pillow reads but cannot write back."""
    on_its_side = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)  # tag, type, count, value, padding
    resolution = struct.pack("<HHI4s", 0x011A, 2, 3, b"72")
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + on_its_side + resolution + b"\0" * 4
    Image.fromarray(FOUR_COLOURS).save(tmp_path / "a.png", exif=block)
    found = as_picture(load_video(tmp_path / "a.png", 1)[0])
    assert np.array_equal(found, np.rot90(FOUR_COLOURS, -1))


def _grey_16(folder: Path) -> Path:
    Image.fromarray(np.rint(65535 * RAMP).astype(np.uint16)).save(folder / "grey.png")
    return folder / "grey.png"


def _grey_16_tiff(folder: Path) -> Path:
    Image.fromarray(np.rint(65535 * RAMP).astype(np.uint16)).save(folder / "grey.tif")
    return folder / "grey.tif"


def _grey_16_big_endian(folder: Path) -> Path:
    picture = Image.fromarray(np.rint(65535 * RAMP).astype(">u2"))
    assert picture.mode == "I;16B"
    picture.save(folder / "grey.tiff")
    return folder / "grey.tiff"


def _integers(folder: Path) -> Path:
    picture = Image.fromarray(np.rint(65535 * RAMP).astype(np.int32))
    assert picture.mode == "I"
    picture.save(folder / "grey.tif")
    return folder / "grey.tif"


def _floats_to_1(folder: Path) -> Path:
    Image.fromarray(RAMP.astype(np.float32)).save(folder / "grey.tif")
    return folder / "grey.tif"


def _floats_to_255(folder: Path) -> Path:
    Image.fromarray(255 * RAMP.astype(np.float32)).save(folder / "grey.tif")
    return folder / "grey.tif"


DEEP = [_grey_16, _grey_16_tiff, _grey_16_big_endian, _integers, _floats_to_1, _floats_to_255]


@pytest.mark.parametrize("write", DEEP)
def test_deep_grey_is_scaled_to_8_bits(tmp_path, write):
    """Pillow cuts it off instead: all that is lighter than 1/256 became white."""
    frame = load_video(write(tmp_path), 1)[0]
    for channel in frame:
        assert np.abs(channel.numpy().astype(int) - EIGHT_BITS).max() <= 1


@pytest.mark.parametrize("values", [[0, 300.0], [-1, 0.5], [0, float("nan")]])
def test_floats_without_an_agreed_white_are_refused(tmp_path, values):
    """Depths in metres are no grey levels."""
    Image.fromarray(np.array([values] * 2, np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(VideoError, match="black and white"):
        load_video(tmp_path / "depth.tif", 1)


def test_transparent_parts_are_white_in_every_mode(tmp_path):
    """A page shows a picture on white. Pillow's conversion shows what lies under transparency."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, 4:] = 255
    colour = np.full((8, 8, 3), [200, 0, 0], np.uint8)
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    rgba.save(tmp_path / "rgba.png")
    rgba.save(tmp_path / "rgba.webp", lossless=True, exact=True)
    rgba.save(tmp_path / "rgba.tif")
    rgba.convert("LA").save(tmp_path / "la.png")
    palette = Image.fromarray((alpha > 0).astype(np.uint8), mode=None).convert("P")
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    keyed = Image.fromarray(np.where(alpha[..., None] > 0, colour, 7).astype(np.uint8))
    keyed.save(tmp_path / "rgb.png", transparency=(7, 7, 7))
    deep = Image.fromarray(np.where(alpha > 0, 60 * 257, 0).astype(np.uint16))
    deep.save(tmp_path / "deep.png", transparency=0)
    for name in ("rgba.png", "rgba.webp", "rgba.tif", "la.png", "p.png", "rgb.png", "deep.png"):
        frame = load_video(tmp_path / name, 1)[0]
        assert (frame[:, :, :4] == 255).all(), name
        shown = [60] * 3 if name in ("la.png", "deep.png") else [200, 0, 0]
        assert (frame[:, 0, 6] - torch.tensor(shown)).abs().max() <= 1, name


def test_other_colour_spaces_become_rgb(tmp_path):
    """CMYK is what printers get."""
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.tif")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=95)
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    for name, shown in (("ink.tif", [255, 0, 0]), ("ink.jpg", [255, 0, 0]), ("bit.png", [255] * 3)):
        frame = load_video(tmp_path / name, 1)[0].int()
        assert (frame[:, 4, 4] - torch.tensor(shown)).abs().max() <= 3, name


def test_the_content_says_what_a_picture_is_and_not_its_name(tmp_path):
    """Websites serve WebP and PNG under any name."""
    Image.fromarray(FOUR_COLOURS).save(tmp_path / "a.png")
    for name in ("a.jpg", "a.mp4", "a", "a.gif"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
        assert np.array_equal(as_picture(load_video(tmp_path / name, 1)[0]), FOUR_COLOURS)


def test_a_photo_with_a_preview_inside_is_the_photo(tmp_path):
    """Phones append a depth map or a second view to a JPEG (MPO); it is no second frame."""
    first, second = Image.fromarray(FOUR_COLOURS), Image.new("RGB", (9, 9))
    first.save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=[second])
    frames = load_video(tmp_path / "photo.jpg", 2)
    assert frames.shape == (2, 3, 32, 48)
    assert torch.equal(frames[0], frames[1])


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"heis", b"mif1"])
@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg", "photo"])
def test_a_photo_of_tiles_is_refused(tmp_path, brand, name):
    """FFmpeg takes the first tile of a HEIC photo, 512 x 512, for the picture.

    Programs that copy photos off a phone call some of them .jpg; they once counted as damaged.
    """
    content = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(100)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match="HEIC") as error:
        load_video(tmp_path / name, 1)
    assert "heif-convert" in str(error.value)


# --------------------------------------------------------------------------------------- animations

LEVELS = [0, 60, 120, 180]
ANIMATED = ["webp", "png"] + ["avif"] * features.check("avif")


@pytest.mark.parametrize("extension", ANIMATED)
def test_an_animation_is_a_video_of_all_its_frames(tmp_path, extension):
    """It used to be a still of its first frame."""
    path = write_animation(tmp_path / f"moving.{extension}", [100, 100, 100, 100])
    assert levels_of(load_video(path, 4)) == pytest.approx(LEVELS, abs=2)
    assert levels_of(load_video(path, 2)) == pytest.approx([0, 180], abs=2)
    assert levels_of(load_video(path, 2, end_frame=1)) == pytest.approx([0, 60], abs=2)


def write_animation(path: Path, delays: list[int], **options) -> Path:
    """Save four grey frames that are shown for the given milliseconds."""
    frames = [Image.new("RGB", (48, 32), (level,) * 3) for level in LEVELS]
    if path.suffix == ".webp":
        options["lossless"] = True
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=delays, **options)
    return path


def levels_of(frames: torch.Tensor) -> list[int]:
    return [round(frame.float().mean().item()) for frame in frames]


@pytest.mark.parametrize("extension", [*ANIMATED, "gif"])
def test_seconds_choose_the_frames_of_an_animation_by_their_delays(tmp_path, extension):
    """Frames begin at 0, 1, 1.5 and 3.5 s."""
    path = write_animation(tmp_path / f"moving.{extension}", [1000, 500, 2000, 500])
    assert levels_of(load_video(path, 2, start=1, end=3)) == pytest.approx([60, 120], abs=2)
    assert levels_of(load_video(path, 1, start=0.9)) == pytest.approx([0], abs=2)
    assert levels_of(load_video(path, 1, start=3.4, end=3.5)) == pytest.approx([120], abs=2)
    assert levels_of(load_video(path, 2, start=1.5)) == pytest.approx([120, 180], abs=2)


def test_a_picture_for_programs_without_animations_is_no_frame(tmp_path):
    """An animated PNG may begin with such a picture."""
    path = write_animation(tmp_path / "moving.png", [100] * 4, default_image=True)
    assert levels_of(load_video(path, 3)) == LEVELS[1:]


def test_frames_that_change_only_a_part_are_shown_whole(tmp_path):
    """Animations store only what changes; a transparent background is white."""
    frames = []
    for number in range(3):
        frame = Image.new("RGBA", (48, 32), (0, 0, 0, 0))
        frame.paste((0, 0, 0, 255), (16 * number, 0, 16 * number + 16, 32))
        frames.append(frame)
    for name in ("moving.webp", "moving.png", "moving.gif"):
        options = {"lossless": True} if name.endswith("webp") else {"disposal": 2}
        options |= {"save_all": True, "append_images": frames[1:], "duration": 100}
        frames[0].save(tmp_path / name, **options)
        for number, frame in enumerate(load_video(tmp_path / name, 3)):
            shown = frame[0, 16, 8::16].tolist()  # the middle of each third
            assert shown == [0 if third == number else 255 for third in range(3)], name


def test_a_still_is_told_from_an_animation_by_its_content(tmp_path):
    """The name of an animated WebP is that of a photo."""
    Image.new("RGB", (8, 8)).save(tmp_path / "still.webp")
    write_animation(tmp_path / "moving.webp", [100] * 4)
    write_video(tmp_path / "film.mp4", numbered_frames(3))
    assert is_still(tmp_path / "still.webp")
    for name in ("moving.webp", "film.mp4", ""):
        assert not is_still(tmp_path / name)
    with pytest.raises(VideoError, match="no such video"):
        is_still(tmp_path / "missing.webp")


def test_a_damaged_animation_is_refused(tmp_path):
    path = write_animation(tmp_path / "moving.png", [100] * 4)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(VideoError, match=r"moving\.png"):
        load_video(path, 4)


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "2.png", "10.png"],
        ["frame_0.25.png", "frame_0.5.png", "frame_1.png", "frame_10.png"],
        ["frame.0.25.png", "frame.0.5.png", "frame.10.png"],
        ["clip.1.png", "clip.2.png", "clip.10.png"],
        ["1.2.3.png", "1.2.10.png", "1.10.1.png"],
        ["a.png", "b.png", "c.png"],
        ["Frame_2.png", "frame_10.png"],
        ["shot1_frame9.png", "shot1_frame10.png", "shot2_frame1.png"],
        ["a_2.png", "b_1.png"],
        ["00000000000000000001.png", "00000000000000000002.png", "10000000000000000001.png"],
        ["2024-01-02 09.59.png", "2024-01-02 10.00.png"],
    ],
)
def test_frames_are_in_natural_order_by_the_whole_name(tmp_path, names):
    """Whatever the order in which the folder lists them."""
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [file.name for file in files_in_order(tmp_path, IMAGE_SUFFIXES)] == names


def test_files_that_programs_leave_in_a_folder_are_no_frames(tmp_path):
    """macOS writes ._0.png beside 0.png, Jupyter .ipynb_checkpoints, and Windows Thumbs.db."""
    folder = write_images(tmp_path / "frames", ["0.png", "1.png", "2.PNG"])
    (folder / "._0.png").write_bytes(b"\0\5\x16\7 Mac OS X")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "Thumbs.db").write_bytes(b"")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "folder.png").mkdir()
    frames = load_video(folder, 3)
    assert frames[:, 0, 20, 20].tolist() == [0, 5, 10]


def test_a_folder_of_videos_with_a_picture_is_not_a_clip_of_one_frame(tmp_path):
    """cover.jpg beside a.mp4 used to be the whole video."""
    folder = write_images(tmp_path / "videos", ["cover.png"])
    write_video(folder / "a.mp4", numbered_frames(3))
    with pytest.raises(VideoError, match=r"a\.mp4.*cover\.png"):
        load_video(folder, 3)


def test_frames_held_sideways_are_turned_in_folders_too(tmp_path):
    (tmp_path / "frames").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(FOUR_COLOURS)))
    for number in range(3):
        stored.save(tmp_path / "frames" / f"{number}.png", exif=exif)
    frames = load_video(tmp_path / "frames", 3)
    assert np.array_equal(as_picture(frames[1]), FOUR_COLOURS)
