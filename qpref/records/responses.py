"""Responses that were sampled from a model."""

from __future__ import annotations

from dataclasses import dataclass

from qpref.records.rows import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledResponse:
    """A response that was sampled from a model, for a reward to score.

    Attributes:
        ended: True where the model ended it, False where it was cut off at its most tokens.
    """

    prompt: tuple[Message, ...]
    text: str
    ended: bool
