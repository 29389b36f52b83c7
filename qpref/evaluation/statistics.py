"""Bootstrap confidence intervals, and accuracy at equal length; arrays in, numbers out.

Every estimate is a ratio of two sums over pairs, so a resample is a vector of weights. Pairs of one prompt aren't
independent, so whole prompts are resampled (the pairs cluster bootstrap of Cameron, Gelbach and Miller 2008). A seed
gives the same draws for every model and statistic, so differences between models are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
CHUNK_NUMBERS = 2**22
"""Weights in memory at a time: 32 MiB."""
LENGTH_PRIOR_SD = 2.5
"""Standard deviation of a normal prior on the length effect, so that it stays finite where length separates right from
wrong; the scale of Gelman et al. 2008, "A weakly informative default prior distribution for logistic and other
regression models"."""
NEWTON_STEPS = 50
SATURATED_GRADIENT = 0.01
"""A logistic loss's gradient, sigmoid(-margin), below which a pair counts as saturated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number, its 95 % interval, and the number of pairs behind it."""

    value: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Resampling of whole prompts with replacement.

    Attributes:
        cluster: [N] index of each pair's prompt, from 0.
        samples: number of draws.
    """

    cluster: NDArray[np.int64]
    samples: int
    seed: int

    @classmethod
    def of(cls, prompts: Sequence[str], samples: int, seed: int) -> Bootstrap:
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        return cls(np.array([numbers[prompt] for prompt in prompts]), samples, seed)

    def weights(self) -> Iterator[Floats]:
        """Yield [draws, N] counts of each pair in each draw, chunk by chunk; the same draws at every call."""
        random = np.random.default_rng(self.seed)
        clusters = int(self.cluster.max()) + 1
        chunk = max(1, CHUNK_NUMBERS // max(clusters, len(self.cluster)))
        for start in range(0, self.samples, chunk):
            draws = min(chunk, self.samples - start)
            picked = random.integers(0, clusters, (draws, clusters))
            picked += clusters * np.arange(draws)[:, None]
            counts = np.bincount(picked.ravel(), minlength=draws * clusters).reshape(draws, clusters)
            yield counts[:, self.cluster].astype(np.float64)

    def mean(self, values: Floats, share: Floats | None = None) -> Estimate:
        """Estimate the mean of [N] values; NaN values are left out.

        Args:
            share: [N] weight of each pair in the mean, such as its tokens.
        """
        known = ~np.isnan(values)
        share = np.where(known, 1.0 if share is None else share, 0.0)
        sums = np.where(known, values, 0.0) * share

        def weighted_mean(weights: Floats) -> Floats:
            with np.errstate(invalid="ignore"):
                ratios: Floats = (weights @ sums) / (weights @ share)
            return ratios

        return self.statistic(weighted_mean, int(known.sum()))

    def statistic(self, compute: Callable[[Floats], Floats], pairs: int) -> Estimate:
        """Estimate any statistic of weighted pairs, with a percentile interval (Efron 1979).

        Args:
            compute: [draws, N] weights -> [draws] values, NaN where a draw's is undefined.
            pairs: number of pairs that count.
        """
        value = float(compute(np.ones((1, len(self.cluster))))[0])
        draws = np.concatenate([compute(weights) for weights in self.weights()])
        draws = draws[~np.isnan(draws)]
        if not len(draws) or math.isnan(value):
            return Estimate(value=value, low=math.nan, high=math.nan, pairs=pairs)
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Estimate(value=value, low=float(low), high=float(high), pairs=pairs)


def is_right(better: Floats, worse: Floats) -> Floats:
    """Return [N] 1 where the better response scores higher, 0 where it scores lower, 0.5 for a tie."""
    right: Floats = (better > worse) + 0.5 * (better == worse)
    return right


def length_controlled(right: Floats, difference: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Fit the [draws] accuracy at equal length, and the [draws] effect of length on it.

    After Dubois et al. 2024, "Length-Controlled AlpacaEval", eq. 2 and 3, where a pair's two responses replace two
    models' answers: the probability that the model prefers the chosen one is

        sigmoid(theta + phi * tanh(d / sd(d))),  d = tokens of chosen - tokens of rejected

    fitted by maximum likelihood with a weak prior on phi. The accuracy at equal length is its value at d = 0,
    sigmoid(theta). phi is above 0 for a model that prefers longer answers more than the labels do. The paper's terms
    for models and prompts are left out.

    Args:
        right: [N] 0, 0.5 or 1, see `is_right`.
        difference: [N] d in tokens.
        weights: [draws, N].
    """
    spread = float(difference.std())
    feature = np.tanh(difference / spread) if spread else np.zeros_like(difference)
    total, hits = weights.sum(1), weights @ right
    with np.errstate(invalid="ignore", divide="ignore"):
        plain = hits / total
    theta = np.log(np.clip(plain, 1e-3, 1 - 1e-3) / (1 - np.clip(plain, 1e-3, 1 - 1e-3)))
    phi = np.zeros_like(theta)
    for _ in range(NEWTON_STEPS):
        probability = 1 / (1 + np.exp(-(theta[:, None] + phi[:, None] * feature)))
        residual = weights * (right - probability)
        curvature = weights * probability * (1 - probability)
        grad_theta, grad_phi = residual.sum(1), residual @ feature - phi / LENGTH_PRIOR_SD**2
        # The negative Hessian [[a, b], [b, c]] of the log-posterior.
        a, b, c = curvature.sum(1), curvature @ feature, curvature @ feature**2 + 1 / LENGTH_PRIOR_SD**2
        with np.errstate(invalid="ignore", divide="ignore"):
            determinant = a * c - b * b
            steps = (c * grad_theta - b * grad_phi) / determinant, (a * grad_phi - b * grad_theta) / determinant
        step_theta, step_phi = (np.clip(np.nan_to_num(step, posinf=0.0, neginf=0.0), -1, 1) for step in steps)
        theta, phi = theta + step_theta, phi + step_phi
        if max(np.abs(step_theta).max(initial=0.0), np.abs(step_phi).max(initial=0.0)) < 1e-9:
            break
    one_sided = (plain <= 0) | (plain >= 1)
    accuracy = np.where(one_sided, plain, 1 / (1 + np.exp(-theta)))
    return np.where(total > 0, accuracy, np.nan), np.where(one_sided, np.nan, phi)


