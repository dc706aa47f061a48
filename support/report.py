"""One HTML page of stored results."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import jinja2
import torch
from PIL import Image

from support.benchmarks import FPS, TEMPORAL, Question, list_videos
from support.errors import UserError, VideoError
from support.files import write_file
from support.video import load_video


def film_strip(question: Question, settings: dict, num_frames: int = 6) -> str:
    """Frames of a question's clip side by side, as the address of an embedded JPEG; "" if gone."""
    videos = list_videos(Path(settings["data"]) / "videos")
    try:
        frames = load_video(videos[question.video], num_frames, *question.cut, FPS)
    except (KeyError, VideoError):
        return ""
    strip = Image.fromarray(torch.cat(list(frames), dim=2).permute(1, 2, 0).numpy())
    strip.thumbnail((num_frames * 160, 120))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def write_report(runs: list[str], output: Path, summarise: Callable) -> None:
    """One HTML page of the stored results of some runs: no network, no script, no model needed.

    report.jinja says what is shown: the analyses of the paper's section 5. Jinja escapes whatever
    comes from annotations, models and judges.
    """
    results = []
    for run in runs:
        files = sorted(Path(run).glob("eval/*.json"))
        if not files:
            fix = "run `python eval.py --checkpoint RUN --benchmark NAME --data DIR` first."
            raise UserError(f"{run} has no results.", "there is no RUN/eval/*.json.", fix)
        for result in (json.loads(file.read_text()) for file in files):
            questions = [Question(**q) for q in result["questions"]]
            results.append(result | {"run": Path(run).name, "questions": questions})
    source = Path(__file__).with_name("report.jinja").read_text()
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    page = jinja2.Template(source, undefined=jinja2.StrictUndefined, **options)
    shown = {"results": results, "temporal": TEMPORAL | {"temporal"}}
    write_file(output, page.render(shown, summarise=summarise, film_strip=film_strip))
    print(f"report: {output}")
