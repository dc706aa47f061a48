"""Train MERV's projectors, mixer and LLM on conversations about videos (paper 3.3, appendix B).

    torchrun train.py                                     the paper in miniature, from nothing
    torchrun --nproc-per-node 8 train.py --model merv --data DIR --tokenizer FILE
    python train.py --help                                every option

One loop, any number of processes: FSDP2 shards every parameter over them, so what one GPU cannot
hold several can. Losses are sums over tokens divided by the tokens of the whole step, so one
process with a batch of 128 and eight with micro-batches of 4 take the same steps.

Leaves runs/NAME/ with config.json, metrics.jsonl and checkpoint/ (for merv.py and eval.py).
Read before: merv.py. Read next: eval.py, miniature/.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

import eval
import miniature
from data import (
    TEMPLATES,
    Batch,
    ConversationDataset,
    FeatureCache,
    GroupedBatchSampler,
    collate,
    load_pixels,
)
from encoders import ENCODERS, UserError
from merv import MERV, MERVS, PROJECTORS, MERVConfig, choose, option, parse_options, progress

# ------------------------------------------------------------------------------------------- config


MINIATURE = Path("data/miniature")  # where the default data and encoders are made


@dataclass(frozen=True)
class Stage:
    """One pass over one file of conversations (appendix B)."""

    files: tuple[str, ...]  # in the data folder
    trained: tuple[str, ...]  # parts of the model; encoders are always frozen
    lr: float  # peak
    global_batch: int
    weight_decay: float = 0.1
    template: str = ""  # data.TEMPLATES; empty: the LLM's own
    miniature_lr: float = 2e-3  # for a small LLM that starts from random weights


ALIGN, ALL = ("projectors", "mixer"), ("projectors", "mixer", "llm")
INSTRUCT = Stage(("stage2.json",), ALL, lr=2e-5, global_batch=128)
RECIPES: dict[str, tuple[Stage, ...]] = {
    "frozen": (INSTRUCT,),
    "video-llava": (
        Stage(("stage1.json",), ALIGN, 1e-3, 256, 0.0, template="caption", miniature_lr=5e-3),
        INSTRUCT,
    ),
    "full": (Stage(("stage1.json",), ALL, 1e-4, 256, template="caption"), INSTRUCT),
}


@dataclass(frozen=True)
class TrainConfig:
    """The command line of train.py."""

    model: str = option("miniature", f"one of {', '.join(MERVS)}")
    recipe: str = option("frozen", f"which stages, which parts are trained: {', '.join(RECIPES)}")
    encoders: str = option(
        "", "comma-separated encoders instead of the model's, such as dinov2,vivit"
    )
    projector: str = option("avg2d", f"table 2a: {', '.join(PROJECTORS)}")
    data: str = option("miniature", "folder with stage1.json and stage2.json; miniature makes one")
    tokenizer: str = option("", "LLaMA-2's tokenizer.model; the miniature makes its own")
    name: str = option("", "the run is runs/NAME, or NAME-2 ...; MODEL-RECIPE if empty")
    epochs: int = option(0, "passes over the data of each stage; 0: 1, and 8 in miniature")
    max_steps: int = option(0, "stop each stage after so many steps; 0: no limit")
    lr: float = option(0.0, "peak learning rate; 0: the recipe's")
    muon_lr: float = option(-1.0, "Muon's, for the LLM's matrices; 0: AdamW; -1: 0.01 in miniature")
    global_batch: int = option(0, "rows of one step over all processes; 0: the recipe's, or 32")
    micro_batch: int = option(0, "rows a process runs at once; 0: 4, or 32 in miniature")
    warmup: float = option(0.03, "fraction of the steps in which the learning rate rises")
    clip: float = option(1.0, "largest gradient norm")
    seed: int = option(0, "of new weights and of the order of the data")
    workers: int = option(2, "processes per rank that decode videos")
    activation_checkpointing: bool = option(
        True, "recompute LLM layers: less memory, 1/3 more work"
    )
    cache_features: str = option(
        "auto", "folder for pooled features; none; auto: none but in miniature"
    )
    evaluate: bool = option(True, "after training, score the miniature's test clips")
    device: str = option("auto", "cuda or cpu; auto takes cuda if there is one")


# --------------------------------------------------------------------------------- processes, model


def join_processes(device: str) -> torch.device:
    """Join the process group that torchrun describes, or be a group of one; our device."""
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def configure(config: TrainConfig) -> tuple[MERVConfig, Path, str]:
    """The model's configuration, the data folder and the tokenizer; rank 0 makes the miniature."""
    model, small = choose(MERVS, config.model, "model"), config.model == "miniature"
    choose(RECIPES, config.recipe, "recipe")
    choose(PROJECTORS, config.projector, "projector")
    model = replace(model, projector=config.projector)
    if config.encoders:
        names = [f"miniature-{name}" if small else name for name in config.encoders.split(",")]
        encoders = tuple(choose(ENCODERS, name, "encoder") for name in names)
        model = replace(model, encoders=encoders)
    folder, tokenizer = Path(config.data), config.tokenizer
    if config.data == "miniature":
        folder = MINIATURE
        if dist.get_rank() == 0:
            miniature.prepare(folder)
        dist.barrier()
        tokenizer = tokenizer or str(folder / "tokenizer.model")
        folder = folder / "train"
    if small:
        sources = MINIATURE / "encoders"
        model = replace(
            model,
            encoders=tuple(
                replace(e, source=str(sources / f"{e.name.removeprefix('miniature-')}.safetensors"))
                for e in model.encoders
            ),
        )
    return model, folder, tokenizer