def is_saturated(margins: Floats) -> Floats:
    """Return [N] 1 where the logistic loss's gradient, sigmoid(-margin), has all but vanished: below 0.01, that is for
    margins above 4.6."""
    saturated: Floats = (margins > math.log(1 / SATURATED_GRADIENT - 1)).astype(np.float64)
    return saturated


def length_buckets(lengths: NDArray[np.int64], most: int = 4) -> list[str]:
    """Name [N] quantile buckets, such as "65-128", one for each length; empty buckets are left out.

    Args:
        most: number of buckets at most.
    """
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, most + 1), method="lower"))
    inner = edges[1:-1] if len(edges) > 2 else edges[:0]
    bucket = np.searchsorted(inner, lengths, side="right")
    names = {number: _range(lengths[bucket == number].min(), lengths[bucket == number].max()) for number in set(bucket)}
    return [names[number] for number in bucket]


def _range(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}-{high}"


def length_strata(lengths: NDArray[np.int64], tolerance: float = 0.1) -> list[str]:
    """Name [N] strata: the chosen response is "longer" than the rejected one, "shorter" or "as long".

    Args:
        lengths: [N, 2] tokens of chosen and rejected.
        tolerance: lengths within this share of the longer one are "as long".
    """
    names = []
    for chosen, rejected in lengths.tolist():
        similar = abs(chosen - rejected) <= tolerance * max(chosen, rejected)
        names.append("as long" if similar else "longer" if chosen > rejected else "shorter")
    return names
