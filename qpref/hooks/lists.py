"""Metrics of ranked lists, for list losses and for the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qpref.records import ListInputs

if TYPE_CHECKING:
    from torch import Tensor


def list_reward_metrics(rewards: Tensor, inputs: ListInputs) -> dict[str, Tensor]:
    """Compute the usual reward metrics of N lists, detached.

    rewards/chosen is that of the best response, rewards/rejected the mean of the others, and rewards/margins their
    difference. rewards/accuracies is the share of the list's ranked pairs in the right order; list/top1 is 1 where the
    best response has the highest reward. Equal rewards count half.

    Args:
        rewards: [R] implicit rewards of the responses (nats times beta).
    """
    chosen, rejected = best_and_rest(rewards.detach(), inputs)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": ordered_share(rewards.detach(), inputs),
        "list/top1": _top1(rewards.detach(), inputs),
    }


def best_and_rest(values: Tensor, inputs: ListInputs) -> tuple[Tensor, Tensor]:
    """Return [N] values of the best responses and [N] means of the others; those that tie for the first rank are best.

    Args:
        values: [R] one for each response.
    """
    import torch

    sides: tuple[list[Tensor], list[Tensor]] = [], []
    for each, ranks in zip(inputs.by_list(values), inputs.by_list(inputs.ranks), strict=True):
        for side, members in zip(sides, (ranks == 1, ranks > 1), strict=True):
            side.append(each.where(members, each.new_zeros(())).sum() / members.sum())
    return torch.stack(sides[0]), torch.stack(sides[1])


def ordered_share(values: Tensor, inputs: ListInputs) -> Tensor:
    """Return the [N] shares of each list's ranked pairs whose better response has the greater value; ties count half.

    Args:
        values: [R] one for each response.
    """
    import torch

    shares = []
    for each, better in zip(inputs.by_list(values), inputs.is_better(), strict=True):
        first, second = each[:, None], each[None, :]
        right = (first > second).to(each.dtype) + 0.5 * (first == second)
        shares.append((right * better).sum() / better.sum())
    return torch.stack(shares)


def _top1(rewards: Tensor, inputs: ListInputs) -> Tensor:
    import torch

    found = []
    for each, ranks in zip(inputs.by_list(rewards), inputs.by_list(inputs.ranks), strict=True):
        lowest = each.new_full((), -torch.inf)
        best, other = each.where(ranks == 1, lowest).amax(), each.where(ranks > 1, lowest).amax()
        found.append((best > other).to(each.dtype) + 0.5 * (best == other))
    return torch.stack(found)
