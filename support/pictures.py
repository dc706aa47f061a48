"""Read pictures with Pillow: photos, drawings and animations, as RGB frames of 8 bits.

Pillow picks the format by content, and only among FORMATS. WHY: it would hand PostScript, for
example, to Ghostscript, which runs programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from support.errors import VideoError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".avif"}
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "AVIF", "GIF")
ANIMATED = ("PNG", "WEBP", "AVIF")  # the formats whose further pictures are frames of a film
# What the first box of such a file says (ISO/IEC 23008-12). Image sequences, hevc and avis, are
# left out: FFmpeg reads them as videos.
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"mif2", b"miaf", b"avif")
# WHY: loading a clip takes at most 1 GB. A decoder keeps several frames, and Pillow takes four
# bytes for each pixel.
MAX_PIXELS = 64_000_000  # of a picture, such as a photo of a phone
MAX_FILM_PIXELS = 36_000_000  # of a film or an animation: 8K, 8192 x 4320; also of a WebP
STRIP = 256  # rows that are converted at once
DEFAULT_DELAY = 0.1  # seconds; how long browsers show a frame that states no delay
MAX_ASPECT = 50  # the longer side over the shorter side
DAMAGED = ("the file is damaged, cut off or not a video.", "download or convert it again.")


# The value of the EXIF tag "Orientation" -> what makes the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_size(path: Path, width: int, height: int, most: int = MAX_PIXELS) -> None:
    """Raise VideoError for frames that would need too much memory, now or after resizing."""
    if width * height > most:
        why = f"a frame may have at most {most:,} pixels."
        raise VideoError(f"{path}: has frames of {width} x {height}.", why, "scale it down.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        why = f"one side may be at most {MAX_ASPECT} times as long as the other."
        raise VideoError(f"{path}: has frames of {width} x {height}.", why, "crop it.")


def open_picture(path: Path) -> Image.Image | None:
    """Open a picture; None if the content is that of something else, such as a video or a GIF.

    Raises VideoError if a picture is damaged or too large, or if the name promises a picture and
    the content is none.
    """
    if path.suffix.lower() in (".mjpeg", ".mjpg"):  # a film whose frames are JPEG pictures
        return None
    try:
        picture = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        refuse_heif(path)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            return None
        raise VideoError(f"{path}: is not a readable image.", *DAMAGED) from error
    except Exception as error:  # WHY: damaged files make Pillow raise errors of many classes
        raise VideoError(f"{path}: is not a readable image: {error}.", *DAMAGED) from error
    if picture.format == "GIF":
        picture.close()
        return None
    if picture.format == "TIFF" and path.suffix.lower() not in IMAGE_SUFFIXES:
        picture.close()
        why = "raw photos are TIFF files whose first picture is only a preview."
        fix = "develop it to JPEG, or name it .tif if it is an ordinary TIFF."
        raise VideoError(f"{path}: may be a raw photo.", why, fix)
    animated = picture.format in ANIMATED and getattr(picture, "is_animated", False)
    # Pillow's decoders of WebP and AVIF need twice the memory of the others.
    small = animated or picture.format in ("WEBP", "AVIF")
    check_size(path, *picture.size, MAX_FILM_PIXELS if small else MAX_PIXELS)
    if picture.format == "WEBP" and animated:
        picture.close()
        return _open_transparent(path)
    # WHY: Pillow maps a file whose name it knows, and then exchanges the sides of a grey TIFF that
    # is on its side.
    picture.filename = ""
    return picture


def refuse_heif(path: Path) -> None:
    """Raise VideoError if a file is a HEIC photo, or an AVIF that Pillow cannot open.

    Phones write them, also under the name of a JPEG. They consist of tiles, of which FFmpeg would
    show one.
    """
    with path.open("rb") as file:
        begin = file.read(12)
    if begin[4:8] == b"ftyp" and begin[8:12] in HEIF_BRANDS:
        why = "it consists of tiles, which are not put together here."
        fix = f"convert it to JPEG, for example with `heif-convert {path.name} photo.jpg`."
        raise VideoError(f"{path}: is a HEIC or AVIF photo.", why, fix)


def _open_transparent(path: Path) -> Image.Image:
    """Open an animated WebP whose frames may have transparent pixels.

    A bit of its header says so. If it is 0, Pillow shows black where no frame has drawn yet, and
    browsers show the page.
    """
    content = bytearray(path.read_bytes())
    content[20] |= 0x10  # ALPHA in https://developers.google.com/speed/webp/docs/riff_container
    return Image.open(BytesIO(content), formats=FORMATS)


def frame_numbers(picture: Image.Image) -> range:
    """The numbers of the frames of an animation; of a still picture, only 0."""
    if picture.format not in ANIMATED:
        return range(1)  # WHY: further pictures in JPEG and TIFF are previews, depth or pages
    # An animated PNG may begin with a picture for programs that show no animations.
    first = int(getattr(picture, "default_image", False))
    total = getattr(picture, "n_frames", 1)
    return range(first, total) if total > first else range(1)


def frame_times(path: Path) -> list[float]:
    """When each frame of an animation is shown, in seconds; [0.0] for a still picture."""
    times = [0.0]
    with open_picture(path) as picture:  # WHY: Pillow cannot go back in every animated PNG
        for number in frame_numbers(picture)[:-1]:
            picture.seek(number)
            picture.load()
            delay = float(picture.info.get("duration", 0)) / 1000
            times.append(times[-1] + (delay or DEFAULT_DELAY))
    return times


def to_rgb(path: Path, picture: Image.Image, number: int = 0) -> np.ndarray:
    """Decode one frame as RGB: uint8 (H, W, 3), upright, transparent parts white.

    Raises VideoError if its numbers have no agreed black and white, and Pillow's own errors if it
    is damaged.
    """
    picture.seek(number)
    picture.load()  # a TIFF is upright from here on, and says so
    orientation = 1
    # WHY: a photo whose EXIF block is damaged is still a photo.
    with suppress(Exception):
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in UPRIGHT:
        picture = picture.transpose(UPRIGHT[orientation])
    if picture.mode.startswith(("I", "F")):
        return _grey(path, picture)
    return flatten(picture)


def _strips(picture: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Cut a picture into strips of STRIP rows: which rows of it, and the strip.

    WHY: each conversion makes a copy of what it converts.
    """
    for top in range(0, picture.height, STRIP):
        bottom = min(top + STRIP, picture.height)
        yield slice(top, bottom), picture.crop((0, top, picture.width, bottom))


