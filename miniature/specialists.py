"""Four tiny specialists, pre-trained from nothing, each by its full-size model's kind of objective.

    SigLIP         sigmoid loss between frames and texts that name one object by colour and shape
    LanguageBind   the same for clips, from SigLIP's weights; half of its texts are a coarse verb,
                   "moves", "changes size" ..., never a direction
    DINOv2         no words: from a masked frame, what its own moving average makes of the whole
    ViViT          supervised, on clips of one object: whether from one frame to the next it went
                   left or right, up or down, grew or shrank, came or faded; never a name of that

Sources: SigLIP arXiv:2303.15343, LanguageBind 2310.01852, iBOT 2111.07832, DINOv2 2304.07193.
"""

import copy
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from encoders import ENCODERS, FAMILIES, Encoder, load_encoder, save_encoder
from miniature import world
from miniature.world import COLOURS, FIRST_SEED, NUM_FRAMES, SHAPES
from support.cli import progress
from support.weights import initialise

FAST_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # a CPU without it is faster in float32
VERBS = dict.fromkeys(world.ACTIONS, "moves") | {"stays": "rests"}  # what captions tell of actions
VERBS |= dict.fromkeys(("grows", "shrinks", "pulses"), "changes size")
VERBS |= dict.fromkeys(("appears", "fades", "blinks"), "changes light")
PHRASES = ["", *(f"{c} {s}" for c in COLOURS for s in SHAPES), *sorted({*VERBS.values()})]
# WHY: torch's Muon computes in bfloat16, which CPUs without AVX-512 do 30 times slower.
muon_in_float32 = partial(patch.object, Tensor, "bfloat16", Tensor.float)


def lesson(number: int, alone: bool) -> tuple[list[int], np.ndarray, np.ndarray]:
    """PHRASES of a caption, up to three objects (or one alone) and a verb; for each two frames, do
    x, y, size and opacity of what acts fall (0), stay (1) or rise (2)? (4, 4); the film."""
    scene, film = world.draw_clip(FIRST_SEED["more"] + number, 1 if alone else None)
    told = [*sorted(f"{a.colour} {a.shape}" for a in scene.things), "", ""][:3]
    centre, size, opacity = world.motion(scene)
    state = np.stack([centre.real, centre.imag, size, opacity], axis=1)  # (T, 4)
    changes = (1 + np.sign((state[1::2] - state[::2]).round(2))).astype(int)
    return [PHRASES.index(phrase) for phrase in (*told, VERBS[scene.action])], changes, film


def normalise(films: Tensor, encoder: Encoder, noise: Tensor | float = 0) -> Tensor:
    """Films, uint8 (b, T, 3, H, W), as the encoder wants their pixels."""
    mean, std = torch.tensor([encoder.config.pixel_mean, encoder.config.pixel_std])
    return (films / 255 + noise - mean[:, None, None]) / std[:, None, None]


class Pupil(nn.Module):
    """An encoder with all blocks of its released file, and what only pre-training needs."""

    def __init__(self, name: str, seed: int):
        super().__init__()
        config = ENCODERS[f"miniature-{name}"]
        d_e, widths = config.hidden_size, {"dinov2": 256, "vivit": 4 * 3}
        self.encoder = FAMILIES[config.family](replace(config, num_layers=config.released_layers))
        self.head = nn.Sequential(nn.LayerNorm(d_e), nn.Linear(d_e, widths.get(name, d_e)))
        self.text_tower = nn.Embedding(len(PHRASES), d_e)  # SIMPLIFY: few things are said here
        self.scale, self.bias = (nn.Parameter(torch.empty(1)) for _ in range(2))
        initialise(self, Generator().manual_seed(seed))
        with torch.no_grad():  # WHY: from 0.02, what tells patches apart takes long to grow
            self.encoder.patch_embedding.weight.mul_(10)
            self.encoder.position_embedding.mul_(20)
            if name == "vivit":  # else its features, which follow a norm, would be the smallest
                self.encoder.final_norm.weight.mul_(8)
        self.teacher = copy.deepcopy(nn.Sequential(self.encoder, self.head)).requires_grad_(False)

    @torch.no_grad()
    def start_from(self, siglip: "Pupil") -> None:
        """LanguageBind: take all that SigLIP has; temporal attention adds nothing at the start."""
        theirs = {k: v for k, v in siglip.state_dict().items() if "teacher" not in k}
        positions = theirs.pop("encoder.position_embedding")[0]
        self.load_state_dict(theirs, strict=False)
        # CLIP's patch embedding has no bias, and its class token has a position of its own.
        self.encoder.position_embedding[1:] = positions + theirs["encoder.patch_embedding.bias"]
        for block in self.encoder.blocks:
            block.temporal_attention.out_proj.weight.zero_()


