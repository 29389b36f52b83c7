"""Output of a loss, read for the rules; anything but metrics by name breaks the rule that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qpref.hooks.metric_names import name_problem
from qpref.testing.calls import BrokenRule, Built
from qpref.testing.examples import Example


def metrics_of(built: Built, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Call the loss, and return its metrics by name."""
    return tensors(built(built.given(examples)).metrics)


def metric(metrics: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a metric that every loss has."""
    if name not in metrics:
        raise BrokenRule(f"no metric {name}")
    return metrics[name]


def tensors(metrics: Any) -> dict[str, Tensor]:
    """Check that metrics are tensors under names that a loss may use."""
    if not isinstance(metrics, Mapping):
        raise BrokenRule(f"returns metrics as {type(metrics).__name__}, not by name")
    for name, value in metrics.items():
        if problem := name_problem(name):
            raise BrokenRule(f"returns a metric that {problem}")
        if not isinstance(value, Tensor):
            raise BrokenRule(f"returns the metric {name} as {type(value).__name__}, not a tensor")
    return dict(metrics)


def same(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Compare within a relative and an absolute tolerance."""
    return actual.shape == expected.shape and torch.allclose(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance
    )


def listed(values: Tensor) -> str:
    """Format numbers for a message."""
    return ", ".join(f"{value:.10g}" for value in values.flatten().tolist())
