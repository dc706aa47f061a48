"""Train MERV's projectors, mixer and LLM on conversations about videos (paper 3.3 and 4).

    torchrun train.py                                     the paper in miniature, from nothing
    torchrun --nproc-per-node 8 train.py --model merv --data DIR --tokenizer FILE
    python train.py --plan --model merv --gpus 8          what that needs, before it is paid for
    python train.py --help                                every option

One loop, any number of processes: FSDP2 shards every parameter over them, so what one GPU cannot
hold several can. Losses are sums over tokens divided by the tokens of the whole step, so one
process with a batch of 128 and eight with micro-batches of 4 take the same steps.

Leaves runs/NAME/ with config.json, metrics.jsonl, loss.svg, saves/ to go on from, and checkpoint/
(for merv.py and eval.py). The command that began a run also goes on with it, bit for bit.
Read before: merv.py, eval.py. Read next: miniature/.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import ConcatDataset, DataLoader

import data
import eval
import merv
import miniature
from encoders import ENCODERS
from merv import MERV, MERVS, MIXERS, PROJECTORS
from miniature import specialists
from support import errors, features, report
from support.cli import choose, leave, option, parse_options, progress
from support.errors import UserError
from support.runs import (
    Run,
    draw_loss,
    fail,
    load_state,
    log,
    open_run,
    peak_memory,
    report_bad,
    resumed,
    save_state,
)

MINIATURE = Path("data/miniature")  # where the default data and encoders are made


@dataclass(frozen=True)
class Stage:
    """One pass over conversations (paper 4; stage 1: table 5)."""

    files: tuple[tuple[str, str], ...]  # in the data folder, with data.TEMPLATES; "": the LLM's own
    trained: tuple[str, ...]  # parts of the model; encoders are always frozen
    lr: float  # peak
    global_batch: int
    weight_decay: float = 0.1
    miniature_lr: float = 2e-3  # for a small LLM that starts from random weights


PLACES = ("shard", "copy", "streams")  # of the encoders, which are frozen
ALIGN, ALL = ("projectors", "mixer"), ("projectors", "mixer", "llm")
CAPTIONS, CONVERSATIONS = ("stage1.json", "caption"), ("stage2.json", "")
INSTRUCT = Stage((CONVERSATIONS,), ALL, lr=2e-5, global_batch=128)
RECIPES: dict[str, tuple[Stage, ...]] = {
    "frozen": (INSTRUCT,),
    "video-llava": (Stage((CAPTIONS,), ALIGN, 1e-3, 256, 0.0, miniature_lr=5e-3), INSTRUCT),
    "full": (Stage((CAPTIONS,), ALL, 1e-4, 256), INSTRUCT),
    "mixed": (replace(INSTRUCT, files=(CAPTIONS, CONVERSATIONS)),),
}


@dataclass(frozen=True)
class TrainConfig:
    """The command line of train.py."""

    model: str = option("miniature", "which encoders, which LLM", MERVS)
    recipe: str = option("frozen", "which stages, which parts are trained", RECIPES)
    encoders: str = option("", "other encoders than the model's, such as dinov2,vivit")
    projector: str = option("avg2d", "table 2a", PROJECTORS)
    mixer: str = option("cross_attention", "table 2c", MIXERS)
    pooled_side: int = option(0, "table 2b: side of a pooled frame; 0: 8, and 2 in miniature")
    data: str = option("miniature", "folder with stage1.json and stage2.json; miniature makes one")
    tokenizer: str = option("", "LLaMA-2's tokenizer.model; the miniature makes its own")
    name: str = option("", "the run is runs/NAME, or NAME-2 ...; MODEL-RECIPE if empty")
    epochs: int = option(0, "passes over the data of each stage; 0: 1, and 4 in miniature")
    max_steps: int = option(0, "stop each stage after so many steps; 0: no limit")
    lr: float = option(0.0, "peak learning rate; 0: the recipe's")
    muon_lr: float = option(-1.0, "Muon's, for the LLM's matrices; 0: AdamW; -1: 0.01 in miniature")
    global_batch: int = option(0, "rows of one step over all processes; 0: the recipe's, or 32")
    micro_batch: int = option(0, "rows a process runs at once; 0: 4, or 32 in miniature")
    warmup: float = option(0.03, "fraction of the steps in which the learning rate rises")
    clip: float = option(1.0, "largest gradient norm")
    seed: int = option(0, "of new weights and of the order of the data")
    encoder_seed: int = option(0, "of the miniature's specialists")
    workers: int = option(2, "processes per rank that decode videos")
    activation_checkpointing: bool = option(True, "recompute LLM layers: less memory, more work")
    replicas: int = option(1, "whole copies of the model, each sharded over its part of the GPUs")
    place_encoders: str = option("shard", "over all GPUs; whole on each; and in parallel", PLACES)
    cache_features: str = option("auto", "folder for pooled features; none; auto: in miniature")
    resume: str = option("", "go on with this run, such as runs/NAME, in its folder, as it began")
    save_every: int = option(500, "steps between two saves to go on from; 0: end of a stage only")
    keep: int = option(2, "how many of these to keep; 0: all")
    max_bad: float = option(0.01, "stop when more than this fraction of rows, and 10, are unusable")
    evaluate: bool = option(True, "after training, score the miniature's test clips")
    device: str = option("auto", "cuda or cpu; auto takes cuda if there is one")
    plan: bool = option(False, "print what the run would need, by the options below, and stop")
    gpus: int = option(8, "plan: number of GPUs")
    gpu_memory: float = option(48.0, "plan: GB of each")
    tflops: float = option(60.0, "plan: what each achieves, 10^12 operations a second")
    text_tokens: int = option(512, "plan: tokens of a conversation, half of them answers")


# --------------------------------------------------------------------------------- processes, model


def join_processes(device: str) -> torch.device:
    """Join the process group that torchrun describes, or be a group of one; our device."""
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank, backend = int(os.environ.get("LOCAL_RANK", 0)), "gloo"
    if cuda:
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
    if world == int(os.environ.get("LOCAL_WORLD_SIZE", world)):  # one machine
        # WHY: torchrun's store outlives a restart (--max-restarts), and with it the addresses of
        # dead processes, for which gloo would wait half an hour.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def configure(config: TrainConfig) -> merv.MERVConfig:
    """The model that the options describe; in miniature its encoders are this folder's."""
    model, small = MERVS[config.model], config.model == "miniature"
    encoders = list(model.encoders)
    if config.encoders:
        names = [f"miniature-{name}" if small else name for name in config.encoders.split(",")]
        encoders = [choose(ENCODERS, name, "encoder") for name in names]
    several = len(set(encoders)) < len(encoders)  # of one: a control
    for i, e in enumerate(encoders):
        own = MINIATURE / f"encoders-{config.encoder_seed}" / e.name.removeprefix("miniature-")
        source, name = f"{own}.safetensors" if small else e.source, e.name
        encoders[i] = replace(e, source=source, name=f"{name}-{i + 1}" if several else name)
    side = config.pooled_side or model.pooled_side
    shape = dict(projector=config.projector, mixer=config.mixer, pooled_side=side)
    return replace(model, encoders=tuple(encoders), **shape)


