"""Train MERV's projectors, mixer and LLM on conversations about videos (paper 3.3 and 4).

    torchrun train.py                                     the paper in miniature, from nothing
    torchrun --nproc-per-node 8 train.py --model merv --data DIR --tokenizer FILE
    torchrun train.py --from merv-frozen --lora 16 --data DIR    fine-tune a released model
    python train.py --help --model merv                   every option, with the paper's values

One loop, any number of processes: FSDP2 shards every parameter over them, so several GPUs can hold
a model that one cannot. The loss is a sum over tokens, divided by the tokens of the whole step. So
one process with a batch of 128 and eight with micro-batches of 4 take the same steps.

Writes runs/NAME/ with config.json, metrics.jsonl, loss.svg, saves/ to resume from, and checkpoint/
(for merv.py and eval.py). The command that began a run also resumes it: on a CPU bit for bit, on
GPUs up to rounding or, with --deterministic, bit for bit too.

    metric in metrics.jsonl   meaning
    step                      optimizer steps so far, over all stages
    loss                      cross-entropy per answer token of this step's rows, in nats
    held_out_loss             the same on fixed rows that are never trained on, every
                              --held-out-every steps. Rows of a batch have similar lengths and short
                              ones are harder, so `loss` jumps between batches; this one does not
    learning_rate             of AdamW in this step
    gradient_norm             before clipping
    tokens_per_second         text and visual tokens, over all processes
    data_wait                 fraction of the step spent waiting for data
    memory_gb                 peak memory of the first process (of its GPU, else main memory)
    mixing_weights            mean mixing weights (equation 2) of the first process's clips

Read before: merv.py, eval.py. Read next: miniature/.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as distributed_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.data import ConcatDataset

import data
import eval
import merv
import miniature
from llama import LLAMAS, LlamaConfig, read_config
from merv import MERV, MERVS, MIXERS, PROJECTORS
from miniature import preset as small
from support import cli, errors, features, files, lora, processes, report, runs, weights
from support.cli import exit_now, option, parse_options, progress
from support.errors import UserError
from support.held_out import HeldOut
from support.muon import Muon
from support.processes import LoadAhead, join_processes, make_mesh
from support.runs import Run

# --------------------------------------------------------------------------------- recipes, options


@dataclass(frozen=True)
class Stage:
    """One pass of training over conversations (paper 4; stage 1: table 5).

    A recipe is a list of stages. What a stage does not train is frozen: it needs no gradient and no
    optimizer state, which for the 7B saves 12 of 16 bytes a parameter.
    """

    files: tuple[tuple[str, str | None], ...]  # name in the data folder, key of data.TEMPLATES
    trained: tuple[str, ...]  # parts of the model; encoders are always frozen
    learning_rate: float  # peak
    global_batch: int
    weight_decay: float = 0.1


CAPTIONS = ("stage1.json", "caption")
CONVERSATIONS = ("stage2.json", None)  # None: the template of the LLM
ALIGNING_PARTS = ("projectors", "mixer")
TRAINABLE_PARTS = ("projectors", "mixer", "llm")

# Stage 1 aligns visual tokens with text, on captions: it trains projectors and mixer, or all parts.
# Stage 2 trains on questions. The learning rates 2e-5 and 1e-4 and the batch of 128 are the paper's
# (section 4), 1e-3 and the batch of 256 those of the authors' code.
ALIGN = Stage((CAPTIONS,), ALIGNING_PARTS, learning_rate=1e-3, global_batch=256, weight_decay=0.0)
ALIGN_ALL = Stage((CAPTIONS,), TRAINABLE_PARTS, learning_rate=1e-4, global_batch=256)
INSTRUCT = Stage((CONVERSATIONS,), TRAINABLE_PARTS, learning_rate=2e-5, global_batch=128)
RECIPES: dict[str, tuple[Stage, ...]] = {
    "frozen": (INSTRUCT,),
    "video-llava": (ALIGN, INSTRUCT),
    "align": (ALIGN,),
    "full": (ALIGN_ALL, INSTRUCT),
    "mixed": (replace(INSTRUCT, files=(CAPTIONS, CONVERSATIONS)),),
}

DTYPES = ("auto", "float32", "bfloat16")
PLACES = ("shard", "copy", "streams")
OPTIMIZERS = ("adamw", "muon")
HELD_OUT_ROWS = 64  # few, because training waits while they are evaluated


@dataclass(frozen=True)
class TrainConfig:
    """The options of train.py. The defaults are the paper's; `preset` has those of each model.

    This dataclass is the command line: the field global_batch is the option --global-batch, and so
    on. `none` on the command line is None here. The options of a run are in its config.json.
    """

    model: str = option("merv", "which encoders and which LLM", MERVS, group="model")
    encoders: str = option("languagebind,dinov2,vivit,siglip", "names, separated by commas")
    encoder_files: str | None = option(
        None, "folder with NAME.safetensors of each encoder; none: released weights"
    )
    encoder_seed: int = option(0, "replaces {encoder_seed} in --encoder-files")
    projector: str = option("avg2d", "a row of table 2a", PROJECTORS)
    mixer: str = option("cross_attention", "a row of table 2c", MIXERS)
    pooled_side: int = option(8, "side of a pooled frame in tokens, table 2b", least=1)
    llm: str = option("llama2-7b", f"{', '.join(LLAMAS)}, a folder or a hub id")
    template: str = option(
        "base", "prompt format of the LLM", sorted(data.TEMPLATES.keys() - {"caption"})
    )
    from_: str | None = option(
        None, "begin from this run, folder or released MERV; none: a new model"
    )

    data: str | None = option(
        None, "folder with stage1.json and stage2.json; miniature: drawn if missing", group="data"
    )
    tokenizer: str | None = option(
        None, "tokenizer.model; none: that of the checkpoint or of the LLM"
    )
    held_out: str | None = option(None, "file of rows that are not trained on")
    allow_outside: bool = option(False, "follow paths and links that leave the data folder")
    workers: int = option(2, "processes per rank that decode videos")
    cache_features: str | None = option(None, "folder for pooled features")
    max_bad: float = option(0.01, "stop if 10 rows and more than this fraction cannot be used")

    recipe: str = option("frozen", "stages, and what each trains", RECIPES, group="optimisation")
    epochs: int = option(1, "passes over the data of each stage", least=1)
    max_steps: int | None = option(None, "stop each stage after this many", least=1)
    learning_rate: tuple[float, ...] = option((2e-5,), "peak, one for all stages or one each")
    global_batch: tuple[int, ...] = option(
        (128,), "rows of a step, one number for all stages or one each", least=1
    )
    lora: int | None = option(None, "rank of adapters; none: the LLM itself is trained", least=1)
    lora_alpha: float = option(16.0, "adapters are scaled by alpha / rank")
    optimizer: str = option("adamw", "muon: Muon for matrices of --muon-parts", OPTIMIZERS)
    muon_parts: str = option("llm", "llm, or llm,projectors", ("llm", "llm,projectors"))
    muon_learning_rate: float = option(0.01, "peak, with --optimizer muon")
    muon_weight_decay: float = option(0.0, "of the same matrices")
    warmup: float = option(0.03, "fraction of the steps in which the learning rate rises")
    clip: float = option(1.0, "gradients are clipped to this norm")
    seed: int = option(0, "of new weights and of the order of the data")

    micro_batch: int = option(
        4, "maximum rows that a process runs at once", group="machine", least=1
    )
    device: str = option("auto", "auto: CUDA, if available", ("auto", "cuda", "cpu"))
    dtype: str = option("auto", "to compute in; auto: bfloat16 on CUDA, else float32", DTYPES)
    deterministic: bool = option(False, "make runs on a GPU bit-identical too, but slower")
    activation_checkpointing: bool = option(True, "recompute LLM layers: less memory, more work")
    replicas: int = option(
        1, "copies of the model, each sharded over its share of the GPUs", least=1
    )
    place_encoders: str = option(
        "shard", "shard, copy (whole on each GPU), streams (a copy, in parallel)", PLACES
    )

    name: str = option("merv-frozen", "the run is runs/NAME, or NAME-2 ...", group="run")
    resume: str | None = option(None, "resume this run, such as runs/NAME")
    save_every: int | None = option(
        500, "steps between saves; none: only at the end of a stage", least=1
    )
    keep: int | None = option(2, "how many saves to keep; none: all", least=1)
    held_out_every: int | None = option(
        100, "steps between evaluations of the held-out rows", least=1
    )
    evaluate: bool = option(False, "with --data miniature, then score test clips")

    @property
    def uses_drawn_clips(self) -> bool:
        """Whether it trains on the miniature's clips, which are drawn if they are missing."""
        return self.data == "miniature"


