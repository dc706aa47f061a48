"""`train.py --from`, `--llm` and `--lora`: begin from any model, and train it like any other.

Real runs under torchrun, in the small workplace of test_train.py.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_llama_weights import released, write
from test_resume import assert_same_run, curve, output_of, ranks, start, wait_for_steps
from test_train import ADAMW, ROOT, losses, run, workplace  # noqa: F401
from tiny_llama import build

import cost
import data
import eval
import merv
import train
from llama import LLAMAS, read_config
from merv import MERV
from support import lora
from support.errors import CheckpointError, UserError
from support.released import AUTHORS_ENCODERS
from tests.foreign_files import write_checkpoint

STEPS = ("--global-batch", "4", "--epochs", "1", "--cache-features", "none", *ADAMW)


@pytest.fixture(scope="module")
def aligned(workplace):  # noqa: F811
    """A run of stage 1 alone, with two encoders and another projector than the miniature's."""
    options = ("--recipe", "align", "--encoders", "dinov2,vivit", "--projector", "attn2d")
    checked(run(workplace, "aligned", *STEPS, *options))
    return workplace


def checked(done: subprocess.CompletedProcess) -> str:
    """What a run printed; it must have succeeded."""
    assert done.returncode == 0, done.stderr
    return done.stdout


# --------------------------------------------------------------------------------------------- from


@pytest.mark.slow
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


def begin(workplace: Path, name: str, *options: str, processes: int = 1, tokenizer=None):  # noqa: F811
    """train.py without --tokenizer, unless one is given: a checkpoint and an LLM have their own."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--standalone", str(ROOT / "train.py"), "--name", name, "--workers", "0"]
    command += ["--data", "data/miniature/train", *STEPS, *options]
    if tokenizer:
        command += ["--tokenizer", str(tokenizer)]
    return subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=300)


def weights_of(workplace: Path, name: str) -> dict[str, torch.Tensor]:  # noqa: F811
    return load_file(workplace / "runs" / name / "checkpoint" / "model.safetensors")


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


@pytest.mark.slow
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
        (["--encoder-files", "mine"], r"--encoder-files mine (?s:.*)comes with its encoders"),
        (["--encoder-seed", "1"], "--encoder-seed 1 contradicts"),
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
    words += ["--model", "miniature", "--tokenizer", tokenizer, "--pooled-side", "3"]
    assert train.read_options(words).projector == "attn2d"
    by_folder = ["--from", folder, "--tokenizer", str(Path(tokenizer).parent)]
    assert train.read_options(by_folder).projector == "attn2d"
    assert train.read_options(["--from", folder]).projector == "attn2d"
    assert train.read_options(["--from", "none"]).projector == "avg2d"


def test_another_tokenizer_is_refused(aligned, tiny_tokenizer):
    """It would give ids that the checkpoint has learned to mean other text."""
    words = ["--from", str(aligned / "runs" / "aligned"), "--tokenizer", str(tiny_tokenizer.path)]
    with pytest.raises(UserError, match=r"--tokenizer .* contradicts --from"):
        train.read_options(words)
    words[-1] = str(tiny_tokenizer.path.parent / "missing.model")
    with pytest.raises(CheckpointError, match=r"Found no .* at .*missing\.model"):
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


AUTHORS_RUN = """
import sys
from dataclasses import replace
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import merv, train
from llama import LLAMAS
from support import cli
LLAMAS["llama2-7b"] = replace(
    LLAMAS["miniature"], num_layers=2, hidden_size=64, vocab_size=32064, name="llama2-7b"
)
for name in merv.FOUR:
    merv.ENCODERS[name] = replace(merv.ENCODERS["miniature-" + name], name=name)
