"""The numbers of a comparison: each metric of each model, overall and by bucket, and differences between models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from qpref.evaluation.scores import Floats, PairScores
from qpref.evaluation.statistics import (
    Bootstrap,
    Estimate,
    is_right,
    is_saturated,
    length_buckets,
    length_controlled,
    length_strata,
)

Column = tuple[Floats, Floats | None]
"""[N] values of a metric, and each pair's weight in their mean (None: equal weights)."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of the comparison.

    Attributes:
        label: for people.
        compute: scores and beta -> its values; None where the metric needs a reference and the model has none.
    """

    label: str
    compute: Callable[[PairScores, float], Column | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One model's numbers.

    Attributes:
        metrics: by key; those that need a reference are left out without one.
        buckets: by kind of bucket (response tokens, length of chosen beside rejected, source), then bucket, then key.
        differences: this model minus the first, over the same pairs; empty for the first.
    """

    metrics: Mapping[str, Estimate]
    buckets: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    differences: Mapping[str, Estimate]


def rewards(scores: PairScores, beta: float) -> Floats | None:
    """Compute [N, 2] implicit rewards: beta * (log p(response) - log p_reference(response))."""
    return None if scores.reference is None else beta * (scores.policy - scores.reference)


def _of_rewards(make: Callable[[Floats], Floats]) -> Callable[[PairScores, float], Column | None]:
    def compute(scores: PairScores, beta: float) -> Column | None:
        found = rewards(scores, beta)
        return None if found is None else (make(found), None)

    return compute


def _of_drift(side: int, make: Callable[[Floats], Floats] = np.asarray) -> Callable[[PairScores, float], Column | None]:
    def compute(scores: PairScores, beta: float) -> Column | None:
        return None if scores.reference is None else (make(scores.policy[:, side] - scores.reference[:, side]), None)

    return compute


def _fell(change: Floats) -> Floats:
    return (change < 0).astype(np.float64)


def _drift_per_token(scores: PairScores, beta: float) -> Column | None:
    """Change of the chosen response's log-probability per token, a mean over all tokens: pairs weigh by length."""
    if scores.reference is None:
        return None
    tokens = scores.lengths[:, 0].astype(np.float64)
    return (scores.policy[:, 0] - scores.reference[:, 0]) / tokens, tokens


def _per_token(scores: PairScores, beta: float) -> Column:
    per_token = scores.policy / scores.lengths
    return is_right(per_token[:, 0], per_token[:, 1]), None


def _kl(scores: PairScores, beta: float) -> Column | None:
    return None if scores.kl is None else (scores.kl, scores.lengths.sum(1).astype(np.float64))


def _right_by_reward(pair: Floats) -> Floats:
    return is_right(pair[:, 0], pair[:, 1])


METRICS: Mapping[str, Metric] = {
    "rewards/accuracies": Metric("accuracy by reward margin", _of_rewards(_right_by_reward)),
    "logps/accuracies": Metric(
        "accuracy by log-probability", lambda scores, beta: (is_right(scores.policy[:, 0], scores.policy[:, 1]), None)
    ),
    "logps/accuracies_per_token": Metric("accuracy by log-probability per token", _per_token),
    "rewards/margins": Metric("reward margin", _of_rewards(lambda pair: pair[:, 0] - pair[:, 1])),
    "rewards/chosen": Metric("rewards/chosen", _of_rewards(lambda pair: pair[:, 0])),
    "rewards/rejected": Metric("rewards/rejected", _of_rewards(lambda pair: pair[:, 1])),
    "logps/chosen": Metric("logps/chosen (nats)", lambda scores, beta: (scores.policy[:, 0], None)),
    "logps/rejected": Metric("logps/rejected (nats)", lambda scores, beta: (scores.policy[:, 1], None)),
    "drift/chosen": Metric("change of logps/chosen since the start (nats)", _of_drift(0)),
    "drift/chosen_per_token": Metric("change of logps/chosen since the start, per token", _drift_per_token),
    "drift/chosen_fell": Metric("share of chosen that became less likely", _of_drift(0, _fell)),
    "drift/rejected": Metric("change of logps/rejected since the start (nats)", _of_drift(1)),
    "kl": Metric("KL from the reference (nats per token)", _kl),
    "saturated": Metric("share of saturated pairs", _of_rewards(lambda pair: is_saturated(pair[:, 0] - pair[:, 1]))),
}  # fmt: skip
CONTROLLED = {
    "rewards/accuracies": "accuracy by reward margin",
    "logps/accuracies": "accuracy by log-probability",
}
"""Accuracies that are also computed at equal length, under their key with `_length_controlled` appended."""
IN_BUCKETS = ("rewards/accuracies", "logps/accuracies", "rewards/margins")


