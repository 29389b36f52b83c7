"""Validator `pairs`: identical, too short and too similar responses, pair by pair.

Responses that differ only in white space or Unicode normalization are the same text: there is nothing to prefer, and
the pair is refused. Responses that differ only in case or punctuation are different token sequences, and may have been
judged by exactly that difference; they get a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from unicodedata import category, normalize

from qpref.hooks import Field, Options, Severity, Split, Validator, hookimpl, report, text_of
from qpref.records import Finding, PreferencePair, UnpairedExample
from qpref_plugins.check_pairs.similarity import more_alike_than

MAX_COMPARED_CHARACTERS = 4000

_CHUNK = re.compile(r"\S+")
_WORD = re.compile(r"\w+")


class PairChecks(Options):
    """Options of the validator `pairs`: severities and thresholds."""

    identical: Severity = Field(
        default="error", description="chosen and rejected are the same text, apart from white space and NFC"
    )
    nearly_identical: Severity = Field(
        default="warn", description="chosen and rejected differ only in case or punctuation"
    )
    too_short: Severity = Field(default="warn", description="a response is shorter than its minimum below")
    min_chosen_characters: int = Field(default=50, ge=0, description="minimum length of chosen, in characters")
    min_rejected_characters: int = Field(default=20, ge=0, description="minimum length of rejected, in characters")
    too_similar: Severity = Field(
        default="warn", description="chosen and rejected are more similar than `max_similarity`"
    )
    max_similarity: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="maximum similarity, 0 to 1: difflib's SequenceMatcher ratio of the first "
        f"{MAX_COMPARED_CHARACTERS} characters",
    )


class CheckPairs:
    """Check of single pairs; keeps no state."""

    def __init__(self, options: PairChecks) -> None:
        self.options = options

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Iterable[Finding]:
        return check_pair(self.options, example) if isinstance(example, PreferencePair) else ()

    def finish(self) -> Iterable[Finding]:
        return ()


def check_pair(options: PairChecks, pair: PreferencePair) -> Iterator[Finding]:
    """Yield the findings of one pair."""
    chosen, rejected = text_of(pair.chosen), text_of(pair.rejected)
    if same_text(chosen, rejected):
        yield from report(options.identical, "identical", "chosen and rejected are the same text", pair.source)
        return
    if message := _too_short(options, chosen, rejected):
        yield from report(options.too_short, "too_short", message, pair.source)
    if same_words(chosen, rejected):
        message = "chosen and rejected differ only in case or punctuation"
        yield from report(options.nearly_identical, "nearly_identical", message, pair.source)
    elif options.too_similar != "off" and _too_similar(chosen, rejected, options.max_similarity):
        message = f"chosen and rejected are more than {options.max_similarity:.0%} alike"
        yield from report(options.too_similar, "too_similar", message, pair.source)


def same_text(first: str, second: str) -> bool:
    """Return whether two texts are equal apart from white space and Unicode normalization (NFC).

    Compared word by word, since most pairs differ in the first; white space never combines with a letter.
    """
    return first == second or all(
        one is not None
        and other is not None
        and (one[0] == other[0] or normalize("NFC", one[0]) == normalize("NFC", other[0]))
        for one, other in zip_longest(_CHUNK.finditer(first), _CHUNK.finditer(second))
    )


def same_words(first: str, second: str) -> bool:
    """Return whether two texts have the same words in the same order, ignoring case and punctuation.

    False for texts without a word.
    """
    if _WORD.search(first) is None or not all(
        one is not None and other is not None and (one[0] == other[0] or one[0].casefold() == other[0].casefold())
        for one, other in zip_longest(_WORD.finditer(first), _WORD.finditer(second))
    ):
        return False
    return (first.isascii() and second.isascii()) or _letters(first) == _letters(second)


def _letters(text: str) -> str:
    """Reduce a text to casefolded letters, digits and marks; many scripts write vowels as marks."""
    return "".join(sign for sign in normalize("NFC", text.casefold()) if category(sign)[0] not in "CPSZ")


def _too_short(options: PairChecks, chosen: str, rejected: str) -> str:
    """Describe which of the two is too short; empty where neither is."""
    num_chosen, num_rejected = len(chosen.strip()), len(rejected.strip())
    parts = []
    if num_chosen < options.min_chosen_characters:
        parts.append(f"chosen has {num_chosen} characters, under {options.min_chosen_characters}")
    if num_rejected < options.min_rejected_characters:
        parts.append(f"rejected has {num_rejected} characters, under {options.min_rejected_characters}")
    return "; ".join(parts)


def _too_similar(chosen: str, rejected: str, limit: float) -> bool:
    return more_alike_than(limit, chosen[:MAX_COMPARED_CHARACTERS], rejected[:MAX_COMPARED_CHARACTERS])


@hookimpl
def qpref_validators() -> Iterator[Validator]:
    yield Validator(
        name="pairs",
        summary="identical, too short and too similar responses",
        options=PairChecks,
        start=CheckPairs,
    )
