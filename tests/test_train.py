"""train.py under real processes: the same curve on any number of them, and what a run leaves."""

import functools
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from data import TEMPLATES, Batch, ConversationDataset, Example
from encoders import ENCODERS, load_encoder, save_encoder
from llama import Tokenizer
from merv import FOUR, MERV, MERVS
from miniature import preset
from miniature.world import write_world
from support import processes
from support.features import FeatureCache
from support.processes import LoadAhead
from support.video import load_video
from train import TrainConfig

ROOT = Path(__file__).parent.parent


STAGES = ("stage1", "stage2")
TEXT = [{"from": "human", "value": "What colour is a fire?"}, {"from": "gpt", "value": "red"}]


def slow(*values):
    """A case that only the slow tests run."""
    return pytest.param(*values, marks=pytest.mark.slow)


# Parameters in float32, computation in bfloat16, gradients reduced in float32: what training does
# on CUDA, here on the CPU. A test with this mark runs a second time so, among the slow ones.
also_as_on_cuda = pytest.mark.parametrize(
    "workplace", ["float32", slow("bfloat16")], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def workplace(request, tmp_path_factory):
    """A folder with a very small world in it and four untrained specialists. To its ten clips come
    four stills, captioned and asked about, and four rows of text alone. Its name is the dtype that
    runs in it compute in."""
    folder = tmp_path_factory.mktemp("workplace") / getattr(request, "param", "float32")
    world = folder / "data" / "miniature"
    write_world(world, {"train": 10, "val": 4, "test": 2})
    rows = {stage: json.loads((world / "train" / f"{stage}.json").read_text()) for stage in STAGES}
    rows["stage2"] = rows["stage2"][::2]  # one conversation about each clip
    for number in range(4):
        still = load_video(world / "train" / rows["stage1"][number]["video"], 8)[number]
        Image.fromarray(still.permute(1, 2, 0).numpy()).save(world / f"train/still_{number}.png")
        for stage in STAGES:
            row = {key: rows[stage][number][key] for key in ("id", "conversations")}
            rows[stage].append(row | {"id": f"still_{number}", "image": f"still_{number}.png"})
        rows["stage2"].append({"id": f"text_{number}", "conversations": TEXT})
    for stage in STAGES:
        (world / "train" / f"{stage}.json").write_text(json.dumps(rows[stage]))
    for name in FOUR:
        encoder = load_encoder(f"miniature-{name}")
        save_encoder(encoder, folder / "data" / "miniature" / "encoders-0" / f"{name}.safetensors")
    return folder


STEPS = ("--global-batch", "4", "--epochs", "1", "--cache-features", "none")
MUON, ADAMW = ("--optimizer", "muon"), ("--optimizer", "adamw")


@pytest.fixture(scope="module")
def alone(workplace):
    """One process that takes every global batch at once, by each optimizer when first asked for."""

    @functools.cache
    def run_alone(optimizer: tuple[str, str]) -> str:
        name = f"alone{optimizer[1]}"
        done = run(workplace, name, *STEPS, "--micro-batch", "4", *optimizer)
        assert done.returncode == 0, done.stderr
        assert len(losses(workplace, name)) == math.ceil(18 / 4)
        return name

    return run_alone


def run(workplace: Path, name: str, *options: str, processes: int = 1, script: str = "train.py"):
    """Run a script of the repository under torchrun in the workplace; what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--standalone", str(ROOT / script)]
    data = ["--data", "data/miniature/train", "--tokenizer", "data/miniature/tokenizer.model"]
    command += ["--name", name, "--workers", "0", "--dtype", workplace.name, *data, *options]
    return subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=300)


def losses(workplace: Path, name: str) -> list[float]:
    """The loss of every step of a run."""
    return loss_of(workplace / "runs" / name)


def loss_of(folder: Path) -> list[float]:
    """The loss of every step of the run in this folder."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, ("--micro-batch", "1", *ADAMW)),
        slow(2, ("--micro-batch", "1", *MUON)),
        slow(1, ("--micro-batch", "1", *ADAMW)),
        slow(4, ("--micro-batch", "1", *MUON)),
        slow(4, ("--micro-batch", "1", *ADAMW, "--replicas", "2", "--place-encoders", "copy")),
        slow(2, ("--micro-batch", "2", *ADAMW, "--place-encoders", "streams")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else f"{value} processes",
)
@also_as_on_cuda
def test_any_split_of_the_global_batch_takes_the_same_steps(workplace, alone, processes, options):
    """Text, image and video rows; some micro-batches have no picture, and encoders are gathered.

    Muon orthogonalises, which makes more of the same rounding than AdamW does.
    """
    optimizer = MUON if set(MUON) <= set(options) else ADAMW
    name, rounding = alone(optimizer), 1e-3 if optimizer == MUON else 1e-4
    if workplace.name == "bfloat16":
        rounding = 2e-2
    other = "".join(options).replace("-", "") + str(processes)
    done = run(workplace, other, *STEPS, *options, processes=processes)
    assert done.returncode == 0, done.stderr
    assert losses(workplace, other) == pytest.approx(losses(workplace, name), rel=rounding)
    first, second = (
        MERV.from_pretrained(workplace / "runs" / run).llm.state_dict() for run in (name, other)
    )
    for key, weight in first.items():
        torch.testing.assert_close(second[key], weight, rtol=0, atol=20 * rounding, msg=key)


# Every Python process imports it before its script, and writes down what it was started with.
START_METHOD = """
import multiprocessing, sys
multiprocessing.set_start_method("{method}", force=True)
with open("{log}", "a") as log:
    print(*sys.orig_argv, file=log)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_need_not_be_forked(workplace, alone, tmp_path, monkeypatch, method):
    """macOS spawns data loader workers, and Python 3.14 starts them from a fork server."""
    log = tmp_path / "started"
    (tmp_path / "sitecustomize.py").write_text(START_METHOD.format(method=method, log=log))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run(workplace, method, *STEPS, "--micro-batch", "4", *ADAMW, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert f"from multiprocessing.{method} import" in log.read_text()
    assert losses(workplace, method) == pytest.approx(losses(workplace, alone(ADAMW)), rel=1e-4)


@pytest.mark.slow
def test_cached_features_give_the_same_curve(workplace):
    """To the rounding of its bfloat16; plain `python` works as well as torchrun."""
    command = [sys.executable, str(ROOT / "train.py"), "--name", "cached", "--workers", "0"]
    command += ["--data", "data/miniature/train", "--tokenizer", "data/miniature/tokenizer.model"]
    command += ["--global-batch", "4", "--epochs", "1", "--cache-features", "features"]
    command += ["--dtype", workplace.name]
    long_way = run(workplace, "long", *STEPS)
    assert long_way.returncode == 0, long_way.stderr
    for name in ("cached", "cached-2"):  # the second time everything comes from the cache
        done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert losses(workplace, name) == pytest.approx(losses(workplace, "long"), rel=1e-2)
        assert ("14 clips or stills of" in done.stdout) == (name == "cached")  # with their size
    # Four encoders; ten clips and four stills to train on, and four held-out clips.
    assert len(list((workplace / "features").rglob("*.safetensors"))) == 4 * (10 + 4 + 4)


def test_no_still_is_repeated_to_fill_the_cache(workplace, tmp_path, monkeypatch):
    """FIX F8. A, c and e are clips, b and d stills: batches of two have one kind or the other."""
    world, rows = workplace / "data" / "miniature", []
    for letter in "abcde":
        kind, file = (
            ("image", "still_0.png") if letter in "bd" else ("video", "videos/clip_000000.mp4")
        )
        copy = tmp_path / (letter + file[-4:])
        copy.write_bytes((world / "train" / file).read_bytes() + letter.encode())  # no duplicates
        rows.append({kind: copy.name, "conversations": TEXT})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(processes, "patient_group", lambda: None)
    monkeypatch.setattr(processes, "wait_for_all", lambda group: None)
    encoder, frames = ENCODERS["miniature-languagebind"], []

    class Eyes:
        def pooled_features(self, pixels):
            frames.extend(len(clip) for clip in pixels[encoder.name])
            return pixels

    cache = FeatureCache(tmp_path / "cache", {encoder.name: "print"})
    parts = Tokenizer(world / "tokenizer.model"), TEMPLATES["base"], [encoder]
    dataset = ConversationDataset(tmp_path / "rows.json", *parts, cache=cache)
    train.fill_cache(Eyes(), dataset, TrainConfig(micro_batch=2, workers=0))
    assert frames == [1, 1] + 3 * [encoder.num_frames]


def test_a_run_describes_itself(workplace):
    """config.json says all that was asked for; the checkpoint loads and moves with its encoders."""
    options = ("--max-steps", "2", "--encoders", "dinov2,vivit", "--deterministic")
    done = run(workplace, "described", *STEPS, *options)
    assert done.returncode == 0, done.stderr
    folder = workplace / "runs" / "described"
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["max_steps"] == 2
        and config["held_out_every"] == 100
        and config["encoders"] == "dinov2,vivit"
        and config["deterministic"]
    )
    moved = folder.rename(workplace / "moved")
    model = MERV.from_pretrained(moved)
    assert list(model.encoders) == ["miniature-dinov2", "miniature-vivit"]
    line = json.loads((moved / "metrics.jsonl").read_text().splitlines()[0])
    assert set(line) >= {"step", "loss", "learning_rate", "gradient_norm", "mixing_weights"}
    curve = xml.etree.ElementTree.parse(moved / "loss.svg").getroot()
    grey, red, _ = (line.get("points").split() for line in curve.findall("{*}polyline"))
    assert len(grey) == len(red) == 2  # a point a step
    higher = float(grey[1].split(",")[1]) > float(grey[0].split(",")[1])  # y points down
    assert higher == (loss_of(moved)[1] < loss_of(moved)[0])
    board = EventAccumulator(str(moved)).Reload()
    assert [scalar.value for scalar in board.Scalars("loss")] == pytest.approx(loss_of(moved))


def test_a_held_out_row_that_another_replaces_is_reported(workplace, tmp_path, monkeypatch, capsys):
    """Otherwise the loss on fixed rows would silently be one on other rows."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    world = workplace / "data" / "miniature"
    shutil.copy(world / "train" / "videos" / "clip_000000.mp4", tmp_path / "good.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    rows = [{"video": name, "conversations": TEXT} for name in ("good.mp4", "bad.mp4")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    class Model:
        tokenizer = Tokenizer(world / "tokenizer.model")
        config = MERVS["miniature"]

    config = TrainConfig(held_out=str(tmp_path / "rows.json"), micro_batch=64)
    held_out = train.read_held_out(Model(), config, None)
    (batch,) = held_out.batches
    assert len(batch.input_ids) == 2  # each row once, although 64 would be wanted
    error = capsys.readouterr().err
    assert "bad.mp4" in error
    assert error.count("Another row takes its place.") == 1


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--modle", "miniature"], "did you mean --model?"),
        (["--recipe", "froozen"], "invalid choice: 'froozen' (choose from 'frozen'"),
        (["--plan", "--gpus", "8"], "use `python cost.py plan`"),
        (["--lr", "1e-3"], "use --learning-rate"),
    ],
)
def test_an_option_that_there_is_not_is_explained(options, wanted, capsys):
    """Before anything else happens."""
    with pytest.raises(SystemExit) as caught:
        train.main(options)
    assert caught.value.code != 0
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--replicas", "2"], "1 processes cannot hold 2 replicas"),
        (["--encoders", "clip"], "There is no encoder clip"),
        (["--global-batch", "5", "--micro-batch", "2"], "choose a multiple of 2"),
        (["--data", "nowhere"], "Cannot read nowhere/stage2.json"),
    ],
)
def test_a_wrong_option_is_explained(workplace, options, wanted):
    """No traceback: what is wrong and how to fix it."""
    command = [sys.executable, str(ROOT / "train.py"), "--name", "wrong", "--evaluate"]
    command += ["--data", "data/miniature/train", "--tokenizer", "data/miniature/tokenizer.model"]
    done = subprocess.run(
        command + options, cwd=workplace, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert wanted in done.stderr
    assert "Traceback" not in done.stderr


class Texts:
    """Forty rows of text alone."""

    def __getitem__(self, index: int) -> Example:
        ids = torch.tensor([1, 2 + index])
        return Example(ids, ids)


def test_workers_leave_sigterm_to_the_main_process():
    """SLURM sends it to all processes of a job. A worker that died would end the run unsaved."""
    others = multiprocessing.active_children()  # left by other tests
    order = [[row] for row in range(40)]
    loader = iter(LoadAhead(Texts(), 2, train.data.collate, batch_sampler=order))
    rows = [next(loader).input_ids[0, 1].item() - 2 for _ in range(2)]  # both have started
    workers = [each for each in multiprocessing.active_children() if each not in others]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    rows += [batch.input_ids[0, 1].item() - 2 for batch in loader]
    assert rows == list(range(40))


def test_the_banner_says_what_will_happen_in_four_lines():
    """The first thing that a newcomer sees: the stages, and roughly how long each takes."""
    lines = preset.BANNER.splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 100
    for stage in ("draw", "pre-train", "encode", "train", "score"):
        assert stage in preset.BANNER


def test_the_learning_rate_rises_then_falls_to_zero():
    """3 % warm-up, then half a cosine (paper 4)."""
    rates = [train.learning_rate(step, 1000, 2e-5, 0.03) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-5 / 30)
    assert max(rates) == rates[30] == pytest.approx(2e-5)
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[515] == pytest.approx(1e-5, rel=1e-2)
    assert rates[-1] < 1e-9


def test_vectors_do_not_decay(workplace):
    """Norms, biases and the mixer's query are left alone by weight decay; matrices are not."""
    tokenizer = Tokenizer(workplace / "data" / "miniature" / "tokenizer.model")
    model = MERV.create(MERVS["miniature"], tokenizer)
    (stage,) = train.RECIPES["frozen"]
    adamw_only, muon_too = TrainConfig(), TrainConfig(optimizer="muon")
    (adamw,) = train.make_optimizers(model, stage, adamw_only)
    matrices, vectors = adamw.param_groups
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0
    assert all(parameter.ndim >= 2 for parameter in matrices["params"])
    assert any(parameter is model.mixer.query for parameter in vectors["params"])
    trained = [p for group in (matrices, vectors) for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    assert not {id(p) for p in trained} & {id(p) for p in model.encoders.parameters()}
    smaller, muon = train.make_optimizers(model, stage, muon_too)
    inner = {id(p) for p in model.llm.layers.parameters() if p.ndim == 2}
    assert {id(p) for p in muon.param_groups[0]["params"]} == inner
    assert sum(len(group["params"]) for group in smaller.param_groups) == len(trained) - len(inner)
    assert muon.param_groups[0]["weight_decay"] == 0
    model.projectors.queries = torch.nn.Parameter(torch.zeros(2, 3))  # as of projector attn2d
    muon_too = replace(muon_too, muon_parts="llm,projectors", muon_weight_decay=0.5)
    _, muon = train.make_optimizers(model, stage, muon_too)
    assert muon.param_groups[0]["weight_decay"] == 0.5
    linears = [projector.linear.weight for projector in model.projectors.values()]
    inner |= {id(weight) for weight in linears}
    assert {id(p) for p in muon.param_groups[0]["params"]} == inner


CAPTIONS, INSTRUCTIONS = math.ceil(14 / 4), math.ceil(18 / 4)  # steps of four rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ("frozen", [INSTRUCTIONS]),
        ("video-llava", [CAPTIONS, INSTRUCTIONS]),
        ("full", [CAPTIONS, INSTRUCTIONS]),
        ("mixed", [math.ceil((14 + 18) / 4)]),
    ],
)
@also_as_on_cuda
def test_every_recipe_runs_through(workplace, recipe, steps):
    """On two processes; stage 2 begins where stage 1 has arrived, and numbers its steps on."""
    options = (*STEPS, "--recipe", recipe, "--micro-batch", "2")
    done = run(workplace, recipe, *options, processes=2)
    assert done.returncode == 0, done.stderr
    curve = losses(workplace, recipe)
    assert len(curve) == sum(steps)
    assert curve[-1] < curve[sum(steps[:-1])] <= curve[0]
    lines = (workplace / "runs" / recipe / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, sum(steps) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["video-llava", "full"])
