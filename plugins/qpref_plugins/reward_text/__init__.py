"""Rewards that are computed from a response's text: its length, a pattern, its sentiment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from qpref.hooks import Field, Options, Reward, RewardFunction, hookimpl, reading_length
from qpref.records import SampledResponse


class LengthOptions(Options):
    """Options of the reward `length`."""

    target: int = Field(default=200, ge=1, description="Best length, in characters as `too_short` counts them.")


class PatternOptions(Options):
    """Options of the reward `pattern`."""

    pattern: str = Field(min_length=1, description="Regular expression of Python.")
    where: Literal["anywhere", "whole"] = Field(
        default="anywhere", description="Whether it has to match all of the text."
    )
    unended: float = Field(default=0.0, description="Added where the response was cut off at its most tokens.")


class SentimentOptions(Options):
    """Options of the reward `sentiment`."""

    sign: Literal["positive", "negative"] = Field(default="positive", description="Which sentiment is better.")


def by_length(options: LengthOptions) -> RewardFunction:
    """1 at the target, falling by the relative distance: 0 at none of it or at twice as much."""
    return _each(lambda one: 1.0 - abs(reading_length(one.text) - options.target) / options.target)


def by_pattern(options: PatternOptions) -> RewardFunction:
    """1 where the pattern matches, else 0."""
    compiled = re.compile(options.pattern, re.DOTALL)
    matches = compiled.fullmatch if options.where == "whole" else compiled.search
    return _each(lambda one: float(matches(one.text) is not None) + (0.0 if one.ended else options.unended))


def by_sentiment(options: SentimentOptions) -> RewardFunction:
    """VADER's compound score in [-1, 1] (Hutto and Gilbert 2014), of English text."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    sign = 1.0 if options.sign == "positive" else -1.0
    return _each(lambda one: sign * analyzer.polarity_scores(one.text)["compound"])


def _each(score: Callable[[SampledResponse], float]) -> RewardFunction:
    def all_of(responses: Sequence[SampledResponse]) -> list[float]:
        return [score(one) for one in responses]

    return all_of


@hookimpl
def qpref_rewards() -> Iterator[Reward]:
    """Offer the three."""
    yield Reward(name="length", summary="closeness to a length", options=LengthOptions, build=by_length)
    yield Reward(name="pattern", summary="a regular expression matches", options=PatternOptions, build=by_pattern)
    yield Reward(
        name="sentiment",
        summary="sentiment of English text, by VADER",
        options=SentimentOptions,
        build=by_sentiment,
        requires=("vaderSentiment>=3.3",),
    )
