"""Four tiny specialists, pre-trained from nothing, each by its full-size model's kind of objective.

    SigLIP         sigmoid loss between frames and what they show, "a red circle, a blue bar":
                   every object's colour and shape; nothing about texture, place or motion
    LanguageBind   the same for clips, from SigLIP's weights; captions add one coarse verb,
                   "moves", "changes size" ..., never a direction
    DINOv2         no words: from a masked frame, what its own moving average makes of the whole
    ViViT          supervised, on films of another kind: a patch of waves, of any colour, does one
                   of 13 things in the first half, such as go south-east, and one in the second.
                   None of its labels is an answer about the world.

Sources: SigLIP arXiv:2303.15343, LanguageBind 2310.01852, iBOT 2111.07832, DINOv2 2304.07193.
"""

import copy
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from encoders import ENCODERS, FAMILIES, Encoder, initialise, load_encoder, save_encoder
from merv import progress
from miniature import world
from miniature.world import ACTIONS, COLOURS, FIRST_SEED, NUM_FRAMES, REVERSED, SHAPES

FAST_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # a CPU without it is faster in float32
NUM_CLIPS = 6000  # to learn from
RECIPES = {  # steps; clips of a batch; frames of a clip; Muon's learning rate
    "siglip": (350, 256, 1, 0.04), "languagebind": (160, 64, 4, 0.02),
    "dinov2": (300, 96, 2, 0.04), "vivit": (600, 64, 8, 0.04),
}  # fmt: skip
VERBS = dict.fromkeys(ACTIONS, "moves") | {"stays": "does nothing"}  # all that a caption tells
VERBS |= dict.fromkeys(("grows", "shrinks", "pulses"), "changes size")
VERBS |= dict.fromkeys(("appears", "fades", "blinks"), "changes light")
PHRASES = ["", *(f"{c} {s}" for c in COLOURS for s in SHAPES), *sorted({*VERBS.values()})]
# ViViT's 13 classes: how a frame differs from the one before in x + iy pixels, log size, opacity.
# First east, south-east, south, south-west, nearer, lighter; then their opposites; then rest.
STEPS = [*((np.exp(0.25j * np.pi * n), 0, 0) for n in range(4)), (0, 0.1, 0), (0, 0, 0.14)]
STEPS = np.concatenate([STEPS, -np.array(STEPS), np.zeros((1, 3))])
OPPOSITE = torch.tensor([*range(6, 12), *range(6), 12])


class InFloat32(torch.overrides.TorchFunctionMode):
    """WHY: torch's Muon computes in bfloat16, which CPUs without AVX-512 do 30 times slower."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


def captioned_clip(number: int) -> tuple[list[int], np.ndarray]:
    """Numbers of the PHRASES of a caption, up to four objects and a verb, and a film."""
    scene, film = world.draw_clip(FIRST_SEED["more"] + number)
    told = [*sorted(f"{a.colour} {a.shape}" for a in scene.things), "", "", ""][:4]
    return [PHRASES.index(phrase) for phrase in (*told, VERBS[scene.action])], film


def two_steps(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of STEPS are the first half and the second, and a film of ViViT's own kind."""
    rng = np.random.default_rng(number)
    first, second = steps = rng.integers(len(STEPS), size=2)
    rates = STEPS[[first] * 4 + [second] * 3] * rng.uniform(0.8, 1.6)
    rates[3] = rates[[2, 4]].mean(0)  # from one half to the other
    place, size, opacity = np.concatenate([np.zeros((1, 3)), rates.cumsum(0)]).T  # (T,) each
    place += rng.uniform(8, 24) + 1j * rng.uniform(8, 24) - place.mean()
    radius = rng.uniform(4, 14) * np.exp(size.real - size.real.max())
    opacity = np.clip(1 + opacity.real - opacity.real.max(), 0, 1)
    lobes, turn, (u, v) = rng.integers(1, 6), rng.uniform(0, 6), rng.uniform(-1, 1, 2)
    outline = lambda x, y, r: np.hypot(x, y) - r * (  # noqa: E731
        0.8 + 0.2 * np.cos(lobes * np.arctan2(y, x) + turn))  # fmt: skip
    waves = lambda x, y: 0.7 + 0.3 * np.sin(u * x + v * y)  # noqa: E731
    patch = (outline, waves, rng.uniform(0.1, 1, 3), place, radius, opacity)
    return steps, world.film([patch], rng)


def pixels(films: Tensor, encoder: Encoder, noise: Tensor | float = 0) -> Tensor:
    """Films, uint8 (b, T, 3, H, W), as the encoder wants them."""
    mean, std = torch.tensor([encoder.config.pixel_mean, encoder.config.pixel_std])
    return (films / 255 + noise - mean[:, None, None]) / std[:, None, None]


