"""The quality checks that every preference pair gets: identical, too short, too similar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from typing import Literal

from qpref.hooks import Field, Options, Split, Validator, hookimpl
from qpref.records import Finding, Message, PreferencePair, UnpairedExample

Severity = Literal["error", "warn", "off"]

MAX_COMPARED_CHARACTERS = 4000


class PairChecks(Options):
    """Options of the validator `pairs`: a severity for each check, and its threshold."""

    identical: Severity = Field(default="error", description="chosen and rejected are the same text, space aside")
    too_short: Severity = Field(default="warn", description="a response shorter than the two lengths below")
    min_chosen_characters: int = Field(default=50, ge=0, description="shortest chosen response")
    min_rejected_characters: int = Field(default=20, ge=0, description="shortest rejected response")
    too_similar: Severity = Field(default="warn", description="chosen and rejected resemble each other too much")
    max_similarity: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description=f"highest SequenceMatcher ratio of the two, over their first {MAX_COMPARED_CHARACTERS} characters",
    )


class CheckPairs:
    """Each pair by itself."""

    def __init__(self, options: PairChecks) -> None:
        self.options = options

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Iterator[Finding]:
        if isinstance(example, PreferencePair):
            yield from check_pair(self.options, example)

    def finish(self) -> Iterable[Finding]:
        return ()


def check_pair(options: PairChecks, pair: PreferencePair) -> Iterator[Finding]:
    """What is wrong with one pair."""
    chosen, rejected = _text(pair.chosen), _text(pair.rejected)
    if chosen.split() == rejected.split():
        yield from _finding(options.identical, "identical", "chosen and rejected are the same text", pair)
        return
    for side, text, fewest in (
        ("chosen", chosen, options.min_chosen_characters),
        ("rejected", rejected, options.min_rejected_characters),
    ):
        if len(text.strip()) < fewest:
            message = f"{side} has {len(text.strip())} characters, under {fewest}"
            yield from _finding(options.too_short, "too_short", message, pair)
    if options.too_similar != "off" and _too_similar(chosen, rejected, options.max_similarity):
        message = f"chosen and rejected are more than {options.max_similarity:.0%} alike"
        yield from _finding(options.too_similar, "too_similar", message, pair)


def _text(messages: tuple[Message, ...]) -> str:
    return "\n".join(message.content for message in messages)


def _too_similar(chosen: str, rejected: str, limit: float) -> bool:
    """Whether the ratio is over the limit; the two upper bounds spare most pairs the quadratic comparison."""
    matcher = SequenceMatcher(
        None, chosen[:MAX_COMPARED_CHARACTERS], rejected[:MAX_COMPARED_CHARACTERS], autojunk=False
    )
    return matcher.real_quick_ratio() > limit and matcher.quick_ratio() > limit and matcher.ratio() > limit


def _finding(severity: Severity, code: str, message: str, pair: PreferencePair) -> Iterator[Finding]:
    if severity != "off":
        yield Finding(
            code=code, severity="error" if severity == "error" else "warning", message=message, source=pair.source
        )


@hookimpl
def qpref_validators() -> Iterator[Validator]:
    yield Validator(
        name="pairs",
        summary="identical, too short and too similar responses",
        options=PairChecks,
        start=CheckPairs,
    )
