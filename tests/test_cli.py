"""Command lines: what --help shows, `none`, tuples, misspelled and moved options, progress."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

import cost
import eval
import merv
import train
from support import cli, processes
from support.cli import option, parse_options, pick_device
from support.errors import UserError


@dataclass(frozen=True)
class Options:
    """A small command line."""

    steps: int = option(10, "how far", group="run")
    limit: float | None = option(None, "stop above", group="run")
    rates: tuple[float, ...] = option((0.1,), "one for each stage", group="optimisation")
    loud: bool = option(False, "print more", group="run")
    words: tuple[str, ...] = option((), "anything")


def test_every_type_of_field_is_read_from_the_command_line():
    """Numbers, `none`, several values, flags, and arguments without a name."""
    assert parse() == Options()
    given = parse("a", "b", "--steps", "3", "--limit", "0.5", "--rates", "1e-3", "2e-5", "--loud")
    assert given == Options(3, 0.5, (1e-3, 2e-5), True, ("a", "b"))
    preset = Options(limit=2.0, loud=True)
    assert parse("--limit", "none", "--no-loud", preset=preset) == Options()


def parse(*words: str, **how) -> Options:
    """The options that these words mean."""
    return parse_options(Options, list(words), "Count.", **how)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--stps", "3"], "did you mean --steps?"),
        (["-i.mp4", "What?"], "If it is a file, write ./-i.mp4."),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--pace", "3"], "--pace has moved: use --steps"),
        (["--limit", "nan"], "--limit: must be a number of at least 0, not nan"),
        (["--rates", "0.1", "-1"], "--rates: must be a number of at least 0, not -1"),
    ],
)
def test_a_wrong_option_is_explained(capsys, words, wanted):
    """Misspelled, of the wrong type, not a number, negative, or moved."""
    with pytest.raises(SystemExit):
        parse(*words, moved={"--pace": "use --steps"})
    assert wanted in capsys.readouterr().err


COUNTS = {
    train: ("micro-batch", "global-batch", "epochs", "max-steps", "lora", "replicas", "keep"),
    eval: ("batch-videos", "max-new-tokens", "judge-parallel"),
    merv: ("max-new-tokens",),
    cost: ("gpus", "replicas", "micro-batch", "text-tokens"),
}


@pytest.mark.parametrize("program", COUNTS, ids=lambda program: program.__name__)
def test_a_number_that_must_be_positive_is_refused_otherwise(program, capsys):
    """None of these options could do anything with 0."""
    for name in COUNTS[program]:
        for number in ("0", "-3"):
            with pytest.raises(SystemExit):
                program.main([f"--{name}", number])
            assert f"--{name}: must be a number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            [],
            [
                "(default: 0.002)",
                "(default: 32)",
                "(default: muon)",
                "(default: data/miniature/features)",
            ],
        ),
        (["--model", "merv"], ["(default: 2e-05)", "(default: 128)", "(default: adamw)"]),
        (["--model", "merv", "--recipe", "video-llava"], ["0.001 2e-05", "256 128"]),
        (["--model", "siglip-single"], ["(default: siglip)", "(default: siglip-single-frozen)"]),
    ],
)
def test_help_shows_the_values_that_will_be_used(capsys, words, wanted):
    """Those of the preset that --model and --recipe choose, in five groups."""
    with pytest.raises(SystemExit):
        train.read_options(["--help", *words])
    text = "".join(capsys.readouterr().out.split())  # lines break within values
    for value in [*wanted, "model:", "data:", "optimisation:", "machine:", "run:"]:
        assert value.replace(" ", "") in text


def test_help_shows_a_value_with_a_percent_sign(capsys):
    """argparse takes %d in a help text for a format."""
    with pytest.raises(SystemExit):
        parse_options(train.TrainConfig, ["--help"], "", train.TrainConfig(data="runs/50%done"))
    assert "50%done" in "".join(capsys.readouterr().out.split())


def test_the_command_line_changes_fields_of_the_preset():
    """One learning rate for both stages, or one for each; else an error."""
    words = ["--model", "merv", "--recipe", "video-llava", "--learning-rate"]
    (first, second) = train.stages_of(train.read_options([*words, "3e-4"]))
    assert first.learning_rate == second.learning_rate == 3e-4
    assert (first.global_batch, second.global_batch) == (256, 128)
    with pytest.raises(UserError, match="3 values, the recipe has 2 stages"):
        train.stages_of(train.read_options([*words, "1", "2", "3"]))


LOOP = """
import sys, time
sys.path.insert(0, {root!r})
from support import cli
bar = cli.progress(range(40), "count")
for number in bar:
    bar.set_postfix_str(f"loss {{number}}", refresh=False)
    time.sleep(0.005)
