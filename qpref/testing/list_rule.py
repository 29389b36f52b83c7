"""The rule of the loss contract that is on lists alone; the other rules call a list loss with lists of two."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qpref.hooks.types import ListLoss, Loss
from qpref.records import ListInputs
from qpref.testing.calls import BrokenRule, Built, LossInputs, NotApplicable, attempt, columns_of, list_of_scores
from qpref.testing.examples import LEVELS, Draws, Ranked, level
from qpref.testing.gradients import FrozenDetached, central_differences

RANKS = ((1, 2), (1, 2, 3), (1, 1, 3), (1, 2, 2, 4), (1, 2, 3, 4, 5))
"""Ranks of the lists that a loss is called with: of several lengths, with and without ties."""


def check_lists(record: Loss, options: Any) -> None:
    """Require one value per list whatever its length, its order among ties and its neighbours; gradients that equal
    finite differences; finite values; and, from the reference on, a rising first and a falling last response."""
    if not isinstance(record, ListLoss):
        raise NotApplicable("it isn't on lists")
    built = Built(record, options)
    lists = random_lists(1)
    values = _values(built, lists)
    is_alone = record.scope_of(options) == "example"
    alone = torch.cat([_values(built, [each]) for each in lists]) if is_alone else values
    if not torch.allclose(alone, values, rtol=1e-12, atol=1e-12):
        raise BrokenRule(f"lists alone are {_listed(alone)}, together {_listed(values)}")
    exchanged = _values(built, [_exchanged(each) for each in lists])
    if not torch.allclose(exchanged, values, rtol=1e-9, atol=1e-9):
        raise BrokenRule(f"responses of equal rank exchanged, {_listed(values)} become {_listed(exchanged)}")
    _check_gradient(record, options, built, lists)
    _check_finite(built)
    _check_accuracies(built)
    if record.is_monotone:
        _check_direction(built, lists)


def random_lists(seed: int) -> list[Ranked]:
    """Make a list of each of RANKS, with responses of 1 to 4 tokens."""
    draws = Draws(seed)
    return [
        Ranked(
            ranks,
            tuple(draws.scores(1 + index % 4) for index in range(len(ranks))),
            margin=(0.0, 0.7)[number % 2],
            numbers=(0.3 * number, 1.0 - number),
        )
        for number, ranks in enumerate(RANKS)
    ]


def given(built: Built, lists: Sequence[Ranked], dtype: torch.dtype = torch.float64) -> LossInputs:
    """Lay lists out as the core does."""
    policy, reference = list_of_scores([one for each in lists for one in each.responses], dtype, built.needs)
    policy.values.requires_grad_()
    ranks = torch.tensor([rank for each in lists for rank in each.ranks])
    inputs = ListInputs(
        policy=policy,
        reference=reference if "reference" in built.needs else None,
        sizes=tuple(len(each.ranks) for each in lists),
        ranks=ranks,
        scores=(1 / ranks).to(dtype) if "scores" in built.needs else None,
        margin=torch.tensor([each.margin for each in lists], dtype=dtype),
        columns=columns_of(lists, built.columns, dtype),
        state=built.state(dtype),
    )
    return LossInputs(inputs, {"responses": policy.values})


def _values(built: Built, lists: Sequence[Ranked]) -> Tensor:
    return built(given(built, lists)).losses.detach()


def _exchanged(each: Ranked) -> Ranked:
    """Exchange two responses of equal rank, where there are some."""
    responses = list(each.responses)
    for index, (rank, following) in enumerate(itertools.pairwise(each.ranks)):
        if rank == following:
            responses[index], responses[index + 1] = responses[index + 1], responses[index]
    return replace(each, responses=tuple(responses))


def _check_gradient(record: Loss, options: Any, built: Built, lists: Sequence[Ranked]) -> None:
    detaches = record.detaches is not None and bool(attempt("detaches", record.detaches, options))
    inputs = given(built, lists)
    weights = torch.linspace(0.7, 1.3, len(lists), dtype=torch.float64)
    losses, (exact,) = built.gradient(inputs, weights)
    estimate = central_differences(FrozenDetached(built, inputs, weights, detaches), inputs.leaves["responses"])
    allowed = 1e-4 * torch.maximum(exact.abs(), estimate.abs()) + 1e-8 * max(1.0, float(losses.abs().sum()))
    worst = int(((exact - estimate).abs() - allowed).argmax())
    if not (exact[worst] - estimate[worst]).abs() <= allowed[worst]:
        raise BrokenRule(f"in a token of a list: gradient {exact[worst]:.6g}, finite difference {estimate[worst]:.6g}")


def _check_finite(built: Built) -> None:
    levels = itertools.product(LEVELS, repeat=3)
    lists = [
        Ranked((1, 2, 3), (level(first, -1.0), level(second, third), level(third, first)))
        for first, second, third in levels
    ]
    for dtype in (torch.float32, torch.float64):
        inputs = given(built, lists, dtype)
        losses, (gradient,) = built.gradient(inputs, torch.ones(len(lists), dtype=dtype))
        for what, values in (("a value", losses), ("a gradient", gradient)):
            if not values.isfinite().all():
                raise BrokenRule(f"{what} of a list of three is {values[~values.isfinite()][0]} in {dtype}")


def _check_accuracies(built: Built) -> None:
    """Require rewards/accuracies of 1 for lists in the right order by any reward, and of 0 for the opposite order."""
    draws = Draws(2)
    # The same response throughout a list: a loss that weighs tokens weighs them alike.
    lists = [Ranked(ranks, (draws.scores(3),) * len(ranks)) for ranks in RANKS]
    inputs = given(built, lists)
    found = built(inputs).metrics.get("rewards/accuracies")
    if found is None or found.shape != (len(lists),):
        raise BrokenRule("rewards/accuracies of lists are missing, or not one for each list")
    better = replace(inputs.inputs, policy=_ordered(inputs.inputs, best_first=True))
    worse = replace(inputs.inputs, policy=_ordered(inputs.inputs, best_first=False))
    for ordered, share in ((better, 1.0), (worse, 0.0)):
        metrics = built(LossInputs(ordered, {"responses": ordered.policy.values})).metrics
        if bool((metrics["rewards/accuracies"] != share).any()):
            raise BrokenRule(f"rewards/accuracies of lists {'in' if share else 'against'} the right order: "
                             f"{_listed(metrics['rewards/accuracies'])}")  # fmt: skip


def _ordered(inputs: ListInputs, best_first: bool) -> Any:
    """Give responses of better ranks higher log-probabilities, beyond what the reference says; or lower ones."""
    by_token = torch.repeat_interleave(inputs.ranks, torch.tensor(inputs.policy.lengths)).double()
    reference = inputs.policy.values if inputs.reference is None else inputs.reference.values
    values = reference.detach() - (by_token if best_first else 6 - by_token) * 50
    return replace(inputs.policy, values=values.requires_grad_())


def _check_direction(built: Built, lists: Sequence[Ranked]) -> None:
    near = [
        replace(each, margin=0.0, responses=tuple(replace(one, reference=one.policy) for one in each.responses))
        for each in lists
    ]
    inputs = given(built, near)
    _, (gradient,) = built.gradient(inputs, torch.ones(len(near), dtype=torch.float64))
    slopes = torch.stack([part.sum() for part in gradient.split(list(inputs.inputs.policy.lengths))])
    for each, ranks in zip(inputs.inputs.by_list(slopes), RANKS, strict=True):
        if not (each[0] < 0 < each[-1]):
            raise BrokenRule(
                f"where policy and reference are the same, a list of ranks {ranks} has gradients {_listed(each)}: the "
                "first response has to rise and the last to fall"
            )


def _listed(values: Tensor) -> str:
    return ", ".join(f"{value:.10g}" for value in values.flatten().tolist())
