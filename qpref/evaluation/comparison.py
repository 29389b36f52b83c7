"""The result of an evaluation: models compared on the same pairs, as JSON, and warnings about what the numbers show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.evaluation.heldout_pairs import Overlap
from qpref.evaluation.statistics import Estimate
from qpref.evaluation.summary import Summary

MANY_SATURATED = 0.5
FEW_PAIRS = 100
MOST_FELL = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModel:
    """One model of the comparison.

    Attributes:
        reference: name of the model whose reference its rewards are computed against; None without a reference.
        overlap: of the prompts with this model's training data, before any were left out; None if those are unknown.
    """

    name: str
    kind: str
    reference: str | None
    overlap: Overlap | None
    summary: Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The result of `qpref eval`.

    Attributes:
        data: name of the data, such as their file.
        data_changed: whether a run's held-out data have changed since its training; None if unknown, or for data given
            by the user.
        read: number of pairs read, after sampling.
        pairs: number of pairs compared: `read` less those left out for overlap or for `left_out`'s reason.
        left_out: number of pairs that some model can't be scored on, and the reason for the first.
        beta_from: source of beta: a run, an option, or the default.
        dtype: compute dtype of all models; None where each used its own.
    """

    data: str
    read: int
    pairs: int
    overlapping_left_out: int
    left_out: tuple[int, str]
    beta: float
    beta_from: str
    seed: int
    samples: int
    dtype: str | None
    models: Sequence[ComparedModel]
    data_changed: bool | None = None

    def warnings(self) -> list[str]:
        """List what to know before trusting the numbers, and what to try."""
        warnings = list(self._data_warnings())
        for model in self.models:
            warnings += [f"{model.name}: {text}" for text in _model_warnings(model.summary.metrics)]
        return warnings

    def as_json(self) -> dict[str, Any]:
        """Convert the comparison to JSON values; an undefined number is null."""
        return {
            "data": self.data,
            "data_changed": self.data_changed,
            "read": self.read,
            "pairs": self.pairs,
            "left_out": {"overlapping": self.overlapping_left_out, "not_comparable": self.left_out[0]},
            "beta": {"value": self.beta, "from": self.beta_from},
            "bootstrap": {"samples": self.samples, "seed": self.seed, "level": 0.95},
            "dtype": self.dtype,
            "models": [_model_json(model) for model in self.models],
            "warnings": self.warnings(),
        }

    def _data_warnings(self) -> Iterator[str]:
        if self.data_changed:
            yield f"{self.data}: changed since training; these aren't the pairs that the run held out"
        if self.pairs < FEW_PAIRS:
            yield f"only {self.pairs} pairs: the intervals are wide"
        count, reason = self.left_out
        if count:
            yield f"{count} of {self.read} pairs are left out for all models; the first: {reason}"
        for model in self.models:
            if model.overlap is not None and model.overlap.normalized:
                yield self._overlap_warning(model.name, model.overlap)

    def _overlap_warning(self, name: str, overlap: Overlap) -> str:
        similar = overlap.normalized - overlap.exact
        up_to_case = f" ({similar} of them up to case and white space)" if similar else ""
        found = f"{name}: {overlap.normalized} of {self.read} prompts are in its training data{up_to_case}"
        if self.overlapping_left_out:
            return f"{found}; they are left out"
        return f"{found}, so its numbers are better than on unseen prompts unless they are left out"


def _model_warnings(metrics: Mapping[str, Estimate]) -> Iterator[str]:
    drift, fell = metrics.get("drift/chosen"), metrics.get("drift/chosen_fell")
    if drift and fell and drift.high < 0 and fell.value > MOST_FELL:
        rejected = metrics["drift/rejected"].value
        yield (
            "likelihood displacement: the chosen responses have become less likely since the start "
            f"({drift.value:+z.1f} nats on average, in {fell.value:.0%} of the pairs), while the rejected ones moved "
            f"by {rejected:+z.1f}; the probability goes to answers that are in neither column. Read some with "
            "qpref generate. To try: a larger beta, a lower learning_rate, fewer steps, a loss that also raises the "
            "chosen responses' likelihood (qpref losses), or data without pairs whose two responses are nearly the same"
        )
    saturated = metrics.get("saturated")
    if saturated and saturated.value > MANY_SATURATED:
        yield (
            f"{saturated.value:.0%} of the pairs are saturated: a logistic loss has less than a hundredth of its "
            "gradient left there, and more training moves only the others. To try: stop earlier, harder pairs, or a "
            "loss with a target margin"
        )
    yield from _length_warning(metrics)


def _length_warning(metrics: Mapping[str, Estimate]) -> Iterator[str]:
    """Warn of one length effect at most: of the accuracy by reward where there is one."""
    for accuracy, by in (("rewards/accuracies", "by reward margin"), ("logps/accuracies", "by log-probability")):
        effect = metrics.get(f"{accuracy}_length_effect")
        if effect and (effect.low > 0 or effect.high < 0):
            plain, equal = metrics[accuracy].value, metrics[f"{accuracy}_length_controlled"].value
            kind = "longer" if effect.value > 0 else "shorter"
            yield (
                f"length bias: it prefers {kind} responses more than the labels do; its accuracy {by} is {plain:.3f}, "
                f"and {equal:.3f} at equal length"
            )
            return


def _model_json(model: ComparedModel) -> dict[str, Any]:
    overlap = None
    if model.overlap is not None:
        overlap = {"exact": model.overlap.exact, "normalized": model.overlap.normalized}
    return {
        "model": model.name,
        "kind": model.kind,
        "reference": model.reference,
        "prompts_in_training_data": overlap,
        "metrics": _json(model.summary.metrics),
        "by": {
            kind: {name: _json(estimates) for name, estimates in buckets.items()}
            for kind, buckets in model.summary.buckets.items()
        },
        "difference_from_first": _json(model.summary.differences),
    }


def _json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | int | None]]:
    return {
        key: {
            "value": finite(estimate.value),
            "low": finite(estimate.low),
            "high": finite(estimate.high),
            "pairs": estimate.pairs,
        }
        for key, estimate in estimates.items()
    }


def finite(value: float) -> float | None:
    """Return the number; None for NaN or an infinity, which JSON doesn't have."""
    return value if math.isfinite(value) else None