# Former option -> what to use now.
MOVED = dict.fromkeys(
    ("--plan", "--gpus", "--gpu-memory", "--tflops", "--text-tokens"), "use `python cost.py plan`"
)
MOVED |= {"--lr": "use --learning-rate", "--muon-lr": "use --muon-learning-rate or --optimizer"}


def preset(model: str, recipe: str) -> TrainConfig:
    """The default options for training a model by a recipe; the command line overrides them."""
    labels = [encoder.label for encoder in MERVS[model].encoders]
    config = TrainConfig(
        model=model,
        recipe=recipe,
        name=f"{model}-{recipe}",
        encoders=",".join(labels),
        pooled_side=MERVS[model].pooled_side,
        llm=MERVS[model].llm.name,
        template=MERVS[model].llm.template,
        learning_rate=tuple(stage.learning_rate for stage in RECIPES[recipe]),
        global_batch=tuple(stage.global_batch for stage in RECIPES[recipe]),
    )
    if model == "miniature":
        rates = small.LEARNING_RATES[recipe]
        config = replace(config, **small.SETTINGS, learning_rate=rates)
    return config


def preset_with_llm(model: str, recipe: str, name: str | None) -> TrainConfig:
    """A preset with another LLM (None: its own), that LLM's template, and its tokenizer."""
    began = preset(model, recipe)
    # In another tokenizer, the same ids mean other text, so a new LLM brings its own.
    if name in (None, began.llm):
        return began
    return replace(began, llm=name, template=llm_config(name, model).template, tokenizer=None)


