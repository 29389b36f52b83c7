"""The rule that a loss uses its reference as what the policy is compared with.

A reference with the wrong sign, or that of the other response, leaves every value finite and every gradient right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qpref.hooks.types import Loss
from qpref.testing.calls import BrokenRule, Built, NotApplicable, attempt
from qpref.testing.examples import Example, near_reference, untrained
from qpref.testing.outputs import listed, metrics_of, same

STEP = 1e-4
"""Nats by which the reference of each token is raised and lowered for a central difference."""
LEAST_PULL = 0.05
"""Share of the change that has to be in the right direction, as for the gradient by the policy."""


def check_reference(record: Loss, options: Any) -> None:
    """Require rewards that are equal while policy and reference are, and the opposite effect of the two on the loss.

    A reward without the reference is free to differ. The second is asked of losses that detach nothing: the reference
    may enter a weight or a target of its own.
    """
    built, examples = Built(record, options), near_reference()
    if "reference" not in built.needs:
        raise NotApplicable("it has no reference")
    _refuse_unequal_starts(built, examples)
    if not record.is_monotone or (record.detaches is not None and attempt("detaches", record.detaches, options)):
        return
    sides = _sides(built, examples)
    rises = {name: _rise(built, examples, change) for name, change in sides.items()}
    better, worse = rises.values()
    if not better - worse > LEAST_PULL * (abs(better) + abs(worse)):
        first, second = rises
        raise BrokenRule(
            f"raising the reference's log-probabilities acts as raising the policy's would: the losses' derivative is "
            f"{better:.4g} by those of {first} and {worse:.4g} by those of {second} responses, and the first has to be "
            "the larger"
        )


def _refuse_unequal_starts(built: Built, examples: Sequence[Example]) -> None:
    same_both = [replace(one, first=untrained(one.first), second=untrained(one.second)) for one in examples]
    starts, moved = metrics_of(built, same_both), metrics_of(built, [_raised(one, 1.0) for one in same_both])
    for name in ("rewards/chosen", "rewards/rejected"):
        if name not in starts or name not in moved:
            continue  # the rule of the metrics names it
        rewards, others = (values[name][~values[name].isnan()] for values in (starts, moved))
        if not same(rewards, others, 1e-9) and not same(rewards, rewards[:1].expand_as(rewards), 1e-9):
            raise BrokenRule(
                f"while policy and reference are the same, {name} differs between examples: {listed(rewards)}"
            )


def _sides(built: Built, examples: Sequence[Example]) -> dict[str, Sequence[tuple[bool, bool]]]:
    """Return what is raised of each example, its first and its second response, for both sides by name."""
    if built.paired:
        return {"chosen": [(True, False)] * len(examples), "rejected": [(False, True)] * len(examples)}
    return {
        "desirable": [(one.desirable, False) for one in examples],
        "undesirable": [(not one.desirable, False) for one in examples],
    }


def _rise(built: Built, examples: Sequence[Example], which: Sequence[tuple[bool, bool]]) -> float:
    """Return the derivative of the summed losses by the reference's log-probabilities of some responses."""
    ends = [
        built.values(
            [_raised(one, step * first, step * second) for one, (first, second) in zip(examples, which, strict=True)]
        )
        for step in (STEP, -STEP)
    ]
    return float((ends[0] - ends[1]).sum() / (2 * STEP))


def _raised(example: Example, first: float, second: float | None = None) -> Example:
    """Raise the reference's log-probability of each token by some nats; of the second response as of the first."""
    raised: Example = replace(
        example,
        first=replace(example.first, reference=example.first.reference + first),
        second=replace(example.second, reference=example.second.reference + (first if second is None else second)),
    )
    return raised