def shard(model: MERV, device: torch.device) -> None:
    """FSDP2: each LLM layer, each encoder and the rest are gathered when they run, else sharded."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # WHY: bfloat16 holds activations well but not sums of many small gradients.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if device.type == "cuda" else None, reduce_dtype=torch.float32
    )
    for part in [*model.llm.layers, *model.encoders.values(), model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)


# ---------------------------------------------------------------------------------------- one stage


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trained parameters for AdamW: matrices decay, vectors (norms, biases, the query) do not.

    FIX: the authors configured decay too, but grouped parameters after sharding had flattened them
    all to vectors, so none ever decayed (ledger K8).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizers(model: MERV, stage: Stage, muon_lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything or, with a muon_lr, Muon for the matrices inside the LLM's layers.

    WHY: the paper trains a pretrained LLM, with AdamW. A small one that starts from random weights
    reads colours after 300 steps of Muon, and not yet after 600 of AdamW (README).
    """
    groups, muon = decay_groups(model, stage.weight_decay), []
    if muon_lr and "llm" in stage.trained:
        muon = [p for p in model.llm.layers.parameters() if p.ndim == 2]
        ids = {id(p) for p in muon}
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in ids]
    optimizers = [torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.999))]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=muon_lr, weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear rise over the first `warmup` of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def fill_cache(
    model: MERV, dataset: ConversationDataset, cache: FeatureCache, workers: int
) -> None:
    """Encode every clip that is not in the cache yet, split over the processes."""
    files = sorted({path for row in dataset.rows if (path := dataset.media(row)[1])})
    missing = [
        file for file in files[dist.get_rank() :: dist.get_world_size()] if not cache.get(file)
    ]

    load = partial(load_pixels, encoders=dataset.encoders)
    loader = DataLoader(missing, batch_size=None, collate_fn=load, num_workers=workers)
    for done, pixels in enumerate(loader):
        device = next(model.encoders.parameters()).device
        features = model.features({name: clip[None].to(device) for name, clip in pixels.items()})
        cache.put(missing[done], {name: value[0] for name, value in features.items()})
        progress("encode clips once", done + 1, len(missing))
    dist.barrier()


