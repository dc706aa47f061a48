"""Errors that say what is wrong, why it matters and how to fix it."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, explained: UserError(what is wrong, why that matters, how to fix it)."""

    def __str__(self) -> str:
        # A DataLoader's worker hands over an error as one text, which has all three in it.
        what, *rest = self.args
        return what + ("\nWhy: {}\nFix: {}".format(*rest) if rest else "")


class CheckpointError(UserError):
    """A checkpoint that is not there or does not fit the model; the message names every tensor."""


class DataError(UserError):
    """A dataset, a row of it or a conversation that is not as it should be."""


class VideoError(DataError):
    """A video that is missing, cannot be decoded, or has no frames where they are wanted."""
