"""Ten pictures of MERV, each drawn from the tensors of a real model: python -m lesson figures

Each function below takes a Lab and returns the numbers of one picture. The template of the same
name, in templates/, draws them and says what to see. views.py measures them.
"""

from __future__ import annotations

import base64
import io
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data import TEMPLATES, preprocess, render_prompt
from eval import Clips, summarise
from lesson import views
from merv import MERV, MERVS, pooling_matrix
from support.benchmarks import load_questions
from support.errors import VideoError
from support.files import whole_lines, write_file
from support.report import read_result
from support.templates import read_template
from support.video import load_video

TWO_KINDS = "split-cross-attention-250-steps"  # a row of the claims, in the world of two kinds
CURVES = ("MERV", "LanguageBind", "DINOv2", "ViViT", "SigLIP")  # rows in figure 10, in this order
FOLDER = Path(__file__).with_name("templates")


@dataclass
class Lab:
    """A model, a clip with questions about it, and what is needed to look inside."""

    model: MERV
    frames: Tensor  # uint8 (T, 3, H, W)
    pixels: dict[str, Tensor]  # encoder -> (T_e, 3, side, side)
    questions: list[str]
    clips: list[views.Asked] = field(default_factory=list)  # of a benchmark, for figures 5 and 6
    claims: dict[str, dict] = field(default_factory=dict)  # row -> result, for figures 6 and 10

    @property
    def labels(self) -> list[str]:
        """The short names of the encoders, in order."""
        return [encoder.label for encoder in self.model.config.encoders]


def open_lab(model: MERV, video: str | Path, questions: list[str]) -> Lab:
    """Read a clip, and preprocess it for each encoder."""
    configs = model.config.encoders
    longest = max(config.num_frames for config in configs)
    frames = load_video(video, longest)  # a still is repeated
    pixels = {config.name: preprocess(frames, config) for config in configs}
    return Lab(model, frames, pixels, questions)


def read_claims(folder: str | Path, benchmark: str) -> dict[str, dict]:
    """The newest result of each row of `python -m miniature claims`, and its steps of training."""
    files = list(Path(folder).glob(f"*-0-????????/eval/{benchmark}.json"))  # ROW-SEED-DIGEST
    files.sort(key=lambda file: file.stat().st_mtime)
    claims = {}
    for file in files:
        run = file.parents[1]
        row = run.name[: -len("-0-????????")]
        steps = len(whole_lines(run / "metrics.jsonl"))
        claims[row] = read_result(file) | {"steps": steps}
    return claims


def read_clips(model: MERV, benchmark: str, folder: str | Path, count: int) -> list[views.Asked]:
    """The first `count` clips of a benchmark, encoded, with their questions."""
    clips = Clips(load_questions(benchmark, folder), folder, model.config.encoders)
    found = []
    for number in range(min(count, len(clips.groups))):
        _, pixels, failure = clips[number]
        if failure:
            fix = f"python eval.py --check --benchmark {benchmark} --data {folder} lists all."
            raise VideoError("A clip of the benchmark cannot be used.", failure, fix)
        found.append(views.look_both_ways(model, pixels, clips.groups[number]))
    return found


def png_url(image: Tensor) -> str:
    """A data: URL with a PNG of a frame, uint8 (3, h, w), or of values 0 to 1, (h, w[, 3])."""
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
    found = read_template(FOLDER / f"{template}.jinja")
    module = found.make_module(numbers | {"png_url": png_url})
    caption = getattr(module, "caption", "")
    return str(module).strip() + "\n", str(caption).strip()


def architecture_numbers(lab: Lab) -> dict:
    """Figure 1: the configurations whose shapes the picture shows."""
    return {"full": MERVS["merv"], "small": MERVS["miniature"]}


def views_numbers(lab: Lab) -> dict:
    """Figure 2: the frame that each time step begins with, and each encoder's features."""
    t = lab.model.config.encoders[0].grid[0]
    every = len(lab.frames) // t
    rows = {}
    for config in lab.model.config.encoders:
        encoder = lab.model.encoders[config.name]
        features = views.features_of(encoder, lab.pixels[config.name])
        rows[config.label] = views.principal_colours(features)
    return {"frames": lab.frames[::every][:t], "rows": rows}


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
    counts = views.whose_view_matters(lab.model, lab.clips)
    kinds = sorted({key[-1] for key in counts})
    return {"counts": counts, "kinds": kinds, "labels": lab.labels, "clips": len(lab.clips)}


