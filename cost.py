"""What a training run needs, and what the paper's models cost: counted on the real modules.

    python cost.py plan --model merv --gpus 8 --gpu-memory 48 --tflops 60
    python cost.py table

`plan` prints the memory of each GPU and the hours that `train.py` will take. `table` counts the
parameters and multiply-adds of tables 2a, 2c and 8. The modules run on tensors that have shapes but
no memory, and in a process group that only pretends to have other processes, so neither weights nor
a GPU are needed. Read before: train.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Batch
from encoders import ENCODERS, FAMILIES
from llama import LLAMAS, Llama
from merv import FOUR, MERV, MERVS, MIXERS, PROJECTORS, MERVConfig
from support import lora
from support.cli import exit_now, option, parse_options
from support.errors import UserError
from support.muon import Muon

# ------------------------------------------------------------------------------------------ options


@dataclass(frozen=True)
class PlanConfig:
    """The options of cost.py: those of train.py that change the cost, and the machine."""

    command: tuple[str, ...] = option((), "plan or table", group="command")

    model: str = option("merv", "which encoders and which LLM", MERVS, group="model")
    encoders: str = option(",".join(FOUR), "names, separated by commas")
    projector: str = option("avg2d", "a row of table 2a", PROJECTORS)
    mixer: str = option("cross_attention", "a row of table 2c", MIXERS)
    pooled_side: int = option(8, "side of a pooled frame in tokens, table 2b", least=1)
    llm: str = option("llama2-7b", "as in train.py")

    recipe: str = option("frozen", "stages, and what each trains", train.RECIPES, group="training")
    lora: int | None = option(None, "rank of adapters; none: no LoRA", least=1)
    optimizer: str = option("adamw", "as in train.py", train.OPTIMIZERS)
    micro_batch: int = option(4, "rows that a process runs at once", least=1)
    text_tokens: int = option(512, "of each row, half of them answers", least=1)
    cached_features: bool = option(False, "without running encoders")
    activation_checkpointing: bool = option(True, "recompute LLM layers")
    replicas: int = option(1, "copies of the model, each on its GPUs", least=1)
    place_encoders: str = option("shard", "as in train.py", train.PLACES)
    dtype: str = option("bfloat16", "to compute in", ("bfloat16", "float32"))

    gpus: int = option(8, "number of GPUs", group="machine", least=1)
    gpu_memory: float = option(48.0, "GB of each GPU", least=0.001)
    tflops: float = option(60.0, "10^12 operations a second that a GPU achieves", least=0.001)


def read_options(arguments: list[str] | None = None) -> PlanConfig:
    """Read the command line. --model and --recipe choose a preset of train.py, as they do there."""
    chosen = train.preset_parser().parse_known_args(arguments)[0]
    training = train.preset_with_llm(chosen.model, chosen.recipe, chosen.llm)
    settings = {"cached_features": training.cache_features is not None}
    for f in fields(PlanConfig):
        if hasattr(training, f.name) and f.name != "dtype":  # a plan is for GPUs: no "auto"
            settings[f.name] = getattr(training, f.name)
    config = parse_options(PlanConfig, arguments, "Count costs.", PlanConfig(**settings))
    if config.command not in (("plan",), ("table",)):
        why = "its commands are plan and table."
        fix = "python cost.py plan, or python cost.py table."
        raise UserError("cost.py needs one command.", why, fix)
    if config.command == ("table",) and len(arguments or sys.argv[1:]) > 1:
        why = "it always counts the models of the paper."
        raise UserError("cost.py table has no options.", why, "leave them out.")
    return config


def training_options(config: PlanConfig) -> train.TrainConfig:
    """The options of train.py that decide the model and the stages of the run that is planned."""
    return replace(
        train.preset_with_llm(config.model, config.recipe, config.llm),
        encoders=config.encoders,
        projector=config.projector,
        mixer=config.mixer,
        pooled_side=config.pooled_side,
        lora=config.lora,
        optimizer=config.optimizer,
    )


def architecture(config: PlanConfig) -> MERVConfig:
    """The model that the options describe, as train.py would build it."""
    return train.model_config(training_options(config))


# ------------------------------------------------------------------------------ one simulated step


@contextmanager
def simulated_processes(count: int) -> Iterator[None]:
    """A process group in which this process has rank 0 and the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build(config: MERVConfig) -> MERV:
    """A model on the tensors of the surrounding context: the meta device, or fake tensors."""
    encoders = [FAMILIES[e.family](e).requires_grad_(False) for e in config.encoders]
    return MERV(config, encoders, Llama(config.llm), None)


