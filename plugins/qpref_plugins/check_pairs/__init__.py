"""Validator `pairs`: identical, too short and too similar responses, pair by pair.

Responses that differ only in white space or Unicode normalization are the same text: there is nothing to prefer, and
the pair is refused. Responses that differ only in case, punctuation or the indentation of their lines are different
token sequences, and may have been judged by exactly that difference; they get a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qpref.hooks import (
    Field,
    Options,
    RowCounts,
    Severity,
    Split,
    Validator,
    hookimpl,
    reading_length,
    reads_shorter,
    report,
    text_of,
)
from qpref.records import Finding, PreferencePair, Source, UnpairedExample
from qpref_plugins.check_pairs.same import same_indentation, same_text, same_words
from qpref_plugins.check_pairs.similarity import more_alike_than

MAX_COMPARED_CHARACTERS = 4000


class PairChecks(Options):
    """Options of the validator `pairs`: severities and thresholds."""

    identical: Severity = Field(
        default="error",
        description="chosen and rejected are the same text, apart from white space (but not indentation) and NFC",
    )
    nearly_identical: Severity = Field(
        default="warn", description="chosen and rejected differ only in case, punctuation or indentation"
    )
    too_short: Severity = Field(
        default="warn",
        description="a response is shorter than its minimum below; a warning counts the rows of each source",
    )
    min_chosen_characters: int = Field(
        default=50,
        ge=0,
        description="minimum length of chosen, in characters of Latin script; a Chinese one counts as 3.5, a Japanese "
        "kana as 1.6, a Korean syllable as 2.25, a Thai character as 1.2",
    )
    min_rejected_characters: int = Field(
        default=20, ge=0, description="minimum length of rejected, in the same characters"
    )
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
    """Check of single pairs; keeps nothing but the number of short ones."""

    def __init__(self, options: PairChecks) -> None:
        self.options = options
        self.short = RowCounts()

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Iterable[Finding]:
        if not isinstance(example, PreferencePair):
            return
        options, source = self.options, example.source
        chosen, rejected = text_of(example.chosen), text_of(example.rejected)
        if same_text(chosen, rejected):
            if same_indentation(chosen, rejected):
                yield from report(options.identical, "identical", "chosen and rejected are the same text", source)
            else:
                message = "chosen and rejected differ only in indentation"
                yield from report(options.nearly_identical, "nearly_identical", message, source)
            return
        if options.too_short != "off":
            yield from self._of_lengths(chosen, rejected, source, split)
        if same_words(chosen, rejected):
            message = "chosen and rejected differ only in case or punctuation"
            yield from report(options.nearly_identical, "nearly_identical", message, source)
        elif options.too_similar != "off" and _too_similar(chosen, rejected, options.max_similarity):
            part = f", in their first {MAX_COMPARED_CHARACTERS} characters"
            longer = max(len(chosen), len(rejected)) > MAX_COMPARED_CHARACTERS
            message = f"chosen and rejected are more than {options.max_similarity:.0%} alike{part if longer else ''}"
            yield from report(options.too_similar, "too_similar", message, source)

    def finish(self) -> Iterator[Finding]:
        options = self.options
        for counts in self.short:
            either = counts.pop("either")
            minima = {"chosen": options.min_chosen_characters, "rejected": options.min_rejected_characters}
            sides = ", ".join(
                f"{side} under {minima[side]} characters in {counts[side].count}" for side in minima if side in counts
            )
            message = f"{either.share} have a short response ({sides}), {either.lines}"
            yield from report("warn", "too_short", message, either.source)

    def _of_lengths(self, chosen: str, rejected: str, source: Source, split: Split) -> tuple[Finding, ...]:
        """Find responses under their minimum; count them, or report each where it refuses its row."""
        texts = (("chosen", chosen, self.options.min_chosen_characters),
                 ("rejected", rejected, self.options.min_rejected_characters))  # fmt: skip
        short = [(side, text, minimum) for side, text, minimum in texts if reads_shorter(text, minimum)]
        if self.options.too_short == "warn":
            self.short.add(source, split, ["either", *(side for side, _, _ in short)] if short else ())
            return ()
        message = "; ".join(
            f"{side} is as long as {int(reading_length(text))} characters of Latin script, under {minimum}"
            for side, text, minimum in short
        )
        return report("error", "too_short", message, source) if short else ()


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