def preset_from(checkpoint: str, recipe: str, llm: str | None) -> TrainConfig:
    """The options with which the model of a checkpoint is trained further.

    Options that describe the model are the checkpoint's; the others are those of the preset with
    the model's name, else of "merv". llm: another name for its LLM, such as the folder of its
    weights.
    """
    found = merv.Checkpoint(checkpoint).build_skeleton().config
    model = "merv"
    if found.name in MERVS:
        model = found.name
    return replace(
        preset(model, recipe),
        from_=checkpoint,
        encoders=",".join(encoder.label for encoder in found.encoders),
        encoder_files=None,
        projector=found.projector,
        mixer=found.mixer,
        pooled_side=found.pooled_side,
        llm=llm if llm == found.llm.source else found.llm.name,
        template=found.llm.template,
        tokenizer=None,
    )


def preset_parser() -> argparse.ArgumentParser:
    """A parser of the options that choose a preset; they are read before all others."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default="miniature", choices=list(MERVS))
    first.add_argument("--recipe", default="frozen", choices=list(RECIPES))
    first.add_argument("--llm")
    return first


def read_options(arguments: list[str] | None = None) -> TrainConfig:
    """Read the command line. --model, --recipe and --llm, or --from, choose a preset, and --resume
    the options of a run. Every other option overrides one value of that preset or run."""
    first = preset_parser()
    first.add_argument("--from", dest="from_")
    first.add_argument("--resume")
    chosen = first.parse_known_args(arguments)[0]
    if chosen.resume not in (None, "none"):
        began = runs.saved_options(chosen.resume, TrainConfig, preset)
    elif chosen.from_ not in (None, "none"):
        began = preset_from(chosen.from_, chosen.recipe, chosen.llm)
    else:
        began = preset_with_llm(chosen.model, chosen.recipe, chosen.llm)
    config = parse_options(TrainConfig, arguments, "Train MERV.", began, MOVED)
    if config.resume:
        runs.check_resumed(config, began)
    elif config.from_:
        runs.check_from(config, began, merv.Checkpoint(config.from_).folder)
    return config


def stages_of(config: TrainConfig) -> list[Stage]:
    """The stages of the recipe, with the learning rates and batch sizes of the options.

    With --lora, stages train adapters instead of the LLM itself. Raises UserError for options that
    contradict each other.
    """
    if config.resume is None:  # older runs could begin with what is refused now
        refuse_idle_options(config)
    recipe = RECIPES[config.recipe]
    rates, sizes = config.learning_rate, config.global_batch
    for name, values in (("learning-rate", rates), ("global-batch", sizes)):
        if len(values) not in (1, len(recipe)):
            what = f"--{name} has {len(values)} values, the recipe has {len(recipe)} stages."
            raise UserError(what, "each stage needs one.", "give one value for all or one each.")
    stages = []
    for number, stage in enumerate(recipe):
        rate = rates[number % len(rates)]
        size = sizes[number % len(sizes)]
        stage = replace(stage, learning_rate=rate, global_batch=size)
        if config.lora is not None:
            trained = ["adapters" if part == "llm" else part for part in stage.trained]
            stage = replace(stage, trained=tuple(trained))
        stages.append(stage)
    return stages


def refuse_idle_options(config: TrainConfig) -> None:
    """Raise UserError for options with which nothing would be trained."""
    if config.lora is not None:
        if config.optimizer == "muon" and config.muon_parts == "llm":
            why = "it trains whole matrices of the LLM, and with --lora these are frozen."
            fix = "use --optimizer adamw, or --muon-parts llm,projectors."
            raise UserError("--optimizer muon has nothing to train.", why, fix)
        if not any("llm" in stage.trained for stage in RECIPES[config.recipe]):
            why = "this recipe does not train the LLM."
            raise UserError(f"--lora has nothing to train with {config.recipe}.", why, "omit it.")
    if config.clip == 0:
        why = "gradients would be clipped to nothing."
        raise UserError("--clip is 0.", why, "to clip none, choose a large number.")
    if config.warmup > 1:
        why = "it is a fraction of the steps, such as 0.03."
        raise UserError(f"--warmup is {config.warmup}.", why, "choose at most 1.")


# ------------------------------------------------------------------------------ processes and model


def model_config(config: TrainConfig) -> merv.MERVConfig:
    """The new model that the options describe.

    Its projectors and mixer are as wide as its LLM. Raises UserError if a name is wrong.
    """
    model = MERVS[config.model]
    encoders = merv.choose_encoders(model, config.encoders)
    if config.encoder_files:
        files = [encoder_file(config, name) for name in config.encoders.split(",")]
        encoders = tuple(replace(e, source=f) for e, f in zip(encoders, files, strict=True))
    model = replace(
        model,
        encoders=encoders,
        projector=config.projector,
        mixer=config.mixer,
        pooled_side=config.pooled_side,
        llm=replace(llm_config(config.llm, config.model), template=config.template),
    )
    grids = {encoder.label: replace(model, encoders=(encoder,)).grid for encoder in encoders}
    if len(set(grids.values())) > 1:
        what = f"The features of --encoders {config.encoders} have different shapes."
        why = f"(time, height, width) is {grids}, and the mixer mixes place by place."
        raise UserError(what, why, "choose other --encoders, or another --projector.")
    return model


def encoder_file(config: TrainConfig, name: str) -> str:
    """Where --encoder-files has the weights of an encoder: FOLDER/NAME.safetensors."""
    folder = Path(config.encoder_files.format(encoder_seed=config.encoder_seed))
    return str(folder / f"{name}.safetensors")


def llm_config(name: str, model: str) -> LlamaConfig:
    """The configuration of an LLM: that of `model`, a key of LLAMAS, a folder or a hub id."""
    own = MERVS[model].llm
    if name == own.name:
        return own
    if name in LLAMAS:
        return LLAMAS[name]
    return read_config(name)


def make_model(config: TrainConfig) -> MERV:
    """The model to train: a new one, or that of --from, with adapters if --lora asks for them.

    Its weights stay mapped to their files, except that a pickle of the authors is copied.
    """
    if config.from_:
        model = load_model(config)
    else:
        architecture = model_config(config)
        # An LLM's tokenizer.model lies beside its weights.
        tokenizer = config.tokenizer or architecture.llm.source
        model = MERV.create(architecture, tokenizer, config.seed)
    if config.lora is not None:
        lora.add_adapters(model.llm, config.lora, config.lora_alpha, config.seed)
    return model


def load_model(config: TrainConfig) -> MERV:
    """The model of --from, whose config names the files that its encoders were read from.

    WHY: training may hold them in bfloat16, so `save_pretrained` copies these files instead.
    """
    checkpoint = merv.Checkpoint(config.from_)
    found = checkpoint.build_skeleton().config
    sources = {}  # of the encoders that do not come from the hub
    for e in found.encoders:
        if config.encoder_files:
            sources[e.name] = encoder_file(config, e.label)
        elif (checkpoint.folder / e.source).is_file():
            sources[e.name] = str(checkpoint.folder / e.source)
    model = MERV.from_pretrained(config.from_, None, "cpu", config.tokenizer, sources)
    read = [replace(e, source=sources.get(e.name, e.source)) for e in found.encoders]
    model.config = replace(model.config, encoders=tuple(read))
    return model


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations and of gathered parameters; trained ones are held in float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def shard(model: MERV, mesh: DeviceMesh, place_encoders: str, dtype: torch.dtype) -> None:
    """Shard the model over the processes (FSDP2).

    Of the processes that share a copy of the model (all, unless there are --replicas), each holds
    its part of every parameter: trained ones in float32, frozen ones (encoders, an LLM with
    adapters) in `dtype`. A layer is gathered in `dtype` just before it runs and freed right after,
    forward and backward; its gradients are averaged over the processes, and each keeps its part.
    The units that are gathered together are one LLM layer, one encoder, and the rest (embeddings,
    head, projectors, mixer).

    place_encoders: "copy" and "streams" leave the frozen encoders whole on every process. Each part
    is cast, and moves from the CPU, as it is sharded. Until then its weights are mapped from their
    file, so besides what it keeps, a process holds only the part that is being sharded.
    """
    # WHY: bfloat16 holds activations well but not sums of many small gradients.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    whole: set[nn.Parameter] = set()  # parameters that every process holds
    for encoder in model.encoders.values():
        if place_encoders == "shard":
            cast(encoder.parameters(), dtype)
            fully_shard(encoder, mesh=mesh, mp_policy=policy)
        else:
            cast(encoder.parameters(), dtype, mesh.device_type)
            whole.update(encoder.parameters())
    model.encoder_streams = place_encoders == "streams"
    for layer in model.llm.layers:
        cast(layer.parameters(), dtype)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    for name, parameter in model.named_parameters():
        if not name.startswith(("encoders.", "llm.layers.")):
            cast([parameter], dtype)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)


def cast(
    parameters: Iterable[nn.Parameter], frozen_dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Change trained parameters to float32, frozen ones to frozen_dtype. A mapped one gets memory
    of its own, unless it fits already."""
    for parameter in parameters:
        dtype = torch.float32 if parameter.requires_grad else frozen_dtype
        parameter.data = parameter.data.to(device, dtype)


