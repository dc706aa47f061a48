"""Measurements at MERV's real widths, each in a process of its own; prints one line of JSON.

python tests/cuda_full_size.py plan      what cost.py predicts for the step below
python tests/cuda_full_size.py train     the step itself: memory, speed, attention kernels
python tests/cuda_full_size.py exact     the same with --deterministic
python tests/cuda_full_size.py lora      a step of the full 7B with --lora 16, as on a card of 24 GB
python tests/cuda_full_size.py answer    the full 7B answers one question and 25
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cost
import train
from data import Batch
from encoders import FAMILIES
from llama import KVCache, Llama
from merv import MERV, MERVS
from support import cli, lora
from support.cuda_graph import DecodingStep

ROWS, TEXT, LAYERS = 8, 512, 8  # of a micro-batch; tokens of a row; of the LLM
FULL = MERVS["merv"]
SMALLER = replace(FULL, llm=replace(FULL.llm, num_layers=LAYERS))


def build(config, dtype: torch.dtype, device: str) -> MERV:
    """A model with random weights, made on its device."""
    torch.set_default_dtype(dtype)
    with torch.device(device):
        encoders = [FAMILIES[e.family](e) for e in config.encoders]
        model = MERV(config, encoders, Llama(config.llm), None)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
    torch.set_default_dtype(torch.float32)
    model.encoders.requires_grad_(False)
    return model


def one_batch(model: MERV, device: str, count: int = ROWS) -> Batch:
    """Clips and conversations of the size that the plan assumes, half of the tokens answers."""
    ids = torch.randint(3, 1000, (count, TEXT))
    places = torch.arange(TEXT // 2, TEXT).repeat(count)
    rows = torch.arange(count).repeat_interleave(TEXT // 2)
    pixels = {}
    for e in model.config.encoders:
        pixels[e.name] = torch.randn(count, e.num_frames, 3, e.image_size, e.image_size)
    batch = Batch(ids, torch.stack([rows, places]), [TEXT] * count, list(range(count)), pixels, {})
    return batch.to(device)


def be_alone() -> None:
    """A process group of this process, on the first card."""
    torch.cuda.set_device(0)
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)


def make_step(model: MERV, stage: train.Stage, batch: Batch) -> Callable[[], None]:
    """Shard a model as train.py does; a function that takes one step on the batch."""
    model.llm.activation_checkpointing = True
    train.shard(model, train.make_mesh("cuda", 1), "shard", torch.bfloat16)
    optimizers = train.make_optimizers(model, stage, train.TrainConfig())
    model.train()

    def step() -> None:
        loss, _ = model(batch)
        (loss / batch.num_labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def peak_of_second(step: Callable[[], None]) -> float:
    """Take two steps; the most memory that the second one holds at once: GB."""
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def measure_training() -> dict:
    """Six steps of train.py's parts; the last four are timed, one more is profiled."""
    be_alone()
    model = build(SMALLER, torch.float32, "cuda")
    batch = one_batch(model, "cuda")
    step = make_step(model, train.RECIPES["frozen"][0], batch)
    memory = peak_of_second(step)
    began = time.perf_counter()
    for _ in range(4):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / 4
    with FlopCounterMode(display=False) as counter:
        model(batch)[0].backward()
    kernels = {}
    for direction in ("forward", "backward"):
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watched:
            if direction == "forward":
                loss = model(batch)[0]
            else:
                loss.backward()
            torch.cuda.synchronize()
        names = {event.key for event in watched.key_averages() if event.device_time_total}
        wanted = ("flash", "fmha", "cudnn", "attention")
        kernels[direction] = sorted(n for n in names if any(part in n.lower() for part in wanted))
    return {
        "memory_gb": memory,
        "tflops": counter.get_total_flops() / seconds / 1e12,
        "matmul_tflops": matmul_tflops(),
        "seconds": seconds,
        "attention": kernels,
    }


def measure_exactly() -> dict:
    """`measure_training` with --deterministic."""
    cli.make_deterministic()
    return measure_training()


# Stages whose steps have one micro-batch.
ONE_MICRO_BATCH = replace(train.RECIPES["frozen"][0], global_batch=1)
ADAPTERS = replace(ONE_MICRO_BATCH, trained=("projectors", "mixer", "adapters"))


def measure_lora() -> dict:
    """The peak of a step of the full 7B with adapters of rank 16 and one row, and its plan: GB."""
    config = cost.PlanConfig(lora=16, micro_batch=1, text_tokens=TEXT, gpus=1)
    with cost.simulated_processes(1):
        planned, _ = cost.memory_of(config, FULL, ADAPTERS)
    be_alone()
    model = build(FULL, torch.bfloat16, "cuda")
    lora.add_adapters(model.llm, 16, 16.0)
    step = make_step(model, ADAPTERS, one_batch(model, "cuda", 1))
    memory = peak_of_second(step)
    began = time.perf_counter()
    for _ in range(4):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / 4
    return {"memory_gb": memory, "planned_gb": sum(planned.values()), "seconds": seconds}


