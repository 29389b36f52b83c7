"""Rows that repeat or contradict others, and few distinct prompts.

Each split by itself; what stands in both is the validator `leakage`'s. Nothing is told before all rows are seen.

A response that is chosen in one row and rejected in another is no contradiction: a ranking of three gives such pairs.
Two rows contradict each other where they have the same two responses the other way round. Preferences that run in a
circle (A over B, B over C, C over A) across rows are told apart, as annotators do disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from qpref.hooks import Field, Options, Places, Severity, SourceSeverity, Split, Validator, hookimpl, report, text_of
from qpref.records import Finding, PreferencePair, Source, UnpairedExample
from qpref_plugins.check_duplicates.table import Edges, edge_keys, on_cycles, partners, repeats

FEWEST_ROWS = 50


class DuplicateChecks(Options):
    """Options of the validator `duplicates`: a severity for each check, and its threshold."""

    duplicate: Severity = Field(default="warn", description="a row that repeats an earlier one: same prompt, answers")
    contradictory: Severity = Field(
        default="warn", description="the same two answers preferred the other way round, or one answer with both labels"
    )
    cyclic: Severity = Field(default="warn", description="rows that prefer A to B, B to C and C to A")
    few_prompts: SourceSeverity = Field(
        default="warn", description=f"few distinct prompts for the rows of a source (of {FEWEST_ROWS} rows or more)"
    )
    min_distinct_prompts: float = Field(
        default=0.25, ge=0, le=1, description="smallest share of distinct prompts; 0.25 is four rows a prompt"
    )


class CheckDuplicates:
    """Remembers each example as hashes and a place."""

    def __init__(self, options: DuplicateChecks) -> None:
        self.options = options
        self.places = Places()
        self.pairs: dict[Split, Edges] = {"heldout": Edges(), "train": Edges()}
        self.labelled: dict[Split, Edges] = {"heldout": Edges(), "train": Edges()}

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Iterable[Finding]:
        prompt = hash(text_of(example.prompt))
        if example.tools:
            prompt = hash((prompt, repr(example.tools)))
        place = self.places.number(example.source)
        if isinstance(example, PreferencePair):
            better, worse = hash((prompt, text_of(example.chosen))), hash((prompt, text_of(example.rejected)))
            self.pairs[split].add(prompt, better, worse, place)
        else:
            self.labelled[split].add(prompt, hash((prompt, text_of(example.completion))), int(example.label), place)
        return ()

    def finish(self) -> Iterator[Finding]:
        for split in self.pairs:
            yield from self._of_pairs(self.pairs[split])
            yield from self._of_labelled(self.labelled[split])
            yield from self._few_prompts(split)

    def _of_pairs(self, edges: Edges) -> Iterator[Finding]:
        keys = edge_keys(edges.better, edges.worse)
        yield from self._repeated(keys, edges, "the same pair as")
        unlike = edges.better != edges.worse
        turned = edge_keys(edges.worse[unlike], edges.better[unlike])
        for place, other in partners(keys[unlike], turned, edges.place[unlike]):
            message = f"the same two answers are preferred the other way round at {self._at(other, place)}"
            yield from self._found("contradictory", message, place)
        for rows in on_cycles(edges.better, edges.worse, edges.prompt):
            places = np.unique(edges.place[rows])
            for place in places if len(places) > 1 else ():
                other = int(places[0] if place != places[0] else places[1])
                message = f"the answers are preferred in a circle, with {self._at(other, int(place))} among others"
                yield from self._found("cyclic", message, int(place))

    def _of_labelled(self, edges: Edges) -> Iterator[Finding]:
        keys = edge_keys(edges.better, edges.worse)
        yield from self._repeated(keys, edges, "the same completion and label as")
        for place, other in partners(keys, edge_keys(edges.better, 1 - edges.worse), edges.place):
            message = f"the same completion has the other label at {self._at(other, place)}"
            yield from self._found("contradictory", message, place)

    def _repeated(self, keys: np.ndarray, edges: Edges, message: str) -> Iterator[Finding]:
        for place, first in repeats(keys, edges.place):
            yield from self._found("duplicate", f"{message} {self.places.source(first)}", place)

    def _few_prompts(self, split: Split) -> Iterator[Finding]:
        """Rows, not pairs, are counted: a ranking of four answers is six pairs of one prompt."""
        place = np.concatenate([self.pairs[split].place, self.labelled[split].place])
        prompt = np.concatenate([self.pairs[split].prompt, self.labelled[split].prompt])
        path = self.places.path_numbers(place)
        for number in np.unique(path):
            own = path == number
            num_rows, num_prompts = len(np.unique(place[own])), len(np.unique(prompt[own]))
            if num_rows >= FEWEST_ROWS and num_prompts < self.options.min_distinct_prompts * num_rows:
                name = "held-out" if split == "heldout" else "training"
                message = (
                    f"{num_prompts} distinct prompts in {num_rows} {name} rows ({num_prompts / num_rows:.1%}); what is "
                    "learned may hold for these prompts alone, and a split by row puts the same prompts on both sides"
                )
                source = Source(path=self.places.paths[number], line=0)
                yield from report(self.options.few_prompts, "few_prompts", message, source)

    def _at(self, other: int, place: int) -> str:
        return "the same row" if other == place else str(self.places.source(other))

    def _found(self, code: str, message: str, place: int) -> tuple[Finding, ...]:
        severity: Severity = getattr(self.options, code)
        return report(severity, code, message, self.places.source(place))


@hookimpl
def qpref_validators() -> Iterator[Validator]:
    yield Validator(
        name="duplicates",
        summary="repeated and contradictory rows, few distinct prompts",
        options=DuplicateChecks,
        start=CheckDuplicates,
    )