def test_stage_2_follows_stage_1_with_the_dtypes_of_cuda(workplace, recipe):
    """Parameters in float32, computation in bfloat16, gradients reduced in float32: what CUDA does,
    emulated on the CPU. Layers that stage 1 freezes are trained in stage 2."""
    curves = {}
    for dtype in ("float32", "bfloat16"):
        name = f"{recipe}-{dtype}"
        options = (*STEPS, "--recipe", recipe, "--micro-batch", "4", "--max-steps", "2")
        done = run(workplace, name, *options, *ADAMW, "--dtype", dtype)
        assert done.returncode == 0, done.stderr
        curves[dtype] = losses(workplace, name)
    assert len(curves["bfloat16"]) == 4
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=2e-2)


HALF_CACHED = """
import sys, torch.distributed as dist
sys.path.insert(0, {root!r})
from support import features
whole = features.FeatureCache.get
def get(self, file):  # rank 1 has lost every second entry since the cache was filled
    lost = dist.get_rank() == 1 and sum(map(ord, file.name)) % 2
    return None if lost and filled else whole(self, file)
features.FeatureCache.get = get
filled = False
import train
fill = train.fill_cache
def fill_cache(*arguments):
    global filled
    filled = False
    fill(*arguments)
    filled = True
train.fill_cache = fill_cache
train.main()
train.exit_now()
"""