def measure_placement(place: str) -> dict:
    """The peak of two steps with the encoders copied, or copied and on streams; 2 LLM layers."""
    be_alone()
    config = replace(FULL, llm=replace(FULL.llm, num_layers=2))
    model = build(config, torch.float32, "cuda")
    train.shard(model, train.make_mesh("cuda", 1), place, torch.bfloat16)
    train.make_optimizers(model, train.RECIPES["frozen"][0], train.TrainConfig())
    batch = one_batch(model.train(), "cuda")
    for _ in range(2):
        model(batch)[0].backward()
    return {"memory_gb": torch.cuda.max_memory_reserved() / 1e9}


def matmul_tflops(size: int = 8192, times: int = 20) -> float:
    """What one large bfloat16 matrix product reaches on this card: 10^12 operations a second."""
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        a @ b
    torch.cuda.synchronize()
    return times * 2 * size**3 / (time.perf_counter() - began) / 1e12


@torch.no_grad()
def measure_answering(new_tokens: int = 64, questions: int = 25) -> dict:
    """Prefill one clip, then answer one question and 25 with 64 tokens each."""
    model = build(FULL, torch.bfloat16, "cuda").eval()
    pixels = {}
    for e in FULL.encoders:
        pixels[e.name] = torch.randn(1, e.num_frames, 3, e.image_size, e.image_size)
    bos = torch.tensor([[1]], device="cuda")
    visual, _ = model.encode(pixels)
    embeds = torch.cat([model.llm.embed_tokens(bos), visual.to(torch.bfloat16)], dim=1)
    prefix = KVCache(FULL.llm, 1, embeds.shape[1], torch.bfloat16, "cuda")
    model.llm.hidden_states(inputs_embeds=embeds, cache=prefix)
    ids = torch.randint(3, 32000, (questions, 24), device="cuda")
    measured: dict[str, float] = {}
    replies = {}
    for graph in (False, True):
        model.llm.cuda_graph = graph
        for name, rows in (("alone", ids[:1]), ("together", ids)):
            lengths = torch.full((len(rows),), rows.shape[1], device="cuda")
            model.llm.generate(rows, None, lengths, prefix, 4, eos_id=-1)
            torch.cuda.synchronize()
            began = time.perf_counter()
            reply = model.llm.generate(rows, None, lengths, prefix, new_tokens, eos_id=-1)
            torch.cuda.synchronize()
            name = f"{name}_graph" if graph else name
            measured[name] = new_tokens / (time.perf_counter() - began)
            replies[name] = torch.tensor(reply, device="cuda")
    measured["graph_agrees"] = graph_agreement(model.llm, prefix, ids, replies["together"])
    memory = torch.cuda.max_memory_allocated() / 1e9
    # With random weights one different token changes all that follow, so each row is read again by
    # itself with the tokens that the batch gave it.
    same = []
    for row, reply in zip(ids[:8], replies["together"], strict=False):
        tokens = torch.cat([row, reply])[None]
        cache = KVCache(FULL.llm, 1, tokens.shape[1], torch.bfloat16, "cuda", prefix)
        hidden = model.llm.hidden_states(input_ids=tokens, cache=cache)
        same.append(likeliest(model.llm.logits(hidden[0, len(row) - 1 : -1]), reply))
    measured["agree"] = torch.cat(same).float().mean().item()
    return {"memory_gb": memory} | measured


def likeliest(logits: Tensor, tokens: Tensor) -> Tensor:
    """Whether each token has the largest logit (n, vocabulary) of its row, or one within a rounding
    step of bfloat16 of it: of 32,000 random logits, many nearly tie."""
    largest = logits.float().max(-1).values
    chosen = logits.float().gather(1, tokens[:, None])[:, 0]
    step = largest.abs() * torch.finfo(torch.bfloat16).eps
    return largest - chosen <= step


def graph_agreement(llm: Llama, prefix: KVCache, ids: Tensor, replies: Tensor) -> float:
    """Share of tokens on which a CUDA graph agrees, given the tokens that came out without one."""
    length = ids.shape[1] + replies.shape[1]
    cache = KVCache(llm.config, len(ids), length, torch.bfloat16, "cuda", prefix)
    llm.hidden_states(input_ids=ids, cache=cache)
    decode = DecodingStep(llm, cache, ids[:, 0])
    same = []
    for now, following in zip(replies.T[:-1], replies.T[1:], strict=True):
        same.append(likeliest(decode(now), following))
    return torch.stack(same).float().mean().item()


def planned_memory() -> dict:
    """The peak that cost.py predicts for `measure_training`: GB."""
    config = cost.PlanConfig(micro_batch=ROWS, text_tokens=TEXT, gpus=1)
    with cost.simulated_processes(1):
        needs, _ = cost.memory_of(config, SMALLER, ONE_MICRO_BATCH)
    return {"memory_gb": sum(needs.values())}


if __name__ == "__main__":
    measurements = {
        "plan": planned_memory,
        "train": measure_training,
        "exact": measure_exactly,
        "lora": measure_lora,
        "copy": partial(measure_placement, "copy"),  # encoders whole on the GPU
        "streams": partial(measure_placement, "streams"),  # and each on a CUDA stream
        "answer": measure_answering,
    }
    print(json.dumps(measurements[sys.argv[1]]()))
