"""Rules about what a loss teaches and reports: a loss that breaks one trains smoothly, and learns something else.

They look at a policy that is a little off its reference, as it is during most of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qpref.hooks import UnpairedLoss
from qpref.hooks.types import Loss
from qpref.testing.calls import BrokenRule, Built, NotApplicable, attempt
from qpref.testing.examples import Example, near_reference
from qpref.testing.outputs import listed, metric, metrics_of

RAISE = 0.1
"""Nats by which a response's tokens are raised, several times their distance from the reference."""
LEAST_PULL = 0.05
"""Share of the gradient that has to be in the right direction; what is left of two equal sides is under 0.02."""
STEP = 1e-4
"""Step of the central differences by a margin."""
TINY = 1e-9


def check_direction(record: Loss, options: Any) -> None:
    """Require a gradient that raises chosen against rejected, or desirable and lowers undesirable completions."""
    built, examples = Built(record, options), near_reference()
    sides = _gradients(built, examples)
    if built.paired:
        _refuse_unmoved_side(record, options, sides)
    if not record.is_monotone:
        raise NotApplicable("it declares that it isn't monotone")
    means = {name: torch.stack([part.mean() for part in parts]) for name, parts in sides.items()}
    if built.paired:
        pull, size = means["chosen"].sum() - means["rejected"].sum(), sum(each.abs().sum() for each in means.values())
        if not pull < -LEAST_PULL * size:
            raise BrokenRule(
                f"near the reference its gradient doesn't raise chosen against rejected: by token and pair it is "
                f"{listed(means['chosen'])} for chosen and {listed(means['rejected'])} for rejected responses"
            )
        return
    desirable = torch.tensor([example.desirable for example in examples])
    for name, members, sign in (("desirable", desirable, 1), ("undesirable", ~desirable, -1)):
        gradients = means["completion"][members]
        if not sign * gradients.sum() < -LEAST_PULL * gradients.abs().sum():
            wanted = "raise" if sign > 0 else "lower"
            raise BrokenRule(f"its gradient doesn't {wanted} {name} completions: by token it is {listed(gradients)}")


def check_reward(record: Loss, options: Any) -> None:
    """Require that a response's reward rises with its log-probabilities, in every example."""
    built, examples = Built(record, options), near_reference()
    before = metrics_of(built, examples)
    sides = (("rewards/chosen", "first"), ("rewards/rejected", "second" if built.paired else "first"))
    for name, side in sides:
        after = metric(metrics_of(built, [_raised(one, side) for one in examples]), name)
        is_its = torch.tensor([built.paired or one.desirable == (name == "rewards/chosen") for one in examples])
        rise = (after - metric(before, name))[is_its]
        if not bool((rise > 0).all()):
            what = (
                name.removeprefix("rewards/")
                if built.paired
                else {"rewards/chosen": "desirable"}.get(name, "undesirable")
            )
            raise BrokenRule(
                f"{name} doesn't rise with the log-probabilities of the {what} responses: {RAISE} nats a token more "
                f"change it by {listed(rise)}"
            )


def check_margin(record: Loss, options: Any) -> None:
    """Require that no loss falls as its row's margin grows, and that a loss without use for margins says so."""
    if isinstance(record, UnpairedLoss):
        raise NotApplicable("single completions have no margin")
    built, examples = Built(record, options), near_reference()
    ends = [_at_margins(built, examples, step) for step in (STEP, -STEP)]
    rise = (ends[0] - ends[1]) / (2 * STEP)
    is_used = bool((rise.abs() > TINY).any())
    declared = "margin" in ignored(record, options)
    if is_used and declared:
        raise BrokenRule("it declares that it ignores margins, and a row's margin changes its loss")
    if declared:
        raise NotApplicable("it declares that it ignores margins")
    if not is_used:
        raise BrokenRule("a row's margin doesn't change its loss")
    if record.is_monotone and bool((rise < -TINY).any()):
        raise BrokenRule(f"the loss falls as the margin that a row requires grows: its derivative is {listed(rise)}")


def check_every_token(record: Loss, options: Any) -> None:
    """Require a gradient at every place of a response, counted from its start and from its end."""
    built = Built(record, options)
    for side, parts in _gradients(built, near_reference()).items():
        if not any(bool(part.any()) for part in parts):
            continue  # the direction says whether that is meant
        shortest = min(map(len, parts))
        for place in (*range(shortest), *range(-shortest, 0)):
            if not any(bool(part[place]) for part in parts):
                number = place + 1 if place >= 0 else -place
                which = f"token {number}, counted from the {'start' if place >= 0 else 'end'}"
                raise BrokenRule(f"{which}, has no gradient in any {side} response")


def ignored(record: Loss, options: Any) -> frozenset[str]:
    """Return what a loss leaves out on purpose, as its record says."""
    names: frozenset[str] = attempt("ignores", lambda: frozenset(record.ignores_of(options)))
    return names


def _refuse_unmoved_side(record: Loss, options: Any, sides: dict[str, Sequence[Tensor]]) -> None:
    detaches = record.detaches is not None and bool(attempt("detaches", record.detaches, options))
    for side, parts in sides.items():
        if not detaches and side not in ignored(record, options) and not any(bool(part.any()) for part in parts):
            raise BrokenRule(
                f"it has no gradient in any {side} response; a loss that leaves them out on purpose declares "
                f'ignores = {{"{side}"}}'
            )


def _gradients(built: Built, examples: Sequence[Example]) -> dict[str, Sequence[Tensor]]:
    """Return the gradient of the summed loss, for each side a tensor by response, without that of prompts."""
    given = built.given(examples)
    _, gradients = built.gradient(given, torch.ones(len(examples), dtype=torch.float64))
    named = dict(zip(given.leaves, gradients, strict=True))
    lengths = {
        side: [len((one.second if side == "rejected" else one.first).policy) for one in examples] for side in named
    }
    return {side: gradient.split(lengths[side]) for side, gradient in named.items() if side != "prompt"}


def _raised(example: Example, side: str) -> Example:
    scores = getattr(example, side)
    changed: Example = replace(example, **{side: replace(scores, policy=scores.policy + RAISE)})
    return changed


def _at_margins(built: Built, examples: Sequence[Example], margin: float) -> Tensor:
    """Return each example's loss with that margin on its own row alone, [N]."""
    return torch.stack(
        [
            built.values([replace(one, margin=margin if one is each else 0.0) for one in examples])[index]
            for index, each in enumerate(examples)
        ]
    )
