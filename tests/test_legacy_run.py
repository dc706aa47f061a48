"""A run that commit 07e06b2 began is resumed by today's code (tests/legacy/make_legacy.py)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The archive's model is the miniature with narrower layers.
RESUME = """
import sys
sys.path.insert(0, {root!r})
from dataclasses import replace
import llama, merv, train
from support.cli import exit_now
miniature = merv.MERVS["miniature"]
narrow = tuple(replace(e, hidden_size=8, num_heads=2) for e in miniature.encoders)
llm = replace(llama.LLAMAS["miniature"], hidden_size=16, intermediate_size=32, num_heads=2,
              num_kv_heads=2, vocab_size=300)
merv.MERVS["miniature"] = replace(miniature, encoders=narrow, llm=llm)
train.small.SETTINGS["encoder_files"] = "legacy/encoders-{{encoder_seed}}"
train.main(["--resume", "runs/legacy-stopped"])
exit_now()
"""


def test_a_run_of_the_old_code_resumes_with_the_losses_that_it_recorded(tmp_path):
    """It stopped after step 2; the old code's own steps 3 and 4 are in metrics.jsonl."""
    shutil.unpack_archive(ROOT / "tests" / "legacy" / "07e06b2.tar.gz", tmp_path)
    (tmp_path / "07e06b2").rename(tmp_path / "legacy")
    (tmp_path / "legacy" / "runs").rename(tmp_path / "runs")
    metrics = tmp_path / "runs" / "legacy-stopped" / "metrics.jsonl"
    recorded = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    assert len(recorded) == 4
    script = RESUME.format(root=str(ROOT))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "legacy-stopped, from step 2" in done.stdout
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(recorded, abs=1e-4)
    assert "lr" in lines[1] and "learning_rate" in lines[2]  # steps 3 and 4 are new
