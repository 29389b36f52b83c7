"""The quality checks that every preference pair gets by itself: identical, too short, too similar.

Answers that differ in space or in how Unicode spells a letter alone are the same text: there is nothing to prefer, and
the pair is refused. Answers that differ in case or punctuation alone are different texts to a model, and the difference
may be what was judged; they are warned of.
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
    """Options of the validator `pairs`: a severity for each check, and its threshold."""

    identical: Severity = Field(
        default="error", description="chosen and rejected are the same text, space and Unicode's spellings (NFC) aside"
    )
    nearly_identical: Severity = Field(default="warn", description="the two differ in case or punctuation alone")
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

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Iterable[Finding]:
        return check_pair(self.options, example) if isinstance(example, PreferencePair) else ()

    def finish(self) -> Iterable[Finding]:
        return ()


def check_pair(options: PairChecks, pair: PreferencePair) -> Iterator[Finding]:
    """What is wrong with one pair."""
    chosen, rejected = text_of(pair.chosen), text_of(pair.rejected)
    if same_text(chosen, rejected):
        yield from report(options.identical, "identical", "chosen and rejected are the same text", pair.source)
        return
    if message := _too_short(options, chosen, rejected):
        yield from report(options.too_short, "too_short", message, pair.source)
    if same_words(chosen, rejected):
        message = "chosen and rejected differ in case or punctuation alone"
        yield from report(options.nearly_identical, "nearly_identical", message, pair.source)
    elif options.too_similar != "off" and _too_similar(chosen, rejected, options.max_similarity):
        message = f"chosen and rejected are more than {options.max_similarity:.0%} alike"
        yield from report(options.too_similar, "too_similar", message, pair.source)


def same_text(first: str, second: str) -> bool:
    """Whether two texts are equal but for space and for how Unicode spells a letter (NFC).

    Piece by piece between spaces, which don't combine with a letter: most pairs differ in the first.
    """
    return first == second or all(
        one is not None
        and other is not None
        and (one[0] == other[0] or normalize("NFC", one[0]) == normalize("NFC", other[0]))
        for one, other in zip_longest(_CHUNK.finditer(first), _CHUNK.finditer(second))
    )


def same_words(first: str, second: str) -> bool:
    """Whether two texts have the same words in the same order, whatever their case and what stands between them.

    Texts without a word never have.
    """
    if _WORD.search(first) is None or not all(
        one is not None and other is not None and (one[0] == other[0] or one[0].casefold() == other[0].casefold())
        for one, other in zip_longest(_WORD.finditer(first), _WORD.finditer(second))
    ):
        return False
    return (first.isascii() and second.isascii()) or _letters(first) == _letters(second)


def _letters(text: str) -> str:
    """A text without case, punctuation, symbols and space; marks stay, which many scripts write their vowels with."""
    return "".join(sign for sign in normalize("NFC", text.casefold()) if category(sign)[0] not in "CPSZ")


def _too_short(options: PairChecks, chosen: str, rejected: str) -> str:
    """Which of the two is too short, in one message; empty where neither is."""
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
