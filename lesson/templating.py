"""Fill the templates of templates/, which draw the lesson's pictures and pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image
from torch import Tensor

FOLDER = Path(__file__).with_name("templates")


def png_url(image: Tensor) -> str:
    """A frame, uint8 (3, h, w), or colours from 0 to 1 (h, w, 3), as a data: URL of a PNG."""
    pixels = image.movedim(0, -1)
    if image.is_floating_point():
        pixels = 255 * image.clamp(0, 1)
        pixels = pixels.round().byte()
    picture = Image.fromarray(pixels.numpy())
    file = io.BytesIO()
    picture.save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    return f"data:image/png;base64,{text}"


def fill(template: str, numbers: dict) -> tuple[str, str]:
    """Fill templates/TEMPLATE.jinja: the text of the picture or page, and its caption."""
    loader = jinja2.FileSystemLoader(FOLDER)
    whitespace = {"trim_blocks": True, "lstrip_blocks": True}
    strict = {"undefined": jinja2.StrictUndefined, "autoescape": True}
    environment = jinja2.Environment(loader=loader, **whitespace, **strict)
    environment.filters["png_url"] = png_url
    found = environment.get_template(f"{template}.jinja")
    module = found.make_module(numbers)
    lines = [line for line in str(module).splitlines() if line.strip()]
    caption = getattr(module, "caption", "")
    return "\n".join(lines) + "\n", str(caption).strip()