@pytest.mark.slow
def test_one_process_may_have_cached_features_and_another_pixels(workplace, tmp_path):
    """Two nodes without a common cache folder, or a deleted entry: nobody waits for ever, and the
    losses are those of encoding everything."""
    script = tmp_path / "half_cached.py"
    script.write_text(HALF_CACHED.format(root=str(ROOT)))
    options = ("--global-batch", "4", "--epochs", "1", "--micro-batch", "2", *ADAMW)
    plain = run(workplace, "all-encoded", *options, "--cache-features", "none", processes=2)
    assert plain.returncode == 0, plain.stderr
    half = run(workplace, "half-cached", *options, "--cache-features", "half", processes=2,
               script=str(script))  # fmt: skip
    assert half.returncode == 0, half.stderr
    expected = losses(workplace, "all-encoded")
    assert losses(workplace, "half-cached") == pytest.approx(expected, rel=1e-2)


def test_mixed_has_the_rows_of_both_stages_each_in_its_own_form(workplace):
    """A caption has no prompt and all of it is a label; an instruction keeps its question."""
    tokenizer = Tokenizer(workplace / "data" / "miniature" / "tokenizer.model")
    (stage,), folder = train.RECIPES["mixed"], workplace / "data" / "miniature" / "train"
    encoders = list(MERVS["miniature"].encoders)
    captions, instructions = (
        train.data.ConversationDataset(
            folder / file, tokenizer, train.data.TEMPLATES[template or "base"], encoders
        )
        for file, template in stage.files
    )
    mixed = train.concatenate([captions, instructions])
    assert len(mixed) == 14 + 18 == len(mixed.lengths) == len(mixed.modalities)
    assert (mixed[0].labels != -100).sum() == len(mixed[0].input_ids) - 1  # all but BOS
    assert train.rows_of(mixed, [[13, 14], [31, 0]], 0, 2) == [
        captions.rows[13], instructions.rows[0], instructions.rows[17], captions.rows[0]
    ]  # fmt: skip
    asked = tokenizer.decode(mixed[14].input_ids[mixed[14].labels == -100].tolist())
    assert asked.startswith("In: ") and asked.endswith("Out:")
    assert stage.learning_rate == 2e-5 and stage.global_batch == 128


