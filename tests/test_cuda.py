"""What only a GPU can show: python -m pytest -m cuda. One card, at most eight minutes.

The checks run in the order of the file, from the cheapest to the full 7B, each with its bound, and
a table with the card's name is printed at the end. They make their own data: clips are folders of
pictures, encoders and language models have random weights. Where there is no CUDA they are
deselected, never counted as passed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import REPOSITORY
from PIL import Image
from safetensors.torch import load_file

from encoders import load_encoder, save_encoder
from merv import MERVS
from miniature import world

pytestmark = pytest.mark.cuda
MEASURED: list[tuple[str, str, str]] = []  # check, what was measured, its bound


@pytest.fixture(scope="session", autouse=True)
def table(request):
    """Print what was measured, with the card's name, when all checks have run."""
    began = time.monotonic()
    yield
    card = torch.cuda.get_device_name()
    lines = [f"{card}, torch {torch.__version__}, {time.monotonic() - began:.0f} s", ""]
    lines += ["| check | measured | bound |", "|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in MEASURED]
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n\n" + "\n".join(lines))


def talk(question: str, answer: str, tag: str = "") -> list[dict]:
    """One question and its answer, as training files have them."""
    return [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with eight clips, eight stills, eight rows of text and four untrained encoders."""
    folder = tmp_path_factory.mktemp("cuda")
    data = folder / "data" / "miniature" / "train"
    captions, questions = [], []
    for number in range(8):
        scene, film = world.draw_clip(number)
        colour = scene.things[0].colour
        (data / f"clip_{number}").mkdir(parents=True)
        for frame, pixels in enumerate(film):
            picture = Image.fromarray(pixels.transpose(1, 2, 0))
            picture.save(data / f"clip_{number}" / f"{frame}.png")
        picture.save(data / f"still_{number}.png")
        for kind, medium in (("video", f"clip_{number}"), ("image", f"still_{number}.png")):
            row = {"id": medium, kind: medium}
            told = talk("Describe it.", f"There is something {colour}.", f"<{kind}>\n")
            asked = talk("What colour is it?", colour, f"<{kind}>\n")
            captions.append(row | {"conversations": told})
            questions.append(row | {"conversations": asked})
        questions.append({"id": f"text_{number}", "conversations": talk("Say red.", "red")})
    (data / "stage1.json").write_text(json.dumps(captions))
    (data / "stage2.json").write_text(json.dumps(questions))
    texts = [turn["value"] for row in captions + questions for turn in row["conversations"]]
    with (data.parent / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 20), model_writer=file, vocab_size=400,
            model_type="bpe", byte_fallback=True, character_coverage=1.0,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    for config in MERVS["miniature"].encoders:
        encoder = load_encoder(config.name)
        save_encoder(encoder, data.parent / "encoders-0" / f"{config.label}.safetensors")
    return folder


STEPS = ("--global-batch", "8", "--micro-batch", "4", "--epochs", "4", "--cache-features", "none")
STEPS += ("--workers", "0", "--optimizer", "adamw", "--no-evaluate")


def command(place: Path, name: str, *options: str, torchrun: bool = False) -> list[str]:
    """The command line of one small run of train.py."""
    files = ["--data", str(place / "data/miniature/train")]
    files += ["--tokenizer", str(place / "data/miniature/tokenizer.model")]
    start = [sys.executable]
    if torchrun:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    return [*start, str(REPOSITORY / "train.py"), "--name", name, *files, *STEPS, *options]


def train(place: Path, name: str, *options: str, torchrun: bool = False) -> list[dict]:
    """Run train.py to its end; the metrics of every step."""
    done = subprocess.run(
        command(place, name, *options, torchrun=torchrun),
        cwd=place, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def apart(one: list[dict], other: list[dict]) -> float:
    """The largest relative difference between the losses of two runs."""
    assert len(one) == len(other) > 0
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(one, other, strict=True))


def check(what: str, measured: float, bound: float, unit: str = "", least: bool = False) -> None:
    """Note a measurement for the table, then hold it to its bound."""
    sign = "≥" if least else "≤"
    MEASURED.append((what, f"{measured:.4g}{unit}", f"{sign} {bound:.4g}{unit}"))
    assert measured >= bound if least else measured <= bound


def test_every_module_imports_and_the_card_is_named():
    """torch sees a CUDA card that computes in bfloat16."""
    card = torch.cuda.get_device_properties(0)
    MEASURED.append((f"{card.name}", f"{card.total_memory / 1e9:.1f} GB", ""))
    assert torch.cuda.is_bf16_supported()


def test_two_steps_run_with_and_without_torchrun(place):
    """The same two steps, to the last bit of the printed loss or to rounding."""
    alone = train(place, "alone", "--device", "cuda", "--max-steps", "2")
    launched = train(place, "launched", "--device", "cuda", "--max-steps", "2", torchrun=True)
    check("two steps, with torchrun against without", apart(alone, launched), 1e-3)


def test_ten_mixed_steps_agree_with_the_cpu(place):
    """Text, stills and clips: bfloat16 on the GPU against float32 on the CPU."""
    # A small learning rate: a large one amplifies rounding from step to step.
    steps = ("--max-steps", "10", "--learning-rate", "2e-4")
    on_gpu = train(place, "ten-gpu", "--device", "cuda", *steps)
    on_cpu = train(place, "ten-cpu", "--device", "cpu", *steps)
    check("ten mixed steps, GPU against CPU", apart(on_gpu, on_cpu), 0.01)


def test_stage_2_follows_stage_1(place):
    """Layers that are frozen in stage 1 are trained in stage 2 (recipe video-llava)."""
    options = ("--recipe", "video-llava", "--max-steps", "3")
    on_gpu = train(place, "two-stages-gpu", "--device", "cuda", *options)
    on_cpu = train(place, "two-stages-cpu", "--device", "cpu", *options)
    check("video-llava across its stages, GPU against CPU", apart(on_gpu, on_cpu), 0.02)


def test_encoders_may_be_copied_or_run_on_streams(place):
    """--place-encoders changes where encoders lie, not what they compute."""
    steps = ("--device", "cuda", "--max-steps", "6", "--place-encoders")
    runs = {where: train(place, where, *steps, where) for where in ("shard", "copy", "streams")}
    check("copied encoders against sharded ones", apart(runs["copy"], runs["shard"]), 0.005)
    check("encoders on streams against sharded ones", apart(runs["streams"], runs["shard"]), 0.005)
    # At full width: in the miniature the activations of one encoder outweigh the whole model.
    memory = {where: measure(where)["memory_gb"] for where in ("copy", "streams")}
    check("memory of streams over copy", memory["streams"] / memory["copy"], 1.5)


def test_a_resumed_run_is_as_close_as_a_second_one(place):
    """A GPU may round differently each time; stopping and resuming adds nothing to that."""
    steps = ("--device", "cuda", "--max-steps", "8")
    first = train(place, "first", *steps)
    second = train(place, "second", *steps)
    train(place, "resumed", *steps, "--save-every", "4", "--keep", "none")
    run = place / "runs" / "resumed"
    for after in (run / "checkpoint", run / "saves" / "00000008"):
        subprocess.run(["rm", "-r", str(after)], check=True)
    resumed = train(place, "resumed", *steps, "--save-every", "4", "--keep", "none")
    twice = 2 * apart(second, first) + 1e-5
    check("resumed against straight, in units of twice the spread", apart(resumed, first), twice)


def test_cached_features_are_those_of_the_cpu(place):
    """The cache is filled in float32, on whichever device there is."""
    for device in ("cuda", "cpu"):
        options = ("--device", device, "--max-steps", "1", "--cache-features", f"cache-{device}")
        train(place, f"cache-{device}", *options)
    largest = 0.0
    files = sorted((place / "cache-cpu").rglob("*.safetensors"))
    assert len(files) == 4 * 16  # four encoders, eight clips and eight stills
    for file in files:
        on_cpu = load_file(file)["features"].float()
        twin = place / "cache-cuda" / file.relative_to(place / "cache-cpu")
        on_gpu = load_file(twin)["features"].float()
        difference = (on_cpu - on_gpu).abs().max() / on_cpu.abs().max()
        largest = max(largest, difference.item())
    check("cached features, GPU against CPU", largest, 1e-2)


def test_sigterm_saves_and_the_same_command_resumes(place):
    """A job that is told to stop saves at the end of its step."""
    options = ("--device", "cuda", "--epochs", "400", "--save-every", "none")
    process = subprocess.Popen(command(place, "told", *options), cwd=place)
    metrics = place / "runs" / "told" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    saves = [int(folder.name) for folder in (place / "runs" / "told" / "saves").iterdir()]
    check("steps saved after SIGTERM", saves[0], 1, least=True)


def test_the_default_run_reaches_its_score_and_answers_alike_everywhere(tmp_path_factory):
    """`torchrun train.py` on this card; then the same questions on CPU and GPU, in two dtypes."""
    folder = tmp_path_factory.mktemp("default")
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    how = {"cwd": folder, "capture_output": True, "text": True, "env": environment}
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(REPOSITORY / "train.py")], timeout=300, **how)
    assert done.returncode == 0, done.stderr[-4000:]
    MEASURED.append(("the default run, from nothing", f"{time.monotonic() - began:.0f} s", ""))
    run = next((folder / "runs").iterdir())
    accuracy = json.loads((run / "eval" / "miniature-open.json").read_text())["accuracy"]["all"]
    check("its accuracy", 100 * accuracy, 53, " %", least=True)
    answers = {}
    for name, device, dtype in (("cpu", "cpu", "float32"), ("float32", "cuda", "float32"),
                                ("bfloat16", "cuda", "bfloat16")):  # fmt: skip
        options = ["--checkpoint", str(run), "--data", "data/miniature/val", "--device", device]
        options += ["--dtype", dtype, "--output", name]
        asked = subprocess.run([sys.executable, str(REPOSITORY / "eval.py"), *options], **how)
        assert asked.returncode == 0, asked.stderr[-4000:]
        result = json.loads((folder / name / "miniature-open.json").read_text())
        answers[name] = [question["answer"] for question in result["questions"]]
    for dtype, bound in (("float32", 99), ("bfloat16", 97)):
        same = np.mean([a == b for a, b in zip(answers[dtype], answers["cpu"], strict=True)])
        check(f"answers in {dtype} equal to the CPU's", 100 * same, bound, " %", least=True)


def measure(script: str, *arguments: str) -> dict:
    """Run a part of tests/cuda_full_size.py in a process of its own; what it measured."""
    program = str(REPOSITORY / "tests" / "cuda_full_size.py")
    how = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 240}
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    how["env"] = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, program, script, *arguments], **how)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_at_full_width_fits_its_plan_and_keeps_the_card_busy():
    """MERV's widths with 8 LLM layers: 1024 visual and 512 text tokens, micro-batch 8."""
    planned = measure("plan")
    found = measure("train")
    off = abs(found["memory_gb"] / planned["memory_gb"] - 1)
    check("peak memory against its plan", 100 * off, 10, " %")
    for direction in ("forward", "backward"):
        kernels = found["attention"][direction]
        MEASURED.append((f"attention kernel, {direction}", ", ".join(kernels)[:90], ""))
        assert any("flash" in name or "cudnn" in name for name in kernels), kernels
    share = found["tflops"] / found["matmul_tflops"]
    MEASURED.append(("training", f"{found['tflops']:.0f} TFLOP/s", ""))
    product = f"{found['matmul_tflops']:.0f} TFLOP/s"
    MEASURED.append(("matrix product of 8192 in bfloat16", product, ""))
    check("share of the card's bfloat16 peak", 100 * share, 40, " %", least=True)


def test_the_7b_answers_25_questions_as_fast_as_one():
    """The whole model with random bfloat16 weights: memory, speed, batched against single."""
    found = measure("answer")
    check("memory of the 7B while it answers", found["memory_gb"], 20, " GB")
    for name, what in (("alone", "one question"), ("together", "25 questions")):
        plain, graph = f"{found[name]:.1f}", f"{found[name + '_graph']:.1f}"
        MEASURED.append((f"decoding steps a second, {what}; with a CUDA graph", plain, graph))
    agrees = 100 * found["graph_agrees"]
    check("tokens on which a CUDA graph agrees", agrees, 95, " %", least=True)
    check("25 questions against one", found["together"] / found["alone"], 0.8, least=True)
    check("tokens that batched and single agree on", 100 * found["agree"], 95, " %", least=True)
