"""A small video world: clips with known content, and the questions that ask about it.

One to three objects, each of its own colour and shape, lie on a noisy background. The first, the
actor, does something for 8 frames. Twelve actions come in pairs, each the other played backwards,
so no single frame tells which of the two it is; four more have no direction. write_world makes
    train/videos/  train/images/  train/stage1.json  stage2.json         the format of Video-LLaVA
    val/videos/  val/open_q.json  open_a.json  mcq_q.json  mcq_a.json    the evaluation's format
    test/  the same as val                             tokenizer.model   SentencePiece
Everything follows from a clip's number. Read next: specialists.py.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import sentencepiece
from numpy.random import Generator, default_rng
from PIL import Image

from data import mcq_prompt, progress


@dataclass(frozen=True)
class World:
    """How much of the world is written."""

    train_clips: int = 3000
    train_images: int = 200  # stills, and
    train_texts: int = 100  # conversations about words: all modalities are trained
    val_clips: int = 100
    test_clips: int = 300
    vocab_size: int = 640  # of the tokenizer: 256 bytes, the letters and the world's words


SIZE, NUM_FRAMES, FPS = 32, 8, 8  # H = W in pixels, T, frames per second
CLIP, STILL = "videos/clip_{:06d}.mp4", "images/still_{:06d}.png"  # where they are written
# Clip n of a split is drawn from seed FIRST_SEED[split] + n: no two splits share a clip.
FIRST_SEED = {"train": 0, "images": 10**6, "val": 2 * 10**6, "test": 3 * 10**6,
              "specialists": 4 * 10**6}  # fmt: skip
COLOURS = {
    "red": (0.95, 0.15, 0.15), "green": (0.15, 0.8, 0.2), "blue": (0.2, 0.3, 1.0),
    "yellow": (0.95, 0.9, 0.15), "pink": (1.0, 0.45, 0.85), "white": (1.0, 1.0, 1.0),
}  # fmt: skip
SHAPES = {  # signed distance in pixels of (x, y), y down, to the outline of radius r
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.85 * r,
    "triangle": lambda x, y, r: np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.6 * r,
    "cross": lambda x, y, r: np.maximum(np.minimum(abs(x), abs(y)) - 0.33 * r,
                                        np.maximum(abs(x), abs(y)) - r),
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r,
    "bar": lambda x, y, r: np.maximum(abs(x) - r, abs(y) - 0.35 * r),
}  # fmt: skip
PAIRS = (  # each the other one played backwards
    ("moves left", "moves right"), ("moves up", "moves down"), ("grows", "shrinks"),
    ("appears", "fades"), ("orbits clockwise", "orbits counterclockwise"), ("merges", "splits"),
)  # fmt: skip
REVERSED = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
ACTIONS = (*REVERSED, "stays", "shakes", "blinks", "pulses")  # the last four have no direction
MOTIONS = {  # what changes for the actor at times t from 0 to 1: x + iy in pixels, size or opacity
    "moves left": lambda t, travel, rng: {"offset": travel * (0.5 - t)},
    "moves up": lambda t, travel, rng: {"offset": 1j * travel * (0.5 - t)},
    "grows": lambda t, travel, rng: {"size": 0.35 + 0.65 * t},
    "appears": lambda t, travel, rng: {"opacity": t},
    "orbits clockwise": lambda t, travel, rng: {  # y is down, so a growing angle turns clockwise
        "offset": travel / 3 * np.exp(2j * np.pi * (rng.random() + rng.uniform(0.6, 0.9) * t))},
    "merges": lambda t, travel, rng: {"offset": travel / 2 * np.outer((-1, 1), 1 - t)},  # 2 copies
    "shakes": lambda t, travel, rng: {"offset": rng.uniform(-2, 2, (len(t), 2)) @ (1, 1j)},
    "blinks": lambda t, travel, rng: {"opacity": (np.arange(len(t)) + rng.integers(4)) // 2 % 2},
    "pulses": lambda t, travel, rng: {
        "size": 0.75 + 0.25 * np.cos(2 * np.pi * (2 * t + rng.random()))},
}  # fmt: skip
NUMBERS = ("one", "two", "three")
PLACES = ("top left", "top", "top right", "left", "centre", "right",
          "bottom left", "bottom", "bottom right")  # fmt: skip


class Thing(NamedTuple):
    """One object; (x, y) is the centre around which it acts, in pixels, y down."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


