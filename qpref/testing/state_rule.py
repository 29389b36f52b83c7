"""The rule for losses that keep a state from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qpref.hooks.loss_state import initial_problem
from qpref.hooks.types import Loss
from qpref.testing.calls import BrokenRule, Built, attempt
from qpref.testing.examples import Draws, Example, extreme_completions, extreme_pairs
from qpref.testing.tables import built_with_each

STEPS = 3


def state_rule(record: Loss, options: Any) -> None:
    """Require a state that steps change, whatever the examples' order, and that stays finite after extreme steps.

    A loss without a state keeps the rule.
    """
    initial = attempt("state", record.state_of, options)
    if problem := initial_problem(initial):
        raise BrokenRule(problem)
    if not initial:
        return
    if (scope := record.scope_of(options)) != "step":
        raise BrokenRule(f"has a state and the scope {scope!r}; only a loss of scope 'step' may have one")
    built = Built(record, options)
    state = built.state(torch.float64)
    first = state
    for seed in range(STEPS):
        examples = Draws(seed).examples(6)
        after, other = _after(built, state, examples), _after(built, state, examples[::-1])
        for name, value in after.items():
            if value.dtype != torch.float64:
                raise BrokenRule(f"{name} of its state of torch.float64 is {value.dtype} after a step")
            if not torch.allclose(value, other[name], rtol=1e-9, atol=1e-9):
                raise BrokenRule(
                    f"{name} of its state depends on the order of the examples: {value}, and {other[name]}"
                )
        state = after
    if idle := [name for name, value in state.items() if torch.equal(value, first[name])]:
        raise BrokenRule(f"no step changes {idle[0]} of its state")
    if not any(_reads_state(each) for each in (built, *built_with_each(record))):
        raise BrokenRule("no loss depends on its state")
    _stay_finite(built, state)


def _reads_state(built: Built) -> bool:
    """Return whether a loss differs between the state that a run begins with and the one after some steps."""
    last = built.state(torch.float64)
    for seed in range(STEPS):
        last = _after(built, last, Draws(seed).examples(6))
    given = built.given(Draws(STEPS).examples(6))
    return not torch.equal(built(given).losses, built(replace(given, inputs=replace(given.inputs, state=last))).losses)


def _stay_finite(built: Built, state: dict[str, Tensor]) -> None:
    """Require finite states, values and gradients after steps of extreme examples."""
    state = {name: value.float() for name, value in state.items()}
    for examples in extreme_pairs() if built.paired else extreme_completions("mismatched" in built.needs):
        state = _after(built, state, examples, torch.float32)
        if bad := [name for name, value in state.items() if not value.isfinite().all()]:
            raise BrokenRule(f"{bad[0]} of its state is not finite after a step of extreme examples")
    examples = Draws().examples(6)
    given = built.given(examples, dtype=torch.float32)
    given = replace(given, inputs=replace(given.inputs, state=state))
    losses, gradients = built.gradient(given, torch.ones(len(examples)))
    if not all(bool(value.isfinite().all()) for value in (losses, *gradients)):
        raise BrokenRule("value or gradient is not finite in the step after one of extreme examples")


def _after(
    built: Built, state: dict[str, Tensor], examples: Sequence[Example], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Return the state after a step of these examples."""
    given = built.given(examples, dtype=dtype)
    return state | dict(built(replace(given, inputs=replace(given.inputs, state=state))).state)
