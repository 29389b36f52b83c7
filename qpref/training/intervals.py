"""95 % intervals of means over pairs, several of which may share a prompt; plain Python, without random draws.

Pairs of one prompt aren't independent, so the deviations of a prompt's pairs are added before they are squared
(cluster-robust variance: Liang and Zeger 1986, "Longitudinal data analysis using generalized linear models"), and the
quantile is Student's for one degree of freedom less than there are prompts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval, which is NaN for fewer than two clusters."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where all of the interval is on one side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """Estimate the mean of [N] values.

    Args:
        clusters: [N] the prompt of each value.
    """
    mean = math.fsum(values) / len(values)
    half = _half_width(values, clusters)
    return Interval(mean, mean - half, mean + half)


def share_change_interval(changes: Sequence[int], clusters: Sequence[Hashable]) -> Interval:
    """Estimate the change of a share, such as an accuracy, measured twice on the same N pairs.

    Two pairs are added for the interval, one that changed each way (the adjusted Wald interval of Bonett and Price
    2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data"): it has a
    width even where all pairs, or none, have changed.

    Args:
        changes: [N] 1 for a pair that became right, -1 for one that became wrong, 0 for the others.
        clusters: [N] the prompt of each pair.
    """
    adjusted = mean_interval([*changes, 1, -1], [*clusters, object(), object()])
    return Interval(sum(changes) / len(changes), max(-1.0, adjusted.low), min(1.0, adjusted.high))


def difference_interval(first: Interval, second: Interval) -> Interval:
    """Estimate the first mean minus the second, of values that have no prompt in common."""
    value, half = first.value - second.value, math.hypot(first.high - first.value, second.high - second.value)
    return Interval(value, value - half, value + half)


def _half_width(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    mean = math.fsum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    count = len(sums)
    if count < 2:
        return math.nan
    variance = count / (count - 1) * math.fsum(total**2 for total in sums.values()) / len(values) ** 2
    return _student_quantile(count - 1) * math.sqrt(variance)


def _student_quantile(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's distribution.

    The first terms of its expansion (Abramowitz and Stegun 1964, 26.7.5): within 1 % from 4 degrees of freedom on.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
