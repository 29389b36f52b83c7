"""Find pairs whose labels may be swapped, by the reference scores that earlier runs have cached."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from qpref import opening
from qpref.policy import reference_cache
from qpref.policy.reference import row_keys
from qpref.policy.reference_cache import ReferenceCache
from qpref.policy.source import BaseFolder
from qpref.records import Finding, Source, TokenizedExample

OUTLIER_DEVIATIONS = 3.5
"""Robust standard deviations beyond which a value is an outlier (Iglewicz and Hoaglin 1993, "How to Detect and Handle
Outliers")."""
MAD_TO_DEVIATION = 1.4826
"""Standard deviation over median absolute deviation, of a normal distribution."""
MIN_PAIRS = 30
"""Known pairs below which no pair is reported."""


class SwapSearch:
    """Collects the reference's preferences, mean log-probability of chosen less that of rejected, where they are known.

    A reference does not prefer what people prefer, so a negative value says nothing. A value far below those of all
    other pairs does: a fluent answer was rejected for a broken one, or the two were swapped.
    """

    def __init__(self, base: BaseFolder) -> None:
        self.preferences: list[tuple[float, Source]] = []
        self._caches = list(_caches_of(base))

    def note(self, example: TokenizedExample) -> None:
        """Look up a pair in the caches; of a list, its first and its last response."""
        if example.label is not None or not self._caches:
            return
        keys = row_keys(example)
        for cache in self._caches:
            chosen, rejected = cache.get(keys[0]), cache.get(keys[-1])
            if chosen is not None and rejected is not None:
                self.preferences.append((float(chosen.mean() - rejected.mean()), example.source))
                return

    def findings(self) -> list[Finding]:
        """Report each pair whose preference is far below the others'."""
        values = [value for value, _ in self.preferences]
        if len(values) < MIN_PAIRS:
            return []
        center = statistics.median(values)
        deviation = MAD_TO_DEVIATION * statistics.median(abs(value - center) for value in values)
        found = []
        for value, source in self.preferences:
            if value < min(0.0, center - OUTLIER_DEVIATIONS * deviation):
                message = (
                    f"the reference finds rejected more likely by {-value:.1f} nats a token: are the labels swapped?"
                )
                found.append(Finding(code="suspected_swap", severity="warning", message=message, source=source))
        return found


def _caches_of(base: BaseFolder) -> Iterator[ReferenceCache]:
    """Open the caches of all references on this base, whatever its quantization."""
    for path in sorted(reference_cache.root().glob(f"*/{reference_cache.DESCRIPTION}")):
        try:
            description = opening.read_object(path)
        except (OSError, ValueError):
            continue
        if base.weights and description.get("weights") == base.weights:
            yield ReferenceCache.open(path.parent, "reader")