def make_mesh(device: str, replicas: int) -> DeviceMesh:
    """(replicas, shards): parameters are cut over the second, each part held once a replica."""
    world = dist.get_world_size()
    if world % replicas:
        what = f"{world} processes cannot hold {replicas} replicas."
        raise UserError(what, "each takes as many.", f"choose a divisor of {world}.")
    sizes, names, only = (replicas, world // replicas), ("replicate", "shard"), replicas == 1
    return init_device_mesh(device, sizes[only:], mesh_dim_names=names[only:])


def shard(model: MERV, mesh: DeviceMesh, place_encoders: str, dtype: torch.dtype) -> None:
    """FSDP2: each LLM layer, each encoder and the rest are gathered when they run, else sharded.
    Each part moves from the CPU as it is sharded, so no GPU ever holds all of the model."""
    # WHY: bfloat16 holds activations well but not sums of many small gradients.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    parts, whole = [*model.llm.layers, *model.encoders.values()], set()
    if place_encoders != "shard":
        parts, whole = parts[: len(model.llm.layers)], set(model.encoders.parameters())
        for parameter in whole:
            parameter.data = parameter.data.to(mesh.device_type, dtype)
    model.encoder_streams = place_encoders == "streams"
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)


# ---------------------------------------------------------------------------------------- one stage


