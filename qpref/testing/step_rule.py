"""The rule that what a loss makes of a step doesn't grow or shrink with the number of its examples."""

from __future__ import annotations

from typing import Any

import torch

from qpref.hooks.types import Loss
from qpref.testing.calls import BrokenRule, Built, NotApplicable
from qpref.testing.examples import Draws

MOST = 1.4
"""Largest factor on an example's gradient; a sum or a mean that the loss takes makes it 2. The deviation of a small
sample, or a share of the examples that is rounded, is within it."""


def check_scale(record: Loss, options: Any) -> None:
    """Require that with every example twice in the step, each copy has about the gradient of the one.

    The loop divides the summed losses by the number of examples. A loss that does so itself learns more slowly the more
    examples a step has, and one that returns sums learns faster.
    """
    if record.scope_of(options) == "example":
        raise NotApplicable("it sees one example at a time")
    built, examples = Built(record, options), Draws().examples(6)
    once, twice = (_size(built, step) for step in (examples, [*examples, *examples]))
    factor = twice / 2**0.5 / once if once > 0 else 1.0
    if not 1 / MOST < factor < MOST:
        raise BrokenRule(
            f"with each example twice in a step, the gradient of an example is {factor:.2f} times as large"
        )


def _size(built: Built, examples: Any) -> float:
    """Return the norm of the summed losses' gradient with respect to all tokens."""
    given = built.given(examples)
    _, gradients = built.gradient(given, torch.ones(len(examples), dtype=torch.float64))
    return float(torch.cat(gradients).norm())
