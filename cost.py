"""What a training run will need, and what the paper's models cost: counted, not guessed.

    python train.py --plan --model merv --gpus 8 --gpu-memory 48 --tflops 60
    python eval.py --table efficiency

The real modules run on fake tensors, which have shapes and no memory, and in a fake process group:
neither weights nor a GPU are needed. Read before: train.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Batch
from encoders import ENCODERS, FAMILIES
from llama import LLAMAS, Llama
from merv import FOUR, MERV, PROJECTORS, MERVConfig
from support.errors import UserError

# ------------------------------------------------------------------------------- a training run

# The paper's stills and clips in each file (paper 4).
ROWS = {train.CAPTIONS: (558e3, 702e3), train.CONVERSATIONS: (665e3, 100e3)}


def fake_step(config: train.TrainConfig, stage: train.Stage, meter, still: bool = False):
    """Forward and backward of one micro-batch on rank 0: real modules, tensors without memory.

    meter: makes the context that watches, given the model. Gives it, the model, the optimizers.
    """
    model_config, b, s = train.configure(config), config.micro_batch, config.text_tokens
    mesh = train.make_mesh("cpu", config.replicas)
    dtype = torch.float32 if config.device == "cpu" else torch.bfloat16
    with FakeTensorMode():
        encoders = [FAMILIES[e.family](e) for e in model_config.encoders]
        model = MERV(model_config, encoders, Llama(model_config.llm), None).train()
        model.llm.activation_checkpointing = config.activation_checkpointing
        # WHY: the tracker stumbles over what is sharded and never runs, so it counts them whole.
        cached = config.cache_features != "none"
        train.shard(model, mesh, "copy" if cached else config.place_encoders, dtype)
        optimizers = train.make_optimizers(model, stage, config.muon_lr)
        ids, labelled = (torch.zeros(n, m, dtype=torch.long) for n, m in ((b, s), (2, b * s // 2)))
        batch = Batch(ids, labelled, [s] * b, list(range(b)), {}, {})
        for e, project in zip(model_config.encoders, model.projectors.values(), strict=True):
            t, side = 1 if still else e.num_frames, e.image_size
            if cached:
                batch.features[e.name] = project.pool(torch.empty(b, *e.grid, e.hidden_size))
            else:
                batch.pixels[e.name] = torch.empty(b, t, 3, side, side)
        with meter(model) as watching:
            model(batch)[0].backward()
    return watching, model, optimizers


def memory_of(config: train.TrainConfig, stage: train.Stage) -> tuple[dict[str, float], MERV]:
    """What rank 0 holds when it holds most, in a backward pass after the first step: GB by kind;
    the model."""
    tracker, model, optimizers = fake_step(config, stage, FSDPMemTracker)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    held = {getattr(kind, "name", "TOTAL"): size for kind, size in peak.items()}
    rows = {"weights": sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())}
    rows |= {"gradients": held["SHARDED_GRAD"], "optimizer": 0}
    rows["gathered weights, gradients"] = sum(
        held[kind] for kind in ("UNSHARDED_PARAM", "ALL_GATHER", "UNSHARDED_GRAD", "REDUCE_SCATTER")
    )
    rows["activations, logits, features"] = held["TOTAL"] - sum(rows.values())
    # WHY: not the tracker's, which takes the temporaries of a step for the optimizer's state.
    for moments, optimizer in zip((2, 1), optimizers, strict=False):  # AdamW, Muon
        owned = [p.to_local() for group in optimizer.param_groups for p in group["params"]]
        rows["optimizer"] += moments * sum(p.nbytes for p in owned)
    return {name: size / 1e9 for name, size in rows.items()}, model


def work_of(config: train.TrainConfig, stage: train.Stage, still: bool) -> dict[str, float]:
    """Operations for one row, forward and backward, by part of the model: 10^12."""
    meter = lambda model: FlopCounterMode(display=False)  # noqa: E731
    counter, model, _ = fake_step(config, stage, meter, still)
    rows = dict.fromkeys([*model.encoders, "LLM layers"], 0)
    for name, counts in counter.get_flop_counts().items():
        path = name.split(".")[1:]  # such as MERV.encoders.siglip, MERV.llm.layers.0
        if path[:1] == ["encoders"] and len(path) == 2:
            rows[path[1]] += sum(counts.values())
        elif path[:2] == ["llm", "layers"] and len(path) == 3:
            rows["LLM layers"] += sum(counts.values())
    rows["projectors, mixer, logits"] = counter.get_total_flops() - sum(rows.values())
    return {name: work / config.micro_batch / 1e12 for name, work in rows.items()}


def plan(config: train.TrainConfig) -> None:
    """Print what a run needs: memory of each GPU, work of a row, hours. UserError: does not fit."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.gpus)
    hours = 0.0
    for number, stage in enumerate(train.RECIPES[config.recipe], start=1):
        needs, model = memory_of(config, stage)
        if sum(needs.values()) > config.gpu_memory:
            refuse(config, stage, sum(needs.values()))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        frozen = sum(p.numel() for p in model.parameters()) / 1e6 - trained
        print(f"stage {number} trains {', '.join(stage.trained)}")
        print(
            f"{trained:,.1f} M parameters, {frozen:,.1f} M are frozen. GB of each GPU, at the peak"
        )
        for name, size in (needs | {"all": sum(needs.values())}).items():
            print(f"  {name:<30}{size:>8.2f}")
        clip, still = (work_of(config, stage, still) for still in (False, True))
        print(f"10^12 operations for {'a clip':>19}{'a still':>10}")
        for name in clip:
            print(f"  {name:<30}{clip[name]:>8.2f}{still[name]:>10.2f}")
        stills, clips = map(sum, zip(*(ROWS[file] for file in stage.files), strict=True))
        work = stills * sum(still.values()) + clips * sum(clip.values())
        print(f"{stills:,.0f} stills, {clips:,.0f} clips: {work * 1e12:.2e} operations")
        hours += work / (config.gpus * config.tflops) / 3600
    print(f"{hours:.1f} hours on {config.gpus} GPUs that achieve {config.tflops:g} TFLOP/s each")