class Scene(NamedTuple):
    """What a clip shows: the first of the things is the actor, the others stand still."""

    things: tuple[Thing, ...]
    action: str  # one of ACTIONS, or "" for a still
    travel: float  # pixels that the actor moves, if it does


def sample_scene(rng: Generator) -> Scene:
    """Objects of distinct colours and shapes, placed so that they never touch, whatever they do."""
    action, count, travel = str(rng.choice(ACTIONS)), rng.integers(1, 4), rng.uniform(7, 11)
    aside = travel / 2 if action in ("moves left", "moves right", "merges", "splits") else 0
    upward = travel / 2 if action in ("moves up", "moves down") else 0
    if action.startswith("orbits"):
        aside = upward = travel / 3
    while True:  # until one of 64 arrangements leaves every object its room
        radius = rng.uniform(4, 5.4, count)
        reach = np.stack([radius, radius], 1) + 1  # half the width and height of that room
        reach[0] += aside, upward
        centre = rng.uniform(reach, SIZE - reach, (64, count, 2))
        gap = abs(centre[:, :, None] - centre[:, None]) - (reach[:, None] + reach)
        apart = (gap.max(-1) + SIZE * np.eye(count) > 0).all((1, 2))
        if apart.any():
            break
    colours, shapes = (rng.permutation(list(names)).tolist() for names in (COLOURS, SHAPES))
    numbers = np.column_stack([centre[apart.argmax()], radius]).tolist()
    things = zip(colours, shapes, numbers, strict=False)
    return Scene(tuple(Thing(c, s, *where) for c, s, where in things), action, travel)


def render(scene: Scene, rng: Generator) -> np.ndarray:
    """The film of a scene: uint8 (T, 3, H, W)."""
    coarse = 0.35 + 0.08 * rng.standard_normal((3, 4, 4), np.float32)  # the background, then smooth
    at = np.linspace(0, 3, SIZE, dtype=np.float32)
    to_fine = np.maximum(0, 1 - abs(at[:, None] - np.arange(4, dtype=np.float32)))  # (H, 4) linear
    frames = np.repeat((to_fine @ coarse @ to_fine.T)[None], NUM_FRAMES, 0)
    time = np.linspace(0, 1, NUM_FRAMES)
    for index, thing in enumerate(scene.things):
        state = {"offset": 0 * time, "size": time**0, "opacity": time**0}
        if index == 0 and scene.action in MOTIONS:
            state |= MOTIONS[scene.action](time, scene.travel, rng)
        elif index == 0 and scene.action in REVERSED:
            forward = MOTIONS[REVERSED[scene.action]](time, scene.travel, rng)
            state |= {name: values[..., ::-1] for name, values in forward.items()}
        jitter = rng.normal(0, 0.3, (NUM_FRAMES, 2))
        for offset in np.atleast_2d(state["offset"]):
            path = np.stack([offset.real, offset.imag], 1) + jitter + (thing.x, thing.y)  # (T, 2)
            x, y = (np.arange(SIZE) + 0.5 - path.T[..., None]).astype(np.float32)  # (T, W), (T, H)
            radius = (thing.radius * state["size"]).astype(np.float32)[:, None, None]
            distance = SHAPES[thing.shape](x[:, None, :], y[:, :, None], radius)  # (T, H, W)
            cover = np.clip(0.5 - distance, 0, 1) * state["opacity"][:, None, None]  # anti-aliased
            colour = np.array(COLOURS[thing.colour], np.float32)[:, None, None]
            frames += cover.astype(np.float32)[:, None] * (colour - frames)
    frames += 0.04 * rng.standard_normal(frames.shape, np.float32)
    return (255 * np.clip(frames, 0, 1)).astype(np.uint8)