def flatten(picture: Image.Image) -> np.ndarray:
    """Convert a picture to RGB: uint8 (H, W, 3). Transparent parts become white."""
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    for rows, strip in _strips(picture):
        if picture.has_transparency_data:
            white = Image.new("RGBA", strip.size, "white")
            strip = Image.alpha_composite(white, strip.convert("RGBA"))
        pixels[rows] = np.asarray(strip.convert("RGB"))
    return pixels


def _grey(path: Path, picture: Image.Image) -> np.ndarray:
    """Convert grey of 16 bits (I;16, I) or floats (F) to uint8 (H, W, 3).

    Integers go from 0 to 65535. Floats go from 0 to 1, or, if any is larger, from 0 to 255. A PNG
    may name one level that is transparent, and so becomes white.
    """
    extremes = []
    for _, strip in _strips(picture):
        values = np.asarray(strip)
        extremes += [values.min(), values.max()]
    white = 65535
    if values.dtype.kind == "f":
        white = 1 if max(extremes) <= 1 else 255
    if not all(0 <= value <= white for value in extremes):  # also if one is not a number
        why = f"its grey levels do not lie between 0 and {white}."
        raise VideoError(f"{path}: has no agreed black and white.", why, "save it with 8 bits.")
    transparent = picture.info.get("transparency")
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    for rows, strip in _strips(picture):
        levels = np.asarray(strip)
        pixels[rows] = np.rint(levels * (255 / white))[..., None]
        if isinstance(transparent, int):
            pixels[rows][levels == transparent] = 255
    return pixels
