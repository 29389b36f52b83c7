"""The refusal of a path that computes shared prompts; the next path is tried then."""

from __future__ import annotations


class CannotShareError(Exception):
    """The model's attention can't compute shared prompts correctly, or not by this path; the text says why."""
