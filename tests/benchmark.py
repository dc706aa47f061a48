"""Compare the speed of eval.py with one clip at a time and with several together.

    python -m tests.benchmark RUN [DATA]     such as runs/miniature-frozen data/miniature/test

The two take turns in one process, so that a machine that is slow for a while slows down both.
Prints milliseconds for each clip and the ratio of the fastest passes, and exits with 1 if an answer
differs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from eval import EvalConfig, evaluate
from merv import MERV

TURNS = 3


def milliseconds_per_clip(model: MERV, data: str, config: EvalConfig) -> tuple[float, list[str]]:
    """Evaluate miniature-open once, with nothing stored: the time, and all answers."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        questions = evaluate(model, "miniature-open", data, folder, config)
        seconds = time.perf_counter() - started
    clips = len({question.video for question in questions})
    return 1000 * seconds / clips, [question.answer for question in questions]


def main(run: str, data: str = "data/miniature/test") -> None:
    """Print a line for each turn, and the ratio."""
    model = MERV.from_pretrained(Path(run))
    alone, together = [], []
    for turn in range(TURNS):
        time_alone, answers_alone = milliseconds_per_clip(model, data, EvalConfig(batch_videos=1))
        time_together, answers_together = milliseconds_per_clip(model, data, EvalConfig())
        alone.append(time_alone)
        together.append(time_together)
        print(f"turn {turn + 1}: {alone[-1]:.1f} ms a clip alone, {together[-1]:.1f} ms together")
        if answers_alone != answers_together:
            sys.exit("The answers differ.")
    print(f"{min(alone) / min(together):.2f} times as fast together")


if __name__ == "__main__":
    main(*sys.argv[1:])
