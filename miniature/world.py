"""A small video world: clips with known content, and the questions that ask about it.

One to three objects, each of its own colour and shape and with a texture, lie anywhere on a noisy
background and may hide parts of each other. One of them, the actor, does something for 8 frames.
Ten actions come in pairs, each the other played backwards, so no single frame tells which of the
two it is; four more have no direction. All follows from a clip's number. Read next: specialists.py.
"""

import json
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import sentencepiece
from numpy.random import Generator, default_rng

from support.cli import progress

VOCAB_SIZE = 640  # of the tokenizer: 256 bytes, the letters and the world's words
SIZE, NUM_FRAMES, FPS = 32, 8, 8  # H = W in pixels, T, frames per second
CLIP = "videos/clip_{:06d}.mp4"  # where it is written
CLIPS = {"train": 3000, "val": 200, "test": 600}  # whatever is chosen is chosen on val
# Clip n of a split is drawn from seed FIRST_SEED[split] + n: no two splits share a clip.
FIRST_SEED = {name: i * 10**6 for i, name in enumerate(("train", "val", "test", "probe", "more"))}
COLOURS = {
    "red": (0.95, 0.15, 0.15), "green": (0.15, 0.8, 0.2), "blue": (0.2, 0.3, 1.0),
    "yellow": (0.95, 0.9, 0.15), "pink": (1.0, 0.45, 0.85), "white": (1.0, 1.0, 1.0),
}  # fmt: skip
SHAPES = {  # signed distance in pixels of (x, y), y down, to the outline of radius r
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.85 * r,
    "triangle": lambda x, y, r: np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.6 * r,
    "cross": lambda x, y, r: np.fmax(np.fmin(abs(x), abs(y)) - r / 3, np.fmax(abs(x), abs(y)) - r),
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r,
}  # fmt: skip
TEXTURES = {  # brightness at (x, y), pixels from the object's centre
    "plain": lambda x, y: 1 + 0 * (x + y),
    "striped": lambda x, y: np.where((y + 0 * x) % 4 < 2, 1, 0.3),
    "shaded": lambda x, y: np.clip(0.7 + 0.08 * x + 0 * y, 0.35, 1),
}
PAIRS = (  # each the other one played backwards
    ("moves left", "moves right"), ("moves up", "moves down"), ("grows", "shrinks"),
    ("appears", "fades"), ("orbits clockwise", "orbits counterclockwise"),
)  # fmt: skip
REVERSED = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
ACTIONS = (*REVERSED, "stays", "shakes", "blinks", "pulses")  # the last four have no direction
NUMBERS, PLACES = ("one", "two", "three"), ("left", "right", "top", "bottom", "centre")

# One object: its looks, and in pixels, y down, the centre around which it acts and its radius.
Thing = namedtuple("Thing", "colour shape texture x y radius")
# Things from back to front, which of them acts, how, how many pixels far, from where in its period.
Scene = namedtuple("Scene", "things actor action travel phase")


def sample_scene(rng: Generator, count: int | None = None) -> Scene:
    """Objects of distinct colours and shapes; at most about half of one is behind another."""
    count = count or rng.integers(1, 4)
    actor, action, travel = int(rng.integers(count)), str(rng.choice(ACTIONS)), rng.uniform(7, 10)
    radius = rng.uniform(5, 6.2, count)
    reach = radius + (np.arange(count) == actor) * (travel / 2 if "moves" in action else 2)
    gap = np.zeros(1)
    while gap.min() < 9:  # until every centre has its room
        x, y = rng.uniform(reach, SIZE - reach, (2, count))
        gap = np.hypot(x - x[:, None], y - y[:, None]) + SIZE * np.eye(count)
    colours, shapes = (rng.permutation(list(names)).tolist() for names in (COLOURS, SHAPES))
    textures, numbers = rng.choice(list(TEXTURES), count).tolist(), np.stack([x, y, radius]).T
    looks = zip(colours, shapes, textures, numbers.tolist(), strict=False)
    things = tuple(Thing(*names, *where) for *names, where in looks)
    return Scene(things, actor, action, travel, rng.random())