"""


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--model", "merv", "--encoders", "dinov2,siglip", "--projector", "all"], "16, 14, 14"),
        (["--model", "merv", "--encoders", "dinov2,miniature-siglip"], "miniature-siglip"),
    ],
)
def test_encoders_whose_features_cannot_be_mixed_are_refused(options, wanted):
    """Before anything is made. Once a RuntimeError of torch.stack, in the first step."""
    with pytest.raises(UserError, match="have different shapes") as caught:
        train.model_config(train.read_options(options))
    assert wanted in str(caught.value)


def test_muon_without_a_matrix_to_train_is_refused():
    """With --lora the LLM is frozen, and AdamW trains the adapters."""
    words = ["--model", "merv", "--lora", "8", "--optimizer", "muon"]
    with pytest.raises(UserError, match="nothing to train"):
        train.stages_of(train.read_options(words))
    assert train.stages_of(train.read_options([*words, "--muon-parts", "llm,projectors"]))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--recipe", "align", "--lora", "4"], "nothing to train"),
        (["--warmup", "5"], "a fraction of the steps"),
        (["--clip", "0"], "clipped to nothing"),
    ],
)
def test_options_that_would_do_nothing_or_too_much_are_refused(words, wanted):
    """Adapters of an LLM that stays frozen; a warm-up in steps or in percent."""
    config = train.read_options(["--model", "merv", *words])
    with pytest.raises(UserError, match=wanted):
        train.stages_of(config)
    train.stages_of(replace(config, resume="runs/begun"))  # by an older version


def test_a_group_of_one_process_needs_no_store_that_windows_lacks(monkeypatch):
    """There torch.distributed has no HashStore."""
    monkeypatch.delattr(torch.distributed, "HashStore")
    store = processes.store_of_one()
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_the_prompt_of_captions_is_no_template_of_an_llm(capsys):
    """It has no question: a model that is asked with it would see no text at all."""
    with pytest.raises(SystemExit):
        train.read_options(["--template", "caption"])
    assert "invalid choice: 'caption'" in capsys.readouterr().err


def test_a_process_without_a_card_is_refused(monkeypatch):
    """Eight processes on a machine with one card. Once a traceback of torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "7")
    with pytest.raises(UserError, match="no CUDA card for process 8"):
        processes.join_processes("cuda")


def test_a_log_gets_a_line_every_ten_seconds_not_one_a_step():
    """Without a terminal a loop of a fifth of a second prints its start and its end."""
    script = LOOP.format(root=str(train.runs.ROOT))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 2 and "40/40" in lines[-1] and "\r" not in done.stderr


def test_devices_are_checked(monkeypatch):
    """ "auto" is never MPS; a device that is missing is an error with its reason."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used"):
            pick_device(name)
    with pytest.raises(UserError, match="There is no device gpu"):
        cli.pick_device("gpu")


def test_deterministic_runs_exclude_what_rounds_differently_each_time(monkeypatch):
    """Strict algorithms, a fixed workspace of cuBLAS, and no attention of cuDNN, whose gradients
    are summed in any order. What a GPU makes of it is in test_cuda.py."""
    monkeypatch.setattr(os, "environ", {})
    try:
        cli.make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(
    ("script", "function", "arguments", "fix"),
    [
        (merv, "answer_questions", ["clip.mp4", "What?"], "--dtype bfloat16"),
        (eval, "run_command", [], "--dtype bfloat16"),
        (train, "train", [], "--micro-batch"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_gpu_without_enough_memory_is_an_error_that_says_what_to_change(
    script, function, arguments, fix, monkeypatch, capsys
):
    """torch's own message is a traceback that ends with advice about its allocator."""

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.")

    monkeypatch.setattr(script, function, run_out)
    monkeypatch.setattr(train, "exit_now", sys.exit)  # exit_now would end pytest
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    message = f"{ended.value} {capsys.readouterr().err}"
    assert "Tried to allocate 2.00 GiB." in message
    assert fix in message
    assert ended.value.code != 0
