"""train.py --plan: what it foretells is what a run takes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Fifty million parameters, planned with fake tensors and then run with real ones.
MEASURED = """
import json, sys
sys.path.insert(0, {root!r})
from dataclasses import replace
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
import cost, train
from data import Batch
from llama import Llama
from merv import MERV, MERVS

def resident(what):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e9

llm = replace(MERVS["miniature"].llm, vocab_size=8000, hidden_size=768, num_layers=6, num_heads=6,
              num_kv_heads=6, intermediate_size=2048)
MERVS["small"] = replace(MERVS["miniature"], name="small", llm=llm)
config = train.settle(train.parse_options(train.TrainConfig, {options!r}, "test"))
stage = train.RECIPES[config.recipe][0]

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
planned, _ = cost.memory_of(config, stage)
work = cost.work_of(config, stage, still=False)
dist.destroy_process_group()

train.join_processes("cpu")
model_config, b, s = train.configure(config), config.micro_batch, config.text_tokens
before = resident("VmRSS")
encoders = [cost.FAMILIES[e.family](e) for e in model_config.encoders]
model = MERV(model_config, encoders, Llama(model_config.llm), None).train()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
model.llm.activation_checkpointing = config.activation_checkpointing
train.shard(model, train.make_mesh("cpu", 1), config.place_encoders, torch.float32)
optimizers = train.make_optimizers(model, stage, config.muon_lr)
pixels = {{e.name: torch.rand(b, e.num_frames, 3, e.image_size, e.image_size)
          for e in model_config.encoders}}
rows, places = torch.arange(b).repeat_interleave(s // 2), torch.arange(s // 2, s).repeat(b)
ids, labelled = torch.randint(1000, (b, s)), torch.stack([rows, places])
batch = Batch(ids, labelled, [s] * b, list(range(b)), pixels, {{}})
for step in range(2):  # the second finds the optimizer's state there
    open("/proc/self/clear_refs", "w").write("5")  # what is held at most, from here on
    model(batch)[0].backward()
    peak = resident("VmHWM") - before
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
with FlopCounterMode(display=False) as counter:
    model(batch)[0].backward()
counted = counter.get_total_flops() / b / 1e12
print(json.dumps([planned, peak, sum(work.values()), counted]))
cli.leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpointing", ["--activation-checkpointing", "--no-activation-checkpointing"]
)
def test_memory_and_work_are_as_foretold(tmp_path, checkpointing):
    """Resident memory within a tenth; operations exactly."""
    options = ["--model", "small", "--micro-batch", "4", "--device", "cpu", checkpointing]
    options += [
        "--encoders",
        "",
        "--text-tokens",
        "512",
        "--muon-lr",
        "0",
        "--cache-features",
        "none",
    ]
    script = tmp_path / "measured.py"
    script.write_text(MEASURED.format(root=str(ROOT), options=options))
    # What is free goes back to the system at once, so that resident is what is held.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    planned, peak, work, counted = json.loads(done.stdout)
    assert sum(planned.values()) == pytest.approx(peak, rel=0.1)
    assert work == pytest.approx(counted, rel=1e-9)


def plan(*options: str) -> subprocess.CompletedProcess:
    """train.py --plan, as a user runs it, in a folder without any data."""
    command = [sys.executable, ROOT / "train.py", "--plan", *options]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=900)


def test_what_fits_is_printed_and_what_does_not_is_refused_with_advice():
    """Sharded over half of the processes or over all of them; half of a micro-batch needs less."""
    done = plan("--gpus", "4", "--gpu-memory", "1", "--replicas", "2", "--cache-features", "none",
                "--place-encoders", "streams")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0.01 < float(re.search(r"  all +([\d.]+)", done.stdout)[1]) < 1
    assert re.search(r"[\d.]+ hours on 4 GPUs that achieve 60 TFLOP/s each", done.stdout)
    refused = plan("--gpus", "2", "--gpu-memory", "0.05")
    assert refused.returncode == 1
    assert "error: A micro-batch of 32 needs" in refused.stderr
    assert re.search(r"Fix: --micro-batch (16|8|4) needs 0\.0", refused.stderr), refused.stderr


@pytest.mark.slow
def test_the_papers_run_fits_eight_gpus_of_48_gb():
    """Full 7B, 1024 visual tokens: the README's figures."""
    done = plan("--model", "merv", "--gpus", "8", "--gpu-memory", "48", "--tflops", "88")
    assert done.returncode == 0, done.stderr
    readme = (ROOT / "README.md").read_text()
    assert done.stdout in readme
