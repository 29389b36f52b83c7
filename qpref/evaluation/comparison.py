"""A report in words and as JSON: what the numbers mean for somebody who has to act on them."""

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
class ModelReport:
    """One model of the report.

    Attributes:
        reference: name of the model whose reference its rewards are against; None where it has none.
        overlap: of the prompts with this run's training data, before any were left out; None where those data aren't
            known.
    """

    name: str
    kind: str
    reference: str | None
    overlap: Overlap | None
    summary: Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `qpref eval` says.

    Attributes:
        data: the file.
        data_changed: whether a run held out other data than these; None where nobody knows, or others were named.
        pairs: how many were compared; `read` less those left out for overlap and those for `left_out`'s reason.
        left_out: pairs that some model can't be asked about, and the first one's reason.
        beta_from: who says beta.
        dtype: what all models computed in; None for each its own.
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
    models: Sequence[ModelReport]
    data_changed: bool | None = None

    def warnings(self) -> list[str]:
        """What somebody should know before trusting the table, and what to try."""
        found = list(self._about_data())
        for model in self.models:
            found += [f"{model.name}: {text}" for text in _about_model(model.summary.metrics)]
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values; what is undefined is null."""
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

    def _about_data(self) -> Iterator[str]:
        if self.data_changed:
            yield f"{self.data}: has changed since training; these aren't the pairs that the run has held out"
        if self.pairs < FEW_PAIRS:
            yield f"{self.pairs} pairs are few: the intervals say how little is certain"
        count, reason = self.left_out
        if count:
            yield f"{count} of {self.read} pairs are left out of all models, the first: {reason}"
        for model in self.models:
            if model.overlap is not None and model.overlap.normalized:
                also = model.overlap.normalized - model.overlap.exact
                close = f", {also} of them but for case and white space" if also else ""
                share = f"{model.overlap.normalized} of {self.read} prompts{close}"
                if self.overlapping_left_out:
                    yield f"{model.name}: {share} stand in its training data; they are left out"
                else:
                    yield (
                        f"{model.name}: {share} stand in its training data, so its numbers are better than on prompts "
                        "that it hasn't seen; --without-overlap leaves them out"
                    )


def _about_model(metrics: Mapping[str, Estimate]) -> Iterator[str]:
    drift, fell = metrics.get("drift/chosen"), metrics.get("drift/chosen_fell")
    if drift and fell and drift.high < 0 and fell.value > MOST_FELL:
        rejected = metrics["drift/rejected"].value
        yield (
            f"the chosen responses have become less likely since the start ({drift.value:+.1f} nats on average, in "
            f"{fell.value:.0%} of the pairs), while the rejected ones moved by {rejected:+.1f}: likelihood "
            "displacement; the probability goes to answers that are in neither column. Read some with qpref generate. "
            "To try: a larger beta, a lower learning_rate, fewer steps, a loss that also raises the chosen responses' "
            "likelihood (qpref losses), or data without pairs whose two responses are nearly the same"
        )
    saturated = metrics.get("saturated")
    if saturated and saturated.value > MANY_SATURATED:
        yield (
            f"{saturated.value:.0%} of the pairs are saturated: a logistic loss has less than a hundredth of its slope "
            "left there, and more training moves the rest alone. To try: stop earlier, harder pairs, or a loss with a "
            "target for the margin"
        )
    for accuracy in ("rewards/accuracies", "logps/accuracies"):
        effect = metrics.get(f"{accuracy}_length_effect")
        if effect and (effect.low > 0 or effect.high < 0):
            plain, equal = metrics[accuracy].value, metrics[f"{accuracy}_length_controlled"].value
            kind = "longer" if effect.value > 0 else "shorter"
            yield (
                f"it prefers {kind} responses beyond what is right: its accuracy "
                f"{'by reward margin' if accuracy.startswith('rewards') else 'by log-probability'} is {plain:.3f}, and "
                f"{equal:.3f} at equal length"
            )
            return  # by reward where there is one


def _model_json(model: ModelReport) -> dict[str, Any]:
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
            "value": _finite(estimate.value),
            "low": _finite(estimate.low),
            "high": _finite(estimate.high),
            "pairs": estimate.pairs,
        }
        for key, estimate in estimates.items()
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
