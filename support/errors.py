"""Errors that tell the user what is wrong, why, and how to fix it.

    languagebind got 12 frames, wants a multiple of 8.
    Why: each frame that it attends to at once has its own learned position.
    Fix: sample a multiple of 8.

Commands print such a message alone, and say how to save memory if a GPU has too little. Any other
exception is a bug and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """An error that its user can fix: UserError(what is wrong, why, how to fix it)."""

    def __str__(self) -> str:
        # A DataLoader re-raises a worker's error with the whole message as its only argument.
        if len(self.args) != 3:
            return super().__str__()
        what, why, fix = self.args
        return f"{what}\nWhy: {why}\nFix: {fix}"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit the model. It lists every bad tensor:

    The weights do not fit: siglip from siglip.safetensors.
      missing     blocks.0.attn.qkv.bias
      mis-shaped  pos_embed: [1, 256, 768], wanted [1, 196, 768]
    Why: with a tensor missing or in the wrong place, the results would be silently wrong.
    Fix: check that this checkpoint belongs to this configuration and is complete.
    """


class DataError(UserError):
    """A dataset, a row of it or a conversation that is malformed. It names the file and the row."""


class VideoError(DataError):
    """A video that is missing, cannot be decoded or has no frames in the wanted span."""
