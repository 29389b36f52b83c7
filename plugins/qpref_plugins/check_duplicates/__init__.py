"""Validator `duplicates`: repeated, contradictory and cyclic preferences, and few distinct prompts.

Each split is checked separately; rows in both are found by the validator `leakage`. Findings come after all rows.

A response that is chosen in one row and rejected in another is no contradiction: a ranking of three gives such pairs.
Two rows contradict each other if they have the same two responses with the preference reversed. Cycles (A over B, B
over C, C over A) across rows have a code of their own, since annotators do disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from qpref.hooks import Field, Options, Places, Severity, SourceSeverity, Split, Validator, composed, hookimpl, report
from qpref.records import Finding, PreferencePair, Source, UnpairedExample
from qpref_plugins.check_duplicates.table import Edges, edge_keys, on_cycles, partners, repeats

FEWEST_ROWS = 50


class DuplicateChecks(Options):
    """Options of the validator `duplicates`: severities and thresholds."""

    duplicate: Severity = Field(default="warn", description="a row repeats an earlier one: same prompt, same responses")
    contradictory: Severity = Field(
        default="warn",
        description="the same two responses with the preference reversed, or one completion with both labels",
    )
    cyclic: Severity = Field(default="warn", description="cyclic preferences: A over B, B over C, C over A")
    few_prompts: SourceSeverity = Field(
        default="warn", description=f"a source of {FEWEST_ROWS} rows or more has few distinct prompts"
    )
    min_distinct_prompts: float = Field(
        default=0.25, ge=0, le=1, description="minimum ratio of distinct prompts to rows; 0.25 is four rows per prompt"
    )


class CheckDuplicates:
    """Collects each example as hashes and its location."""

    def __init__(self, options: DuplicateChecks) -> None:
        self.options = options
        self.places = Places()
        self.pairs: dict[Split, Edges] = {"heldout": Edges(), "train": Edges()}
        self.labelled: dict[Split, Edges] = {"heldout": Edges(), "train": Edges()}

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Iterable[Finding]:
        prompt = hash(composed(example.prompt))
        if example.tools:
            prompt = hash((prompt, repr(example.tools)))
        location = self.places.number(example.source)
        if isinstance(example, PreferencePair):
            better, worse = hash((prompt, composed(example.chosen))), hash((prompt, composed(example.rejected)))
            self.pairs[split].add(prompt, better, worse, location)
        else:
            self.labelled[split].add(prompt, hash((prompt, composed(example.completion))), int(example.label), location)
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
        reversed_keys = edge_keys(edges.worse[unlike], edges.better[unlike])
        for location, other in partners(keys[unlike], reversed_keys, edges.location[unlike]):
            message = f"the same two responses have the preference reversed at {self._at(other, location)}"
            yield from self._found("contradictory", message, location)
        for rows in on_cycles(edges.better, edges.worse, edges.prompt):
            locations = np.unique(edges.location[rows])
            for location in locations if len(locations) > 1 else ():
                other = int(locations[0] if location != locations[0] else locations[1])
                message = f"cyclic preferences, with {self._at(other, int(location))} among others"
                yield from self._found("cyclic", message, int(location))

    def _of_labelled(self, edges: Edges) -> Iterator[Finding]:
        keys = edge_keys(edges.better, edges.worse)
        yield from self._repeated(keys, edges, "the same completion and label as")
        for location, other in partners(keys, edge_keys(edges.better, 1 - edges.worse), edges.location):
            message = f"the same completion has the other label at {self._at(other, location)}"
            yield from self._found("contradictory", message, location)

    def _repeated(self, keys: np.ndarray, edges: Edges, message: str) -> Iterator[Finding]:
        for location, first in repeats(keys, edges.location):
            yield from self._found("duplicate", f"{message} {self.places.source(first)}", location)

    def _few_prompts(self, split: Split) -> Iterator[Finding]:
        """Count rows, not pairs: a ranking of four responses is six pairs of one prompt."""
        location = np.concatenate([self.pairs[split].location, self.labelled[split].location])
        prompt = np.concatenate([self.pairs[split].prompt, self.labelled[split].prompt])
        path = self.places.path_numbers(location)
        for number in np.unique(path):
            own = path == number
            num_rows, num_prompts = len(np.unique(location[own])), len(np.unique(prompt[own]))
            if num_rows >= FEWEST_ROWS and num_prompts < self.options.min_distinct_prompts * num_rows:
                name = "held-out" if split == "heldout" else "training"
                message = (
                    f"{num_prompts} distinct prompts in {num_rows} {name} rows ({num_prompts / num_rows:.1%}): the "
                    "model may not generalize to other prompts, and a split by row puts the same prompts in both splits"
                )
                source = Source(path=self.places.paths[number], line=0)
                yield from report(self.options.few_prompts, "few_prompts", message, source)

    def _at(self, other: int, location: int) -> str:
        return "the same row" if other == location else str(self.places.source(other))

    def _found(self, code: str, message: str, location: int) -> tuple[Finding, ...]:
        severity: Severity = getattr(self.options, code)
        return report(severity, code, message, self.places.source(location))


@hookimpl
def qpref_validators() -> Iterator[Validator]:
    yield Validator(
        name="duplicates",
        summary="repeated and contradictory rows, few distinct prompts",
        options=DuplicateChecks,
        start=CheckDuplicates,
        skips_refused=True,
    )
