"""The rule that losses depend on what their record needs: a reference that isn't used costs a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from qpref.hooks.types import Loss
from qpref.testing.calls import BrokenRule, Built, LossInputs
from qpref.testing.examples import Draws, Example, Scores
from qpref.testing.list_rule import given as given_lists
from qpref.testing.list_rule import random_lists
from qpref.testing.outputs import same
from qpref.testing.tables import built_with_each

SEEDS = range(5)


def check_used_needs(record: Loss, options: Any) -> None:
    """Require that some loss of several batches changes with each input and each column that the record names.

    A column may be unused under some options, such as a weight of 0 for it.
    """
    built = Built(record, options)
    for need in sorted(built.needs):
        if not any(_differ(built, before, after) for before, after in _changes(built, need)):
            raise BrokenRule(f"it needs '{need}', and no loss depends on it")
    for name in built.columns:
        if not any(_reads(each, name) for each in (built, *built_with_each(record))):
            raise BrokenRule(f"it has the column '{name}', and no loss depends on it")


def _reads(built: Built, column: str) -> bool:
    if column not in built.columns:
        return False
    drawn = (built.given(Draws(seed).examples(6)) for seed in SEEDS)
    return any(_differ(built, given, _with_other_numbers(given, column)) for given in drawn)


def _changes(built: Built, need: str) -> Iterator[tuple[LossInputs, LossInputs]]:
    """Make inputs, and the same with others in place of what is needed."""
    for seed in SEEDS:
        if need == "scores":
            given = given_lists(built, random_lists(seed))
            yield given, replace(given, inputs=replace(given.inputs, scores=0.3 + given.inputs.scores**2))
        else:
            examples = Draws(seed).examples(6)
            yield built.given(examples), built.given(list(map(CHANGED[need], examples)))


def _moved(name: str) -> Callable[[Scores], Scores]:
    """Make a change of one of the numbers of each token, by other amounts from token to token."""

    def change(scores: Scores) -> Scores:
        values = getattr(scores, name)
        return replace(scores, **{name: values - torch.linspace(0.1, 0.5, len(values), dtype=values.dtype)})

    return change


def _of_responses(change: Callable[[Scores], Scores]) -> Callable[[Example], Example]:
    return lambda one: replace(one, first=change(one.first), second=change(one.second))


CHANGED: Mapping[str, Callable[[Example], Example]] = {
    "reference": _of_responses(_moved("reference")),
    "prompt": lambda one: replace(one, prompt=one.prompt - 0.3),
    "log_sum_squares": _of_responses(_moved("log_sum_squares")),
    "entropy": _of_responses(_moved("entropy")),
    "tokens": _of_responses(
        lambda scores: replace(scores, tokens=scores.tokens + 7, mask=torch.ones_like(scores.mask))
    ),
    "mismatched": lambda one: replace(one, second=_moved("policy")(one.second)),
}
"""Need -> a change of an example in it alone."""


def _with_other_numbers(given: LossInputs, name: str) -> LossInputs:
    numbers = given.inputs.columns[name]
    columns = {**given.inputs.columns, name: numbers + torch.linspace(0.2, 1.0, len(numbers), dtype=numbers.dtype)}
    return replace(given, inputs=replace(given.inputs, columns=columns))


def _differ(built: Built, before: LossInputs, after: LossInputs) -> bool:
    """Return whether a loss changes by more than rounding."""
    return not same(built(after).losses.detach(), built(before).losses.detach(), 1e-9)
