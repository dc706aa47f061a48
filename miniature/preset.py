"""The settings of the miniature: plain values from which train.py builds its preset.

They differ from the paper's because the LLM is small and starts from random weights.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path("data/miniature")  # where the drawn clips and the encoders are written
HELD_OUT = FOLDER / "val" / "stage2.json"

# Learning rate of each stage of a recipe. It is higher where the LLM is frozen, as in the paper.
LEARNING_RATES = {
    "frozen": (2e-3,),
    "video-llava": (5e-3, 2e-3),
    "full": (2e-3, 2e-3),
    "mixed": (2e-3,),
    "align": (5e-3,),  # the first stage of video-llava alone
}

SETTINGS = {
    "data": "miniature",
    "tokenizer": str(FOLDER / "tokenizer.model"),
    "encoder_files": str(FOLDER / "encoders-{encoder_seed}"),
    "held_out": str(HELD_OUT),
    "global_batch": (32,),
    "micro_batch": 32,
    "optimizer": "muon",
    "muon_parts": "llm,projectors",
    "muon_learning_rate": 0.02,
    "muon_weight_decay": 0.5,
    "activation_checkpointing": False,  # the model is small enough without
    "cache_features": str(FOLDER / "features"),
    "held_out_every": 100,
    "evaluate": True,
}

# Times on a CPU with two cores.
BANNER = """\
The miniature: train a video language model from nothing, on clips that this program draws.
1. draw clips, 30 s.  2. pre-train four small encoders, 4 min.  3. encode the clips, 1 min.
4. train projectors, mixer and LLM, 4 min.  5. score answers about test clips, 10 s.
Times are rough, for two CPU cores. Finished parts are kept and used again."""
