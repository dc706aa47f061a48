"""The folder of a training run: config, metrics, saves, resume, bad rows, the loss curve."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sharded

from support import files
from support.errors import CheckpointError, UserError


def latest_run(folder: str | Path = "runs") -> Path:
    """The run whose checkpoint was written last."""
    runs = sorted(Path(folder).glob("*/checkpoint/config.json"), key=lambda f: f.stat().st_mtime)
    if not runs:
        fix = "run `torchrun train.py` first, or name a checkpoint with --checkpoint."
        raise CheckpointError(f"No trained run under {folder}/.", "none was trained here.", fix)
    return runs[-1].parent.parent


TRAINED = sharded.StateDictOptions(ignore_frozen_params=True)  # encoders come from their sources


# What --resume may change: how a run is computed, not what. All else stays as it began.
HOW = {"resume", "micro_batch", "workers", "activation_checkpointing", "replicas"}


HOW |= {"place_encoders", "save_every", "keep", "max_bad", "evaluate", "device"}


@dataclass
class Run:
    """A run while it is under way."""

    config: object
    folder: Path
    done: int  # steps, over all stages, of the save that it goes on from; 0: from the start
    bad: int  # rows that could not be used so far, over all processes
    seen: int = 0  # rows so far
    stop: bool = False  # SIGTERM came
    board: object = None  # TensorBoard's writer


def save_state(model, optimizers: list, run: Run, number: int) -> None:
    """saves/NUMBER: the shards of every process after so many steps, complete or not there.

    FIX: the authors save the optimizer state of rank 0 only (ledger F6). Data order and learning
    rate follow from the number, and nothing is random, so nothing else is needed.
    WHY: not in the background. At 7B on 8 GPUs it is 10 GB each, some seconds every 500 steps.
    """
    folder = run.folder / "saves" / f"{number:08d}"
    partial = folder.with_suffix(".partial")
    weights, moments = sharded.get_state_dict(model, optimizers, options=TRAINED)
    dcp.save({"model": weights, "optimizers": moments}, checkpoint_id=partial)
    dist.barrier()
    if dist.get_rank() == 0:
        partial.rename(folder)
        saved = sorted(f for f in folder.parent.iterdir() if not f.suffix)
        for old in saved[: -run.config.keep] if run.config.keep else []:
            shutil.rmtree(old.rename(old.with_suffix(".partial")))  # never half a save
    dist.barrier()


def load_state(model, optimizers: list, run: Run) -> None:
    """All as it was after step run.done, however many processes saved it."""
    weights, moments = sharded.get_state_dict(model, optimizers, options=TRAINED)
    state = {"model": weights, "optimizers": moments}  # the weights are the model's own tensors
    dcp.load(state, checkpoint_id=run.folder / "saves" / f"{run.done:08d}")
    sharded.set_optimizer_state_dict(model, optimizers, state["optimizers"], options=TRAINED)


def open_run(config) -> Run:
    """On rank 0: the folder of a new run or, in that of one under way, all as at its last save.

    Under way is --resume's run, or one that the same options and code began and did not end: a
    command given again goes on, by hand as by torchrun --max-restarts.
    """
    here = Path(__file__).parents[1]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(here.glob("*.py"))))
    git = {"shell": True, "cwd": here, "capture_output": True, "text": True}
    commit = subprocess.run("git describe --always --dirty", **git).stdout.strip()
    saved = {"code": code.hexdigest()[:16], "commit": commit, "torch": torch.__version__}
    saved |= asdict(config)
    for number in count(1):
        folder = Path(config.resume or f"runs/{config.name}{f'-{number}' * (number > 1)}")
        file, ended = folder / "config.json", (folder / "checkpoint").exists()
        began = json.loads(file.read_text()) | {"commit": commit} if file.exists() else None
        if config.resume or not folder.exists() or (began == saved and not ended):
            break
    if not began:
        files.write_file(file, json.dumps(saved, indent=2))
    for rest in (folder / "saves").glob("*.partial"):
        shutil.rmtree(rest)
    done, lines = max((int(f.name) for f in (folder / "saves").glob("*")), default=0), []
    for file in (folder / "metrics.jsonl", folder / "bad_examples.jsonl"):
        lines = [x for x in files.whole_lines(file) if json.loads(x)["step"] <= done]
        files.write_file(file, "".join(lines))
    print(f"{folder}, from step {done}: {json.dumps(asdict(config))}")
    return Run(config, folder, done, bad=len(lines))


def resumed(config):
    """The options that the run to resume began with, and the HOW of this command line."""
    file = Path(config.resume) / "config.json"
    if not file.is_file():
        raise UserError(f"No run at {config.resume}.", f"{file} is missing.", "check the path.")
    saved, now = json.loads(file.read_text()), asdict(config)
    began = {f.name: saved[f.name] for f in fields(config)}
    given = {f.name for f in fields(config) if now[f.name] not in (f.default, began[f.name])}
    if odd := sorted(given - HOW):
        what, why = f"--{odd[0]} {now[odd[0]]} contradicts {file}.", "a run goes on as it began."
        raise UserError(what, why, f"leave that out; what may change is {', '.join(sorted(HOW))}.")
    return type(config)(**began | {name: now[name] for name in given})


def log(run: Run, metrics: dict) -> None:
    """One line of metrics.jsonl; its numbers to TensorBoard too, if that is installed."""
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")
    for name in metrics.keys() - {"step", "weights"} if run.board else ():
        run.board.add_scalar(name, metrics[name], metrics["step"])


def draw_loss(folder: Path) -> None:
    """loss.svg: the loss of every step, grey, and its running average, red."""
    losses = [json.loads(line)["loss"] for line in files.whole_lines(folder / "metrics.jsonl")]
    average, curves = accumulate(losses, lambda mean, loss: 0.95 * mean + 0.05 * loss), []
    for values, colour in ((losses, "#bbb"), (average, "#c33")):
        scaled = (200 - 180 * value / max(losses) for value in values)
        points = " ".join(f"{600 * i / len(losses):.1f},{y:.1f}" for i, y in enumerate(scaled))
        curves.append(f'<polyline fill="none" stroke="{colour}" points="{points}"/>')
    axes = f"loss: {max(losses):.2f} nats a token at the top, 0 at the bottom; {len(losses)} steps"
    frame = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 200">'
    text = f'<text x="4" y="14" font-family="sans-serif" font-size="12" fill="#888">{axes}</text>'
    files.write_file(folder / "loss.svg", "\n".join([frame, *curves, text, "</svg>\n"]))


def peak_memory(device: torch.device) -> float:
    """The most that was held at once, in GB: of the GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def report_bad(mine: list[dict], total: int, run: Run, step: int) -> None:
    """Write the rows of a step that could not be used to a file; stop if they become too many.

    FIX: the authors replace them silently (ledger F4).
    """
    records = [None] * dist.get_world_size()
    dist.all_gather_object(records, [{"step": step, **row} for row in mine])
    file = run.folder / "bad_examples.jsonl"
    if dist.get_rank() == 0:
        with file.open("a") as lines:
            lines.writelines(json.dumps(row) + "\n" for rows in records for row in rows)
    run.bad += total
    if run.bad >= 10 and run.bad > run.config.max_bad * run.seen:
        what = f"{run.bad} of the {run.seen} rows so far could not be used."
        why = f"with more than --max-bad {run.config.max_bad} of them, this is another data set."
        raise UserError(what, why, f"repair the rows that {file} lists.")


def fail(model, batches: list, rows: list[dict], folder: Path, what: str) -> None:
    """Write what reproduces this step to a folder (weights, batches, rows), then raise."""
    dcp.save(sharded.get_model_state_dict(model, options=TRAINED), checkpoint_id=folder)
    step = {"batches": [vars(batch) for batch in batches], "rows": rows}
    torch.save(step, folder / f"rank-{dist.get_rank()}.pt")
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [row.get("id") for row in rows])
    why = f"the cause is among the rows with these ids, a list for each rank: {everyone}."
    fix = f"see {folder} (weights, batches, rows); a smaller --lr may help."
    raise UserError(f"{folder.name}: {what}.", why, fix)
