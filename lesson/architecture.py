"""Draw docs/architecture.svg: MERV from frames to answer, with the real shapes of a configuration.

    python -m lesson.architecture

Every number in the picture is read from merv.MERVS, so the picture cannot disagree with the code.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from merv import MERVS, MERVConfig

PICTURE = Path(__file__).parents[1] / "docs" / "architecture.svg"
COLOURS = ("#3566c4", "#d07a1c", "#2f8f6b", "#a4478f")  # one for each encoder
NAMES = {  # what stands in a box for an encoder's label: its name and what it was trained on
    "languagebind": "LanguageBind: video and language",
    "dinov2": "DINOv2: objects and their parts",
    "vivit": "ViViT: actions over time",
    "siglip": "SigLIP: images and language",
}
WIDTH, HEIGHT = 1000, 455
ROW, TOP = 76, 58  # distance between two encoders, and where the first one stands

STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1c2026; }
.small { font-size: 12px; fill: #5b6470; }
.box { fill: #ffffff; stroke: #5b6470; }
.arrow { stroke: #5b6470; fill: none; marker-end: url(#head); }
@media (prefers-color-scheme: dark) {
  text { fill: #e8eaee; } .small { fill: #a0a8b4; }
  .box { fill: #1c2026; stroke: #a0a8b4; } .arrow { stroke: #a0a8b4; }
}
"""


def box(x: float, y: float, width: float, lines: list[str], colour: str = "") -> str:
    """A rectangle with a title line and smaller lines below it; (x, y) is its top left corner."""
    height = 22 + 18 * (len(lines) - 1) + 12
    style = f' style="stroke: {colour}; stroke-width: 2"' if colour else ""
    parts = [f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"{style}/>']
    for number, line in enumerate(lines):
        css = ' class="small"' if number else ""
        left, baseline = x + 10, y + 20 + 18 * number
        parts.append(f'<text{css} x="{left}" y="{baseline}">{escape(line)}</text>')
    return "\n".join(parts)


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight arrow from (x1, y1) to (x2, y2)."""
    return f'<path class="arrow" d="M {x1} {y1} L {x2} {y2}"/>'


def sizes(*numbers: int) -> str:
    """A shape as it is written in the picture: 16 × 8 × 8."""
    return " × ".join(str(number) for number in numbers)


def draw(config: MERVConfig) -> str:
    """The picture of one configuration with four encoders, as SVG."""
    t, h, w = config.grid
    d = config.llm.hidden_size
    n = config.num_visual
    frames = max(encoder.num_frames for encoder in config.encoders)
    middle = TOP + 1.5 * ROW + 26  # the height at which the four paths meet
    parts = [
        box(10, middle - 26, 100, ["one clip", f"{frames} frames"]),
        '<text x="152" y="36">four frozen encoders</text>',
        '<text x="454" y="36">equation 1: pool, then project</text>',
        '<text x="752" y="36">equation 2: mix</text>',
    ]
    for number, encoder in enumerate(config.encoders):
        y = TOP + ROW * number
        colour = COLOURS[number]
        grid = sizes(*encoder.grid, encoder.hidden_size)
        taken = f"{encoder.num_frames} frames → {grid}"
        projected = f"x: {n} tokens × {d}"
        parts += [
            arrow(110, middle, 147, y + 26),
            box(152, y, 262, [NAMES[encoder.label], taken], colour),
            arrow(414, y + 26, 449, y + 26),
            box(454, y, 258, [f"average to {sizes(t, h, w)}, Linear", projected], colour),
            arrow(712, y + 26, 747, middle),
        ]
    mixer = ["one query Q", "softmax over encoders", f"→ {n} visual tokens × {d}"]
    parts += [
        box(752, middle - 35, 236, mixer),
        arrow(870, middle + 36, 870, 393),
        box(454, 398, 534, [f"LLaMA-2 reads [BOS], {n} visual tokens and the question"]),
        arrow(454, 415, 419, 415),
        box(152, 398, 262, ["the answer"]),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            "<title>MERV: four encoders, two equations, one language model</title>",
            f"<style>{STYLE}</style>",
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            ' orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="#7a8494"/></marker>',
            *parts,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Write the picture that README.md shows."""
    PICTURE.write_text(draw(MERVS["merv"]), encoding="utf-8")
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
