"""Four tiny specialists, pre-trained from nothing, each by its full-size model's kind of objective.

    SigLIP         sigmoid loss between frames and lists of what they show
    LanguageBind   the same for clips and captions, from SigLIP's weights
    DINOv2         from a masked frame, what its own moving average makes of the whole one
    ViViT          which action is it?

Sources: SigLIP arXiv:2303.15343, LanguageBind 2310.01852, iBOT 2111.07832, DINOv2 2304.07193.
"""

import copy
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from encoders import ENCODERS, FAMILIES, Encoder, initialise, save_encoder
from miniature import world
from miniature.world import ACTIONS, COLOURS, FIRST_SEED, NUM_FRAMES, REVERSED, SHAPES, Scene

NUM_CLIPS = 6000  # to learn from
FAST_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # a CPU without it is faster in float32
RECIPES = {  # steps; batch, of frames, clips or, DINOv2, pairs of frames; Muon's learning rate
    "siglip": (350, 256, 0.04), "languagebind": (160, 64, 0.02),
    "dinov2": (300, 96, 0.04), "vivit": (600, 64, 0.04),
}  # fmt: skip
PHRASES = ["", *(f"{c} {s}" for c in COLOURS for s in SHAPES), *ACTIONS]
BACKWARDS = torch.tensor([ACTIONS.index(REVERSED.get(action, action)) for action in ACTIONS])


class InFloat32(torch.overrides.TorchFunctionMode):
    """WHY: torch's Muon computes in bfloat16, which CPUs without AVX-512 do 30 times slower."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


class Clips:
    """Films (n, T, 3, H, W) uint8 and what is known about them; batches for one encoder."""

    def __init__(self, drawn: list[tuple[Scene, np.ndarray]]):
        scenes, films = zip(*drawn, strict=True)
        self.films, self.scenes = torch.from_numpy(np.stack(films)), scenes
        self.generator = torch.Generator().manual_seed(0)
        self.actions = torch.tensor([ACTIONS.index(scene.action) for scene in scenes])
        told = [[*sorted([*map(str, s.things), "", ""][:3]), s.action] for s in scenes]
        self.phrases = torch.tensor([[PHRASES.index(words) for words in row] for row in told])

    def below(self, high: int, count: int) -> Tensor:  # whole numbers in [0, high)
        return torch.randint(high, (count,), generator=self.generator)

    def pixels(self, films: Tensor, encoder: Encoder) -> Tensor:
        """uint8 (..., 3, H, W) -> normalised, with noise against which video coding is faint."""
        noise = 0.02 * torch.randn(films.shape, generator=self.generator)
        mean, std = torch.tensor([encoder.config.pixel_mean, encoder.config.pixel_std])
        return (films / 255 + noise - mean[:, None, None]) / std[:, None, None]


class Contrast(nn.Module):
    """SigLIP's and LanguageBind's: a frame or clip must fit its own text and no other."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder, d_e = encoder, encoder.config.hidden_size
        self.image_head = nn.Sequential(nn.LayerNorm(d_e), nn.Linear(d_e, d_e))
        # SIMPLIFY: the text tower is a table of phrases; a text is their sum, in whatever order.
        self.text_tower = nn.EmbeddingBag(len(PHRASES), d_e, mode="sum", padding_idx=0)
        for part in (self.image_head, self.text_tower):
            initialise(part, torch.Generator().manual_seed(1))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10)))
        self.bias = nn.Parameter(torch.tensor(-5.0))

    def forward(self, clips: Clips, batch: int) -> Tensor:
        chosen = clips.below(len(clips.films), batch)
        films, phrases = clips.films[chosen], clips.phrases[chosen]
        if self.encoder.config.family == "languagebind":
            films = films[:, :: NUM_FRAMES // self.encoder.config.num_frames]
        else:  # SigLIP: one frame of each, and nothing said about motion
            films = films[torch.arange(batch), clips.below(films.shape[1], batch)][:, None]
            phrases = phrases[:, :-1]
        features = self.encoder(clips.pixels(films, self.encoder))  # (b, t, h, w, d_e)
        images = F.normalize(self.image_head(features.mean((1, 2, 3))), dim=-1)
        logits = images @ F.normalize(self.text_tower(phrases), dim=-1).mT
        logits = self.log_scale.exp() * logits + self.bias
        # WHY: equal texts are common here (36 single objects), and are no mismatch.
        fits = (phrases[:, None] == phrases).all(-1)
        return -F.logsigmoid(torch.where(fits, logits, -logits).float()).sum() / batch

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


class SelfDistillation(nn.Module):
    """DINOv2's: from a masked frame, predict which prototype the teacher sees in each hidden patch.
    SIMPLIFY: only the patch loss; a loss between whole frames never moved at this size."""

    def __init__(self, encoder: Encoder, prototypes: int = 256):
        super().__init__()
        self.encoder, d_e = encoder, encoder.config.hidden_size
        self.head = nn.Sequential(
            nn.LayerNorm(d_e), nn.Linear(d_e, 2 * d_e), nn.GELU(), nn.Linear(2 * d_e, prototypes),
            nn.LayerNorm(prototypes, elementwise_affine=False),  # or all stay equal
        )  # fmt: skip
        initialise(self.head, torch.Generator().manual_seed(1))
        self.teacher = copy.deepcopy(nn.ModuleList([encoder, self.head])).requires_grad_(False)

    def forward(self, clips: Clips, batch: int) -> Tensor:
        films = clips.films[clips.below(len(clips.films), batch)]
        frames = clips.pixels(films[:, :: NUM_FRAMES // 2], self.encoder)  # two of each
        _, h, w = self.encoder.config.grid
        masked = torch.rand(batch, 2, h, w, generator=clips.generator) < 0.5
        # A patch of zeros is embedded as the bias of the patch embedding: a learned mask token.
        hidden = F.interpolate(masked.float(), frames.shape[-2:])[:, :, None] > 0
        seen = self.encoder(frames.masked_fill(hidden, 0))  # (b, 2, h, w, d_e)
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.parameters(), strict=False):
                slow.lerp_(fast, 0.03)
            encoder, head = self.teacher
            whole = encoder(frames)
            patch_targets = sinkhorn(head(whole))
        patches = self.head(seen).float().log_softmax(-1)
        return -(patch_targets * patches).sum(-1)[masked].mean()


def sinkhorn(logits: Tensor, temperature: float = 0.2) -> Tensor:
    """(..., prototypes) -> probabilities in which all prototypes are used equally often."""
    share = (logits.float() / temperature).softmax(-1).flatten(0, -2)
    for _ in range(3):
        share = share / share.sum(0).clamp(min=1e-6)  # a prototype may be nobody's
        share = share / share.sum(1, keepdim=True)
    return share.view(logits.shape)


class Classification(nn.Module):
    """ViViT's: which action is it?"""

    # SIMPLIFY: its classes are the actions asked about later; Kinetics' are farther away.
    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(16 * encoder.config.hidden_size, len(ACTIONS))
        initialise(self.classifier, torch.Generator().manual_seed(1))

    def forward(self, clips: Clips, batch: int) -> Tensor:
        chosen, backwards = clips.below(len(clips.films), batch), clips.below(2, batch).bool()
        films, labels = clips.films[chosen], clips.actions[chosen]
        films = torch.where(backwards[:, None, None, None, None], films.flip(1), films)
        labels = torch.where(backwards, BACKWARDS[labels], labels)
        # Colour channels change places, so that motion is all there is to learn.
        channels = torch.rand(batch, 3, generator=clips.generator).argsort(1)
        films = films.gather(2, channels[:, None, :, None, None].expand_as(films))
        features = self.encoder(clips.pixels(films, self.encoder)).movedim(-1, 1)
        pooled = F.adaptive_avg_pool3d(features.float(), (4, 2, 2)).flatten(1)  # as MERV sees it
        return F.cross_entropy(self.classifier(pooled).float(), labels)


def train(objective: nn.Module, clips: Clips, name: str) -> None:
    """Minimise `objective(clips, batch)` by a recipe."""
    steps, batch, muon_lr = RECIPES[name]
    matrices = [p for p in objective.encoder.blocks.parameters() if p.ndim == 2]
    others = [p for p in objective.parameters() if p.requires_grad and p not in {*matrices}]
    optimizers = [
        # WHY: with AdamW alone, ViViT stays near chance for as long as we can wait.
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05),
    ]

    def factor(step: int) -> float:  # of the learning rates: linear warm-up, then half a cosine
        done = (step - 30) / (steps - 30)
        return (step + 1) / 30 if done < 0 else 0.5 + 0.5 * math.cos(math.pi * done)

    schedules = [torch.optim.lr_scheduler.LambdaLR(each, factor) for each in optimizers]
    for step in range(steps):
        # WHY: on a CPU and at this size, plain attention is faster than the fused kernel.
        with torch.autocast("cpu", torch.bfloat16, FAST_BF16), sdpa_kernel(SDPBackend.MATH):
            loss = objective(clips, batch)
        if not loss.isfinite():
            raise ArithmeticError(f"{name}: the loss is {loss.item()} at step {step}.")
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        with InFloat32():
            for each in (*optimizers, *schedules):
                each.step()
        objective.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"{name}: step {step + 1} of {steps}, loss {loss:.3f}", file=sys.stderr)


