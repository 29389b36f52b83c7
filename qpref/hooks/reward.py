"""Rewards: what scores the responses that a model samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.records import SampledResponse

RewardFunction = Callable[[Sequence[SampledResponse]], Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward of responses, for `qpref sample`.

    Attributes:
        build: makes the function from the options, once a command. It gets responses to several prompts and returns a
            finite number for each, higher is better. How the responses are split among calls is left open, so a score
            depends on its response alone.
        requires: requirements beyond those of qpref, such as "vaderSentiment>=3"; the command is refused before a model
            is loaded where one isn't installed.
    """

    name: str
    summary: str
    options: type[Any]
    build: Callable[[Any], RewardFunction]
    requires: Sequence[str] = ()
