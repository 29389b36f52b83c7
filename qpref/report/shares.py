"""Intervals of shares of held-out pairs, such as the accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qpref.report.text import count_text, share_text

MANY = 1000
"""Count from which a percentage's decimal means something: its interval is a few percent wide."""
Z = 1.959964
"""Quantile of the standard normal distribution for a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Share:
    """A share of `count` pairs that count as independent, with its 95 % interval; NaN where it isn't known."""

    value: float
    count: float

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (Wilson 1927); it stays within 0 and 1, and has a width at both of them."""
        if not (self.count > 0 and 0 <= self.value <= 1):
            return math.nan, math.nan
        square = Z**2 / self.count
        middle = (self.value + square / 2) / (1 + square)
        half = Z / (1 + square) * math.sqrt(self.value * (1 - self.value) / self.count + square / (4 * self.count))
        return max(0.0, middle - half), min(1.0, middle + half)

    @property
    def interval_text(self) -> str:
        """Format the interval: `65 to 91 %`; empty where it isn't known."""
        low, high = self.interval
        digits = 1 if self.count >= MANY else 0
        return "" if math.isnan(low) else f"{100 * low:.{digits}f} to {100 * high:.{digits}f} %"

    def __str__(self) -> str:
        interval = self.interval_text
        return f"{share_text(self.value)} ({interval})" if interval else share_text(self.value)

    @property
    def count_text(self) -> str:
        return count_text(self.count)


def is_share(metric: str) -> bool:
    """Return whether a metric is a share of examples, by its name."""
    return metric.endswith("accuracies")