def labels() -> dict[str, str]:
    """Map each key to its label, in the order of the table: an accuracy is followed by its value at equal length."""
    named: dict[str, str] = {}
    for key, metric in METRICS.items():
        named[key] = metric.label
        if key in CONTROLLED:
            named[f"{key}_length_controlled"] = f"{CONTROLLED[key]} at equal length"
            named[f"{key}_length_effect"] = "effect of length on it (0: none)"
    return named


def summarize(models: Sequence[PairScores], beta: float, bootstrap: Bootstrap, sources: Sequence[str]) -> list[Summary]:
    """Compute every model's numbers over the same pairs.

    Args:
        sources: [N] the file of each pair.
    """
    columns = [_columns(scores, beta) for scores in models]
    groups = _groups(models[0], sources)
    summaries = []
    for scores, own in zip(models, columns, strict=True):
        metrics = {key: bootstrap.mean(*column) for key, column in own.items()}
        metrics |= _length_controlled(scores, own, bootstrap)
        buckets = {kind: _by_bucket(own, names, bootstrap) for kind, names in groups.items()}
        differences = {} if own is columns[0] else _differences(columns[0], own, bootstrap)
        summaries.append(Summary(metrics=metrics, buckets=buckets, differences=differences))
    return summaries


def _columns(scores: PairScores, beta: float) -> dict[str, Column]:
    found = {key: metric.compute(scores, beta) for key, metric in METRICS.items()}
    return {key: column for key, column in found.items() if column is not None}


def _length_controlled(scores: PairScores, own: Mapping[str, Column], bootstrap: Bootstrap) -> dict[str, Estimate]:
    difference = (scores.lengths[:, 0] - scores.lengths[:, 1]).astype(np.float64)
    found = {}
    for key in CONTROLLED:
        if key in own:
            right = own[key][0]
            for part, ending in enumerate(("length_controlled", "length_effect")):
                fit = partial(_part_of_fit, right, difference, part)
                found[f"{key}_{ending}"] = bootstrap.statistic(fit, len(right))
    return found


def _part_of_fit(right: Floats, difference: Floats, part: int, weights: Floats) -> Floats:
    return length_controlled(right, difference, weights)[part]


def _groups(scores: PairScores, sources: Sequence[str]) -> dict[str, Sequence[str]]:
    """Assign each of [N] pairs to a bucket, for each kind of bucket."""
    groups: dict[str, Sequence[str]] = {
        "response tokens": length_buckets(scores.lengths.sum(1)),
        "length of chosen beside rejected": length_strata(scores.lengths),
    }
    return groups | ({"source": sources} if len(set(sources)) > 1 else {})


def _by_bucket(own: Mapping[str, Column], names: Sequence[str], bootstrap: Bootstrap) -> dict[str, dict[str, Estimate]]:
    buckets = np.array(names)
    return {
        name: {
            key: bootstrap.mean(np.where(buckets == name, own[key][0], np.nan), own[key][1])
            for key in IN_BUCKETS
            if key in own
        }
        for name in sorted(set(names), key=_bucket_order)
    }


def _bucket_order(name: str) -> tuple[int, str]:
    start = name.partition("-")[0]
    return (int(start) if start.isdigit() else 0, name)


def _differences(first: Mapping[str, Column], own: Mapping[str, Column], bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Estimate paired differences: a pair's difficulty, common to both models, cancels."""
    return {
        key: bootstrap.mean(own[key][0] - first[key][0], own[key][1]) for key in METRICS if key in own and key in first
    }