# --------------------------------------------------------------------------------------------- data


def make_datasets(model: MERV, stage: Stage, config: TrainConfig, cache) -> ConcatDataset:
    """The files of a stage as one dataset."""
    folder = small.FOLDER / "train" if config.uses_drawn_clips else Path(config.data)
    datasets = []
    for file, template in stage.files:
        datasets.append(read_rows(model, folder / file, template, config, cache))
    return concatenate(datasets)


def read_rows(
    model: MERV, file: Path, template: str | None, config: TrainConfig, cache
) -> data.ConversationDataset:
    """A file of conversations for this model.

    With a cache, every clip that it lacks is encoded now. The encoders are frozen, so the pooled
    features of a clip are the same in every epoch, and for every mixer and LLM.
    template: how questions become prompts, a key of data.TEMPLATES; None is the LLM's own. The
    text of a row is cut to 2048 tokens, or to the positions beside the visual tokens if fewer.
    """
    form = data.TEMPLATES[template or model.config.llm.template]
    encoders = list(model.config.encoders)
    room = model.config.llm.max_positions - model.config.num_visual
    how = {"cache": cache, "allow_outside": config.allow_outside, "max_length": min(2048, room)}
    dataset = data.ConversationDataset(file, model.tokenizer, form, encoders, **how)
    if cache:
        fill_cache(model, dataset, config)
    return dataset