def draw_clip(seed: int, still: bool = False) -> tuple[Scene, np.ndarray]:
    """Scene and film (T, 3, H, W) number `seed`: the same every time. `still`: nothing happens."""
    rng = default_rng(seed)
    scene = sample_scene(rng)._replace(**{"action": ""} if still else {})
    return scene, render(scene, rng)


def write_clip(seed: int, path: Path) -> Scene:
    """Write clip number `seed` as an H.264 file or, if `path` says .png, as one still."""
    scene, frames = draw_clip(seed, still=path.suffix == ".png")
    pictures = np.ascontiguousarray(frames.transpose(0, 2, 3, 1))
    if path.suffix == ".png":
        Image.fromarray(pictures[0]).save(path)
        return scene
    with av.open(path, "w", options={"fflags": "+bitexact"}) as container:
        options = {"crf": "18", "preset": "fast", "mbtree": "0"}
        stream = container.add_stream("libx264", FPS, options=options)
        # WHY: 4:2:0 would keep a quarter of the colour, too little for objects of ten pixels.
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, "yuv444p"
        # WHY: one thread, no version in the file and no mbtree, which in so small a picture reads
        # memory that nobody wrote: the same clip is the same file, byte for byte.
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return scene


class Question(NamedTuple):
    """One question about a scene, and all the answers that such a question can have."""

    kind: str
    text: str
    answer: str
    answers: tuple[str, ...]


def ask(scene: Scene) -> Iterator[Question]:
    """Everything that can be asked about a clip or a still; what happens in it comes last."""
    for a in scene.things:
        yield Question("colour", f"What colour is the {a.shape}?", a.colour, tuple(COLOURS))
        yield Question("shape", f"What shape is {a.colour}?", a.shape, tuple(SHAPES))
    for a in scene.things[scene.action.startswith("moves") :]:  # those that stay in one place
        # WHY: a centre within a pixel of a border between two places has no clear answer.
        if min(abs(along - border) for along in (a.x, a.y) for border in (12, 20)) > 1:
            row, column = ((along > 12) + (along > 20) for along in (a.y, a.x))
            yield Question("where", f"Where is the {a}?", PLACES[3 * row + column], PLACES)
    if scene.action not in ("merges", "splits"):  # there the number changes
        number = NUMBERS[len(scene.things) - 1]
        yield Question("how many", "How many objects are there?", number, NUMBERS)
    if scene.action:
        yield Question("what happens", "What happens?", scene.action, ACTIONS)


def choose_options(question: Question, temporal: bool, rng: Generator) -> list[str]:
    """Up to four options, shuffled; `temporal`: two actions, each in both directions of time."""
    if temporal:
        other = rng.choice([pair for pair in PAIRS if question.answer not in pair])
        options = [question.answer, REVERSED[question.answer], *other]
    else:
        wrong = [answer for answer in question.answers if answer != question.answer]
        options = [question.answer, *rng.permutation(wrong)[:3]]
    return rng.permutation(options).tolist()


def instructions(scene: Scene, rng: Generator) -> list[tuple[str, str]]:
    """Up to eight questions with answers in random order, one in ten as multiple choice."""
    *others, last = ask(scene)  # the last is always in
    chosen = [others[i] for i in rng.permutation(len(others))[:7]] + [last]
    turns = []
    for question in (chosen[i] for i in rng.permutation(len(chosen))):
        text, answer = question.text, question.answer
        if rng.random() < 0.1:
            options = choose_options(question, answer in REVERSED and rng.random() < 0.5, rng)
            text, answer = mcq_prompt(text, options), "ABCD"[options.index(answer)]
        turns.append((text, answer))
    return turns


