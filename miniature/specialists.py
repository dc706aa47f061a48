"""Pre-train four tiny encoders, each with the type of objective of its full-size model.

    SigLIP         matches single frames with texts that name one object by colour and shape
    LanguageBind   matches clips with such texts or with a coarse verb ("moves", "changes size",
                   never a direction), starting from SigLIP's weights
    DINOv2         sees no text: from a frame with hidden patches it predicts what a moving average
                   of itself makes of these patches
    ViViT          classifies how one object changes between two frames: left or right, up or
                   down, larger or smaller, stronger or fainter

Sources: SigLIP arXiv:2303.15343, LanguageBind 2310.01852, iBOT 2111.07832, DINOv2 2304.07193.
"""

import copy
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from encoders import ENCODERS, FAMILIES, Encoder, load_encoder, save_encoder
from miniature import world
from miniature.world import COLOURS, FIRST_SEED, NUM_FRAMES, SHAPES
from support.cli import progress
from support.muon import Muon
from support.processes import end_with_parent
from support.statistics import linear_probe
from support.weights import initialise

VERBS = {  # what captions call an action; all others are "moves"
    "stays": "rests",
    "grows": "changes size",
    "shrinks": "changes size",
    "pulses": "changes size",
    "appears": "changes light",
    "fades": "changes light",
    "blinks": "changes light",
}
PHRASES = [""]  # the parts of captions; "" stands in for a missing second or third object
PHRASES += [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
PHRASES += ["changes light", "changes size", "moves", "rests"]
NUM_PROTOTYPES = 256  # DINOv2's
ADAMW_LR = 3e-3  # peak learning rate of everything that Muon does not train


def fast_bfloat16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 in hardware; on others float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported()  # WHY: macOS builds of torch lack this operation


def example(
    number: int,
    alone: bool,  # with a single object
) -> tuple[ndarray, ndarray, ndarray]:
    """One clip for pre-training: caption (4,), changes (T / 2, 4), frames (T, 3, H, W).

    caption: indices into PHRASES, up to three objects and a verb.
    changes: whether x, y, size and opacity of the actor fall (0), stay (1) or rise (2) from frame
    0 to frame 1, from frame 2 to frame 3, and so on.
    """
    seed = FIRST_SEED["pretraining"] + number
    scene, frames = world.draw_clip(seed, count=1 if alone else None)
    captions = sorted(f"{a.colour} {a.shape}" for a in scene.things)
    while len(captions) < 3:
        captions.append("")
    captions.append(VERBS.get(scene.action, "moves"))
    caption = np.array([PHRASES.index(phrase) for phrase in captions])
    states = world.motion(scene)
    differences = states[:, 1::2] - states[:, ::2]  # (4, T / 2)
    signs = np.sign(differences.T.round(2))
    return caption, 1 + signs.astype(int), frames


@lru_cache(1)  # encoders that are trained one after the other learn from the same clips
def draw_examples(count: int, alone: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked examples: captions (n, 4), changes (n, T / 2, 4), clips (n, T, 3, H, W)."""
    examples = [example(number, alone) for number in range(count)]
    captions, changes, films = [torch.tensor(np.stack(x)) for x in zip(*examples, strict=True)]
    return captions, changes, films


def normalise(frames: Tensor, encoder: Encoder) -> Tensor:
    """Bring pixels in [0, 1], (b, T, 3, H, W), to the range that the encoder expects."""
    config = encoder.config
    mean = frames.new_tensor(config.pixel_mean)
    std = frames.new_tensor(config.pixel_std)
    return (frames - mean.view(3, 1, 1)) / std.view(3, 1, 1)


class Pretrainer(nn.Module):
    """An encoder with all blocks of its released file, and the parts only pre-training needs."""

    def __init__(self, name: str, seed: int):
        super().__init__()
        config = ENCODERS[f"miniature-{name}"]
        d_e = config.hidden_size
        outputs = {
            "siglip": d_e,
            "languagebind": d_e,
            "dinov2": NUM_PROTOTYPES,
            "vivit": 4 * 3,  # x, y, size, opacity: each falls, stays or rises
        }
        family = FAMILIES[config.family]
        self.encoder = family(replace(config, num_layers=config.released_layers))
        self.head = nn.Sequential(nn.LayerNorm(d_e), nn.Linear(d_e, outputs[name]))
        # SIMPLIFY: with so few phrases, one learned vector a phrase replaces a text encoder.
        self.text_encoder = nn.Embedding(len(PHRASES), d_e)
        self.scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1))
        initialise(self, Generator().manual_seed(seed))
        with torch.no_grad():
            # WHY: with the usual 0.02, the embeddings of different patches stay alike for long.
            self.encoder.patch_embedding.weight.mul_(10)
            self.encoder.position_embedding.mul_(20)
            if name == "vivit":  # WHY: else its features, which follow a norm, are the smallest
                self.encoder.final_norm.weight.mul_(8)
        if name == "dinov2":  # the teacher is a moving average of encoder and head
            self.teacher = copy.deepcopy(nn.Sequential(self.encoder, self.head))
            self.teacher.requires_grad_(False)

    @torch.no_grad()
    def start_from(self, siglip: "Pretrainer") -> None:
        """Copy SigLIP's weights into LanguageBind; temporal attention adds nothing at first."""
        weights = siglip.state_dict()
        positions = weights.pop("encoder.position_embedding")[0]
        self.load_state_dict(weights, strict=False)
        # LanguageBind's patch embedding has no bias, so SigLIP's goes into the positions. The first
        # position is the class token's, which SigLIP lacks.
        bias = weights["encoder.patch_embedding.bias"]
        self.encoder.position_embedding[1:] = positions + bias
        for block in self.encoder.blocks:
            block.temporal_attention.out_proj.weight.zero_()


def matching_loss(
    model: Pretrainer,
    frames: Tensor,  # (b, T, 3, H, W)
    captions: Tensor,  # (b, 4): three objects and a verb, as `example` gives them
    generator: Generator,
) -> Tensor:
    """SigLIP's and LanguageBind's sigmoid loss: which texts of the batch fit which images?

    The text of a clip is one of its objects or, if it has more than one frame, in half of the
    cases its verb.
    """
    objects = captions[:, :3]
    verbs = captions[:, 3]
    draw = torch.rand(captions.shape, generator=generator).to(captions.device)
    chosen = draw[:, :3].masked_fill(objects == 0, -1).argmax(1)
    texts = objects[torch.arange(len(objects)), chosen]  # (b,)
    if frames.shape[1] > 1:
        texts = torch.where(draw[:, 3] < 0.5, verbs, texts)
    features = model.encoder(frames).mean((1, 2, 3))  # (b, d_e)
    image_embeddings = F.normalize(model.head(features), dim=-1)
    text_embeddings = F.normalize(model.text_encoder(texts), dim=-1)
    similarity = image_embeddings @ text_embeddings.mT  # (images, texts)
    logits = 10 * model.scale.exp() * similarity - 5 + model.bias
    # WHY: in a small world, the text of another clip often fits as well. Then it counts as a match.
    fits = (captions[:, :, None] == texts).any(1).float()
    loss = F.binary_cross_entropy_with_logits(logits.float(), fits, reduction="sum")
    return loss / len(frames)


def masked_patch_loss(
    model: Pretrainer,
    frames: Tensor,  # (b, T, 3, H, W)
    captions: Tensor,  # not used
    generator: Generator,
) -> Tensor:
    """DINOv2's self-distillation: which prototype does the teacher see in each hidden patch?

    SIMPLIFY: only the loss on patches; the one on whole frames never fell at this size.
    """
    b, t, _, height, width = frames.shape
    masked = torch.rand(b, t, 4, 4, generator=generator) < 0.5  # (b, t, h, w)
    masked = masked.to(frames.device)
    pixel_mask = F.interpolate(masked.float(), (height, width)) > 0
    student = nn.Sequential(model.encoder, model.head)
    with torch.no_grad():
        averages = model.teacher.parameters()
        for average, parameter in zip(averages, student.parameters(), strict=True):
            average.lerp_(parameter, 0.03)
        scores = model.teacher(frames).float()
        scores = F.layer_norm(scores, (NUM_PROTOTYPES,)) / 0.2
        targets = scores.softmax(-1)  # (b, t, h, w, prototypes)
        # Sinkhorn: use all prototypes equally, or one of them would become every answer.
        for _ in range(3):
            used = targets.sum((0, 1, 2, 3))
            targets = targets / used.clamp(min=1e-6)
            targets = targets / targets.sum(-1, keepdim=True)
    # Patches of zeros are embedded as the bias of the patch embedding: a learned mask token.
    visible = frames.masked_fill(pixel_mask[:, :, None], 0)
    guesses = F.layer_norm(student(visible).float(), (NUM_PROTOTYPES,))
    return F.cross_entropy(guesses[masked], targets[masked])


def change_loss(
    model: Pretrainer,
    frames: Tensor,  # (b, T, 3, H, W)
    changes: Tensor,  # (b, t, 4), as `example` gives them
    generator: Generator,  # not used
) -> Tensor:
    """ViViT's classification: how does the object change within each tubelet of two frames?"""
    features = model.encoder(frames).mean((2, 3))  # (b, t, d_e)
    logits = model.head(features).view(-1, 3)  # t tubelets x 4 properties x 3 classes
    return F.cross_entropy(logits.float(), changes.flatten())


@dataclass(frozen=True)
class Recipe:
    """How one encoder is pre-trained."""

    loss: Callable  # (model, frames, captions or changes, generator) -> loss
    steps: int  # of training
    batch: int  # clips in a step
    num_frames: int  # frames taken of a clip
    muon_lr: float  # peak learning rate of Muon


RECIPES = {
    "siglip": Recipe(matching_loss, 720, 256, 1, 0.04),
    "languagebind": Recipe(matching_loss, 240, 64, 4, 0.02),
    "dinov2": Recipe(masked_patch_loss, 280, 96, 2, 0.04),
    "vivit": Recipe(change_loss, 700, 64, 8, 0.04),
}


def make_optimizers(model: Pretrainer, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else.

    WHY: with AdamW alone, ViViT stays near chance for as long as a first run may take.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.blocks") and parameter.ndim == 2:
            matrices.append(parameter)
        elif parameter.requires_grad:
            others.append(parameter)
    muon = Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.05)
    adamw = torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.05)
    return [muon, adamw]


def train(
    model: Pretrainer,
    name: str,  # of a recipe
    seed: int,  # decides the order of the clips and the noise
    num_clips: int = 6000,
) -> list[float]:
    """Pre-train by a recipe, where the model is; returns the loss of each step.

    Random numbers are drawn on the CPU, so that they are the same on every device.
    """
    device = next(model.parameters()).device
    recipe = RECIPES[name]
    classify = recipe.loss is change_loss
    captions, changes, films = draw_examples(num_clips, alone=classify)
    clips = films.to(device)
    labels = captions.to(device)
    if classify:
        labels = changes.to(device)
    optimizers = make_optimizers(model, recipe.muon_lr)
    generator = Generator().manual_seed(seed)
    stride = NUM_FRAMES // recipe.num_frames
    losses = []
    for step in progress(range(recipe.steps), name):
        # 1. A batch of clips, with noise that hides the smaller errors of video coding.
        chosen = torch.randint(num_clips, (recipe.batch,), generator=generator)
        start = torch.randint(stride, (), generator=generator)
        frames = clips[chosen, start::stride] / 255
        targets = labels[chosen]
        noise = torch.randn(frames.shape, generator=generator)
        frames += 0.02 * noise.to(device)
        frames = normalise(frames, model.encoder)
        # 2. The loss. WHY: at this size plain attention is faster on a CPU than the fused kernel.
        bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))
        with bfloat16, sdpa_kernel(SDPBackend.MATH):
            loss = recipe.loss(model, frames, targets, generator)
        losses.append(loss.item())
        # 3. The update, with 30 steps of warm-up below a cosine to 0.
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm_up = (step + 1) / 30
        angle = math.pi * step / recipe.steps
        cosine = 0.5 + 0.5 * math.cos(angle)
        for optimizer, peak in zip(optimizers, (recipe.muon_lr, ADAMW_LR), strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(warm_up, cosine)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def train_chain(names: tuple[str, ...], folder: Path, seed: int, device: str) -> None:
    """Pre-train and save these encoders, one after the other, in this process."""
    torch.set_num_threads(1)
    models = {}
    for name in names:
        models[name] = Pretrainer(name, seed).to(device)
        if name == "languagebind":
            models[name].start_from(models["siglip"])
        train(models[name], name, seed)
        save_encoder(models[name].encoder, folder / f"{name}.safetensors")


def pretrain(folder: Path, seed: int = 0, device: str = "cpu") -> None:
    """Pre-train the encoders into <folder>/<name>.safetensors, and print what they have learned."""
    chains = [("siglip", "languagebind"), ("vivit",), ("dinov2",)]  # the longest first
    # WHY: two processes of one thread do 1.4 times the work of one process with two threads.
    # They are spawned because torch must not fork.
    processes = min(len(chains), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent) as pool:
        work = partial(train_chain, folder=folder, seed=seed, device=device)
        list(pool.map(work, chains))
    for name in RECIPES:
        encoder = load_encoder(f"miniature-{name}", folder / f"{name}.safetensors")
        line = f"{name:13}"
        for what, accuracy in probe(encoder).items():
            line += f" {what} {accuracy:4.0%} "
        print(line, flush=True)


@torch.no_grad()
def probe(encoder: Encoder, num_clips: int = 900) -> dict[str, float]:
    """What a linear classifier reads from pooled features of clips with one object: accuracies."""
    films, looks = [], []
    for number in range(num_clips):
        scene, film = world.draw_clip(FIRST_SEED["probe"] + number, count=1)
        films.append(film)
        (thing,) = scene.things
        looks.append((thing.colour, thing.shape, thing.texture, scene.action))
    stride = NUM_FRAMES // encoder.config.num_frames
    frames = torch.tensor(np.stack(films))[:, ::stride]
    features = encoder(normalise(frames / 255, encoder))
    grids = features.flatten(0, 1).movedim(-1, 1)  # (clips * t, d_e, h, w)
    pooled = F.adaptive_avg_pool2d(grids, 2).reshape(num_clips, -1)
    fitted = num_clips * 2 // 3  # the classifier is tested on the last third
    accuracies = {}
    for index, name in enumerate(("colour", "shape", "texture", "action")):
        words = [look[index] for look in looks]
        accuracies[name] = linear_probe(pooled, words, fitted)
    return accuracies
