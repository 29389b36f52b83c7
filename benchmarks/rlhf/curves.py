"""A run's checkpoints as curves: reward at a KL divergence, reward at a cost, cost of a reward, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A checkpoint, measured on E held-out openings.

    Attributes:
        cpu_seconds: CPU seconds of the arm's process until it was saved; 0 for the base.
        rewards: [E] mean reward of the opening's sampled continuations.
        kls: [E] nats, mean over the same continuations of log policy - log base.
    """

    cpu_seconds: float
    rewards: Numbers
    kls: Numbers


Curve = Sequence[Point]
"""Points in the order of training; the base is the first."""
Statistic = Callable[[float, Numbers, Numbers, Numbers], float]
"""Target, and the [P] CPU seconds, rewards and KL divergences of a curve -> a number."""


def reward_at_kl(kl: float, seconds: Numbers, rewards: Numbers, kls: Numbers) -> float:
    """Interpolate the reward where the run first reaches a KL; NaN where it never does."""
    return first_crossing(kls, rewards, kl)


def reward_at_seconds(budget: float, seconds: Numbers, rewards: Numbers, kls: Numbers) -> float:
    """Interpolate the reward at a cost in CPU seconds; NaN beyond the run's end."""
    return first_crossing(seconds, rewards, budget)


def seconds_to_reward(reward: float, seconds: Numbers, rewards: Numbers, kls: Numbers) -> float:
    """Interpolate the CPU seconds at which the run first reaches a reward; NaN where it never does."""
    return first_crossing(rewards, seconds, reward)


def first_crossing(xs: Numbers, ys: Numbers, x: float) -> float:
    """Interpolate y linearly where x is first reached, in the order of the points; NaN where it never is."""
    for at, (here, there) in enumerate(zip(xs, ys, strict=True)):
        if here >= x:
            if at == 0 or here == xs[at - 1]:
                return float(there)
            share = (x - xs[at - 1]) / (here - xs[at - 1])
            return float(ys[at - 1] + share * (there - ys[at - 1]))
    return math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A statistic of several curves, one for each seed.

    Attributes:
        value: mean over the seeds that reach the target; NaN where none does.
        low, high: 95% bootstrap interval over the openings, with the seeds that are there; NaN where fewer than
            `REACHED` of the resamples reach the target with every seed.
        seeds: each seed's value.
    """

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]


REACHED = 0.975
"""Least share of resamples that give an interval."""


def estimate(curves: Sequence[Curve], statistic: Statistic, target: float, resamples: int = RESAMPLES) -> Estimate:
    """Compute a statistic of each seed's curve, and a percentile bootstrap interval of their mean.

    A resample draws openings with replacement, the same for all seeds and all points of a curve, since all are measured
    on the same openings.
    """
    count = len(curves[0][0].rewards)
    own = np.arange(count)
    seeds = tuple(statistic(target, *_columns(curve, own)) for curve in curves)
    drawn = np.random.default_rng(0).integers(count, size=(resamples, count))
    means = np.array([np.mean([statistic(target, *_columns(curve, rows)) for curve in curves]) for rows in drawn])
    reached = means[~np.isnan(means)]
    low, high = (math.nan, math.nan) if len(reached) < REACHED * resamples else np.percentile(reached, [2.5, 97.5])
    value = float(np.nanmean(seeds)) if not all(map(math.isnan, seeds)) else math.nan
    return Estimate(value=value, low=float(low), high=float(high), seeds=seeds)


def mean_interval(values: Numbers, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Compute the 95% percentile bootstrap interval of a mean over openings."""
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def _columns(curve: Curve, rows: NDArray[np.int64]) -> tuple[Numbers, Numbers, Numbers]:
    seconds = np.array([point.cpu_seconds for point in curve])
    rewards = np.array([point.rewards[rows].mean() for point in curve])
    kls = np.array([point.kls[rows].mean() for point in curve])
    return seconds, rewards, kls


def common_kl(curves: Sequence[Curve]) -> float:
    """Return nine tenths of the largest KL that every run reaches: even where it is noisy, all reach it."""
    return 0.9 * min(max(float(point.kls.mean()) for point in curve) for curve in curves)


def common_seconds(curves: Sequence[Curve]) -> float:
    """Return the CPU seconds of the shortest run."""
    return min(curve[-1].cpu_seconds for curve in curves)


def half_of_the_gain(curves: Sequence[Curve]) -> float:
    """Return the reward halfway between the base's and the best checkpoint's of any run."""
    base = float(curves[0][0].rewards.mean())
    best = max(float(point.rewards.mean()) for curve in curves for point in curve)
    return base + (best - base) / 2
