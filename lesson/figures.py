"""Ten pictures of MERV, each drawn from the tensors of a real model: python -m lesson figures

Each function below takes a Lab and returns the numbers of one picture. The template of the same
name, in templates/, draws them and says what to see. views.py measures them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data import TEMPLATES, preprocess, render_prompt
from eval import Clips
from lesson import views
from lesson.templating import fill
from merv import MERV, MERVS, pooling_matrix
from support.benchmarks import load_questions
from support.errors import VideoError
from support.files import whole_lines, write_file
from support.runs import running_average
from support.video import load_video

MOST = 8  # time steps or layers that a picture shows, evenly spaced


@dataclass
class Lab:
    """A model, a clip with questions about it, and what is needed to look inside."""

    model: MERV
    frames: Tensor  # uint8 (T, 3, H, W)
    pixels: dict[str, Tensor]  # encoder -> (T_e, 3, side, side)
    questions: list[str]
    clips: list[views.Asked] = field(default_factory=list)  # of a benchmark, for figures 5 and 6
    metrics: list[dict] = field(default_factory=list)  # of the training run, for figure 10

    @property
    def labels(self) -> list[str]:
        """The short names of the encoders, in order."""
        return [encoder.label for encoder in self.model.config.encoders]


def open_lab(model: MERV, video: str | Path, questions: list[str], run: str | Path) -> Lab:
    """Load a clip and, if `run` is a folder of train.py, the metrics of the training."""
    configs = model.config.encoders
    longest = max(config.num_frames for config in configs)
    frames = load_video(video, longest)  # a still is repeated
    pixels = {config.name: preprocess(frames, config) for config in configs}
    lab = Lab(model, frames, pixels, questions)
    log = Path(run) / "metrics.jsonl"
    if log.is_file():
        lab.metrics = [json.loads(line) for line in whole_lines(log)]
    return lab


def read_clips(model: MERV, benchmark: str, folder: str | Path, count: int) -> list[views.Asked]:
    """The first `count` clips of a benchmark, encoded, with their questions."""
    clips = Clips(load_questions(benchmark, folder), folder, model.config.encoders)
    found = []
    count = min(count, len(clips.groups))
    for number in range(count):
        _, pixels, failure = clips[number]
        if failure:
            fix = f"python eval.py --check --benchmark {benchmark} --data {folder} lists all."
            raise VideoError("A clip of the benchmark cannot be used.", failure, fix)
        found.append(views.look_both_ways(model, pixels, clips.groups[number]))
    return found


def spaced(count: int) -> list[int]:
    """At most MOST of the numbers from 0 to count - 1, evenly spaced."""
    places = torch.linspace(0, count - 1, min(count, MOST))
    return places.round().long().tolist()


# ------------------------------------------------------------------ the numbers behind each picture


def architecture_numbers(lab: Lab) -> dict:
    """Figure 1: the full-size model, whose shapes the picture shows."""
    return {"config": MERVS["merv"]}


def views_numbers(lab: Lab) -> dict:
    """Figure 2: some time steps, the clip's frames at these, and each encoder's features."""
    t = lab.model.config.encoders[0].grid[0]
    steps = spaced(t)
    every = len(lab.frames) / t
    frames = [lab.frames[int(step * every)] for step in steps]
    rows = {}
    for config in lab.model.config.encoders:
        clip = lab.pixels[config.name]
        encoder = lab.model.encoders[config.name]
        features = views.features_of(encoder, clip)
        colours = views.principal_colours(features)
        rows[config.label] = colours[steps]
    return {"steps": steps, "frames": frames, "rows": rows}


def pooling_numbers(lab: Lab) -> dict:
    """Figure 3: the pooling matrices (side, size) of the paper's grids and of this model's."""
    sizes = {(4, 2), (16, 8), (14, 8)}
    config = lab.model.config
    for encoder in config.encoders:
        sizes.add((encoder.grid[1], config.pooled_side))
    cpu = torch.device("cpu")
    windows = []
    for size, side in sorted(sizes):
        windows.append(pooling_matrix(size, side, cpu))
    return {"windows": windows}


def reach_numbers(lab: Lab) -> dict:
    """Figure 4: which frames reach which time step, in the paper's model and in this one."""
    generator = torch.Generator().manual_seed(0)
    paper = {}
    own = {}
    for config in MERVS["merv"].encoders:
        clip = torch.randn(config.num_frames, 3, 8, 8, generator=generator)
        encoder = views.narrow(config)
        paper[config.label] = views.reach(encoder, clip)
    for config in lab.model.config.encoders:
        encoder = lab.model.encoders[config.name]
        own[config.label] = views.reach(encoder, lab.pixels[config.name])
    return {"groups": {"the paper's frames": paper, lab.model.config.name: own}}


def matters_numbers(lab: Lab) -> dict:
    """Figure 5: whose view matters for which kind of question."""
    found = views.whose_view_matters(lab.model, lab.clips)
    return {"found": found, "labels": lab.labels, "clips": len(lab.clips)}