def train_stage(
    model: MERV, stage: Stage, dataset: ConversationDataset, config: TrainConfig, log: Path
) -> None:
    """One stage of a recipe, on a sharded model. The README explains what is logged."""
    rank, world = dist.get_rank(), dist.get_world_size()

    # 1. What is trained. The rest keeps its weights and needs neither gradient nor optimizer.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in stage.trained)
    optimizers = make_optimizers(model, stage, config.muon_lr)
    model.train()

    # 2. The order of the data: `accumulation` micro-batches of every process make one step.
    samplers = [
        GroupedBatchSampler(
            dataset, stage.global_batch, config.micro_batch, rank, world, config.seed, epoch
        )
        for epoch in range(config.epochs)
    ]
    accumulation = stage.global_batch // (config.micro_batch * world)
    steps = sum(len(sampler) for sampler in samplers) // accumulation
    steps = min(steps, config.max_steps or steps)
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=[rows for sampler in samplers for rows in sampler],
            num_workers=config.workers,
            collate_fn=collate,
        )
    )

    for step in range(steps):
        # 3. Load the micro-batches of this step.
        started = time.perf_counter()
        batches: list[Batch] = [next(loader) for _ in range(accumulation)]
        waited = time.perf_counter() - started

        # 4. How many labels the whole step has, and which micro-batches have pictures on any rank.
        counts = torch.tensor(
            [sum(b.num_labels for b in batches)] + [len(b.visual_rows) for b in batches]
        )
        dist.all_reduce(counts)
        num_labels, pictures = int(counts[0]), counts[1:].tolist()

        # 5. Forward and backward. FIX: dividing each micro-batch by its own number of labels would
        #    weigh a label in a short batch more than one in a long batch (ledger F5).
        total, weights = torch.zeros(()), []
        for batch, anywhere in zip(batches, pictures, strict=True):
            join = bool(anywhere) and dataset.cache is None
            loss, weight_be = model(batch.to(model.device), join)
            # FSDP gives the mean of the ranks' gradients; times their number it is the sum.
            (loss * world / num_labels).backward()
            total += loss.detach().cpu()
            weights.append(weight_be.float().cpu())

        # 6. Clip, then step with this step's learning rate.
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip).full_tensor()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, group["peak"], config.warmup)
            optimizer.step()
            optimizer.zero_grad()

        # 7. Log.
        dist.all_reduce(total)
        seen = torch.cat(weights)
        if rank == 0:
            seconds = time.perf_counter() - started
            metrics = {
                "step": step + 1,
                "loss": total.item() / num_labels,
                "lr": optimizers[0].param_groups[0]["lr"],
                "gradient_norm": norm.item(),
                "labels_per_second": num_labels / seconds,
                "data_wait": waited / seconds,
                "weights": seen.mean(0).tolist() if len(seen) else [],
            }
            with log.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
            progress("train", step + 1, steps, f"loss {metrics['loss']:.3f}")


def settle(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on the model's size."""
    small, auto = config.model == "miniature", config.cache_features == "auto"
    return replace(
        config,
        epochs=config.epochs or (8 if small else 1),
        muon_lr=config.muon_lr if config.muon_lr >= 0 else 0.01 * small,
        micro_batch=config.micro_batch or (config.global_batch or 32 if small else 4),
        cache_features=str(MINIATURE / "features") if small and auto else config.cache_features,
        name=config.name or f"{config.model}-{config.recipe}",
    )


def train(config: TrainConfig) -> Path:
    """Every stage of the recipe, then the checkpoint; the folder of the run."""
    device = join_processes(config.device)
    config = settle(config)
    model_config, folder, tokenizer = configure(config)
    run, number = Path("runs") / config.name, 1
    if dist.get_rank() == 0:
        while run.exists():  # no run is ever overwritten
            number += 1
            run = Path("runs") / f"{config.name}-{number}"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(asdict(config), indent=2))
        print(f"{run}: {json.dumps(asdict(config))}")
    small = config.model == "miniature"
    model = MERV.create(model_config, tokenizer, config.seed)
    cache = None
    if config.cache_features not in ("none", "auto"):
        cache = FeatureCache(config.cache_features, model.fingerprints())
    stages = []
    for stage in RECIPES[config.recipe]:
        template = TEMPLATES[stage.template or model_config.llm.template]
        for file in stage.files:
            dataset = ConversationDataset(
                folder / file, model.tokenizer, template, list(model.config.encoders), cache=cache
            )
            lr = config.lr or (stage.miniature_lr if small else stage.lr)
            size = config.global_batch or (32 if small else stage.global_batch)
            stages.append((replace(stage, lr=lr, global_batch=size), dataset))
            if cache:
                fill_cache(model.to(device), dataset, cache, config.workers)
    model.llm.activation_checkpointing = config.activation_checkpointing and not small
    shard(model.to(device), device)
    for stage, dataset in stages:
        train_stage(model, stage, dataset, config, run / "metrics.jsonl")
    state = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        model.save_pretrained(run / "checkpoint", state)
    dist.barrier()
    return run


def main(arguments: list[str] | None = None) -> None:
    """`train.py`: train, then score the miniature."""
    config = parse_options(TrainConfig, arguments, "Train MERV.")
    try:
        run = train(config)
        first = dist.get_rank() == 0
        dist.destroy_process_group()
        if first and config.evaluate and config.data == "miniature":
            model = MERV.from_pretrained(run)
            for name in ("miniature-open", "miniature-mcq"):
                questions = eval.evaluate(model, name, MINIATURE / "test", run / "eval")
                eval.print_table(name, questions)
            eval.write_report([str(run)], run / "report.html")
            clip = MINIATURE / "test" / "videos" / "clip_000000.mp4"
            print(f'\nask it: python merv.py {clip} "What happens?"')
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