def make_batch(config: PlanConfig, model: MERV, still: bool) -> Batch:
    """A micro-batch of rows with a clip or a still each; the second half of the text is labelled.

    The values do not matter, as only shapes are counted.
    """
    b, s = config.micro_batch, config.text_tokens
    ids = torch.zeros(b, s, dtype=torch.long)
    labelled = torch.zeros(2, b * s // 2, dtype=torch.long)
    batch = Batch(ids, labelled, [s] * b, list(range(b)), pixels={}, pooled={})
    for e in model.config.encoders:
        projector = model.projectors[e.name]
        if config.cached_features:
            t, h, w = e.grid
            if projector.class_token:
                h, w = 1, 1
            features = torch.empty(b, t, h, w, e.hidden_size)
            batch.pooled[e.name] = projector.pool(features)
        else:
            frames = 1 if still else e.num_frames
            side = e.image_size
            batch.pixels[e.name] = torch.empty(b, frames, 3, side, side)
    return batch


def simulate_step(
    config: PlanConfig,
    model_config: MERVConfig,
    stage: train.Stage,
    measure: Callable,
    still: bool,
    micro_batches: int = 1,
) -> tuple:
    """Run forward and backward of micro-batches on rank 0, on tensors without memory.

    measure: given the model, makes the context manager that observes it.
    Returns what that context manager gives, the model, and the optimizers.
    """
    mesh = train.make_mesh("cpu", config.replicas)
    # WHY: the memory tracker fails on modules that are sharded and never run.
    place = "copy" if config.cached_features else config.place_encoders
    with FakeTensorMode():
        model = build(model_config).train()
        if config.lora is not None:
            alpha = 16.0  # any: it changes no cost
            lora.add_adapters(model.llm, config.lora, alpha)
        model.llm.activation_checkpointing = config.activation_checkpointing
        train.shard(model, mesh, place, getattr(torch, config.dtype))
        optimizers = train.make_optimizers(model, stage, training_options(config))
        batch = make_batch(config, model, still)
        with measure(model) as measured:
            for number in range(micro_batches):
                if number > 0:
                    measured.reset_mod_stats()  # the memory tracker asks for it
                if config.replicas > 1:
                    model.set_requires_all_reduce(number + 1 == micro_batches)
                loss, _ = model(batch)
                loss.backward()
    return measured, model, optimizers


GATHERED = ("UNSHARDED_PARAM", "ALL_GATHER", "UNSHARDED_GRAD", "REDUCE_SCATTER")


def memory_of(
    config: PlanConfig, model_config: MERVConfig, stage: train.Stage
) -> tuple[dict[str, float], MERV]:
    """The memory of rank 0 at the peak of a backward pass: GB by purpose; also the model.

    The peak is that of the second step and later ones, when the optimizer's state exists. If a step
    has several micro-batches, it is in the second of them, when gradients exist from its start.
    """
    several = stage.global_batch > config.micro_batch * dist.get_world_size()
    tracker, model, optimizers = simulate_step(
        config, model_config, stage, FSDPMemTracker, False, micro_batches=2 if several else 1
    )
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    held = {}  # bytes by the tracker's name for a kind of tensor; TOTAL is all of them
    for kind, size in peak.items():
        held[getattr(kind, "name", "TOTAL")] = size
    parameters = 0
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            parameter = parameter.to_local()
        parameters += parameter.nbytes
    rows = {"parameters": parameters, "gradients": held["SHARDED_GRAD"]}
    rows["gathered parameters, gradients"] = sum(held[kind] for kind in GATHERED)
    rows["activations, logits, features"] = held["TOTAL"] - sum(rows.values())
    rows["optimizer"] = optimizer_state(optimizers)
    if config.cached_features and config.place_encoders == "shard":
        # simulate_step leaves the idle encoders whole, but training shards them.
        whole = sum(parameter.nbytes for parameter in model.encoders.parameters())
        rows["parameters"] -= whole - whole * config.replicas // dist.get_world_size()
    return {purpose: size / 1e9 for purpose, size in rows.items()}, model


def optimizer_state(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of the optimizers' state on rank 0.

    WHY: the memory tracker cannot say, because it counts temporary tensors of a step as state.
    """
    size = 0
    for optimizer in optimizers:
        tensors = 1 if isinstance(optimizer, Muon) else 2  # AdamW has two moments
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                size += tensors * parameter.to_local().nbytes
    return size


def operations_of(
    config: PlanConfig, model_config: MERVConfig, stage: train.Stage, still: bool
) -> dict[str, float]:
    """Operations of one row, forward and backward, by part of the model: 10^12."""
    # It counts Linears, convolutions and attention.
    counter, model, _ = simulate_step(
        config, model_config, stage, lambda model: FlopCounterMode(display=False), still
    )
    rows = dict.fromkeys([*model.encoders, "LLM layers"], 0)
    for name, counts in counter.get_flop_counts().items():
        path = name.split(".")[1:]  # MERV.encoders.siglip -> [encoders, siglip]
        if len(path) == 2 and path[0] == "encoders":
            rows[path[1]] += sum(counts.values())
        elif len(path) == 3 and path[:2] == ["llm", "layers"]:
            rows["LLM layers"] += sum(counts.values())
    rows["projectors, mixer, logits"] = counter.get_total_flops() - sum(rows.values())
    return {part: count / config.micro_batch / 1e12 for part, count in rows.items()}


# --------------------------------------------------------------------------------------------- plan

# The paper's stills and clips in each file (paper 4).
STILLS = {train.CAPTIONS: 558_000, train.CONVERSATIONS: 665_000}
CLIPS = {train.CAPTIONS: 702_000, train.CONVERSATIONS: 100_000}


def print_plan(config: PlanConfig) -> None:
    """Print the memory of each GPU, the operations of a row and the hours of a run.

    Raises UserError if the run does not fit into the memory of the GPUs.
    """
    model_config = architecture(config)
    total = 0.0  # 10^12 operations
    with simulated_processes(config.gpus):
        stages = train.stages_of(training_options(config))
        for number, stage in enumerate(stages, start=1):
            print(f"stage {number} trains {', '.join(stage.trained)}")
            print_memory(config, model_config, stage)
            total += print_operations(config, model_config, stage)
    hours = total / (config.gpus * config.tflops) / 3600
    print(f"{hours:.1f} hours on {config.gpus} GPUs that achieve {config.tflops:g} TFLOP/s each")


def print_memory(config: PlanConfig, model_config: MERVConfig, stage: train.Stage) -> None:
    """Print the memory of each GPU at its peak. UserError: it is more than the GPUs have."""
    needs, model = memory_of(config, model_config, stage)
    needs["all"] = sum(needs.values())
    if needs["all"] > config.gpu_memory:
        raise does_not_fit(config, model_config, stage, needs["all"])
    trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
    frozen = count(model) - trained
    print(f"  {trained / 1e6:,.1f} M parameters are trained, {frozen / 1e6:,.1f} M are frozen")
    print("  memory of each GPU at the peak      GB")
    for purpose, size in needs.items():
        print(f"    {purpose:<30}{size:>8.2f}")


def print_operations(config: PlanConfig, model_config: MERVConfig, stage: train.Stage) -> float:
    """Print the operations of a row; return those of the stage in 10^12, on the paper's data."""
    clip = operations_of(config, model_config, stage, still=False)
    still = operations_of(config, model_config, stage, still=True)
    print("  10^12 operations for            a clip   a still")
    for part in clip:
        print(f"    {part:<30}{clip[part]:>6.2f}{still[part]:>10.2f}")
    stills = sum(STILLS[file] for file in stage.files)
    clips = sum(CLIPS[file] for file in stage.files)
    total = stills * sum(still.values())
    total += clips * sum(clip.values())
    print(f"  {stills:,} stills and {clips:,} clips take {total * 1e12:.2e} operations")
    return total


def does_not_fit(
    config: PlanConfig, model_config: MERVConfig, stage: train.Stage, needed: float
) -> UserError:
    """The error for a run that needs too much memory: it names a micro-batch that fits, if any."""
    problem = f"A micro-batch of {config.micro_batch} needs {needed:.2f} GB of each GPU."
    why = f"each has {config.gpu_memory:g} GB."
    smaller = config.micro_batch // 2
    while smaller:
        needs, _ = memory_of(replace(config, micro_batch=smaller), model_config, stage)
        size = sum(needs.values())
        if size <= config.gpu_memory:
            return UserError(problem, why, f"--micro-batch {smaller} needs {size:.2f} GB.")
        smaller //= 2
    fix = "use more --gpus, --activation-checkpointing or fewer --text-tokens."
    return UserError(problem, why, fix)


# -------------------------------------------------------------------------------------------- table

TEXT = 880  # text tokens; the paper drew random text for each row: the last three of PAPER differ


class PaperRow(NamedTuple):
    """A model in the paper's tables 2c and 8."""

    name: str
    encoders: tuple[str, ...]
    visual: int  # tokens that the LLM reads
    millions: int | None  # parameters; None: the paper does not say
    tera: float  # 10^12 multiply-adds of one video and its text


PAPER = (
    PaperRow("MERV", FOUR, 1024, 7686, 17.19),
    PaperRow("LanguageBind alone", ("languagebind",), 16 * 257, 7147, 41.3),
    PaperRow("DINOv2 alone", ("dinov2",), 16 * 257, 7046, 40.88),
    PaperRow("SigLIP alone", ("siglip",), 16 * 196, 6834, 31.08),
    PaperRow("concat (sequence)", FOUR, 4 * 1024, None, 43.09),
    PaperRow("ViViT alone", ("vivit",), 16 * 196, 6830, 27.12),
    PaperRow("concat (channel)", FOUR, 1024, None, 16.29),
    PaperRow("learnable W", FOUR, 1024, None, 16.24),
)
# Table 2a, M parameters before the final Linear.
PAPER_PROJECTORS = {"avg2d": 0, "avg3d": 0, "attn2d": 12.7, "conv2d": 237, "conv3d": 113}

# Released parameters that nothing uses: final norms, and SigLIP's attention pooling.
UNUSED = {
    "languagebind": 2 * 1024,
    "dinov2": 2 * 1024,
    "vivit": 0,
    "siglip": 2 * 768 + 12 * 768**2 + 12 * 768,
}
# The authors' fusion module is multi-head attention with width 3072 over keys and values of width
# 4096: a query, four matrices, four biases. At inference it is equation 2's one vector (ledger K5).
FUSION = 3072 + 2 * 3072 * 3072 + 2 * 3072 * 4096 + 4 * 3072


def count(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def cost_of(row: PaperRow, released: bool) -> tuple[float, float]:
    """Count a model on one video and TEXT tokens: M parameters, 10^12 multiply-adds.

    released: as the authors' code does it, with blocks and parameters that nothing uses, and logits
    at every position. Otherwise as this code does it: only blocks that are needed, and the last
    logits. Multiply-adds are those of Linears, convolutions and attention.
    """
    encoders = [ENCODERS[name] for name in row.encoders]
    if released:
        encoders = [replace(e, num_layers=e.released_layers) for e in encoders]
    llm = replace(LLAMAS["llama2-7b"], vocab_size=32064)  # the authors' (ledger K9)
    config = MERVConfig("on paper", tuple(encoders), llm)
    if len(encoders) == 1:
        config = replace(config, projector="all", mixer="mean")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build(config)
        videos = {e.name: torch.empty(1, e.num_frames, 3, 224, 224) for e in encoders}
        model.encode(videos)
        embeds = torch.empty(1, row.visual + TEXT, llm.hidden_size)
        hidden = model.llm.hidden_states(inputs_embeds=embeds)
        model.llm.logits(hidden if released else hidden[:, -1:])
    parameters = count(model)
    if released:
        parameters += sum(UNUSED[name] for name in row.encoders)
    if released and len(encoders) > 1:
        parameters += FUSION - count(model.mixer)
    return parameters / 1e6, counter.get_total_flops() / 2e12  # 2 operations a multiply-add


def projector_cost(name: str) -> float:
    """M parameters of a projector before its final Linear, from LanguageBind to width 4096."""
    with torch.device("meta"):
        projector = PROJECTORS[name](1024, 4096, 8)
    return (count(projector) - count(projector.linear)) / 1e6


def print_table() -> None:
    """Print the figures of tables 8, 2c and 2a beside ours."""
    print(f"One video and {TEXT} text tokens: the paper's figure, the released form, this code\n")
    print(f"{'':<20} M: paper released    here   T: paper released (off)         here")
    for row in PAPER:
        released_m, released_t = cost_of(row, released=True)
        ours_m, ours_t = cost_of(row, released=False)
        millions = " " * 16
        if row.millions is not None:
            millions = f"{row.millions:>8}{int(released_m):>8}"
        off = f"({100 * (released_t / row.tera - 1):+.1f} %)"
        work = f"{row.tera:>12.2f}{released_t:>8.2f} {off:<11}{ours_t:>8.2f}"
        print(f"{row.name:<20}{millions}{ours_m:>8.0f}{work}")
    print("\nM parameters of projectors before the final Linear (LanguageBind, width 4096)")
    for name, millions in PAPER_PROJECTORS.items():
        print(f"{name:<20}{millions:>8}{projector_cost(name):>8.1f}")


def main(arguments: list[str] | None = None) -> None:
    """`python cost.py plan` or `python cost.py table`."""
    try:
        config = read_options(arguments)
        if config.command == ("plan",):
            print_plan(config)
        else:
            print_table()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        exit_now(1)


if __name__ == "__main__":
    main()
    exit_now()