def train_chain(names: tuple, drawn: list, folder: Path) -> None:
    """Train and save these specialists, one after the other, in this process."""
    torch.set_num_threads(1)
    clips = Clips(drawn)
    objectives, kinds = {}, {"dinov2": SelfDistillation, "vivit": Classification}
    for name in names:
        start, path = time.time(), folder / f"{name}.safetensors"
        config = ENCODERS[f"miniature-{name}"]  # with all blocks of its released file:
        encoder = FAMILIES[config.family](replace(config, num_layers=config.released_layers))
        initialise(encoder, torch.Generator().manual_seed(0))
        with torch.no_grad():  # WHY: from 0.02, what tells patches apart takes long to grow
            encoder.patch_embedding.weight.mul_(10)
            encoder.position_embedding.mul_(20)
        objectives[name] = objective = kinds.get(name, Contrast)(encoder)
        if name == "languagebind":
            objective.start_from(objectives["siglip"])
        train(objective, clips, name)
        if name == "vivit":
            # WHY: the last norm leaves features ten times smaller than the others', so MERV's new
            # mixture would hardly contain them. Without the classifier their scale is free.
            for parameter in encoder.final_norm.parameters():
                parameter.data *= 8
        save_encoder(encoder, path)
        print(f"{name:13} {time.time() - start:4.0f} s", flush=True)


def pretrain(folder: Path) -> None:
    """Train the four specialists into <folder>/<name>.safetensors."""
    seeds = range(FIRST_SEED["specialists"], FIRST_SEED["specialists"] + NUM_CLIPS)
    drawn = world.parallel("clips to learn from", world.draw_clip, seeds)
    run = partial(train_chain, drawn=drawn, folder=folder)
    # WHY: two processes of one thread do 1.4 times the work of one process with two threads.
    world.parallel("training", run, [("siglip", "languagebind", "dinov2"), ("vivit",)])
