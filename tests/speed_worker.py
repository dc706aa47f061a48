"""One of the two processes of tests/speed.py: measures the version whose modules it imports.

    PYTHONPATH=CODE python tests/speed_worker.py prepare FOLDER    with commit 07e06b2 only
    PYTHONPATH=CODE python tests/speed_worker.py VERSION FOLDER

The second reads names of measurements from stdin, a line each, and answers with a line of JSON:
what is measured -> milliseconds. FOLDER is what `prepare` has filled. This file uses what both
versions have; where their functions differ, it asks for OLD.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

import data
import encoders
import eval
import train as training
from merv import MERV
from miniature import specialists, world

OLD = hasattr(training, "settle")  # commit 07e06b2
CLIPS = {"train": 320, "test": 240}  # in the world that both versions learn from
DRAWN = 4000  # clips in a measurement of drawing, half as many as the first command draws
STEPS = 10  # of pre-training in a measurement
# Clips in a batch of pre-training and frames of each clip.
PRETRAINING = {"siglip": (256, 1), "languagebind": (64, 4), "dinov2": (96, 2), "vivit": (64, 8)}


class Clock:
    """Takes the place of a progress bar: shows nothing, but notes when each round begins."""

    latest: Clock

    def __init__(self, items, *_, **__):
        self.items = items
        self.times: list[float] = []
        Clock.latest = self

    def __iter__(self):
        for item in self.items:
            self.times.append(time.perf_counter())
            yield item

    def set_postfix_str(self, *_, **__) -> None:
        """What a progress bar would show beside its numbers."""

    def milliseconds(self) -> float:
        """The median time of a round, from its start to the start of the next one.

        The first two rounds warm up and are left out.
        """
        rounds = [end - begin for begin, end in pairwise(self.times[2:])]
        return 1000 * median(rounds)


def milliseconds_since(started: float) -> float:
    """Time since time.perf_counter() was `started`."""
    return 1000 * (time.perf_counter() - started)


def options(folder: Path) -> training.TrainConfig:
    """Options of train.py that mean the same in both versions: those of the old miniature."""
    common = {
        "data": str(folder / "train"),
        "tokenizer": str(folder / "tokenizer.model"),
        "cache_features": str(folder / "features"),
        "epochs": 4,
        "workers": 2,
        "device": "cpu",
        "evaluate": False,
    }
    if OLD:
        config = training.TrainConfig(**common, muon_lr=0.01, global_batch=32, save_every=0)
        return training.settle(config)
    preset = training.preset("miniature", "frozen")
    muon = {"muon_learning_rate": 0.01, "muon_parts": "llm", "muon_weight_decay": 0.0}
    preset = replace(preset, **muon, learning_rate=(2e-3,))
    return replace(preset, **common, global_batch=(32,), micro_batch=32, save_every=None)


def prepare(folder: Path) -> None:
    """Make what both versions work on: clips, encoders, a checkpoint, features of the clips.

    The encoders stay untrained, because their speed does not depend on their weights.
    """
    world.write_world(folder, CLIPS)
    for name in PRETRAINING:
        encoder = specialists.Pupil(name, seed=0).encoder
        encoders.save_encoder(encoder, folder / "encoders-0" / f"{name}.safetensors")
    training.MINIATURE = folder  # where it looks for the encoders
    training.train(replace(options(folder), epochs=8))


def load(folder: Path, cache: Path) -> tuple[MERV, data.ConversationDataset]:
    """The checkpoint, and the training rows with a cache of features in a folder."""
    model = MERV.from_pretrained(folder / "runs" / "miniature-frozen")
    stored = data.FeatureCache(cache, model.fingerprints())
    configs = list(model.config.encoders)
    file = folder / "train" / "stage2.json"
    template = data.TEMPLATES["base"]
    return model, data.ConversationDataset(file, model.tokenizer, template, configs, cache=stored)


def train(folder: Path) -> dict:
    """Train the checkpoint in train.py's own loop, from cached features."""
    config = options(folder)
    model, dataset = load(folder, folder / "features")
    training.fill_cache(model, dataset, config)  # finds all features
    model.llm.activation_checkpointing = False
    training.shard(model, training.make_mesh("cpu", 1), "shard", torch.float32)
    rows = training.concatenate([dataset])
    with TemporaryDirectory() as place:
        run = training.Run(config, Path(place), done=0, bad=0)
        if OLD:
            stage = training.RECIPES["frozen"][0]
            stage = replace(stage, lr=stage.miniature_lr, global_batch=config.global_batch)
            training.train_stage(model, stage, rows, run, 0)
        else:
            stage = training.stages_of(config)[0]
            training.train_stage(model, stage, rows, None, run, 0)
        lines = Path(place, "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    return {"training step": Clock.latest.milliseconds(), "losses": losses}


def evaluate(folder: Path) -> dict:
    """Answer the questions about all test clips."""
    model, _ = load(folder, folder / "features")
    with TemporaryDirectory() as place:
        started = time.perf_counter()
        questions = eval.evaluate(model, "miniature-open", folder / "test", Path(place))
        elapsed = milliseconds_since(started)
    answers = [question.answer for question in questions]
    return {"evaluating a clip": elapsed / CLIPS["test"], "answers": answers}


def draw(folder: Path) -> dict:
    """Draw clips, make their questions and write their videos, as the first command does."""
    with TemporaryDirectory() as place:
        Path(place, "videos").mkdir()
        started = time.perf_counter()
        if OLD:
            for number in range(DRAWN):
                scene, frames = world.draw_clip(number)
                list(world.ask(scene))
                world.write_clip(frames, Path(place, world.CLIP.format(number)))
        else:
            write = partial(world.write_clip, Path(place), "plain", "train")
            list(world.run_on_all_cores(write, range(DRAWN)))
        return {"drawing a clip": milliseconds_since(started) / DRAWN}


def pretrain(folder: Path) -> dict:
    """Take a few steps of pre-training with each encoder, on one thread like the first command."""
    times = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, (clips, frames) in PRETRAINING.items():
        recipe = specialists.RECIPES[name]
        if OLD:
            objective, *_, rate = recipe
            recipe = (objective, STEPS, clips, frames, rate)
            model = specialists.Pupil(name, seed=0)
        else:
            recipe = replace(recipe, steps=STEPS, batch=clips, num_frames=frames)
            model = specialists.Pretrainer(name, seed=0)
        specialists.RECIPES[name] = recipe
        specialists.train(model, name, seed=0, num_clips=100)
        times[f"pre-training step, {name}"] = Clock.latest.milliseconds()
    torch.set_num_threads(threads)
    return times


def encode(folder: Path) -> dict:
    """Fill an empty cache with the pooled features of all training clips."""
    with TemporaryDirectory() as cache:
        model, dataset = load(folder, Path(cache))
        started = time.perf_counter()
        training.fill_cache(model, dataset, options(folder))
        return {"encoding a clip": milliseconds_since(started) / CLIPS["train"]}


def serve(folder: Path) -> None:
    """Answer each line of stdin."""
    training.join_processes("cpu")
    model, _ = load(folder, folder / "features")
    for config in model.config.encoders:
        encoders.ENCODERS[config.name] = config  # so pre-training has the same sizes too
    measurements = {f.__name__: f for f in (train, evaluate, draw, pretrain, encode)}
    for line in sys.stdin:
        with redirect_stdout(io.StringIO()):
            reply = measurements[line.strip()](folder)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    for module in (training, eval, specialists, world):
        module.progress = Clock
    task, place = sys.argv[1:]
    if task == "prepare":
        prepare(Path(place))
    else:
        serve(Path(place))
    # WHY: threads of torch's process group may abort a process that ends in the usual way.
    sys.stdout.flush()
    os._exit(0)