SPOILED = """
import sys
sys.path.insert(0, {root!r})
import data, train
from support import cli
from functools import partial
whole = data.collate
def spoil(examples):
    batch = whole(examples)
    {spoil}
    return batch
data.collate = spoil
train.main(sys.argv[1:])
cli.exit_now()
"""


@pytest.mark.slow
@also_as_on_cuda
def test_unusable_rows_are_written_down_once_and_stop_the_run_when_too_many(workplace):
    """One bad row on each of two ranks in every step of four rows: the tenth is one too many."""
    spoil = 'batch.bad = [{"row": 3, "id": "x", "file": "x.mp4", "reason": "no frames"}]'
    done = run_spoiled(workplace, "bad", spoil, "--micro-batch", "2")
    assert done.returncode != 0
    assert "error: 10 of the 20 rows so far could not be used." in done.stderr
    lines = (workplace / "runs" / "bad" / "bad_examples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert json.loads(lines[0])["reason"] == "no frames"


def run_spoiled(workplace: Path, name: str, spoil: str, *options: str):
    """train.py on two processes, with something done to every batch."""
    script = workplace / f"{name}.py"
    script.write_text(SPOILED.format(root=str(ROOT), spoil=spoil))
    return run(workplace, name, *STEPS, *options, processes=2, script=str(script))


@pytest.mark.slow
@also_as_on_cuda
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_what_reproduces_it(workplace):
    """The error names the step and the rows; weights, batches and rows are in a folder."""
    spoil = "batch.pixels = {k: v * float('nan') for k, v in batch.pixels.items()}"
    done = run_spoiled(workplace, "nan", spoil, "--micro-batch", "2")
    assert done.returncode != 0
    folder = next((workplace / "runs" / "nan").glob("failure-step-*"))
    assert f"error: {folder.name}: the loss is nan" in done.stderr
    dumps = [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]
    ids = [[row["id"] for row in dump["rows"]] for dump in dumps]
    assert str(ids) in done.stderr and sum(map(len, ids)) == 4
    pixels = [v for dump in dumps for b in dump["batches"] for v in b["pixels"].values()]
    assert any(not clip.isfinite().all() for clip in pixels)
    again = Batch(**dumps[0]["batches"][0])
    assert again.num_labels > 0 and len(again.lengths) == 2
    assert (folder / ".metadata").exists()  # the weights


@pytest.mark.slow
def test_two_nodes_need_one_common_run_folder(workplace, tmp_path):
    """Every process writes its share of a save into the run's folder, and reads it to resume. Two
    nodes with folders of their own wrote halves of saves that nobody could read."""
    (tmp_path / "data").symlink_to(workplace / "data")
    nodes = (workplace, tmp_path)
    saves = ("--max-steps", "2", "--save-every", "1", *ADAMW)
    for status, output in run_on_two_nodes(nodes, "apart", *saves):
        assert status != 0
        assert "1 processes do not see runs/apart/config.json" in output
        assert "start all nodes in one folder on a shared file system" in output
    (tmp_path / "runs").symlink_to(workplace / "runs")
    for status, output in run_on_two_nodes(nodes, "together", *saves):
        assert status == 0, output
    assert len(losses(workplace, "together")) == 2
    # A node that is started again with the configuration, but without the save to resume from.
    (tmp_path / "runs").unlink()
    shutil.rmtree(workplace / "runs" / "together" / "checkpoint")
    shutil.copytree(workplace / "runs" / "together", tmp_path / "runs" / "together")
    shutil.rmtree(tmp_path / "runs" / "together" / "saves")
    for status, output in run_on_two_nodes(nodes, "together", *saves):
        assert status != 0
        assert "1 processes do not see runs/together/saves/00000002/.metadata" in output


def run_on_two_nodes(folders: tuple[Path, Path], name: str, *options: str) -> list[tuple[int, str]]:
    """One torchrun in each folder, as on two machines: status and output of both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    command += ["--rdzv-id", name, str(ROOT / "train.py"), "--name", name, "--workers", "0"]
    command += ["--data", "data/miniature/train", *STEPS, "--micro-batch", "2", *options]
    started, ended = [], []
    for folder in folders:
        with (folder / f"{name}.log").open("w") as log:
            how = {"cwd": folder, "stdout": log, "stderr": subprocess.STDOUT}
            started.append(subprocess.Popen(command, **how))
    for folder, process in zip(folders, started, strict=True):
        ended.append((process.wait(timeout=300), (folder / f"{name}.log").read_text()))
    return ended