def fill_cache(model: MERV, dataset: data.ConversationDataset, config: TrainConfig) -> None:
    """Encode the files that the cache lacks, each by one process."""
    cache = dataset.cache
    patient = processes.patient_group()
    # Sorted by kind, so that few batches mix stills and clips (ledger F8).
    media = sorted({dataset.media(row) for row in dataset.rows} - {("text", None)})
    mine = media[dist.get_rank() :: dist.get_world_size()]
    missing = [file for _, file in mine if not cache.find(file)]
    load = partial(decode, encoders=dataset.encoders)
    loader = LoadAhead(missing, config.workers, load, batch_size=config.micro_batch)
    with processes.cores_left_to(config.workers):
        for usable, pixels in progress(loader, "encode clips once", show=dist.get_rank() == 0):
            pooled = model.pooled_features(pixels) if usable else {}
            for index, file in enumerate(usable):
                clip = {name: value[index] for name, value in pooled.items()}
                cache.put(file, clip)
                if file == missing[0] and dist.get_rank() == 0:
                    size = sum(2 * value.numel() for value in clip.values()) / 1e6  # bfloat16
                    print(f"{cache.folder}: {len(media)} clips or stills of {size:.3f} MB each")
    processes.wait_for_all(patient)


def decode(files: list[Path], encoders: list) -> tuple[list[Path], dict]:
    """The files that can be decoded, and encoder -> pixels. Unreadable files are reported by the
    dataset, with their rows."""
    usable, clips = [], []
    for file in files:
        with suppress(errors.DataError):
            clips.append(data.load_pixels(file, encoders))
            usable.append(file)
    return usable, data.stack(clips)


def concatenate(datasets: list[data.ConversationDataset]) -> ConcatDataset:
    """Several files as one dataset, with the fields that the sampler reads."""
    together = ConcatDataset(datasets)
    together.lengths, together.modalities = [], []
    for dataset in datasets:
        together.lengths += dataset.lengths
        together.modalities += dataset.modalities
    return together


