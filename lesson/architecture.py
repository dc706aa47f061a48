"""Draw docs/architecture.svg: MERV from frames to answer, with the real shapes of a configuration.

    python -m lesson.architecture

Every number in the picture is read from merv.MERVS, so the picture cannot disagree with the code.
"""

from __future__ import annotations

from pathlib import Path

from lesson.templating import fill
from merv import MERVS, MERVConfig

PICTURE = Path(__file__).parents[1] / "docs" / "architecture.svg"


def draw(config: MERVConfig) -> str:
    """The picture of one configuration with four encoders, as SVG."""
    picture, _ = fill("1-architecture", {"config": config})
    return picture


if __name__ == "__main__":
    PICTURE.write_text(draw(MERVS["merv"]), encoding="utf-8")