class Objective(nn.Module):
    """An encoder with all blocks of its released file and a head; a batch of clips -> the loss."""

    def __init__(self, name: str, width: int):
        super().__init__()
        config = ENCODERS[f"miniature-{name}"]
        self.encoder = FAMILIES[config.family](replace(config, num_layers=config.released_layers))
        self.head = nn.Sequential(
            nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, width)
        )


class Contrast(Objective):
    """SigLIP's and LanguageBind's: a frame or clip must fit its own text and no other."""

    def __init__(self, name: str):
        super().__init__(name, width=96)
        # SIMPLIFY: the text tower is a table of phrases; a text is their sum, in whatever order.
        self.text_tower = nn.EmbeddingBag(len(PHRASES), 96, mode="sum", padding_idx=0)
        self.sharpness, self.bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, frames: Tensor, phrases: Tensor, generator: torch.Generator) -> Tensor:
        if frames.shape[1] == 1:  # SigLIP's: a still tells no verb
            phrases = phrases[:, :-1]
        images = F.normalize(self.head(self.encoder(frames).mean((1, 2, 3))), dim=-1)
        logits = images @ F.normalize(self.text_tower(phrases), dim=-1).mT
        logits = 10 * self.sharpness.exp() * logits - 5 + self.bias  # SigLIP's start
        # WHY: equal texts are common here (36 single objects), and are no mismatch.
        fits = (phrases[:, None] == phrases).all(-1)
        return -F.logsigmoid(torch.where(fits, logits, -logits).float()).sum() / len(frames)

    @torch.no_grad()
    def start_from(self, siglip: "Contrast") -> None:
        """Take all that SigLIP has, too; temporal attention adds nothing at the start."""
        theirs = siglip.state_dict()
        positions = theirs.pop("encoder.position_embedding")[0]
        self.load_state_dict(theirs, strict=False)
        # CLIP's patch embedding has no bias, and its class token has a position of its own.
        self.encoder.position_embedding[1:] = positions + theirs["encoder.patch_embedding.bias"]
        for block in self.encoder.blocks:
            block.temporal_attention.out_proj.weight.zero_()


class SelfDistillation(Objective):
    """DINOv2's: from a masked frame, predict which prototype the teacher sees in each hidden patch.
    SIMPLIFY: only the patch loss; a loss between whole frames never moved at this size."""

    def __init__(self, name: str):
        super().__init__(name, width=256)
        # The teacher, a moving average of the student, soon forgets how it started.
        self.teacher = copy.deepcopy(nn.Sequential(self.encoder, self.head)).requires_grad_(False)

    def forward(self, frames: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
        b, t, *_ = frames.shape
        masked = torch.rand(b, t, 4, 4, generator=generator) < 0.5
        # A patch of zeros is embedded as the bias of the patch embedding: a learned mask token.
        hidden = F.interpolate(masked.float(), frames.shape[-2:])[:, :, None] > 0
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.parameters(), strict=False):
                slow.lerp_(fast, 0.03)
            seen = F.layer_norm(self.teacher(frames).float(), (256,))
            # Less their mean, or one prototype would be the answer to everything.
            targets = ((seen - seen.mean((0, 1, 2, 3))) / 0.2).softmax(-1)
        guess = self.head(self.encoder(frames.masked_fill(hidden, 0))).float()
        guess = F.layer_norm(guess, (256,)).log_softmax(-1)
        return -(targets * guess).sum(-1)[masked].mean()


class Classification(Objective):
    """ViViT's: what happens in the first half of the film, and what in the second?"""

    def __init__(self, name: str):
        super().__init__(name, width=len(STEPS))

    def forward(self, frames: Tensor, steps: Tensor, generator: torch.Generator) -> Tensor:
        back = torch.rand(len(frames), generator=generator) < 0.5  # "east, dark" <-> "light, west"
        frames = torch.where(back[:, None, None, None, None], frames.flip(1), frames)
        steps = torch.where(back[:, None], OPPOSITE[steps].flip(1), steps)
        halves = self.encoder(frames).unflatten(1, (2, -1)).mean((2, 3, 4))  # (b, 2, d_e)
        return F.cross_entropy(self.head(halves).flatten(0, 1).float(), steps.flatten())


OBJECTIVES = {"siglip": Contrast, "languagebind": Contrast,
              "dinov2": SelfDistillation, "vivit": Classification}  # fmt: skip