def mixing_numbers(lab: Lab) -> dict:
    """Figure 6: the mixing weights (clips, e)."""
    return {"weights": views.mixing_of(lab.model, lab.clips), "labels": lab.labels}


def strip_numbers(lab: Lab) -> dict:
    """Figure 7: the questions and the model's answers, token by token."""
    conversation = []
    answers = lab.model.answer(lab.pixels, lab.questions, views.LONGEST)
    for question, answer in zip(lab.questions, answers, strict=True):
        conversation.append({"from": "human", "value": question})
        conversation.append({"from": "gpt", "value": answer.text})
    turns = render_prompt(conversation, TEMPLATES[lab.model.template])
    tokens = views.strip(lab.model, turns)
    return {"tokens": tokens, "visual": lab.model.config.num_visual}


def mask_numbers(lab: Lab) -> dict:
    """Figure 8: the attention mask of three questions that share a prefix."""
    questions = (lab.questions * 3)[:3]
    visible = views.prompt_mask(lab.model, lab.pixels, questions)
    _, lengths = lab.model.prompts(questions)
    _, s, keys = visible.shape
    prefix = keys - s
    shown = min(MOST, prefix)  # of the tokens of the prefix, the last ones
    visible = visible[:, :, prefix - shown :]
    lengths = lengths.tolist()
    masks = list(zip(questions, visible, lengths, strict=True))
    return {"masks": masks, "prefix": prefix, "shown": shown}


def attention_numbers(lab: Lab) -> dict:
    """Figure 9: where the last token of the first question looks, (layers, t, h, w)."""
    question = lab.questions[0]
    looks = views.where_it_looks(lab.model, lab.pixels, question)
    return {"looks": looks, "layers": spaced(len(looks)), "question": question}


def learning_numbers(lab: Lab) -> dict:
    """Figure 10: the losses and the mixing weights during training, as (step, value)."""
    average = running_average([row["loss"] for row in lab.metrics])
    losses = defaultdict(list)
    mixing = defaultdict(list)
    for row, loss in zip(lab.metrics, average, strict=True):
        step = row["step"]
        losses["running average"].append((step, loss))
        if "held_out_loss" in row:
            losses["held-out rows"].append((step, row["held_out_loss"]))
        for label, weight in zip(lab.labels, row["mixing_weights"], strict=False):
            mixing[label].append((step, weight))
    return {"losses": losses, "mixing": mixing}


def page_numbers(lab: Lab, other: views.Pooled) -> dict:
    """The page of one clip: figures 2 and 7, mixing weights, and answers with one view changed.

    other: pooled features of another clip, which one encoder after the other is given.
    """
    model = lab.model
    names = list(model.encoders)

    def ask(kept, pooled):
        reader = views.reader_of_features(model, kept)
        return reader.answer(pooled, lab.questions, views.LONGEST)

    shown = views_numbers(lab) | strip_numbers(lab)
    clip = views.look_both_ways(model, lab.pixels, [])
    pooled = {}
    answers = {"all encoders": ask(names, clip.pooled)}
    for label, name in zip(lab.labels, names, strict=True):
        colours = views.principal_colours(clip.pooled[name])
        pooled[label] = colours[shown["steps"]]
        others = [kept for kept in names if kept != name]
        # A learned mixer has one score for each encoder, and nothing to mix fewer with.
        if others and model.config.mixer != "learned":
            answers[f"without {label}"] = ask(others, clip.pooled)
        deceived = clip.pooled | {name: other[name]}
        answers[f"{label} deceived"] = ask(names, deceived)
    return shown | {"pooled": pooled, "answers": answers}


FIGURES = {  # name of the file and of the template -> numbers
    "1-architecture": architecture_numbers,
    "2-views": views_numbers,
    "3-pooling": pooling_numbers,
    "4-reach": reach_numbers,
    "5-matters": matters_numbers,
    "6-mixing": mixing_numbers,
    "7-strip": strip_numbers,
    "8-mask": mask_numbers,
    "9-attention": attention_numbers,
    "10-learning": learning_numbers,
}
NEEDS = {"5-matters": "clips", "6-mixing": "clips", "10-learning": "metrics"}  # fields of Lab


def write_figures(lab: Lab, folder: Path) -> list[str]:
    """Draw all figures that can be drawn, and README.md with their captions; the lines to print."""
    page = "# Pictures of MERV, drawn from real tensors\n\n"
    page += f"`python -m lesson figures` drew them from the model {lab.model.config.name}.\n"
    report = []
    for name, numbers in FIGURES.items():
        need = NEEDS.get(name)
        if need and not getattr(lab, need):
            report.append(f"skipped {name}: there are no {need}")
            continue
        picture, caption = fill(name, numbers(lab))
        number, _, title = name.partition("-")
        page += f"\n## Figure {number}: {title}\n\n"
        page += f"![{title}]({name}.svg)\n\n{caption}\n"
        file = folder / f"{name}.svg"
        write_file(file, picture)
        report.append(f"wrote {file}")
    write_file(folder / "README.md", page)
    report.append(f"wrote {folder}/README.md")
    return report
