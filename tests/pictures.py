"""Do the committed pictures still show what a model trained today shows?

    python -m lesson figures --output FOLDER
    python -m tests.pictures FOLDER          compare with docs/figures; status 1 if they disagree

Pixels and digits may differ, because another CPU trains another model. What the pictures say may
not: the same pictures with the same words, the same encoders that matter, similar mixing weights.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree
from pathlib import Path

SVG = "{http://www.w3.org/2000/svg}"
COMMITTED = Path(__file__).resolve().parents[1] / "docs/figures"
SAME_TEXT = ("1-architecture", "3-pooling", "4-reach")  # these depend on no trained weight
SAME_WORDS = ("2-views", "5-matters", "6-mixing", "8-mask", "9-attention", "10-learning")
CLEAR = 0.25  # an encoder that leads by so much in one picture leads in the other one too
CLOSE = 0.15  # between two mean mixing weights


def texts(folder: Path, name: str) -> list[str]:
    """What is written in a picture, from top to bottom."""
    tree = xml.etree.ElementTree.parse(folder / f"{name}.svg")
    return [element.text for element in tree.iter(f"{SVG}text")]


def words(folder: Path, name: str) -> set[str]:
    """The words of a picture, with every number replaced by N.

    Whether figure 6 has a second world, and figure 10 is there, depends on which claims were run.
    """
    found = {re.sub(r"[\d.]+", "N", text) for text in texts(folder, name)}
    return {text for text in found if not text.startswith("a world of two kinds")}


def shares(folder: Path) -> dict[tuple, dict[str, float]]:
    """Figure 5: (part, kind) -> encoder -> its share of the answers, if there are at least 20."""
    found = {}
    tree = xml.etree.ElementTree.parse(folder / "5-matters.svg")
    for group in tree.iter(f"{SVG}g"):
        count, total = group.find(f"{SVG}text").text.split(" of ")
        if int(total) >= 20:
            key = group.get("data-part"), group.get("data-kind")
            by_encoder = found.setdefault(key, {})
            by_encoder[group.get("data-encoder")] = int(count) / int(total)
    return found


def leader(by_encoder: dict[str, float]) -> str:
    """The encoder with the largest share, or "" if another one is close."""
    second, first = sorted(by_encoder.values())[-2:]
    return max(by_encoder, key=by_encoder.get) if first - second >= CLEAR else ""


def mixing_weights(folder: Path) -> list[float]:
    """Figure 6: the mean mixing weight of each encoder in the usual world."""
    means = [re.search(r"  (\d\.\d+) ±", text) for text in texts(folder, "6-mixing")]
    return [float(mean[1]) for mean in means if mean][:4]


def differences(drawn: Path, committed: Path = COMMITTED) -> list[str]:
    """What the committed pictures say that the newly drawn ones do not; empty if they agree."""
    found = []
    for name in SAME_TEXT:
        if texts(drawn, name) != texts(committed, name):
            found.append(f"{name}: another text")
    for name in SAME_WORDS:
        both = all((folder / f"{name}.svg").exists() for folder in (drawn, committed))
        if both and words(drawn, name) != words(committed, name):
            found.append(f"{name}: {words(drawn, name) ^ words(committed, name)}")
    new = shares(drawn)
    for key, by_encoder in shares(committed).items():
        pair = {leader(by_encoder), leader(new[key]) if key in new else ""}
        if len(pair - {""}) == 2:
            found.append(f"5-matters, {key}: {by_encoder} committed, {new[key]} drawn")
    pairs = zip(mixing_weights(drawn), mixing_weights(committed), strict=True)
    if any(abs(one - other) > CLOSE for one, other in pairs):
        found.append("6-mixing: other mixing weights")
    return found


if __name__ == "__main__":
    disagreements = differences(Path(sys.argv[1]))
    print("\n".join(disagreements) or "docs/figures shows what this model shows")
    sys.exit(bool(disagreements))