def training_row(name: str, media: dict[str, str], turns: list[tuple[str, str]]) -> dict:
    """A row in Video-LLaVA's format; media: {"video": path}, {"image": path} or, text only, {}."""
    told = [(who, text) for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    conversation = [{"from": who, "value": text} for who, text in told]
    conversation[0]["value"] = "".join(f"<{kind}>\n" for kind in media) + conversation[0]["value"]
    return {"id": name, **media, "conversations": conversation}


def training_files(clips: list[Scene], stills: list[Scene], texts: int) -> tuple[list, list]:
    """Rows of stage 1, captions, and of stage 2, instructions on clips, stills and words."""
    captions, conversations, rng = [], [], default_rng(0)
    for kind, scenes, path in (("video", clips, CLIP), ("image", stills, STILL)):
        for number, scene in enumerate(scenes):
            name, media = f"{kind}_{number:06d}", {kind: path.format(number)}
            actor, *others = scene.things
            caption = f"A {actor} {scene.action}." if scene.action else f"There is a {actor}."
            if others:
                caption += f" There is also {' and '.join(f'a {thing}' for thing in others)}."
            captions.append(training_row(name, media, [(f"Describe the {kind}.", caption)]))
            conversations.append(training_row(name, media, instructions(scene, rng)))
    facts = [(f"What is the reverse of {a}?", b) for a, b in REVERSED.items()]
    for kind, words in (("colour", COLOURS), ("shape", SHAPES)):
        facts += [(f"Is {word} a colour or a shape?", kind) for word in words]
    for number in range(texts):
        turns = [facts[i] for i in rng.permutation(len(facts))[:4]]
        conversations.append(training_row(f"text_{number:06d}", {}, turns))
    return captions, conversations


def evaluation_files(scenes: list[Scene], seed: int) -> dict[str, list[dict]]:
    """File name -> rows: for each clip a question of every kind, open-ended and multiple choice."""
    rng, files = default_rng(seed), {name: [] for name in ("open_q", "open_a", "mcq_q", "mcq_a")}
    for number, scene in enumerate(scenes):
        questions, name = list(ask(scene)), f"clip_{number:06d}"
        asked = {questions[i].kind: questions[i] for i in rng.permutation(len(questions))}
        if scene.action in REVERSED:
            asked["temporal"] = asked["what happens"]
        for kind, question in sorted(asked.items()):
            key = {"question_id": f"{name}_{kind.replace(' ', '_')}"}
            row = {**key, "video_name": name, "question": question.text}
            answer = {**key, "answer": question.answer, "type": kind}
            if kind != "temporal":
                files["open_q"].append(row)
                files["open_a"].append(answer)
            options = choose_options(question, kind == "temporal", rng)
            files["mcq_q"].append({**row, "options": options, "num_option": len(options)})
            files["mcq_a"].append({**answer, "answer_id": options.index(question.answer)})
    return files


def parallel(what: str, function: Callable, *arguments: Sequence) -> list:
    """list(map(function, *arguments)), on every core."""
    total = len(arguments[0])
    # WHY: spawn, not fork, because the caller may already run torch's threads.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        drawn = pool.map(function, *arguments, chunksize=1 + total // 100)
        return list(progress(drawn, what, total))


def write_world(world: World, folder: Path) -> None:
    """Write the clips, stills, questions and tokenizer into a new folder."""
    counts = {"train": world.train_clips, "images": world.train_images,
              "val": world.val_clips, "test": world.test_clips}  # fmt: skip
    seeds, paths = [], []
    for split, count in counts.items():
        path = f"train/{STILL}" if split == "images" else f"{split}/{CLIP}"
        (folder / path).parent.mkdir(parents=True)
        seeds += range(FIRST_SEED[split], FIRST_SEED[split] + count)
        paths += [folder / path.format(number) for number in range(count)]
    drawn = iter(parallel("clips and stills", write_clip, seeds, paths))
    scenes = {split: list(islice(drawn, count)) for split, count in counts.items()}
    captions, conversations = training_files(scenes["train"], scenes["images"], world.train_texts)
    files = {"train": {"stage1": captions, "stage2": conversations}}
    files |= {s: evaluation_files(scenes[s], FIRST_SEED[s]) for s in ("val", "test")}
    for split, named in files.items():
        for name, rows in named.items():
            (folder / split / f"{name}.json").write_text(json.dumps(rows, indent=1))
    text = (turn["value"] for row in captions + conversations for turn in row["conversations"])
    # WHY: LLaMA-2's choices; what the world never says becomes bytes, so any text can be encoded.
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=text, model_writer=model, vocab_size=world.vocab_size,
            model_type="bpe", byte_fallback=True, character_coverage=1.0, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
