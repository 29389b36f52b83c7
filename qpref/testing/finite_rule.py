"""The rule that a loss stays finite wherever a policy can get to, and in every step that data can make."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from qpref.hooks.types import Loss
from qpref.testing.calls import BrokenRule, Built
from qpref.testing.examples import Example, alike, extreme_completions, extreme_pairs
from qpref.testing.outputs import metrics_of


def check_finite(record: Loss, options: Any) -> None:
    """Require finite values and gradients wherever a policy can get to, in float32 and float64."""
    built = Built(record, options)
    for count in (1, 6):
        _refuse_not_finite_alike(built, alike()[:count])
    batches = extreme_pairs() if built.paired else extreme_completions("mismatched" in built.needs)
    for dtype, examples in itertools.product((torch.float32, torch.float64), batches):
        given = built.given(examples, dtype=dtype)
        losses, gradients = built.gradient(given, torch.ones(len(examples), dtype=dtype))
        if not losses.isfinite().all():
            example = examples[int((~losses.isfinite()).nonzero()[0])]
            raise BrokenRule(f"{losses[~losses.isfinite()][0]} in {_name(dtype)} at {example}")
        for (name, _), gradient in zip(given.leaves.items(), gradients, strict=True):
            if not gradient.isfinite().all():
                raise BrokenRule(
                    f"gradient {gradient[~gradient.isfinite()][0]} in {_name(dtype)} at "
                    f"{_owner(examples, name, int((~gradient.isfinite()).nonzero()[0]))}"
                )


def _refuse_not_finite_alike(built: Built, examples: Sequence[Example]) -> None:
    """Require finite values, gradients and rewards where all examples are alike, or a single one makes the step."""
    where = "of a step of equal examples" if len(examples) > 1 else "of a step of one example"
    given = built.given(examples)
    losses, gradients = built.gradient(given, torch.ones(len(examples), dtype=torch.float64))
    found = {
        "the loss": losses,
        **{f"the gradient by {leaf}": each for leaf, each in zip(given.leaves, gradients, strict=True)},
    }
    if built.paired:
        found |= {name: each for name, each in metrics_of(built, examples).items() if name.startswith("rewards/")}
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            raise BrokenRule(f"{name} {where} is {values[~values.isfinite()][0]}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _owner(examples: Sequence[Example], leaf: str, index: int) -> Example:
    """Return the example that a token of a leaf belongs to."""
    for example in examples:
        tokens = {"rejected": example.second.policy, "prompt": example.prompt}.get(leaf, example.first.policy)
        if index < len(tokens):
            return example
        index -= len(tokens)
    raise IndexError(index)