def order_data(dataset: ConcatDataset, stage: Stage, config: TrainConfig) -> tuple[list, int, int]:
    """This process's micro-batches of all epochs, how many make a step, and the number of steps.

    A global batch of 8 rows on 2 processes with micro-batches of 2:

        process 0   rows 0 2 | rows 4 6      two micro-batches, then one optimizer step
        process 1   rows 1 3 | rows 5 7
    """
    world = dist.get_world_size()
    rows = max(1, min(config.micro_batch, stage.global_batch // world))
    order: list[list[int]] = []
    for epoch in range(config.epochs):
        order += data.GroupedBatchSampler(
            dataset, stage.global_batch, rows, dist.get_rank(), world, config.seed, epoch
        )
    accumulation = stage.global_batch // (rows * world)
    steps = len(order) // accumulation
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    return order, accumulation, steps


# ------------------------------------------------------------------------------------ held-out rows


def read_held_out(model: MERV, config: TrainConfig, cache) -> HeldOut | None:
    """The rows of --held-out; None if there is no such file, and then no loss on it is logged.

    A row that cannot be used is reported once, and another row takes its place in every evaluation.
    """
    if config.held_out is None:
        return None
    file = Path(config.held_out)
    if not file.is_file():
        if dist.get_rank() == 0:
            print(f"There is no {file}, so the loss on held-out rows is not logged.")
        return None
    dataset = read_rows(model, file, None, config, cache)
    # Rows spread evenly over the file, equally many for each process.
    rank, world = dist.get_rank(), dist.get_world_size()
    count = max(1, min(HELD_OUT_ROWS, len(dataset)) // world)
    total = count * world
    rows = [place * (len(dataset) - 1) // max(1, total - 1) for place in range(total)]
    mine = rows[rank::world]
    batches = []
    for first in range(0, count, config.micro_batch):
        part = mine[first : first + config.micro_batch]
        batch = data.collate([dataset[row] for row in part])
        for reason in sorted({bad["reason"] for bad in batch.bad}):
            print(f"held-out rows: {reason}\nAnother row takes its place.", file=sys.stderr)
        batches.append(batch)
    shown = rows[:: max(1, len(rows) // 3)]
    return HeldOut(dataset, batches, shown, join=config.place_encoders == "shard")


# ---------------------------------------------------------------------------------------- one stage


def make_optimizers(model: MERV, stage: Stage, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a stage: AdamW and, with --optimizer muon, Muon for the matrices of LLM
    layers (and of projectors, if --muon-parts names them).

    All other parameters are frozen: they need neither gradient nor optimizer. Weight decay applies
    to matrices, but not to vectors (norms, biases, the query).
    FIX: the authors configured decay too, but grouped parameters after sharding had flattened them
    all to vectors, so none ever decayed (ledger K8).
    WHY: a small LLM that starts from random weights learns more per step with Muon, and still
    more with weight decay, by which the random weights fade (docs/train.md).
    """
    muon, matrices, vectors = [], [], []
    use_muon = config.optimizer == "muon"
    for name, parameter in model.named_parameters():
        part = "adapters" if lora.is_adapter(name) else name.split(".")[0]
        parameter.requires_grad_(part in stage.trained)
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif use_muon and is_for_muon(name, parameter, config.muon_parts):
            muon.append(parameter)
        else:
            matrices.append(parameter)
    groups = []
    for parameters, weight_decay in ((matrices, stage.weight_decay), (vectors, 0.0)):
        if parameters:  # WHY: torch cannot load an empty group beside a second optimizer
            groups.append({"params": parameters, "weight_decay": weight_decay})
    # WHY: torch's default on CUDA makes temporary copies as large as all trained parameters.
    fused = next(model.parameters()).device.type == "cuda"
    how = {"lr": stage.learning_rate, "betas": (0.9, 0.999), "fused": fused}
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, **how)]
    if muon:
        # WHY muon_weight_decay is 0 by default: a pre-trained LLM would lose what it knows.
        optimizers.append(Muon(muon, config.muon_learning_rate, config.muon_weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def is_for_muon(name: str, parameter: nn.Parameter, parts: str) -> bool:
    """Whether Muon trains a parameter: a matrix from features to features, such as the weight of a
    Linear, and no embedding, query or adapter.

    Muon makes all singular values of a step equal, which suits whole matrices only.
    """
    if parameter.ndim != 2 or not name.endswith("weight") or lora.is_adapter(name):
        return False
    if name.startswith("projectors."):
        return "projectors" in parts
    return name.startswith("llm.layers.")


def refresh_dtypes(model: MERV) -> None:
    """Let FSDP look again at which parameters are trained, at the start of a stage.

    WHY: it decides in which dtype a group of parameters reduces its gradients at the group's first
    forward pass. Layers that are frozen in stage 1 would otherwise reduce in bfloat16 in stage 2,
    and torch refuses such gradients (pytorch issue 186998, fixed in 2.14).
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The learning rate of a step: linear warm-up, then half a cosine down to 0 (paper 4).

    With 100 steps and warmup 0.03: steps 0, 1, 2 have 1/3, 2/3 and 3/3 of the peak, step 51 about
    half of it, step 99 almost nothing. The warm-up gives AdamW time to estimate its moments.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass
class Counts:
    """What the processes tell each other before a step, summed over all of them.

    Every process then makes the same decisions: what to divide the loss by, whether to stop, and
    for which micro-batches the encoders run.
    """

    labels: int  # tokens that the loss covers
    text_tokens: int
    visual_rows: int  # rows with a video or image
    bad: int  # rows that could not be used
    stop: int  # processes that have received SIGTERM
    to_encode: list[int]  # rows whose clip the encoders must encode, for each micro-batch


def count_over_processes(batches: list[data.Batch], stop: bool) -> Counts:
    """Sum the counts of the micro-batches of one step over all processes."""
    labels = sum(batch.num_labels for batch in batches)
    tokens = sum(sum(batch.lengths) for batch in batches)
    visual = sum(len(batch.visual_rows) for batch in batches)
    bad = sum(len(batch.bad) for batch in batches)
    to_encode = [batch.num_to_encode for batch in batches]
    counts = torch.tensor([labels, tokens, visual, bad, int(stop), *to_encode])
    dist.all_reduce(counts)
    return Counts(*counts[:5].tolist(), to_encode=counts[5:].tolist())


def forward_backward(
    model: MERV, batches: list[data.Batch], counts: Counts, config: TrainConfig
) -> tuple[float, list[float]]:
    """Accumulate the gradients of one step; return its loss and this process's mean mixing weights.

    FIX: dividing each micro-batch by its own number of labels would weigh a label in a short batch
    more than one in a long batch (ledger F5).
    """
    world = dist.get_world_size()
    total, mixing = torch.zeros((), device=model.device), []
    last = len(batches) - 1
    for number, batch in enumerate(batches):
        # Sharded encoders are gathered by all processes together, so all run them if one has clips
        # to encode, even one with text or cached features.
        join = config.place_encoders == "shard" and counts.to_encode[number] > 0
        if config.replicas > 1:
            model.set_requires_all_reduce(number == last)  # replicas add up once per step
        loss, mixing_weights_be = model(batch.to(model.device), join=join)
        # FSDP takes the mean of the processes' gradients; times their number it is the sum.
        (loss * world / max(1, counts.labels)).backward()
        total += loss.detach()
        mixing.append(mixing_weights_be.float())
    sum_of_losses = total.cpu()  # WHY only here: fetching a number waits for the GPU
    dist.all_reduce(sum_of_losses)
    together = torch.cat(mixing).cpu()
    mean = together.mean(0).tolist() if len(together) else []
    return sum_of_losses.item() / max(1, counts.labels), mean


def update(optimizers: list, step: int, steps: int, warmup: float) -> float:
    """One step of every optimizer, with the learning rate of this step; return that of AdamW.

    `peak` is the group's own: the stage's for AdamW, --muon-learning-rate for Muon.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, group["peak"], warmup)
        optimizer.step()
        optimizer.zero_grad()
    return optimizers[0].param_groups[0]["lr"]


def train_stage(model: MERV, stage: Stage, dataset, held_out, run: Run, steps_done: int) -> int:
    """Train one stage on a sharded model; return the number of steps up to its end.

    steps_done: steps of the earlier stages. Steps up to run.done are skipped without reading data.
    """
    config, rank = run.config, dist.get_rank()

    # 1. Choose what is trained, and how. Each stage has new optimizers, without old moments.
    optimizers = make_optimizers(model, stage, config)
    refresh_dtypes(model)
    model.train()

    # 2. Order the data: `accumulation` micro-batches of every process make one step. The order
    #    follows from the seed alone, so resuming means skipping the steps that are done.
    order, accumulation, steps = order_data(dataset, stage, config)
    start = min(steps, max(0, run.done - steps_done))
    order = order[start * accumulation : steps * accumulation]
    loader = iter(LoadAhead(dataset, config.workers, data.collate, batch_sampler=order))
    run.seen += start * stage.global_batch
    if steps_done < run.done <= steps_done + steps:
        runs.load_state(model, optimizers, run)
    bar = progress(range(start, steps), "train", show=rank == 0)
    for step in bar:
        # 3. Load the micro-batches of this step, and count over all processes.
        number = steps_done + step + 1
        started = time.perf_counter()
        batches: list[data.Batch] = [next(loader) for _ in range(accumulation)]
        waited = time.perf_counter() - started
        counts = count_over_processes(batches, run.stop)
        run.seen += stage.global_batch
        runs.report_bad(batches, counts.bad, run, number)

        # 4. Forward and backward; then clip the gradients, as one vector over all processes.
        loss, mixing_weights = forward_backward(model, batches, counts, config)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip).full_tensor().item()
        if not math.isfinite(loss + norm):
            rows = rows_of(dataset, order, (step - start) * accumulation, accumulation)
            what = f"the loss is {loss}, the gradient norm {norm}"
            runs.dump_and_raise(model, batches, rows, run, number, what)

        # 5. Update the parameters.
        rate = update(optimizers, step, steps, config.warmup)

        # 6. Log; from time to time, evaluate the held-out rows.
        metrics = {"step": number, "loss": loss, "gradient_norm": norm}
        metrics |= {"learning_rate": rate, "mixing_weights": mixing_weights}
        metrics |= speed(model, counts, waited, time.perf_counter() - started)
        last = step + 1 == steps
        if held_out and (last or due(number, config.held_out_every)):
            metrics["held_out_loss"] = held_out.evaluate(model, number)
        if rank == 0:
            runs.log(run, metrics)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

        # 7. Save what the next step needs, now and then; stop if asked to.
        if counts.stop or last or due(number, config.save_every):
            runs.save_state(model, optimizers, run, number)
        if counts.stop:
            stop(number)
    return steps_done + steps


def rows_of(dataset: ConcatDataset, order: list[list[int]], first: int, count: int) -> list[dict]:
    """The rows of `count` micro-batches from `first`, as they stand in the file."""
    rows = []
    ends = dataset.cumulative_sizes  # where each file's rows end
    for index in chain.from_iterable(order[first : first + count]):
        part = bisect_right(ends, index)
        rows.append(dataset.datasets[part].rows[index - ends[part]])  # negative: from its end
    return rows


def speed(model: MERV, counts: Counts, waited: float, seconds: float) -> dict[str, float | None]:
    """Metrics of time and memory for one step. seconds: how long it took.

    waited: how many of these seconds the step waited for data; more --workers shorten them.
    """
    tokens = counts.text_tokens + counts.visual_rows * model.config.num_visual
    return {
        "tokens_per_second": tokens / seconds,
        "data_wait": waited / seconds,
        "memory_gb": runs.peak_memory(model.device),
    }


def stop(number: int) -> None:
    """End the process after a step, because SIGTERM was received. Everything is saved by now."""
    if dist.get_rank() == 0:
        print(f"Stopped after step {number}; the same command resumes the run.")
    exit_now()


def due(number: int, every: int | None) -> bool:
    """Whether something that happens every `every` steps (None: never) happens after this one."""
    return every is not None and number % every == 0


# ------------------------------------------------------------------------------------ the whole run


def begin(config: TrainConfig, device: torch.device) -> Run:
    """On rank 0, make the miniature's data if --data names it, and open the run's folder. Every
    process returns the same Run."""
    if config.data is None:
        why = f"the model {config.model} comes without data."
        raise UserError("--data is missing.", why, "see docs/train.md.")
    if not (config.tokenizer or config.from_ or llm_config(config.llm, config.model).source):
        why = f"the LLM {config.llm} comes without one."
        raise UserError("--tokenizer is missing.", why, "name a tokenizer.model.")
    opened: list[Run | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            if config.uses_drawn_clips:
                print(small.BANNER, flush=True)
                miniature.prepare(small.FOLDER, config.encoder_seed, str(device))
            opened = [runs.open_run(config)]
        except UserError as error:
            opened = [error]
    dist.broadcast_object_list(opened)
    run = opened[0]
    if isinstance(run, UserError):
        raise run
    processes.check_common_folder(run.folder / "config.json")
    if run.done:
        processes.check_common_folder(runs.save_folder(run, run.done) / ".metadata")
    return run


def train(config: TrainConfig) -> Run:
    """Run the stages of the recipe that are not done yet, then write the checkpoint.

    Returns the run. If the same command has already written its checkpoint, nothing is trained.
    """
    # First of all, because CUDA reads some of these settings only once.
    if config.deterministic:
        cli.make_deterministic()
    device = join_processes(config.device)
    if not config.from_:
        model_config(config)  # raises UserError before there is a folder
    stages = stages_of(config)
    run = begin(config, device)
    if (run.folder / "checkpoint").is_dir():
        return run
    if dist.get_rank() == 0:
        runs.open_board(run)
    # On SIGTERM, finish the step, save and stop; the handler itself only sets a flag.
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop", True))

    # The model, mapped from its files; pooled features of all clips, if they are to be cached.
    model = make_model(config)
    cache = None
    if config.cache_features:
        cache = features.FeatureCache(config.cache_features, model.fingerprints())
        model.encoders.to(device, torch.float32)
    datasets = [make_datasets(model, stage, config, cache) for stage in stages]
    held_out = read_held_out(model, config, cache)

    # The same model, sharded over all processes, and every stage in turn.
    model.llm.activation_checkpointing = config.activation_checkpointing
    mesh = make_mesh(device.type, config.replicas)
    shard(model, mesh, config.place_encoders, compute_dtype(config.dtype, device))
    steps_done = 0
    for number, (stage, dataset) in enumerate(zip(stages, datasets, strict=True), start=1):
        if dist.get_rank() == 0:
            print(f"stage {number} of {len(stages)}: train {', '.join(stage.trained)}")
        steps_done = train_stage(model, stage, dataset, held_out, run, steps_done)
    runs.check_steps(run, steps_done)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # Gather the whole model on the CPU of rank 0, which writes what merv.py and eval.py read.
    whole = distributed_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = distributed_state.get_model_state_dict(model, options=whole)
    if dist.get_rank() == 0:
        runs.draw_loss(run.folder)
        # The adapters are added to their matrices, so the checkpoint can be read without LoRA.
        if config.lora is not None:
            adapters = {name: state[name] for name in state if lora.is_adapter(name)}
            weights.save_tensors(adapters, run.folder / "adapters.safetensors")
            state = lora.merge(state, config.lora_alpha / config.lora)
        with files.writing(run.folder / "checkpoint"):
            model.save_pretrained(run.folder / "checkpoint", state)
    dist.barrier()
    return run


def evaluate(run: Run) -> bool:
    """Score the miniature's test clips in float32, on the device of the run; print a table and
    write the report.

    Returns True on the process that has written the report, the last to finish its share.
    """
    name, test = "miniature-open", small.FOLDER / "test"
    model = MERV.from_pretrained(run.folder, device=cli.pick_device(run.config.device))
    answered = eval.evaluate(model, name, test, run.folder / "eval")
    if answered is None:
        return False
    eval.print_table(name, answered)
    report.write_report([str(run.folder)], run.folder / "report.html", eval.summarise, test)
    clip = test / "videos" / "clip_000000.mp4"
    print(f'ask it: python merv.py {clip} "What happens?"')
    return True


def main(arguments: list[str] | None = None) -> None:
    """`train.py`: train, then score the miniature."""
    try:
        run = train(read_options(arguments))
        complete = dist.get_rank() == 0
        dist.destroy_process_group()
        if run.config.evaluate and run.config.uses_drawn_clips:
            complete = evaluate(run)
        if complete:
            runs.close_run(run)
    except cli.FIXABLE as error:
        print(cli.explain(error, "lower --micro-batch, or use more GPUs."), file=sys.stderr)
        exit_now(1)


if __name__ == "__main__":
    main()
    exit_now()