def make_optimizers(model: MERV, stage: Stage, muon_lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for all that the stage trains or, with a muon_lr, Muon for matrices of LLM layers.

    All else is frozen: it needs neither gradient nor optimizer. Matrices decay, vectors (norms,
    biases, the query) do not.
    FIX: the authors configured decay too, but grouped parameters after sharding had flattened them
    all to vectors, so none ever decayed (ledger K8).
    WHY: a small LLM that starts from random weights learns more in a step of Muon (README).
    """
    muon, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in stage.trained)
        inside = muon_lr > 0 and name.startswith("llm.layers.") and parameter.ndim == 2
        if parameter.requires_grad:
            group = vectors if parameter.ndim < 2 else muon if inside else matrices
            group.append(parameter)
    groups = [{"params": matrices, "weight_decay": stage.weight_decay}]
    groups += [{"params": vectors, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.999))]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=muon_lr, weight_decay=0.0))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear rise over the first `warmup` of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def fill_cache(model: MERV, dataset: data.ConversationDataset, config: TrainConfig) -> None:
    """Encode what the cache lacks, split over the processes; no still beside clips (ledger F8)."""
    cache, rank, world = dataset.cache, dist.get_rank(), dist.get_world_size()
    media = sorted({dataset.media(row) for row in dataset.rows} - {("text", None)})
    missing = [file for _, file in media[rank::world] if not cache.get(file)]
    load = partial(decode, encoders=dataset.encoders)
    loader = DataLoader(missing, config.micro_batch, collate_fn=load, num_workers=config.workers)
    for usable, pixels in progress(loader, "encode clips once"):
        features = model.features(pixels) if usable else {}
        for index, file in enumerate(usable):
            clip = {name: value[index] for name, value in features.items()}
            cache.put(file, clip)
            if file == missing[0]:
                size = sum(2 * value.numel() for value in clip.values()) / 1e6  # bfloat16
                print(f"{cache.folder}: {len(media)} clips or stills of {size:.3f} MB each")
    dist.barrier()


def decode(files: list[Path], encoders: list) -> tuple[list[Path], dict]:
    """The files that can be decoded, and encoder -> their clips; the others' rows will say so."""
    usable, clips = [], []
    for file in files:
        with suppress(errors.DataError):
            clips.append(data.load_pixels(file, encoders))
            usable.append(file)
    return usable, data.stack(clips)


def concatenate(datasets: list[data.ConversationDataset]) -> ConcatDataset:
    """Several files as one dataset, with what the sampler and the dump of a failure read of it."""
    together = ConcatDataset(datasets)
    for name in ("rows", "lengths", "modalities"):
        setattr(together, name, [value for one in datasets for value in getattr(one, name)])
    return together


def train_stage(model: MERV, stage: Stage, dataset: ConcatDataset, run: Run, before: int) -> int:
    """One stage of a recipe, on a sharded model. The README explains what is logged.

    before: steps of the earlier stages; gives them plus this stage's. Those up to run.done are
    behind us: skipped, without reading their data.
    """
    config, rank, world = run.config, dist.get_rank(), dist.get_world_size()

    # 1. What is trained, and how.
    optimizers = make_optimizers(model, stage, config.muon_lr)
    model.train()

    # 2. The order of the data: `accumulation` micro-batches of every process make one step.
    sizes, order = (stage.global_batch, config.micro_batch, rank, world, config.seed), []
    for epoch in range(config.epochs):
        order += data.GroupedBatchSampler(dataset, *sizes, epoch)
    sharded = config.place_encoders == "shard" and config.cache_features == "none"
    accumulation = stage.global_batch // (config.micro_batch * world)
    steps = min(len(order) // accumulation, config.max_steps or len(order))
    start = min(steps, max(0, run.done - before))
    order = order[start * accumulation : steps * accumulation]
    loading = {"num_workers": config.workers, "collate_fn": data.collate}
    loader = iter(DataLoader(dataset, batch_sampler=order, **loading))
    run.seen += start * stage.global_batch
    if before < run.done <= before + steps:
        load_state(model, optimizers, run)

    for step in (bar := progress(range(start, steps), "train")):
        # 3. Load the micro-batches of this step.
        started, number = time.perf_counter(), before + step + 1
        batches: list[data.Batch] = [next(loader) for _ in range(accumulation)]
        waited = time.perf_counter() - started

        # 4. Over all ranks: labels, tokens, unusable rows, who must stop, batches with pictures.
        counts = [[b.num_labels, sum(b.lengths), len(b.bad)] for b in batches]
        counts = [*map(sum, zip(*counts, strict=True)), run.stop]
        counts = torch.tensor(counts + [len(b.visual_rows) for b in batches])
        dist.all_reduce(counts)
        labels, tokens, bad, stop, *pictures = counts.tolist()
        run.seen += stage.global_batch
        if bad:
            report_bad([row for batch in batches for row in batch.bad], bad, run, number)

        # 5. Forward and backward. FIX: dividing each micro-batch by its own number of labels would
        #    weigh a label in a short batch more than one in a long batch (ledger F5).
        total, weights = torch.zeros(()), []
        for batch, anywhere in zip(batches, pictures, strict=True):
            loss, weight_be = model(batch.to(model.device), join=sharded and anywhere > 0)
            # FSDP gives the mean of the ranks' gradients; times their number it is the sum.
            (loss * world / labels).backward()
            total += loss.detach().cpu()
            weights.append(weight_be.float().cpu())

        # 6. Clip, then step with this step's learning rate.
        dist.all_reduce(total)
        loss = total.item() / labels
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip).full_tensor().item()
        if not math.isfinite(loss + norm):
            indices = order[(step - start) * accumulation :][:accumulation]
            rows = [dataset.rows[i] for micro_batch in indices for i in micro_batch]
            what = f"the loss is {loss}, the gradient norm {norm}"
            fail(model, batches, rows, run.folder / f"failure-step-{number}", what)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, group["peak"], config.warmup)
            with specialists.muon_in_float32():
                optimizer.step()
            optimizer.zero_grad()

        # 7. Log.
        if rank == 0:
            seconds, lr = time.perf_counter() - started, optimizers[0].param_groups[0]["lr"]
            tokens += sum(pictures) * model.config.num_visual
            metrics = {"step": number, "loss": loss, "lr": lr, "gradient_norm": norm}
            metrics |= {"tokens_per_second": tokens / seconds, "data_wait": waited / seconds}
            mixed = torch.cat(weights).mean(0).tolist() if any(map(len, weights)) else []
            log(run, metrics | {"memory_gb": peak_memory(model.device), "weights": mixed})
            bar.set_postfix_str(f"loss {loss:.3f}")

        # 8. Save what the next step needs, now and then; leave if asked to.
        if stop or step + 1 == steps or (config.save_every and number % config.save_every == 0):
            save_state(model, optimizers, run, number)
        if stop:
            print(f"Stopped after step {number}; the same command goes on." * (rank == 0))
            leave()
    return before + steps


