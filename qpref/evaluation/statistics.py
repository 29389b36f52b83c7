"""Estimates with bootstrap confidence intervals, and accuracy at equal length. Arrays in, numbers out; no model here.

Every estimate is a ratio of two sums over pairs, so a resample is a vector of weights. Pairs of one prompt aren't
independent, so whole prompts are drawn (Cameron, Gelbach and Miller 2008 call it the pairs cluster bootstrap). The same
seed gives the same draws, for every model and statistic: differences between models are paired.
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
"""Weights that exist at a time: 32 MiB."""
LENGTH_PRIOR_SD = 2.5
"""Of a normal prior on the effect of length, so that it stays finite where length separates right from wrong; the scale
of Gelman et al. 2008, "A weakly informative default prior distribution for logistic and other regression models"."""
NEWTON_STEPS = 50
SATURATED_SLOPE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number, its 95 % interval, and of how many pairs it is."""

    value: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Draws of whole prompts with replacement.

    Attributes:
        cluster: [N] which prompt, from 0 on, each pair has.
        samples: how many draws.
    """

    cluster: NDArray[np.int64]
    samples: int
    seed: int

    @classmethod
    def of(cls, prompts: Sequence[str], samples: int, seed: int) -> Bootstrap:
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        return cls(np.array([numbers[prompt] for prompt in prompts]), samples, seed)

    def weights(self) -> Iterator[Floats]:
        """[draws, N] how often each pair stands in a draw, some draws at a time; the same ones at every call."""
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
        """The mean of [N] values; a pair whose value is NaN doesn't count.

        Args:
            share: [N] what each pair weighs in the mean, such as its tokens.
        """
        known = ~np.isnan(values)
        share = np.where(known, 1.0 if share is None else share, 0.0)
        sums = np.where(known, values, 0.0) * share

        def of(weights: Floats) -> Floats:
            with np.errstate(invalid="ignore"):
                ratios: Floats = (weights @ sums) / (weights @ share)
            return ratios

        return self.statistic(of, int(known.sum()))

    def statistic(self, of: Callable[[Floats], Floats], pairs: int) -> Estimate:
        """The interval of any statistic of weighted pairs, by percentiles (Efron 1979).

        Args:
            of: [draws, N] weights -> [draws] values, NaN where a draw has none.
            pairs: of how many it is.
        """
        value = float(of(np.ones((1, len(self.cluster))))[0])
        draws = np.concatenate([of(weights) for weights in self.weights()])
        draws = draws[~np.isnan(draws)]
        if not len(draws) or math.isnan(value):
            return Estimate(value=value, low=math.nan, high=math.nan, pairs=pairs)
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Estimate(value=value, low=float(low), high=float(high), pairs=pairs)


def is_right(better: Floats, worse: Floats) -> Floats:
    """[N] 1 where the better one scores higher, 0 where lower, a half for a tie."""
    right: Floats = (better > worse) + 0.5 * (better == worse)
    return right


def length_controlled(right: Floats, difference: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """[draws] accuracy at equal length, and the effect of length on it.

    After Dubois et al. 2024, "Length-Controlled AlpacaEval", eq. 2 and 3, with the two responses of a pair in the place
    of two models' answers: the chance that the model prefers the chosen one is

        sigmoid(theta + phi * tanh(d / sd(d))),  d = tokens of chosen - tokens of rejected

    fitted by maximum likelihood with a weak prior on phi. The accuracy at equal length is its value at d = 0,
    sigmoid(theta). phi is above 0 for a model that prefers longer answers, beyond what is right. Their terms for the
    models and the prompts have no counterpart here.

    Args:
        right: [N] 0, 0.5 or 1.
        difference: [N] tokens.
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
        chance = 1 / (1 + np.exp(-(theta[:, None] + phi[:, None] * feature)))
        slope = weights * (right - chance)
        curve = weights * chance * (1 - chance)
        first, second = slope.sum(1), slope @ feature - phi / LENGTH_PRIOR_SD**2
        a, b, c = curve.sum(1), curve @ feature, curve @ feature**2 + 1 / LENGTH_PRIOR_SD**2
        with np.errstate(invalid="ignore", divide="ignore"):
            determinant = a * c - b * b
            step, turn = (c * first - b * second) / determinant, (a * second - b * first) / determinant
        step, turn = (np.clip(np.nan_to_num(change, posinf=0.0, neginf=0.0), -1, 1) for change in (step, turn))
        theta, phi = theta + step, phi + turn
        if max(np.abs(step).max(initial=0.0), np.abs(turn).max(initial=0.0)) < 1e-9:
            break
    one_sided = (plain <= 0) | (plain >= 1)
    accuracy = np.where(one_sided, plain, 1 / (1 + np.exp(-theta)))
    return np.where(total > 0, accuracy, np.nan), np.where(one_sided, np.nan, phi)


def is_saturated(margins: Floats) -> Floats:
    """[N] 1 where the logistic loss's slope, sigmoid(-margin), has all but vanished: below 0.01, from 4.6 on."""
    saturated: Floats = (margins > math.log(1 / SATURATED_SLOPE - 1)).astype(np.float64)
    return saturated


def length_buckets(lengths: NDArray[np.int64], most: int = 4) -> list[str]:
    """[N] for each length the range of quantiles that it falls in, such as "65-128"; empty ranges are left out."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, most + 1), method="lower"))
    inner = edges[1:-1] if len(edges) > 2 else edges[:0]
    bucket = np.searchsorted(inner, lengths, side="right")
    names = {number: _range(lengths[bucket == number].min(), lengths[bucket == number].max()) for number in set(bucket)}
    return [names[number] for number in bucket]


def _range(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}-{high}"


def length_strata(lengths: NDArray[np.int64], tolerance: float = 0.1) -> list[str]:
    """[N] how long the chosen response is beside the rejected one; within 10 % of the longer is as long.

    Args:
        lengths: [N, 2] chosen, rejected.
    """
    names = []
    for chosen, rejected in lengths.tolist():
        about = abs(chosen - rejected) <= tolerance * max(chosen, rejected)
        names.append("as long" if about else "longer" if chosen > rejected else "shorter")
    return names