def contrast(pupil: Pupil, frames: Tensor, phrases: Tensor, generator: Generator) -> Tensor:
    """SigLIP's and LanguageBind's: a frame or clip must fit what is said of it and nothing else."""
    verb = frames.shape[1] > 1  # LanguageBind's; half of its texts are one
    draw = torch.rand(phrases.shape, generator=generator).masked_fill(phrases == 0, -1)
    draw[:, 3] = torch.where(draw[:, 3] < 0.5 * verb, 2, -1)
    texts = phrases.gather(1, draw.argmax(1, keepdim=True))  # (b, 1): each names one thing
    images = F.normalize(pupil.head(pupil.encoder(frames).mean((1, 2, 3))), dim=-1)
    logits = images @ F.normalize(pupil.text_tower(texts[:, 0]), dim=-1).mT
    logits = 10 * pupil.scale.exp() * logits - 5 + pupil.bias
    # WHY: the text of another fits as well where it shows the same, as is common in a small world.
    fits = (phrases[:, :, None] == texts[:, 0]).any(1)
    return -F.logsigmoid(torch.where(fits, logits, -logits).float()).sum() / len(frames)


def distil(pupil: Pupil, frames: Tensor, _: Tensor, generator: Generator) -> Tensor:
    """DINOv2's: from a masked frame, which prototype does the teacher see in each hidden patch?
    SIMPLIFY: only the patch loss; a loss between whole frames never moved at this size."""
    masked = torch.rand(*frames.shape[:2], 4, 4, generator=generator) < 0.5  # (b, t, h, w)
    # A patch of zeros is embedded as the bias of the patch embedding: a learned mask token.
    hidden = F.interpolate(masked.float(), frames.shape[-2:])[:, :, None] > 0
    with torch.no_grad():
        student = nn.Sequential(pupil.encoder, pupil.head).parameters()
        for slow, fast in zip(pupil.teacher.parameters(), student, strict=True):
            slow.lerp_(fast, 0.03)
        seen = F.layer_norm(pupil.teacher(frames).float(), (256,)) / 0.2
        targets = seen.softmax(-1)
        for _ in range(3):  # Sinkhorn: all prototypes in equal use, or one would be every answer
            targets = targets / targets.sum((0, 1, 2, 3)).clamp(min=1e-6)
            targets = targets / targets.sum(-1, keepdim=True)
    guess = F.layer_norm(pupil.head(pupil.encoder(frames.masked_fill(hidden, 0))).float(), (256,))
    return -(targets * guess.log_softmax(-1)).sum(-1)[masked].mean()


def classify(pupil: Pupil, frames: Tensor, labels: Tensor, _: Generator) -> Tensor:
    """ViViT's: how does what acts change within the two frames of each tubelet?"""
    tubelets = pupil.head(pupil.encoder(frames).mean((2, 3)))  # (b, 4, 4 * 3)
    return F.cross_entropy(tubelets.view(-1, 3).float(), labels.flatten())


RECIPES = {  # objective; steps; clips of a batch; frames of a clip; Muon's learning rate
    "siglip": (contrast, 480, 256, 1, 0.04), "languagebind": (contrast, 200, 64, 4, 0.02),
    "dinov2": (distil, 280, 96, 2, 0.04), "vivit": (classify, 400, 64, 8, 0.04),
}  # fmt: skip


