"""Losses on lists of ranked responses to one prompt: Plackett-Luce, and LiPO's lambda-weighted pairs.

D is a response's log-ratio, its summed log-probability under the policy minus that under the reference, s = beta D, ls
is log sigmoid, and m the row's margin. Between responses of one rank nothing is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, ListLoss, Options, hookimpl, list_reward_metrics
from qpref.records import ListInputs, LossOutput

LARGEST_SCORE = 80.0
"""Cap of the exponent in a gain, which keeps it finite in float32."""


class PlackettLuceOptions(Options):
    """Options of the loss `plackett_luce`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the tie to the reference, as in dpo: a larger one keeps the policy closer. "
        "Usual: 0.05 to 0.5.",
    )


class LipoOptions(Options):
    """Options of the loss `lipo`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the tie to the reference, as in dpo. The paper's best are 0.05 to 0.5.",
    )
    weights: Literal["lambda", "none"] = Field(
        default="lambda",
        description='Weight of each pair of the list: "lambda" by how much exchanging the two would change the '
        'ranking\'s DCG, "none" 1 for all, which is RankNet.',
    )
    gain: Literal["wins", "scores"] = Field(
        default="wins",
        description='Label of a response under lambda weights: "wins" is the share of the others that it ranks above, '
        '"scores" the score in its row, which has to be there; the paper\'s lie between 0 and 1.',
    )


def build_plackett_luce(options: PlackettLuceOptions) -> Callable[[ListInputs], LossOutput]:
    """sum_i log(1 + sum_j e^(s_j - s_i + m)), j over the responses that rank below i.

    Rafailov et al. 2023, appendix A.3, without ties: the negative log-likelihood of the ranking, where each
    response in turn is preferred to all that follow. A response that ties with others competes with those below them
    all the same, and not with them.
    """

    def plackett_luce(inputs: ListInputs) -> LossOutput:
        rewards = _rewards(inputs, options.beta)
        losses = []
        for each, better, margin in zip(inputs.by_list(rewards), inputs.is_better(), inputs.margin, strict=True):
            differences = each[None, :] - each[:, None] + margin
            worse = differences.masked_fill(~better, -math.inf).logsumexp(1)
            losses.append((-logsigmoid(-worse)).where(better.any(1), each.new_zeros(())).sum())
        return LossOutput(losses=torch.stack(losses), metrics=list_reward_metrics(rewards, inputs))

    return plackett_luce


def build_lipo(options: LipoOptions) -> Callable[[ListInputs], LossOutput]:
    """-sum_ij w_ij ls(s_i - s_j - m), i ranked above j; w_ij = |G_i - G_j| |1 / log(1 + p_i) - 1 / log(1 + p_j)|.

    Liu et al. 2024: G = 2^label - 1, and p is a response's position, from 1, when the list is sorted by
    s. The weights are constants to the gradient.
    """

    def lipo(inputs: ListInputs) -> LossOutput:
        rewards = _rewards(inputs, options.beta)
        labels = _wins(inputs, rewards.dtype) if options.gain == "wins" else _scores(inputs, rewards.dtype)
        losses = []
        lists = zip(inputs.by_list(rewards), labels, inputs.is_better(), inputs.margin, strict=True)
        for each, label, better, margin in lists:
            values = -logsigmoid(each[:, None] - each[None, :] - margin)
            if options.weights == "lambda":
                values = values * _lambda_weights(each.detach(), label)
            losses.append(values.where(better, each.new_zeros(())).sum())
        return LossOutput(losses=torch.stack(losses), metrics=list_reward_metrics(rewards, inputs))

    return lipo


def _rewards(inputs: ListInputs, beta: float) -> Tensor:
    """[R] implicit rewards of the responses."""
    assert inputs.reference is not None  # needs = {"reference"}
    return beta * (inputs.policy.total - inputs.reference.total)


def _wins(inputs: ListInputs, dtype: torch.dtype) -> list[Tensor]:
    """Return [K] of each list: the share of the other responses that each one ranks above; a tie counts half."""
    found = []
    for better in inputs.is_better():
        above, below = better.sum(1).to(dtype), better.sum(0).to(dtype)
        others = len(better) - 1
        found.append(0.5 + 0.5 * (above - below) / others)
    return found


def _scores(inputs: ListInputs, dtype: torch.dtype) -> list[Tensor]:
    """Return [K] of each list: its row's scores."""
    assert inputs.scores is not None  # needs of gain = "scores"
    return list(inputs.by_list(inputs.scores.to(dtype)))


def _lambda_weights(rewards: Tensor, labels: Tensor) -> Tensor:
    """[K, K] change of the list's DCG if two responses exchanged positions."""
    gains = labels.clamp(max=LARGEST_SCORE).exp2() - 1
    positions = rewards.argsort(descending=True, stable=True).argsort() + 1
    discounts = 1 / (1 + positions.to(rewards.dtype)).log()
    return (gains[:, None] - gains[None, :]).abs() * (discounts[:, None] - discounts[None, :]).abs()


@hookimpl
def qpref_losses() -> Iterator[ListLoss]:
    yield ListLoss(
        name="plackett_luce",
        summary="likelihood of a whole ranking, DPO's listwise form (Rafailov et al. 2023)",
        formula="sum_i log(1 + sum_j e^(s_j - s_i + m)), j ranked below i, s = beta D",
        paper="Rafailov et al. 2023, Direct Preference Optimization, appendix A.3",
        options=PlackettLuceOptions,
        build=build_plackett_luce,
        starts_at=lambda options: math.log(2),
        log_ratios_only=True,
        variants=[{"beta": 0.5}],
    )
    yield ListLoss(
        name="lipo",
        summary="lambda-weighted pairs of a ranking (Liu et al. 2024)",
        formula="-sum_ij |G_i - G_j| |1/log(1 + p_i) - 1/log(1 + p_j)| ls(s_i - s_j - m), i ranked above j, s = beta D",
        paper="Liu et al. 2024, LiPO: Listwise Preference Optimization through Learning-to-Rank",
        options=LipoOptions,
        build=build_lipo,
        needs=lambda options: frozenset({"reference"} | ({"scores"} if options.gain == "scores" else set())),
        starts_at=lambda options: math.log(2) if options.weights == "none" else None,
        log_ratios_only=True,
        detaches=lambda options: options.weights == "lambda",
        variants=[{"beta": 0.5}, {"weights": "none"}, {"gain": "scores"}],
    )
