"""Validator `leakage`: held-out prompts in the training set, on which evaluation measures memorization.

Held-out prompts are indexed, then training prompts are streamed. Equal prompts may differ in case and punctuation. A
near leak is a training prompt with a large share of the word 5-grams of a held-out one, as in PaLM's contamination test
(Chowdhery et al. 2022, section 8: at least 70 % of the 8-grams). System turns are ignored: whole data sets share them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from qpref.hooks import Field, Options, Places, Severity, Split, Validator, composed, hookimpl, report, text_of
from qpref.records import Finding, PreferencePair, UnpairedExample
from qpref_plugins.check_leakage.index import HeldOutIndex
from qpref_plugins.check_leakage.shingles import plain

BATCH_BYTES = 1 << 16


class LeakageChecks(Options):
    """Options of the validator `leakage`: severities and thresholds.

    A training row has at most one of these findings, the first that applies; as an error, it removes the row.
    """

    leaked_pair: Severity = Field(default="warn", description="a whole training row is in the held-out set too")
    leaked_prompt: Severity = Field(
        default="warn", description="a training prompt equals a held-out one, apart from case and punctuation"
    )
    near_leak: Severity = Field(default="warn", description="a training prompt contains most of a held-out one")
    min_overlap: float = Field(
        default=0.8, gt=0, le=1, description="share of a held-out prompt's word 5-grams from which on it is a near leak"
    )


class CheckLeakage:
    """Checks prompts in batches; matches are collected, 24 bytes per row, and reported at the end."""

    def __init__(self, options: LeakageChecks) -> None:
        self.options = options
        self.places = Places()
        self.index = HeldOutIndex()
        self.closed = False
        self.whole: dict[int, int] = {}
        self.prompts: list[bytes] = []
        self.rows = array("q")
        self.num_bytes = 0
        self.last_location = -1
        self.pairs = array("q")
        self.pair_at = array("q")
        self.found = array("q")
        self.found_at = array("q")
        self.shares = array("d")

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Iterable[Finding]:
        if split == "train":
            if not self.closed:
                self._close()
            if not len(self.index):
                return ()
        location = self.places.number(example.source)
        key = _key(example)
        if split == "heldout":
            self.whole.setdefault(key, location)
        elif (known := self.whole.get(key)) is not None:
            self.pairs.append(location)
            self.pair_at.append(known)
            return ()
        if location != self.last_location:
            self.last_location = location  # pairs of a ranking share the prompt
            self._take(plain(text_of([turn for turn in example.prompt if turn.role != "system"])), location)
        return ()

    def finish(self) -> Iterator[Finding]:
        self._flush()
        pairs, first = np.unique(self.pairs, return_index=True)
        for location, known in zip(pairs.tolist(), np.asarray(self.pair_at)[first].tolist(), strict=True):
            message = f"this row is in the held-out set too, at {self.places.source(known)}"
            yield from report(self.options.leaked_pair, "leaked_pair", message, self.places.source(location))
        for number in np.flatnonzero(~np.isin(self.found, pairs)).tolist():
            source, other = (self.places.source(locations[number]) for locations in (self.found, self.found_at))
            if (share := self.shares[number]) > 1:
                message = f"this prompt is in the held-out set too, at {other}"
                yield from report(self.options.leaked_prompt, "leaked_prompt", message, source)
            else:
                message = f"this prompt contains {share:.0%} of the held-out one at {other}"
                yield from report(self.options.near_leak, "near_leak", message, source)

    def _take(self, prompt: bytes, location: int) -> None:
        self.prompts.append(prompt)
        self.rows.append(location)
        self.num_bytes += len(prompt) + 1
        if self.num_bytes >= BATCH_BYTES:
            self._flush()

    def _close(self) -> None:
        self._flush()
        self.index.close()
        self.closed = True

    def _flush(self) -> None:
        prompts, rows = self.prompts, self.rows
        self.prompts, self.rows, self.num_bytes = [], array("q"), 0
        if not prompts:
            return
        if not self.closed:
            self.index.add(prompts, rows)
            return
        match = self.index.find(prompts, self.options.min_overlap)
        for row, prompt, share, equal in zip(match.row, match.prompt, match.share, match.equal, strict=True):
            self.found.append(rows[row])
            self.found_at.append(self.index.first_row[prompt])
            self.shares.append(2.0 if equal else share)


def _key(example: PreferencePair | UnpairedExample) -> int:
    """Hash a whole example; Python caches the hash of a text, so that other validators get it for free."""
    if isinstance(example, PreferencePair):
        return hash((composed(example.prompt), composed(example.chosen), composed(example.rejected)))
    return hash((composed(example.prompt), composed(example.completion), example.label))


@hookimpl
def qpref_validators() -> Iterator[Validator]:
    yield Validator(
        name="leakage",
        summary="held-out prompts in the training set, exactly or nearly",
        options=LeakageChecks,
        start=CheckLeakage,
        skips_refused=True,
    )