def train(pupil: Pupil, name: str, seed: int, num_clips: int = 6000) -> list[float]:
    """Train by the recipe of that name, on so many clips; the losses."""
    objective, steps, batch, num_frames, muon_lr = RECIPES[name]
    lessons = zip(*(lesson(n, name == "vivit") for n in range(num_clips)), strict=True)
    *labels, films = (torch.from_numpy(np.stack(part)) for part in lessons)
    generator, losses, stride = Generator().manual_seed(seed), [], NUM_FRAMES // num_frames
    matrices = [p for p in pupil.encoder.blocks.parameters() if p.ndim == 2]
    others = [p for p in pupil.parameters() if p.requires_grad and p not in {*matrices}]
    # WHY: with AdamW alone, ViViT stays near chance for as long as we can wait.
    muon = torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.05)
    adamw = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    for step in progress(range(steps), name):
        chosen = torch.randint(num_clips, (batch,), generator=generator)
        frames = films[chosen, torch.randint(stride, (), generator=generator) :: stride]
        noise = 0.02 * torch.randn(frames.shape, generator=generator)  # video coding is fainter
        frames = normalise(frames, pupil.encoder, noise)
        # WHY: on a CPU and at this size, plain attention is faster than the fused kernel.
        with torch.autocast("cpu", torch.bfloat16, FAST_BF16), sdpa_kernel(SDPBackend.MATH):
            loss = objective(pupil, frames, labels[name == "vivit"][chosen], generator)
        loss.backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        factor = min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer, peak in ((muon, muon_lr), (adamw, 3e-3)):
            optimizer.param_groups[0]["lr"] = peak * factor
            with muon_in_float32():
                optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_chain(names: tuple[str, ...], folder: Path, seed: int) -> None:
    """Train and save these specialists, one after the other, in this process."""
    torch.set_num_threads(1)
    pupils = {name: Pupil(name, seed) for name in names}
    for name, pupil in pupils.items():
        if name == "languagebind":
            pupil.start_from(pupils["siglip"])
        train(pupil, name, seed)
        save_encoder(pupil.encoder, folder / f"{name}.safetensors")


def pretrain(folder: Path, seed: int = 0) -> None:
    """Train the four specialists into <folder>/<name>.safetensors, and print what they know."""
    chains = [("siglip", "languagebind"), ("dinov2", "vivit")]
    # WHY: two processes of one thread do 1.4 times the work of one with two; torch must not fork.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(train_chain, chains, [folder] * 2, [seed] * 2))
    for name in RECIPES:
        known = probe(load_encoder(f"miniature-{name}", folder / f"{name}.safetensors"))
        print(f"{name:13}", *(f"{what} {right:4.0%} " for what, right in known.items()), flush=True)


@torch.no_grad()
def probe(encoder: Encoder, clips: int = 900) -> dict[str, float]:
    """What a linear classifier reads from pooled features of clips with one object: accuracies."""
    seeds = range(FIRST_SEED["probe"], FIRST_SEED["probe"] + clips)
    scenes, films = zip(*(world.draw_clip(seed, count=1) for seed in seeds), strict=True)
    films = torch.from_numpy(np.stack(films))[:, :: NUM_FRAMES // encoder.config.num_frames]
    grids = torch.cat([encoder(normalise(part, encoder)) for part in films.split(100)])
    pooled = F.adaptive_avg_pool2d(grids.flatten(0, 1).movedim(-1, 1), 2).reshape(clips, -1)
    known, new = ((pooled - pooled.mean(0)) / pooled.std(0)).tensor_split([clips * 2 // 3])
    # Ridge regression to one-hot labels on two thirds of the clips: X' (X X' + l I)^-1 Y.
    solve = new @ known.mT @ torch.linalg.inv(known @ known.mT + 300 * torch.eye(len(known)))
    right = {}
    for what in ("colour", "shape", "texture", "action"):
        words = [getattr(s if what == "action" else s.things[0], what) for s in scenes]
        y = torch.tensor([sorted({*words}).index(word) for word in words])
        guess = (solve @ (F.one_hot(y[: len(known)]) - 1 / len({*words}))).argmax(1)
        right[what] = (guess == y[len(known) :]).float().mean().item()
    return right
