"""`python cost.py plan`: the memory and operations that it predicts are those of a real run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cost
import train
from support.errors import UserError

ROOT = Path(__file__).parent.parent


def test_a_plan_that_fits_is_printed(capsys):
    """Two replicas, each sharded over two of four GPUs."""
    options = ["plan", "--gpus", "4", "--gpu-memory", "1", "--replicas", "2"]
    options += ["--no-cached-features", "--place-encoders", "streams"]
    cost.main(options)
    plan = capsys.readouterr().out
    assert 0.01 < float(re.search(r"  all +([\d.]+)", plan)[1]) < 1
    assert re.search(r"[\d.]+ hours on 4 GPUs that achieve 60 TFLOP/s each", plan)


def test_a_plan_that_does_not_fit_names_a_micro_batch_that_does():
    """Half a micro-batch needs less memory."""
    done = run_cost("plan", "--gpus", "2", "--gpu-memory", "0.05")
    assert done.returncode == 1
    assert "error: A micro-batch of 32 needs" in done.stderr
    assert re.search(r"Fix: --micro-batch (16|8|4|2) needs 0\.0", done.stderr), done.stderr


def test_cost_needs_one_of_its_two_commands():
    """The error names both."""
    for words in ([], ["guess"], ["plan", "table"]):
        with pytest.raises(UserError, match=r"cost\.py plan, or python cost\.py table"):
            cost.read_options(words)


def test_the_table_takes_no_options():
    """It counts the paper's models, whatever --model says."""
    assert cost.read_options(["table"]).command == ("table",)
    with pytest.raises(UserError, match="leave them out"):
        cost.read_options(["table", "--model", "merv"])


@pytest.mark.parametrize("model", ["miniature", "merv", "siglip-single"])
def test_a_plan_is_for_the_run_that_train_would_start(model):
    """The same --model and --recipe give the same model, optimizer and micro-batch."""
    plan = cost.read_options(["plan", "--model", model, "--recipe", "video-llava"])
    training = train.read_options(["--model", model, "--recipe", "video-llava"])
    assert cost.architecture(plan) == train.model_config(training)
    for name in ("optimizer", "micro_batch", "activation_checkpointing", "place_encoders"):
        assert getattr(plan, name) == getattr(training, name)
    assert plan.cached_features == (training.cache_features is not None)


@pytest.mark.parametrize("projector", ["class", "all", "avg3d"])
def test_cached_features_have_the_shape_that_the_projector_pools_to(projector):
    """A step of the LLM with cached features costs the same as one without, minus the encoders."""
    operations = []
    for cached in ("--cached-features", "--no-cached-features"):
        options = ["plan", "--projector", projector, "--encoders", "dinov2,vivit", cached]
        config = cost.read_options(options)
        what, stage = cost.architecture(config), train.RECIPES["frozen"][0]
        with cost.simulated_processes(1):
            operations.append(cost.operations_of(config, what, stage, still=False))
    with_cache, without = operations
    assert with_cache["LLM layers"] == without["LLM layers"] > 0
    assert with_cache["miniature-vivit"] == 0 < without["miniature-vivit"]


def test_encoders_that_stay_idle_are_sharded_in_the_plan_as_in_training():
    """With cached features, they were counted whole on each of 4 GPUs."""
    parameters = []
    for more in (["--no-cached-features"], ["--cached-features"]):
        config = cost.read_options(["plan", "--encoders", "dinov2,vivit", "--gpus", "4", *more])
        with cost.simulated_processes(4):
            rows, _ = cost.memory_of(config, cost.architecture(config), train.RECIPES["frozen"][0])
        parameters.append(rows["parameters"])
    assert parameters[1] == pytest.approx(parameters[0], rel=0.01)


def run_cost(*options: str) -> subprocess.CompletedProcess:
    """cost.py as a user runs it, in a folder without any data."""
    command = [sys.executable, ROOT / "cost.py", *options]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=900)


# A model of fifty million parameters is planned without memory, and then run with memory.
MEASURED = """
import json, sys
sys.path.insert(0, {root!r})
from dataclasses import replace
import torch
from torch.utils.flop_counter import FlopCounterMode
import cost, train
from data import Batch
from merv import MERVS
from support.cli import exit_now

def resident(what):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e9

llm = replace(MERVS["miniature"].llm, vocab_size=8000, hidden_size=768, num_layers=6, num_heads=6,
              num_kv_heads=6, intermediate_size=2048)
MERVS["small"] = replace(MERVS["miniature"], name="small", llm=llm)
config = cost.read_options({options!r})
what = cost.architecture(config)
# A step of as many micro-batches as the test wants.
stage = replace(train.RECIPES[config.recipe][0], global_batch=config.micro_batch * {micro_batches})

with cost.simulated_processes(1):
    planned, _ = cost.memory_of(config, what, stage)
    planned_work = cost.operations_of(config, what, stage, still=False)

train.join_processes("cpu")
b, s = config.micro_batch, config.text_tokens
before = resident("VmRSS")
model = cost.build(what).train()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
model.llm.activation_checkpointing = config.activation_checkpointing
train.shard(model, train.make_mesh("cpu", 1), config.place_encoders, torch.float32)
optimizers = train.make_optimizers(model, stage, cost.training_options(config))
pixels = {{e.name: torch.rand(b, e.num_frames, 3, e.image_size, e.image_size)
          for e in what.encoders}}
rows, places = torch.arange(b).repeat_interleave(s // 2), torch.arange(s // 2, s).repeat(b)
ids, labelled = torch.randint(1000, (b, s)), torch.stack([rows, places])
batch = Batch(ids, labelled, [s] * b, list(range(b)), pixels, {{}})
for step in range(2):  # in the second, the optimizer's state exists
    open("/proc/self/clear_refs", "w").write("5")  # the kernel measures the peak from here on
    for _ in range({micro_batches}):
        model(batch)[0].backward()
    peak = resident("VmHWM") - before
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
with FlopCounterMode(display=False) as counter:
    model(batch)[0].backward()
counted = counter.get_total_flops() / b / 1e12
print(json.dumps([planned, peak, sum(planned_work.values()), counted]))
exit_now()
"""


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    "checkpointing", ["--activation-checkpointing", "--no-activation-checkpointing"]
)
def test_memory_and_operations_are_as_planned(tmp_path, checkpointing, micro_batches):
    """Resident memory within a tenth; operations exactly. From the second micro-batch of a step on,
    its activations exist beside gradients."""
    options = ["plan", "--model", "small", "--micro-batch", "4", "--text-tokens", "512"]
    options += ["--dtype", "float32", "--optimizer", "adamw", checkpointing]
    script = tmp_path / "measured.py"
    script.write_text(MEASURED.format(root=str(ROOT), options=options, micro_batches=micro_batches))
    # Free memory goes back to the system at once, so that resident memory is what is in use.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    planned, peak, work, counted = json.loads(done.stdout)
    assert sum(planned.values()) == pytest.approx(peak, rel=0.1)
    assert work == pytest.approx(counted, rel=1e-9)


@pytest.mark.slow
def test_the_papers_run_fits_eight_gpus_of_48_gb():
    """The full 7B with 1024 visual tokens: docs/train.md shows what the command prints."""
    done = run_cost(
        "plan", "--model", "merv", "--gpus", "8", "--gpu-memory", "48", "--tflops", "88"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout in (ROOT / "docs/train.md").read_text()
