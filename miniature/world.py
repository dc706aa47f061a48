"""A small video world: short clips whose content is known, and questions about them.

A clip shows one to three objects on a noisy background. They have different colours and different
shapes, lie anywhere and may partly hide each other. One of them, the actor, performs an action for
8 frames. Ten actions form five pairs; each is the other played backwards, so no single frame shows
which of the two it is. Four more actions have no direction of time.

The seed of a clip decides everything about it. Read next: specialists.py.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator, default_rng

from data import TEMPLATES, render_prompt
from support import dataset_writer
from support.cli import progress
from support.dataset_writer import Fact
from support.drawing import draw_background, draw_shape
from support.processes import run_on_all_cores

SIZE = 32  # height and width of a frame in pixels
NUM_FRAMES = 8  # of a clip
FPS = 8  # frames per second
CLIPS = {"train": 8000, "val": 200, "test": 600}  # sizes and learning rates were chosen on val
VOCAB_SIZE = 640  # of the tokenizer: 256 bytes, the letters, and the words of the world

# Clip n of a split has the seed FIRST_SEED[split] + n, so no two splits share a clip.
FIRST_SEED = {
    "train": 0,
    "val": 1_000_000,
    "test": 2_000_000,
    "probe": 3_000_000,  # to measure what the specialists' features contain
    "pretraining": 4_000_000,  # of the specialists
}

COLOURS = {  # red, green and blue in [0, 1]
    "red": (0.95, 0.15, 0.15), "green": (0.15, 0.8, 0.2), "blue": (0.2, 0.3, 1.0),
    "yellow": (0.95, 0.9, 0.15), "pink": (1.0, 0.45, 0.85), "white": (1.0, 1.0, 1.0),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
TEXTURES = ("plain", "striped", "shaded")
PAIRS = (  # each action is the other one played backwards
    ("moves left", "moves right"),
    ("moves up", "moves down"),
    ("grows", "shrinks"),
    ("appears", "fades"),
    ("orbits clockwise", "orbits counterclockwise"),
)
REVERSED = {}  # an action -> the same action played backwards
for _forward, _backward in PAIRS:
    REVERSED[_forward] = _backward
    REVERSED[_backward] = _forward
ACTIONS = (*REVERSED, "stays", "shakes", "blinks", "pulses")
NUMBERS = ("one", "two", "three")
PLACES = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class Thing:
    """One object."""

    colour: str  # one of COLOURS
    shape: str  # one of SHAPES
    texture: str  # one of TEXTURES
    x: float  # its centre in pixels from the left edge; an actor moves around it
    y: float  # likewise, from the top edge
    radius: float  # in pixels


@dataclass(frozen=True)
class Scene:
    """What a clip shows."""

    things: tuple[Thing, ...]  # from back to front
    actor: int  # which of them acts
    action: str  # one of ACTIONS
    travel: float  # how far a moving actor goes, in pixels
    phase: float  # where in its period a repeated action starts, in [0, 1)


def sample_scene(rng: Generator, count: int) -> Scene:
    """Draw a scene with `count` objects, one to three."""
    actor = int(rng.integers(count))
    action = str(rng.choice(ACTIONS))
    travel = rng.uniform(7, 10)
    radius = rng.uniform(5, 6.2, count)
    reach = radius.copy()  # how close to the edge of the frame a centre may lie
    reach[actor] += travel / 2 if action.startswith(("moves", "orbits")) else 2
    nearest = beside = 0
    # Pixels between centres, so that objects touch at most until the actor moves, and between a
    # centre and the borders of the quarters, so that each object clearly lies in one of them.
    while nearest < 12 or beside < 2:
        x, y = rng.uniform(reach, SIZE - reach, (2, count))
        distances = np.hypot(x - x[:, None], y - y[:, None])
        np.fill_diagonal(distances, SIZE)
        nearest = distances.min()
        beside = np.abs([x - SIZE / 2, y - SIZE / 2]).min()
    colours = rng.permutation(list(COLOURS)).tolist()
    shapes = rng.permutation(SHAPES).tolist()
    textures = rng.choice(TEXTURES, count).tolist()
    looks = zip(colours, shapes, textures, x, y, radius, strict=False)  # the first `count` of each
    return Scene(tuple(Thing(*look) for look in looks), actor, action, travel, rng.random())


def motion(scene: Scene) -> np.ndarray:
    """What the action does to the actor in each frame, float (4, T).

    The rows are its offsets in x and y in pixels, a factor of its radius, and its opacity.
    """
    frame = np.arange(NUM_FRAMES)
    t = np.linspace(0, 1, NUM_FRAMES)
    x, y = np.zeros((2, NUM_FRAMES))
    size, opacity = np.ones((2, NUM_FRAMES))
    # A point (x, y) is the complex number x + iy. Multiplying it by exp(i * angle) turns it around
    # (0, 0), clockwise as seen on the screen because y points down.
    start = np.exp(2j * np.pi * scene.phase)
    backward = scene.action in [second for _, second in PAIRS]
    match REVERSED[scene.action] if backward else scene.action:
        case "moves left":
            x = scene.travel * (0.5 - t)
        case "moves up":
            y = scene.travel * (0.5 - t)
        case "grows":
            size = 0.4 + 0.6 * t
        case "appears":
            opacity = t
        case "orbits clockwise":
            orbit = scene.travel / 2 * start * np.exp(1.6j * np.pi * t)
            x, y = orbit.real, orbit.imag
        case "shakes":
            shake = 1.5 * start * (-1) ** frame
            x, y = shake.real, shake.imag
        case "blinks":
            opacity = (frame + int(4 * scene.phase)) // 2 % 2
        case "pulses":
            size = 0.75 + 0.25 * (start * np.exp(4j * np.pi * t)).real
    states = np.stack([x, y, size, opacity])
    return states[:, ::-1] if backward else states


def draw_clip(seed: int, count: int | None = None) -> tuple[Scene, np.ndarray]:
    """Draw a clip: its scene, and its frames as uint8 (T, 3, H, W).

    count: how many objects; None: one, two and three in turn, so that all are equally frequent.
    """
    rng = default_rng(seed)
    scene = sample_scene(rng, count or 1 + seed % 3)
    frames = draw_background(NUM_FRAMES, SIZE, rng)
    for index, a in enumerate(scene.things):
        action = scene.action if index == scene.actor else "stays"
        x, y, size, opacity = motion(replace(scene, action=action))
        colour = COLOURS[a.colour]
        draw_shape(frames, a.shape, a.texture, colour, a.x + x, a.y + y, a.radius * size, opacity)
    frames += 0.03 * rng.standard_normal(frames.shape)
    return scene, (255 * np.clip(frames, 0, 1)).astype(np.uint8)


def place_of(thing: Thing) -> str:
    """The quarter of the frame that an object lies in, one of PLACES."""
    row = "bottom" if thing.y > SIZE / 2 else "top"
    column = "right" if thing.x > SIZE / 2 else "left"
    return f"{row} {column}"


def facts(scene: Scene) -> list[Fact]:
    """All questions about a clip that have one clear answer."""
    found = []
    for a in scene.things:
        found += [
            Fact("colour", f"What colour is the {a.shape}?", a.colour, tuple(COLOURS)),
            Fact("shape", f"What shape is the {a.colour} object?", a.shape, SHAPES),
            Fact("texture", f"What texture does the {a.colour} object have?", a.texture, TEXTURES),
        ]
    travels = scene.action.startswith(("moves", "orbits"))
    for index, a in enumerate(scene.things):
        if travels and index == scene.actor:
            continue  # it has no fixed place
        question = f"Where is the {a.colour} object?"
        found.append(Fact("where", question, place_of(a), PLACES))
    number = NUMBERS[len(scene.things) - 1]
    found.append(Fact("how many", "How many objects are there?", number, NUMBERS))
    kind = "temporal" if scene.action in REVERSED else "what happens"
    found.append(Fact(kind, "What happens?", scene.action, ACTIONS))
    return found


def describe(scene: Scene) -> str:
    """The caption of a clip, for example "There is a plain red ring that moves left."."""
    captions = [f"a {a.texture} {a.colour} {a.shape}" for a in scene.things]
    captions[scene.actor] += f" that {scene.action}"
    return f"There is {' and '.join(captions)}."


def make_clip(kind: str, split: str, number: int) -> tuple[np.ndarray, str, list[Fact]]:
    """Frames, caption and facts of a clip in a world of that kind; see `write_world`."""
    seed = FIRST_SEED[split] + number
    scene, frames = draw_clip(seed)
    known = facts(scene)
    if kind == "shuffled":
        # Not always the next clip: it would always have one object more, or one instead of three.
        _, frames = draw_clip(seed + 1 + number // 3 % 3)
    if kind == "two_kinds":
        grey = number % 2 == 1
        if grey:
            frames = frames[:, [1, 1, 1]]  # the green channel three times
        else:
            frames = frames[default_rng(number).permutation(NUM_FRAMES)]
        known = [fact for fact in known if (fact.question == "What happens?") == grey]
    return frames, describe(scene), known


def write_clip(folder: Path, kind: str, split: str, number: int) -> tuple[str, list[Fact]]:
    """Draw a clip and write its video; returns its caption and facts."""
    frames, caption, known = make_clip(kind, split, number)
    name = dataset_writer.CLIP.format(number)
    dataset_writer.write_video(frames, FPS, folder / f"videos/{name}.mp4")
    return caption, known


def write_split(folder: Path, split: str, count: int, kind: str) -> dict[str, list[dict]]:
    """Write the clips of a split and the files about them, which are returned.

    Training files for train, evaluation files for test, and both for val: train.py logs the loss
    on its conversations.
    """
    (folder / "videos").mkdir(parents=True)
    captions, known = [], []
    clips = run_on_all_cores(partial(write_clip, folder, kind, split), range(count))
    for caption, clip_facts in progress(clips, f"draw {split} clips", count):
        captions.append(caption)
        known.append(clip_facts)
    files = {}
    if split != "test":
        files |= dataset_writer.training_files(captions, known, FIRST_SEED[split])
    if split != "train":
        files |= dataset_writer.evaluation_files(known, PAIRS, FIRST_SEED[split])
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))
    return files


def write_world(folder: Path, clips: dict[str, int], kind: str = "plain") -> None:
    """Write clips, questions and a tokenizer into a new folder. clips: split -> how many.

    Two other kinds of world break the link between clips and questions on purpose:
      shuffled   each clip is replaced by one of the next three, so questions do not fit (control)
      two_kinds  clips with odd numbers are grey and are asked only what happens; the others have
                 their frames in random order and are asked everything else
    """
    for split, count in clips.items():
        files = write_split(folder / split, split, count, kind)
        if split != "train":
            continue
        # The tokenizer is trained on rendered prompts, which are what it will encode.
        texts = []
        for stage, template in (("stage1", "caption"), ("stage2", "base")):
            for row in files[stage]:
                turns = render_prompt(row["conversations"], TEMPLATES[template])
                texts += [text for text, _ in turns]
        dataset_writer.write_tokenizer(texts, VOCAB_SIZE, folder / "tokenizer.model")