train.main()
cli.exit_now()
"""


def test_training_begins_from_an_authors_checkpoint(workplace, tmp_path):  # noqa: F811
    """A folder in their layout, at a small size; the file has neither tokenizer nor encoders. The
    first loss is that of the loaded weights, and the run is an ordinary one."""
    script = tmp_path / "authors.py"
    script.write_text(AUTHORS_RUN.format(root=str(ROOT)))
    folder = tmp_path / "merv-frozen"
    llama = replace(
        LLAMAS["miniature"], num_layers=2, hidden_size=64, vocab_size=32064, name="llama2-7b"
    )
    parts, _ = write_checkpoint(folder, llama, list(AUTHORS_ENCODERS))
    options = ("--from", str(folder), "--encoder-files", str(folder), "--max-steps", "2")
    done = run(workplace, "authors", *STEPS, *options, "--lora", "2", script=str(script))
    checked(done)
    model = MERV.from_pretrained(workplace / "runs" / "authors")
    assert model.config.llm.rope_bf16 and model.config.llm.vocab_size == 32064
    head = parts["llm_backbone"]["llm.lm_head.weight"]
    assert torch.equal(model.llm.lm_head.weight, head)  # frozen
    query = parts["llm_backbone"]["llm.model.layers.0.self_attn.q_proj.weight"]
    moved = (model.llm.layers[0].self_attn.q_proj.weight - query).abs().max()
    assert 0 < moved < 1e-2
    assert len(list((workplace / "runs" / "authors" / "checkpoint" / "encoders").iterdir())) == 4


# ---------------------------------------------------------------------------------------------- llm


@pytest.fixture(scope="module")
def vicuna(workplace, tmp_path_factory):  # noqa: F811
    """A small LLaMA in Hugging Face's format in a folder with the name of Vicuna's repository."""
    folder = tmp_path_factory.mktemp("models") / "vicuna-7b-v1.5"
    folder.mkdir()
    sizes = {"vocab_size": 640, "max_positions": 256}
    tensors = released(build(**sizes))
    write(folder, tensors, "safetensors", vocab_size=640, max_position_embeddings=256)
    tokenizer = workplace / "data" / "miniature" / "tokenizer.model"
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder


def test_widths_template_and_tokenizer_follow_the_llm(workplace, vicuna):  # noqa: F811
    """Projectors and mixer are as wide as the LLM, whose weights are loaded and then trained."""
    options = ("--llm", str(vicuna), "--encoders", "languagebind", "--projector", "all")
    checked(begin(workplace, "other-llm", *options, "--max-steps", "1", "--learning-rate", "1e-4"))
    model = MERV.from_pretrained(workplace / "runs" / "other-llm")
    assert model.config.llm.hidden_size == 32 == model.mixer.query.shape[0]
    assert model.template == model.config.llm.template == "vicuna"
    assert model.config.projector == "all" and list(model.encoders) == ["miniature-languagebind"]
    source = load_file(vicuna / "model.safetensors")["lm_head.weight"]
    assert 0 < (model.llm.lm_head.weight - source).abs().max() < 1e-2
    again = ["--from", str(workplace / "runs" / "other-llm"), "--llm", str(vicuna)]
    assert train.read_options(again).template == "vicuna"


@pytest.mark.parametrize("name", [name for name in LLAMAS if LLAMAS[name].source])
def test_a_folder_with_the_name_of_its_repository_has_the_template_of_the_preset(name, tmp_path):
    """Vicuna used to get LLaMA-2's prompts if its folder was named as its authors name it."""
    folder = tmp_path / Path(LLAMAS[name].source).name
    folder.mkdir()
    write(folder, {}, "safetensors")
    assert read_config(folder).template == LLAMAS[name].template
    options = train.read_options(["--llm", str(folder)])
    assert options.template == LLAMAS[name].template and options.tokenizer is None
    assert train.read_options(["--llm", str(folder), "--template", "base"]).template == "base"


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("Llama-2-13b-chat-hf", "llama2_chat"), ("llama-2-70b-chat", "llama2_chat"),
        ("Llama-2-13b-hf", "base"), ("vicuna-7b-v1.3", "vicuna"), ("vicuna-13b", "vicuna"),
        ("me@home/vicuna-7b-v1.5", "vicuna"), ("TinyLlama-1.1B-step-50K-105b", "base"),
    ],
)  # fmt: skip
def test_other_sizes_and_versions_of_a_family_have_its_template(name, template, tmp_path):
    """They used to get the base model's prompts, without a word."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    write(folder, {}, "safetensors")
    assert read_config(folder).template == template


def test_a_preset_of_another_llm_is_planned_with_its_widths():
    """Video-LLaVA: one encoder, all its patches, Vicuna."""
    words = ["--model", "merv", "--encoders", "languagebind", "--projector", "all"]
    words += ["--llm", "vicuna-13b", "--recipe", "video-llava"]
    config = train.model_config(train.read_options(words))
    assert config.llm.hidden_size == 5120 and config.llm.template == "vicuna"
    assert config.num_visual == 16 * 16 * 16
    assert cost.architecture(cost.read_options(["plan", *words])) == config


def test_an_llm_that_is_not_there_or_no_llama_is_explained(tmp_path):
    """Before anything is trained."""
    with pytest.raises(CheckpointError, match=r"Found no config\.json"):
        train.read_options(["--llm", str(tmp_path / "nowhere")])
    write(tmp_path, {}, "safetensors", model_type="mistral")
    with pytest.raises(CheckpointError, match="not a plain LLaMA"):
        train.read_options(["--llm", str(tmp_path)])


def test_an_llm_without_a_tokenizer_needs_one(workplace):  # noqa: F811
    """The miniature LLM has no weights and no tokenizer of its own."""
    done = begin(workplace, "speechless", "--tokenizer", "none")
    assert done.returncode != 0 and "error: --tokenizer is missing." in done.stderr


# --------------------------------------------------------------------------------------------- lora


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_train_on_two_processes_as_on_one(workplace, dtype):  # noqa: F811
    """bfloat16: a frozen base in bfloat16 beside adapters in float32, as on CUDA."""
    options = (*STEPS, "--lora", "4", "--micro-batch", "1", "--dtype", dtype)
    checked(run(workplace, f"one-{dtype}", *options))
    checked(run(workplace, f"two-{dtype}", *options, processes=2))
    one, two = losses(workplace, f"one-{dtype}"), losses(workplace, f"two-{dtype}")
    assert two == pytest.approx(one, rel=1e-4 if dtype == "float32" else 2e-2)
    assert one[-1] < one[0]


@pytest.mark.slow
def test_a_run_with_adapters_leaves_a_plain_checkpoint_and_the_adapters(workplace):  # noqa: F811
    """model.safetensors is the base plus (alpha / rank) B A, which eval.py reads as it is. In stage
    1 of video-llava, adapters rest; embeddings, norms and head never change."""
    recipe = ("--recipe", "video-llava", "--lora", "4", "--lora-alpha", "8", "--max-steps", "2")
    checked(run(workplace, "adapted", *STEPS, *recipe))
    adapters = load_file(workplace / "runs" / "adapted" / "adapters.safetensors")
    assert len(adapters) == 2 * 7 * LLAMAS["miniature"].num_layers
    assert all(lora.is_adapter(name) for name in adapters)
    tokenizer = workplace / "data" / "miniature" / "tokenizer.model"
    config = train.read_options(["--tokenizer", str(tokenizer), "--encoder-files", "none"])
    base = MERV.create(train.model_config(config), tokenizer, config.seed).state_dict()
    base = {name: tensor for name, tensor in base.items() if name.startswith("llm.")}
    saved = weights_of(workplace, "adapted")
    for name, tensor in lora.merge(base | adapters, 8 / 4).items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert not torch.equal(saved["llm.layers.0.mlp.up_proj.weight"],
                           base["llm.layers.0.mlp.up_proj.weight"])  # fmt: skip
    command = [sys.executable, str(ROOT / "eval.py"), "--checkpoint", "runs/adapted"]
    command += ["--benchmark", "miniature-open", "--data", "data/miniature/test"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=300)
    assert "every answer: runs/adapted/eval/miniature-open.json" in checked(done)


def test_muon_leaves_adapters_to_adamw(workplace):  # noqa: F811
    """Muon makes all singular values of a step equal, which suits whole matrices of an LLM."""
    tokenizer = workplace / "data" / "miniature" / "tokenizer.model"
    config = train.read_options(["--lora", "4", "--tokenizer", str(tokenizer)])
    config = replace(config, encoder_files=None)
    model = train.make_model(config)
    (stage,) = train.stages_of(config)
    adamw, muon = train.make_optimizers(model, stage, config)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    theirs = {id(p) for p in muon.param_groups[0]["params"]}
    assert theirs == {id(e.linear.weight) for e in model.projectors.values()}
    trained = [p for group in adamw.param_groups for p in group["params"]]
    assert len(trained) + len(theirs) == len(names)
    assert {name.split(".")[0] for name in names} == {"projectors", "mixer", "llm"}
    assert all(lora.is_adapter(name) for name in names if name.startswith("llm."))


def test_the_plan_knows_adapters():
    """Fewer parameters are trained, so there is less state; the base is in the compute dtype."""
    plans = {}
    for rank in ("none", "4"):
        words = ["plan", "--gpus", "1", "--optimizer", "adamw", "--lora", rank]
        config = cost.read_options(words)
        (stage,) = train.stages_of(cost.training_options(config))
        with cost.simulated_processes(1):
            plans[rank], _ = cost.memory_of(config, cost.architecture(config), stage)
    assert plans["4"]["optimizer"] < 0.3 * plans["none"]["optimizer"]
    assert plans["4"]["parameters"] < 0.9 * plans["none"]["parameters"]


# --------------------------------------------------------------------------------- the page of docs


def test_the_page_about_fine_tuning_does_what_it_says(workplace, clip, tmp_path, monkeypatch):  # noqa: F811
    """Its Python makes rows that can be read, and every command has options that exist, with a
    small checkpoint in place of the released one."""
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    page = page.split("## Fine-tune your own in one page")[1].split("\n## ")[0]
    assert page.count("\n") <= 40
    (tmp_path / "mydata" / "videos").mkdir(parents=True)
    (tmp_path / "mydata" / "videos" / "a.mp4").write_bytes(clip.read_bytes())
    table = "\ufeffvideo,question,answer\na.mp4,What moves?,a bar\n"  # as Excel writes UTF-8
    (tmp_path / "mydata" / "questions.csv").write_text(table, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    checkpoint = str(workplace / "runs" / "adapted" / "checkpoint")
    if not Path(checkpoint).exists():
        checked(run(workplace, "adapted", *STEPS, "--lora", "4", "--max-steps", "1"))
    model = MERV.from_pretrained(checkpoint)
    config = train.preset("miniature", "frozen")
    rows = train.read_rows(model, Path("mydata/stage2.json"), None, config, None)
    assert len(rows) == 1 and set(rows[0].pixels) == set(model.encoders)
    commands = re.search(r"```sh\n(.*?)```", page, re.DOTALL)[1].replace("\\\n", " ")
    own = str(model.tokenizer.path)
    commands = commands.replace("merv-frozen", checkpoint).replace("tokenizer.model", own)
    programs = {"data.py": data, "cost.py": cost, "train.py": train, "merv.py": merv}
    programs["eval.py"] = eval
    lines = [shlex.split(line, comments=True) for line in commands.splitlines()]
    assert len(lines) == 5
    for _, program, *words in lines:
        programs[program].read_options(words)


@pytest.mark.slow
def test_a_card_of_24_gb_holds_the_7b_with_adapters():
    """And docs/train.md shows what the plan prints."""
    words = ["plan", "--model", "merv", "--lora", "16", "--gpus", "1", "--micro-batch", "1"]
    command = [sys.executable, str(ROOT / "cost.py"), *words, "--gpu-memory", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    memory = checked(done).split("10^12")[0].split("adapters\n")[1].rstrip()
    assert memory in (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