def motion(scene: Scene) -> list[np.ndarray]:
    """How the actor changes: x + iy in pixels, factor of its radius, opacity; (T,) each."""
    frame, t = np.arange(NUM_FRAMES), np.linspace(0, 1, NUM_FRAMES)
    turned = np.exp(2j * np.pi * scene.phase)
    forward = {
        "moves left": (scene.travel * (0.5 - t), 1, 1),
        "moves up": (1j * scene.travel * (0.5 - t), 1, 1),
        "grows": (0, 0.4 + 0.6 * t, 1),
        "appears": (0, 1, t),
        "orbits clockwise": (scene.travel / 3 * turned * np.exp(1.6j * np.pi * t), 1, 1),  # y: down
        "stays": (0, 1, 1),
        "shakes": (1.5 * turned * (-1) ** frame, 1, 1),
        "blinks": (0, 1, (frame + int(4 * scene.phase)) // 2 % 2),
        "pulses": (0, 0.75 + 0.25 * (turned * np.exp(4j * np.pi * t)).real, 1),
    }
    backwards = scene.action not in forward
    states = forward[REVERSED[scene.action] if backwards else scene.action]
    states = [np.broadcast_to(state, NUM_FRAMES) for state in states]
    return [state[::-1] if backwards else state for state in states]


def draw_clip(seed: int, count: int | None = None) -> tuple[Scene, np.ndarray]:
    """Scene and film, uint8 (T, 3, H, W), number `seed`. count: of its objects."""
    rng = default_rng(seed)
    scene, pixel = sample_scene(rng, count), np.arange(SIZE) + 0.5
    coarse, at = 0.35 + 0.08 * rng.standard_normal((3, 4, 4)), np.linspace(0, 3, SIZE)
    linear = np.maximum(0, 1 - abs(at[:, None] - np.arange(4)))  # (H, 4): interpolates
    frames = np.repeat((linear @ coarse @ linear.T)[None], NUM_FRAMES, 0)
    for index, a in enumerate(scene.things):
        states = motion(scene if index == scene.actor else scene._replace(action="stays"))
        offset, size, opacity = (state[:, None, None] for state in states)
        x = pixel - a.x - offset.real  # (T, 1, W)
        y = pixel[:, None] - a.y - offset.imag  # (T, H, 1)
        cover = np.clip(0.5 - SHAPES[a.shape](x, y, a.radius * size), 0, 1) * opacity
        paint = TEXTURES[a.texture](x, y)[:, None] * np.array(COLOURS[a.colour])[:, None, None]
        frames += cover[:, None] * (paint - frames)
    frames += 0.03 * rng.standard_normal(frames.shape)
    return scene, (255 * np.clip(frames, 0, 1)).astype(np.uint8)


def write_clip(frames: np.ndarray, path: Path) -> None:
    """Write a film (T, 3, H, W) as an H.264 file."""
    with av.open(path, "w", options={"fflags": "+bitexact"}) as container:
        options = {"crf": "18", "preset": "fast", "mbtree": "0"}
        stream = container.add_stream("libx264", FPS, options=options)
        # WHY: 4:2:0 would keep a quarter of the colour. One thread, no version, and no mbtree,
        # which in so small a picture reads memory that nobody wrote: the same bytes each time.
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, "yuv444p"
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for picture in np.ascontiguousarray(frames.transpose(0, 2, 3, 1)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def ask(scene: Scene) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """All questions about a clip: kind, text, answer, and what such an answer can be."""
    for a in scene.things:
        yield "colour", f"What colour is the {a.shape}?", a.colour, tuple(COLOURS)
        yield "shape", f"What shape is the {a.colour} object?", a.shape, tuple(SHAPES)
        yield "texture", f"What texture does the {a.shape} have?", a.texture, tuple(TEXTURES)
    moves = scene.action.startswith(("moves", "orbits"))
    still = [a for i, a in enumerate(scene.things) if i != scene.actor or not moves]
    for a in still:
        right, down = a.x - SIZE / 2, a.y - SIZE / 2
        place = ("right" if right > 0 else "left", "bottom" if down > 0 else "top")
        place = "centre" if max(abs(right), abs(down)) < 4 else place[abs(down) > abs(right)]
        # WHY: in a corner or on a border between two places there is no clear answer.
        if abs(abs(right) - abs(down)) > 2 or max(abs(right), abs(down)) < 3:
            yield "where", f"Where is the {a.shape}?", place, PLACES
        others = [(b.x - a.x, b.shape) for b in scene.things if b is not a]
        left, margin = [shape for x, shape in others if x < 0], 2 + moves * scene.travel / 2
        if len(left) == 1 and all(abs(x) > margin for x, _ in others):
            yield "left of", f"Which shape is left of the {a.shape}?", left[0], tuple(SHAPES)
    yield "how many", "How many objects are there?", NUMBERS[len(scene.things) - 1], NUMBERS
    kind = "temporal" if scene.action in REVERSED else "what happens"
    yield kind, "What happens?", scene.action, ACTIONS


def choose_options(kind: str, answer: str, answers: tuple[str, ...], rng: Generator) -> list[str]:
    """Up to five options, shuffled; "temporal": two actions, each in both directions of time."""
    if kind == "temporal":
        other = rng.choice([pair for pair in PAIRS if answer not in pair])
        return rng.permutation([answer, REVERSED[answer], *other]).tolist()
    wrong = rng.permutation([other for other in answers if other != answer])
    return rng.permutation([answer, *wrong[: rng.integers(3, 5)]]).tolist()


def training_files(scenes: list[Scene], asked: list[list], seed: int) -> dict[str, list[dict]]:
    """Video-LLaVA's: captions, and up to eight open questions a clip, what happens among them."""
    rng, files = default_rng(seed), {"stage1": [], "stage2": []}
    for number, (scene, (*others, last)) in enumerate(zip(scenes, asked, strict=True)):
        told = [f"a {a.texture} {a.colour} {a.shape}" for a in scene.things]
        told[scene.actor] += f" that {scene.action}"
        chosen = [*(others[i] for i in rng.permutation(len(others))[:7]), last]
        turns = [text for i in rng.permutation(len(chosen)) for text in chosen[i][1:3]]
        caption = ["Describe the video.", f"There is {' and '.join(told)}."]
        for rows, texts in zip(files.values(), (caption, turns), strict=True):
            said = [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]
            said[0]["value"] = "<video>\n" + said[0]["value"]
            name, video = f"clip_{number:06d}", CLIP.format(number)
            rows.append({"id": name, "video": video, "conversations": said})
    return files


def evaluation_files(asked: list[list], seed: int) -> dict[str, list[dict]]:
    """For each clip one question of every kind, open-ended and as multiple choice."""
    rng, open_q, mcq_q, known = default_rng(seed), [], [], []
    for number, questions in enumerate(asked):
        chosen = {questions[i][0]: questions[i] for i in rng.permutation(len(questions))}
        for kind, text, answer, answers in sorted(chosen.values()):
            clip, options = f"clip_{number:06d}", choose_options(kind, answer, answers, rng)
            key = {"question_id": f"{clip}_{kind.replace(' ', '_')}"}
            open_q.append(key | {"video_name": clip, "question": text})
            mcq_q.append(open_q[-1] | {"options": options})
            known.append(key | {"answer": answer, "answer_id": options.index(answer), "type": kind})
    return {"open_q": open_q, "open_a": known, "mcq_q": mcq_q, "mcq_a": known}


def write_world(folder: Path, clips: dict[str, int], kind: str = "") -> None:
    """Write clips, questions and tokenizer into a new folder. clips: split -> how many.

    kind "shuffled": the next clip is shown instead. "two_kinds": odd clips are grey and asked only
    what happens, even ones have their frames out of order and are asked the rest.
    """
    texts = []
    for split, count in clips.items():
        (folder / split / "videos").mkdir(parents=True)
        scenes, asked, seed = [], [], FIRST_SEED[split]
        for number in progress(range(count), f"draw {split} clips"):
            scene, frames = draw_clip(seed + number)
            questions = list(ask(scene))
            if kind == "shuffled":
                frames = draw_clip(seed + number + 1)[1]
            if kind == "two_kinds":
                order = default_rng(number).permutation(NUM_FRAMES)
                frames = frames[:, [1, 1, 1]] if number % 2 else frames[order]  # green as grey
                questions = [q for q in questions if (q[1] == "What happens?") == number % 2]
            write_clip(frames, folder / split / CLIP.format(number))
            scenes.append(scene)
            asked.append(questions)
        training = split == "train"
        files = training_files(scenes, asked, seed) if training else evaluation_files(asked, seed)
        for name, rows in files.items():
            (folder / split / f"{name}.json").write_text(json.dumps(rows, indent=1))
            texts += [turn["value"] for row in rows for turn in row.get("conversations", ())]
    # WHY: LLaMA-2's choices; what the world never says becomes bytes, so any text can be encoded.
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=VOCAB_SIZE,
            model_type="bpe", byte_fallback=True, character_coverage=1.0, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