def mixing_numbers(lab: Lab) -> dict:
    """Figure 6: the mixing weights (clips, e), and those in the world of two kinds, if trained."""
    worlds = {"the usual world": views.mixing_of(lab.model, lab.clips)}
    split = lab.claims.get(TWO_KINDS)
    if split and split["settings"]["encoders"] == list(lab.model.encoders):
        rows = {}
        for question in split["questions"]:
            in_colour = question.prompt != "What happens?"  # all that grey clips are asked
            rows[in_colour, question.video] = question.mixing_weights
        weights = [rows[clip] for clip in sorted(rows)]
        worlds["a world of two kinds: grey clips that move, then coloured ones that do not"] = (
            torch.tensor(weights)
        )
    return {"worlds": worlds, "labels": lab.labels}


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
    """Figure 8: which tokens each token of three questions may look at, as the KV cache has it."""
    questions = (lab.questions * 3)[:3]
    cache = views.read_prompts(lab.model, lab.pixels, questions)
    visible = cache.mask[:, 0] == 0  # (questions, s, prefix + s)
    prefix = cache.prefix_length
    shown = min(8, prefix)  # of the tokens of the prefix, the last ones
    visible = visible[:, :, prefix - shown :].cpu()
    lengths = cache.lengths.tolist()
    masks = list(zip(questions, visible, lengths, strict=True))
    return {"masks": masks, "prefix": prefix, "shown": shown}


def attention_numbers(lab: Lab) -> dict:
    """Figure 9: where the last token of the first question looks, (layers, t, h, w)."""
    question = lab.questions[0]
    looks = views.where_it_looks(lab.model, lab.pixels, question)
    return {"looks": looks, "question": question}


def learning_numbers(lab: Lab) -> dict:
    """Figure 10: kind of question -> MERV or one encoder -> [(steps of training, accuracy in %)].

    A row NAME that was trained for another number of steps is called NAME-N-steps.
    """
    panels = defaultdict(lambda: defaultdict(list))
    for name in CURVES:
        for row, result in lab.claims.items():
            if not re.fullmatch(rf"{name}(-\d+-steps)?", row):
                continue
            for kind, score in summarise(result["questions"]).items():
                point = (result["steps"], 100 * score.accuracy)
                panels[kind][name].append(point)
                panels[kind][name].sort()
    return {"panels": panels}


def page_numbers(lab: Lab, other: views.Pooled) -> dict:
    """The page of one clip: figures 2, 7 and 9, pooled grids, and answers with one view changed.

    other: pooled features of another clip, which one encoder after the other is given.
    """
    model = lab.model
    names = list(model.encoders)

    def ask(kept, pooled):
        reader = views.reader_of_features(model, kept)
        return reader.answer(pooled, lab.questions, views.LONGEST)

    clip = views.look_both_ways(model, lab.pixels, [])
    pooled = {}
    answers = {"all encoders": ask(names, clip.pooled)}
    for encoder in model.config.encoders:
        label, name = encoder.label, encoder.name
        pooled[label] = views.principal_colours(clip.pooled[name])
        others = [kept for kept in names if kept != name]
        # A learned mixer has one score for each encoder, and nothing to mix fewer with.
        if others and model.config.mixer != "learned":
            answers[f"without {label}"] = ask(others, clip.pooled)
        deceived = clip.pooled | {name: other[name]}
        answers[f"{label} deceived"] = ask(names, deceived)
    looks = {}
    for question in lab.questions:
        look = views.where_it_looks(model, lab.pixels, question)
        look = look.mean(0)  # over layers: (t, h, w)
        looks[question] = look / look.max()
    shown = {"pooled": pooled, "answers": answers, "looks": looks}
    return shown | views_numbers(lab) | strip_numbers(lab)


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
NEEDS = {"5-matters": "clips", "6-mixing": "clips", "10-learning": "claims"}  # fields of Lab


def write_figures(lab: Lab, folder: Path) -> list[str]:
    """Draw all figures that can be drawn, and README.md with their captions; the lines to print."""
    page = "# Pictures of MERV, drawn from real tensors\n\n"
    command = f"python -m lesson figures --clips {len(lab.clips)}"
    page += f"`{command}` drew them from the model `{lab.model.config.name}`.\n"
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
