"""`train.py --from`, `--llm` and `--lora`: begin from any model, and train it like any other.

Real runs under torchrun, in the small workplace of test_train.py.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_same_run, curve, output_of, ranks, start, wait_for_steps
from test_train import ADAMW, ROOT, loss_of, losses, run, workplace  # noqa: F401

import train
from merv import MERV
from support.errors import CheckpointError, UserError

STEPS = ("--global-batch", "4", "--epochs", "1", "--cache-features", "none", *ADAMW)
CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.model")


def begin(workplace: Path, name: str, *options: str, processes: int = 1, tokenizer=None):  # noqa: F811
    """train.py without --tokenizer, unless one is given: a checkpoint and an LLM have their own."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--standalone", str(ROOT / "train.py"), "--name", name, "--workers", "0"]
    command += ["--data", "data/miniature/train", *STEPS, *options]
    if tokenizer:
        command += ["--tokenizer", str(tokenizer)]
    return subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=300)


def checked(done: subprocess.CompletedProcess) -> str:
    """What a run printed; it must have succeeded."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights_of(workplace: Path, name: str) -> dict[str, torch.Tensor]:  # noqa: F811
    return load_file(workplace / "runs" / name / "checkpoint" / "model.safetensors")


@pytest.fixture(scope="module")
def aligned(workplace):  # noqa: F811
    """A run of stage 1 alone, with two encoders and another projector than the miniature's."""
    options = ("--recipe", "align", "--encoders", "dinov2,vivit", "--projector", "attn2d")
    checked(run(workplace, "aligned", *STEPS, *options))
    return workplace


# --------------------------------------------------------------------------------------------- from


def test_stage_2_from_a_run_of_stage_1_is_the_two_stage_recipe(aligned):
    """The same losses and weights, bit for bit: what stage 1 leaves is all that stage 2 needs."""
    options = ("--encoders", "dinov2,vivit", "--projector", "attn2d")
    rates = ("--learning-rate", "5e-3", "2e-3")
    both = ("--recipe", "video-llava", *rates)
    checked(run(aligned, "both", *STEPS, *options, *both))
    checked(begin(aligned, "second", "--from", "runs/aligned", "--recipe", "frozen"))
    first, second = losses(aligned, "aligned"), losses(aligned, "second")
    assert first + second == losses(aligned, "both")
    straight, resumed = weights_of(aligned, "both"), weights_of(aligned, "second")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_run_knows_its_beginning_and_its_checkpoint_needs_no_other(aligned):
    """config.json names it. Encoders are copied from it, so the first run may be deleted."""
    checked(begin(aligned, "later", "--from", "runs/aligned", "--max-steps", "1"))
    folder = aligned / "runs" / "later"
    assert json.loads((folder / "config.json").read_text())["from_"] == "runs/aligned"
    moved = folder.rename(aligned / "later-moved")
    model = MERV.from_pretrained(moved)
    assert model.config.projector == "attn2d"
    before = MERV.from_pretrained(aligned / "runs" / "aligned")
    for name, tensor in before.encoders.state_dict().items():
        assert torch.equal(model.encoders.state_dict()[name], tensor), name
    assert not torch.equal(model.llm.norm.weight, before.llm.norm.weight)  # it was trained


def test_encoders_keep_their_float32_weights_when_training_holds_bfloat16(aligned):
    """A checkpoint made on a GPU used to have encoders rounded to bfloat16, and the next one again,
    so the cache of features made for one was of no use for the other."""
    options = ("--from", "runs/aligned", "--max-steps", "1", "--dtype", "bfloat16")
    checked(begin(aligned, "rounded", *options))
    file = "checkpoint/encoders/miniature-dinov2.safetensors"
    first, second = (load_file(aligned / "runs" / name / file) for name in ("aligned", "rounded"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_run_from_a_checkpoint_resumes_bit_for_bit(aligned):
    """Killed after some steps, it resumes with the command that began it. With micro-batches of one
    row, one process has text alone where the other has a clip. It then began its backward pass at
    another layer, because the frozen embeddings need no gradient, and the processes lost step."""
    options = ("--from", "runs/aligned", "--save-every", "1", "--micro-batch", "1", *STEPS)
    options += ("--epochs", "2", "--lora", "4")
    undisturbed = start(aligned, "--name", "undisturbed", *options)
    output = output_of(undisturbed)
    assert undisturbed.returncode == 0, output
    killed = start(aligned, "--name", "killed", *options)
    wait_for_steps(killed, aligned / "runs" / "killed" / "metrics.jsonl", 3)
    os.kill(ranks(killed.pid)[-1], signal.SIGKILL)
    output_of(killed)
    again = start(aligned, "--name", "killed", *options)
    output = output_of(again)
    assert again.returncode == 0, output
    assert_same_run(aligned, "killed", "undisturbed")
    assert len(curve(aligned, "killed")) > 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--encoders", "dinov2"], "--encoders dinov2 contradicts"),
        (["--encoders", "vivit,dinov2"], "--encoders vivit,dinov2 contradicts"),
        (["--projector", "avg2d"], "--projector avg2d contradicts"),
        (["--mixer", "mean"], "--mixer mean contradicts"),
        (["--pooled-side", "4"], "--pooled-side 4 contradicts"),
        (["--model", "merv"], "--model merv contradicts"),
        (["--llm", "vicuna-7b"], "--llm vicuna-7b contradicts"),
        (["--template", "vicuna"], "--template vicuna contradicts"),
    ],
)
def test_an_option_that_contradicts_the_checkpoint_is_named(aligned, options, named):
    """Silently training another model than was asked for would be worse than an error."""
    words = ["--from", str(aligned / "runs" / "aligned"), *options]
    with pytest.raises(UserError, match=named):
        train.read_options(words)


def test_options_that_agree_with_the_checkpoint_are_welcome(aligned):
    """A script may repeat what the checkpoint has, its tokenizer included."""
    folder = str(aligned / "runs" / "aligned")
    tokenizer = str(aligned / "data" / "miniature" / "tokenizer.model")
    words = ["--from", folder, "--encoders", "dinov2,vivit", "--projector", "attn2d"]
    words += ["--model", "miniature", "--tokenizer", tokenizer, "--pooled-side", "2"]
    assert train.read_options(words).projector == "attn2d"
    assert train.read_options(["--from", folder]).projector == "attn2d"
    assert train.read_options(["--from", "none"]).projector == "avg2d"


def test_another_tokenizer_is_refused(aligned, tiny_tokenizer):
    """It would give ids that the checkpoint has learned to mean other text."""
    words = ["--from", str(aligned / "runs" / "aligned"), "--tokenizer", str(tiny_tokenizer.path)]
    with pytest.raises(UserError, match=r"--tokenizer .* contradicts --from"):
        train.read_options(words)


def test_a_run_without_a_checkpoint_and_no_run_at_all_are_explained(tmp_path):
    """A run that has not ended has options but no model yet."""
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text(json.dumps({"model": "miniature", "recipe": "frozen"}))
    with pytest.raises(CheckpointError, match="a run that has not ended"):
        train.read_options(["--from", str(unfinished)])
    with pytest.raises(CheckpointError, match=r"Found no .*config\.json"):
        train.read_options(["--from", str(tmp_path / "nowhere")])
