"""Draw simple shapes into video frames (used by miniature/world.py)."""

from __future__ import annotations

import numpy as np
from numpy import ndarray
from numpy.random import Generator


def signed_distance(shape: str, x: ndarray, y: ndarray, radius: ndarray) -> ndarray:
    """Distance in pixels from (x, y), y down, to the outline of a shape; negative inside."""
    largest = np.maximum(abs(x), abs(y))
    smallest = np.minimum(abs(x), abs(y))
    match shape:
        case "circle":
            return np.hypot(x, y) - radius
        case "square":
            return largest - 0.85 * radius
        case "triangle":
            return np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.6 * radius
        case "cross":
            return np.maximum(smallest - radius / 3, largest - radius)
        case "ring":
            middle = np.hypot(x, y) - 0.75 * radius
            return abs(middle) - 0.25 * radius
    raise ValueError(f"There is no shape {shape}.")


def brightness(texture: str, x: ndarray, y: ndarray) -> ndarray:
    """Brightness of a texture at (x, y), in pixels from the centre of the object."""
    match texture:
        case "plain":
            return np.ones_like(x)
        case "striped":
            return np.where(y % 4 < 2, 1, 0.3)
        case "shaded":
            return np.clip(0.7 + 0.08 * x, 0.35, 1)
    raise ValueError(f"There is no texture {texture}.")


def draw_background(num_frames: int, size: int, rng: Generator) -> ndarray:
    """Frames (T, 3, H, W) of 4x4 random dark colours, with bilinear interpolation between them."""
    grid = 0.35 + 0.08 * rng.standard_normal((3, 4, 4))
    position = np.linspace(0, 3, size)
    share = np.maximum(0, 1 - abs(position[:, None] - np.arange(4)))  # (H, 4), rows sum to 1
    picture = share @ grid @ share.T
    return np.repeat(picture[None], num_frames, axis=0)


def draw_shape(
    frames: ndarray,  # (T, 3, H, W) in [0, 1]; painted over
    shape: str,
    texture: str,
    colour: tuple[float, float, float],  # red, green and blue in [0, 1]
    x: ndarray,  # (T,), the centre in pixels in each frame
    y: ndarray,  # (T,), y down
    radius: ndarray,  # (T,) in pixels
    opacity: ndarray,  # (T,) in [0, 1]
) -> None:
    """Paint a shape over frames."""
    _, _, height, width = frames.shape
    x, y, radius, opacity = np.stack([x, y, radius, opacity])[:, :, None, None]  # (T, 1, 1) each
    column = np.arange(width) + 0.5  # the centres of the pixels
    row = np.arange(height)[:, None] + 0.5
    x_offset, y_offset = np.broadcast_arrays(column - x, row - y)  # (T, H, W)
    distance = signed_distance(shape, x_offset, y_offset, radius)
    # One pixel of transition between outside and inside: the outline is antialiased.
    cover = np.clip(0.5 - distance, 0, 1) * opacity
    shade = brightness(texture, x_offset, y_offset)
    paint = shade[:, None] * np.array(colour)[:, None, None]  # (T, 3, H, W)
    frames += cover[:, None] * (paint - frames)