# -------------------------------------------------------------------------------- what a run leaves


# ------------------------------------------------------------------------------------ the whole run


def settle(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on the model's size."""
    small, cache = config.model == "miniature", config.cache_features
    if cache == "auto":
        cache = str(MINIATURE / "features") if small else "none"
    return replace(
        config,
        epochs=config.epochs or (4 if small else 1),
        muon_lr=config.muon_lr if config.muon_lr >= 0 else 0.01 * small,
        micro_batch=config.micro_batch or (config.global_batch or 32 if small else 4),
        cache_features=cache,
        name=config.name or f"{config.model}-{config.recipe}",
    )


def train(config: TrainConfig) -> Run:
    """Every stage of the recipe, then the checkpoint; or what is left of a run that has begun."""
    device, model_config = join_processes(config.device), configure(config)
    rank, small = dist.get_rank(), config.model == "miniature"
    folder, tokenizer = Path(config.data), config.tokenizer
    if config.data == "miniature":
        if rank == 0:
            miniature.prepare(MINIATURE, config.encoder_seed)
        dist.barrier()
        folder, tokenizer = MINIATURE / "train", tokenizer or str(MINIATURE / "tokenizer.model")
    found = [open_run(config) if rank == 0 else None]
    dist.broadcast_object_list(found)
    run: Run = found[0]
    if (run.folder / "checkpoint").is_dir():
        return run
    if rank == 0 and find_spec("tensorboard"):
        run.board = import_module("torch.utils.tensorboard").SummaryWriter(run.folder)
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop", True))
    model = MERV.create(model_config, tokenizer, config.seed)
    llm, encoders, cache, stages = model_config.llm, list(model.config.encoders), None, []
    if config.cache_features != "none":
        cache = features.FeatureCache(config.cache_features, model.fingerprints())
    for stage in RECIPES[config.recipe]:
        lr = config.lr or (stage.miniature_lr if small else stage.lr)
        size, files = config.global_batch or (32 if small else stage.global_batch), []
        for file, template in stage.files:
            parts = (model.tokenizer, data.TEMPLATES[template or llm.template], encoders)
            files.append(data.ConversationDataset(folder / file, *parts, cache=cache))
            if cache:
                model.encoders.to(device)
                fill_cache(model, files[-1], config)
        stages.append((replace(stage, lr=lr, global_batch=size), concatenate(files)))
    model.llm.activation_checkpointing = config.activation_checkpointing and not small
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shard(model, make_mesh(device.type, config.replicas), config.place_encoders, dtype)
    steps = 0
    for stage, dataset in stages:
        steps = train_stage(model, stage, dataset, run, steps)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    whole = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = sharded.get_model_state_dict(model, options=whole)
    if rank == 0:
        draw_loss(run.folder)
        model.save_pretrained(run.folder / "checkpoint", state)
    dist.barrier()
    return run


def main(arguments: list[str] | None = None) -> None:
    """`train.py`: train, then score the miniature."""
    config = parse_options(TrainConfig, arguments, "Train MERV.")
    try:
        config = settle(resumed(config) if config.resume else config)
        if config.plan:
            return import_module("cost").plan(config)  # cost.py imports this module
        run = train(config)
        dist.destroy_process_group()
        if run.config.evaluate and run.config.data == "miniature":
            model, name = MERV.from_pretrained(run.folder), "miniature-open"
            answered = eval.evaluate(model, name, MINIATURE / "test", run.folder / "eval")
            if answered:  # by all processes, each its share
                eval.print_table(name, answered)
                report.write_report([str(run.folder)], run.folder / "report.html", eval.summarise)
                clip = MINIATURE / "test" / "videos" / "clip_000000.mp4"
                print(f'ask it: python merv.py {clip} "What happens?"')
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(1)


if __name__ == "__main__":
    main()
    leave()
