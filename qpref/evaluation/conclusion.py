"""Conclusions from a comparison's numbers in a sentence or two; none where the pairs are too few.

A claim is made only where its 95 % interval is on one side; a few pairs make no claim, however clear their share looks:
with ten of ten right, the bootstrap's interval has no width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qpref.evaluation.comparison import ComparedModel
from qpref.evaluation.statistics import Estimate

LEAST_PAIRS = 20
LEAD = ("rewards/accuracies", "logps/accuracies", "drift/chosen", "logps/chosen", "kl")
"""Metrics that a conclusion rests on: how often right, at what price, how far away. The first three there are."""
NUM_LEAD = 3


def lead_keys(models: Sequence[ComparedModel]) -> list[str]:
    """Return the keys of the three rows that come first."""
    has_reference = any("rewards/accuracies" in model.summary.metrics for model in models)
    keys = [key for key in LEAD if has_reference != (key in ("logps/accuracies", "logps/chosen"))]
    there = [key for key in keys if any(key in model.summary.metrics for model in models)]
    return there[:NUM_LEAD]


def conclusions(models: Sequence[ComparedModel]) -> list[str]:
    """Return one sentence for each model, and one for each difference from the first; none where pairs are too few."""
    said = [sentence for model in models for sentence in _of_model(model.name, model.summary.metrics)]
    first = models[0].name
    return said + [
        sentence for model in models[1:] for sentence in _of_difference(model.name, first, model.summary.differences)
    ]


def _of_model(name: str, metrics: Mapping[str, Estimate]) -> Iterator[str]:
    by_reward = metrics.get("rewards/accuracies")
    accuracy = by_reward or metrics.get("logps/accuracies")
    if accuracy is None or accuracy.pairs < LEAST_PAIRS:
        return
    measure = "by reward margin" if by_reward else "by log-probability"
    share = f"{name}: right on {accuracy.value:.0%} of {accuracy.pairs} pairs {measure} ({_interval(accuracy)})"
    if accuracy.low > 0.5:
        yield f"{share}{_price(metrics)}"
    elif accuracy.high < 0.5:
        yield f"{share}: it prefers the rejected answers"
    else:
        yield f"{share}: these pairs don't tell it from chance"


def _price(metrics: Mapping[str, Estimate]) -> str:
    """Describe the change of the chosen responses' likelihood, where that is known."""
    drift = metrics.get("drift/chosen")
    if drift is None or drift.pairs < LEAST_PAIRS:
        return ""
    if drift.high < 0:
        return f", and its chosen answers became less likely ({drift.value:+z.1f} nats)"
    if drift.low > 0:
        return f", and its chosen answers became likelier ({drift.value:+z.1f} nats)"
    return ", without a measurable change of its chosen answers' likelihood"


def _of_difference(name: str, first: str, differences: Mapping[str, Estimate]) -> Iterator[str]:
    found = differences.get("rewards/accuracies") or differences.get("logps/accuracies")
    if found is None or found.pairs < LEAST_PAIRS:
        return
    points = f"{100 * found.value:+z.0f} points ({100 * found.low:+z.0f} to {100 * found.high:+z.0f})"
    if found.low > 0:
        yield f"{name} is right more often than {first}: {points}"
    elif found.high < 0:
        yield f"{name} is right less often than {first}: {points}"
    else:
        yield f"{name} and {first} don't differ significantly in how often they are right: {points}"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:.0%} to {estimate.high:.0%}"