def refuse(config: train.TrainConfig, stage: train.Stage, needed: float) -> None:
    """Raise UserError, with the largest micro-batch that fits, if one does."""
    what = f"A micro-batch of {config.micro_batch} needs {needed:.1f} GB of each GPU."
    why, b = f"it has {config.gpu_memory:g} GB.", config.micro_batch // 2
    while b:
        held = sum(memory_of(replace(config, micro_batch=b), stage)[0].values())
        if held <= config.gpu_memory:
            raise UserError(what, why, f"--micro-batch {b} needs {held:.1f} GB.")
        b //= 2
    raise UserError(what, why, "take more --gpus, --activation-checkpointing or fewer tokens.")


# ---------------------------------------------------------------------------- the paper's models

TEXT = 880  # tokens; the paper took a random string for each row, so the last three rows differ
PAPER = (  # row, encoders, visual tokens, M parameters (table 8), T multiply-adds (tables 2c and 8)
    ("MERV", FOUR, 1024, 7686, 17.19),
    ("LanguageBind alone", FOUR[:1], 16 * 257, 7147, 41.3),
    ("DINOv2 alone", FOUR[1:2], 16 * 257, 7046, 40.88),
    ("SigLIP alone", FOUR[3:], 16 * 196, 6834, 31.08),
    ("concat (sequence)", FOUR, 4 * 1024, 0, 43.09),
    ("ViViT alone", FOUR[2:3], 16 * 196, 6830, 27.12),
    ("concat (channel)", FOUR, 1024, 0, 16.29),
    ("learnable W", FOUR, 1024, 0, 16.24),
)
# Table 2a, M parameters before the final Linear.
PAPER_PROJECTORS = {"avg2d": 0, "avg3d": 0, "attn2d": 12.7, "conv2d": 237, "conv3d": 113}
# Released parameters that nobody runs: final norms, SigLIP's pooling head, the fusion module.
UNUSED = {"languagebind": 2048, "dinov2": 2048, "vivit": 0, "siglip": 1536 + 12 * 768**2 + 14 * 768}
FUSION = 3072 * (1 + 3072 + 2 * 4096 + 3 + 3072 + 1)


def count(module: torch.nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def cost(names: tuple[str, ...], visual: int, released: bool) -> tuple[float, float]:
    """Millions of parameters and tera multiply-adds of one video + TEXT tokens, on meta.

    released: all blocks, unused parts, logits everywhere; else as here: the blocks that are run,
    the last logits. Counted are Linears, convolutions and attention.
    """
    llama, single = replace(LLAMAS["llama2-7b"], vocab_size=32064), len(names) == 1
    encoders = [ENCODERS[name] for name in names]
    if released:
        encoders = [replace(e, num_layers=e.released_layers) for e in encoders]
    how = {"projector": "all", "mixer": "mean"} if single else {}
    config = MERVConfig("on paper", tuple(encoders), llama, **how)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = MERV(config, [FAMILIES[e.family](e) for e in encoders], Llama(llama), None)
        model.encode({e.name: torch.empty(1, e.num_frames, 3, 224, 224) for e in encoders})
        hidden = model.llm.hidden_states(None, torch.empty(1, visual + TEXT, llama.hidden_size))
        model.llm.logits(hidden if released else hidden[:, -1:])
    parameters = count(model)
    if released:
        parameters += sum(UNUSED[name] for name in names)
        parameters += 0 if single else FUSION - count(model.mixer)
    return parameters / 1e6, counter.get_total_flops() / 2e12


def print_efficiency() -> None:
    """Tables 8, 2c and 2a: the paper's figures and ours."""
    print(f"One video + {TEXT} text tokens: the paper, counted in the released form, done here\n")
    print(f"{'':<20} M: paper counted    here    T: paper counted (off)          here")
    for name, encoders, visual, millions, tera in PAPER:
        counted_m, counted_t = cost(encoders, visual, released=True)
        ours_m, ours_t = cost(encoders, visual, released=False)
        known = f"{millions:>8}{int(counted_m):>8}" if millions else f"{'':>16}"
        off = f"({100 * (counted_t / tera - 1):+.1f} %)"
        work = f"{tera:>12.2f}{counted_t:>8.2f} {off:<11}{ours_t:>8.2f}"
        print(f"{name:<20}{known}{ours_m:>8.0f}{work}")
    print("\nM parameters of projectors before the final Linear (LanguageBind, width 4096)")
    for name, millions in PAPER_PROJECTORS.items():
        with torch.device("meta"):
            projector = PROJECTORS[name](1024, 4096, 8)
        before = (count(projector) - count(projector.linear)) / 1e6
        print(f"{name:<20}{millions:>8}{before:>8.1f}")