def create(name: str, seed: int) -> Objective:
    """A specialist that knows nothing yet."""
    objective = OBJECTIVES[name](name)
    initialise(objective, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # WHY: from 0.02, what tells patches apart takes long to grow
        objective.encoder.patch_embedding.weight.mul_(10)
        objective.encoder.position_embedding.mul_(20)
    return objective


def train(objective: Objective, name: str, seed: int, num_clips: int = NUM_CLIPS) -> list[float]:
    """Minimise an objective by its recipe: the losses."""
    steps, batch, num_frames, muon_lr = RECIPES[name]
    drawn = map(two_steps if name == "vivit" else captioned_clip, range(num_clips))
    labels, films = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    generator, losses = torch.Generator().manual_seed(seed), []
    matrices = [p for p in objective.encoder.blocks.parameters() if p.ndim == 2]
    others = [p for p in objective.parameters() if p.requires_grad and p not in {*matrices}]
    optimizers = [
        # WHY: with AdamW alone, ViViT stays near chance for as long as we can wait.
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05),
    ]
    for step in range(steps):
        chosen = torch.randint(num_clips, (batch,), generator=generator)
        stride = NUM_FRAMES // num_frames
        first = torch.randint(stride, (), generator=generator)
        frames = films[chosen, first::stride]
        # With noise, against which video coding is faint.
        noise = 0.02 * torch.randn(frames.shape, generator=generator)
        frames = pixels(frames, objective.encoder, noise)
        # WHY: on a CPU and at this size, plain attention is faster than the fused kernel.
        with torch.autocast("cpu", torch.bfloat16, FAST_BF16), sdpa_kernel(SDPBackend.MATH):
            loss = objective(frames, labels[chosen], generator)
        if not loss.isfinite():
            raise ArithmeticError(f"{name}: the loss is {loss.item()} at step {step}.")
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, (muon_lr, 3e-3), strict=True):
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 30, cosine)
            with InFloat32():
                optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        progress(name, step + 1, steps, f"loss {loss:.3f}")
    return losses


def train_chain(names: tuple[str, ...], folder: Path, seed: int) -> None:
    """Train and save these specialists, one after the other, in this process."""
    torch.set_num_threads(1)
    objectives = {name: create(name, seed) for name in names}
    for name, objective in objectives.items():
        if name == "languagebind":
            objective.start_from(objectives["siglip"])
        train(objective, name, seed)
        if name == "vivit":
            # WHY: the last norm leaves features ten times smaller than the others', so MERV's new
            # mixture would hardly contain them. Without the classifier their scale is free.
            for parameter in objective.encoder.final_norm.parameters():
                parameter.data *= 8
        save_encoder(objective.encoder, folder / f"{name}.safetensors")


def pretrain(folder: Path, seed: int = 0) -> None:
    """Train the four specialists into <folder>/<name>.safetensors, and print what they know."""
    chains = [("siglip", "languagebind"), ("dinov2", "vivit")]
    # WHY: two processes of one thread do 1.4 times the work of one process with two threads.
    # Spawned, not forked, because the caller may already run torch's threads.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(train_chain, chains, [folder] * 2, [seed] * 2))
    for name in RECIPES:
        encoder = load_encoder(f"miniature-{name}", folder / f"{name}.safetensors")
        known = "  ".join(f"{what} {right:4.0%}" for what, right in probe(encoder).items())
        print(f"{name:13} knows {known}", flush=True)


@torch.no_grad()
def probe(encoder: Encoder, clips: int = 900) -> dict[str, float]:
    """What a linear classifier reads from pooled features of clips with one object: accuracies."""
    first = FIRST_SEED["probe"]
    scenes, films = zip(*(world.draw_clip(first + n, count=1) for n in range(clips)), strict=True)
    films = torch.from_numpy(np.stack(films))[:, :: NUM_FRAMES // encoder.config.num_frames]
    grids = torch.cat([encoder(pixels(part, encoder)) for part in films.split(100)])
    pooled = F.adaptive_avg_pool2d(grids.flatten(0, 1).movedim(-1, 1), 2).reshape(clips, -1)
    x, results = (pooled - pooled.mean(0)) / pooled.std(0), {}
    for what, tell in PROBES.items():
        labels = [tell(scene, scene.things[0]) for scene in scenes]
        rows = [n for n, label in enumerate(labels) if label is not None]
        classes = sorted({labels[n] for n in rows})
        y, split = torch.tensor([classes.index(labels[n]) for n in rows]), len(rows) * 2 // 3
        known, new = x[rows].split([split, len(rows) - split])
        # Ridge regression to one-hot labels on two thirds of the clips: W = X' (X X' + l I)^-1 Y.
        gram = known @ known.mT + 300 * torch.eye(split)
        guess = new @ known.mT @ torch.linalg.solve(gram, F.one_hot(y[:split]) - 1 / len(classes))
        results[what] = (guess.argmax(1) == y[split:]).float().mean().item()
    return results


PROBES = {
    "colour": lambda scene, a: a.colour, "shape": lambda scene, a: a.shape,
    "texture": lambda scene, a: a.texture, "place": lambda scene, a: (a.x // 8, a.y // 8),
    "verb": lambda scene, a: VERBS[scene.action],
    "direction": lambda scene, a: scene.action if scene.action in REVERSED else None,
}  # fmt: skip
