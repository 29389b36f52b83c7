"""DPO with a beta that follows each step's margins, and without the pairs whose margins are the farthest off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs

MIN_BETA = 1e-3


class BetaDpoOptions(Options):
    """Options of the loss `beta_dpo`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="The beta of a step whose mean margin is the moving average, and the factor on the rewards that "
        "are logged. Usual: 0.1 to 0.5.",
    )
    alpha: float = Field(
        default=0.6,
        ge=0,
        description="Change of beta, as a share of it, for each nat by which the step's mean margin is above the "
        "moving average. 0 keeps beta. Usual: 0.5 to 1.",
    )
    filter: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of a step's pairs to leave out: those whose margins are the farthest from the moving "
        "average. 0 keeps all. Usual: 0 to 0.4.",
    )
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="Share of the moving average that stays at each step. Usual: 0.9."
    )


def beta_dpo(options: BetaDpoOptions) -> Callable[[PairedInputs], LossOutput]:
    """-log sigmoid(beta_t h - m) of the pairs that are kept, times pairs / kept pairs; 0 of the others.

    M_0 = momentum M_0 + (1 - momentum) mean(h) over the step's pairs, and beta_t = beta (1 + alpha (mean of the kept
    h - M_0)), at least 1e-3; nothing of this has a gradient. The pairs nearest to M_0 are kept, and with them those as
    far as the last of them. The paper draws them at random instead, by a normal density around M_0, which has the same
    order; here two runs keep the same pairs.

    Wu et al. 2024, "beta-DPO: Direct Preference Optimization with Dynamic beta".
    """

    def beta_dpo(inputs: PairedInputs) -> LossOutput:
        policy, reference = inputs.policy, inputs.reference
        assert reference is not None  # needs = {"reference"}
        chosen = policy.chosen.total - reference.chosen.total
        rejected = policy.rejected.total - reference.rejected.total
        gaps = (chosen - rejected).detach()
        average = options.momentum * inputs.state["average"] + (1 - options.momentum) * gaps.mean()
        kept = _nearest(gaps, average, options.filter)
        mean = (gaps * kept).sum() / kept.sum()
        beta = (options.beta * (1 + options.alpha * (mean - average))).clamp(min=MIN_BETA)
        losses = -logsigmoid(beta * (chosen - rejected) - inputs.margin)
        metrics = {"beta_dpo/beta": beta.expand(len(gaps)), "beta_dpo/average": average.expand(len(gaps))}
        return LossOutput(
            losses=losses * kept * (len(gaps) / kept.sum()),
            metrics=reward_metrics(options.beta * chosen, options.beta * rejected) | metrics,
            state={"average": average},
        )

    return beta_dpo


def _nearest(gaps: Tensor, average: Tensor, left_out: float) -> Tensor:
    """[N] 1 for the pairs to keep, else 0, in the dtype of `gaps`."""
    count = max(1, math.floor(len(gaps) * (1 - left_out) + 1e-9))  # 10 * (1 - 0.9) is a little below 1
    distances = (gaps - average).abs()
    return (distances <= torch.kthvalue(distances, count).values).to(gaps.dtype)


BETA_DPO = PairedLoss(
    name="beta_dpo",
    summary="DPO with a beta that follows the step's margins, without outliers (Wu et al. 2024)",
    formula="-log sigmoid(beta (1 + alpha (mean h - M_0)) h - margin) of the pairs whose h is the nearest to M_0, "
    "M_0 = moving average of h",
    paper='Wu et al. 2024, "beta-DPO: Direct Preference Optimization with Dynamic beta"',
    options=BetaDpoOptions,
    build=beta_dpo,
    scope="step",
    starts_at=lambda options: math.log(2),
    log_ratios_only=True,
    detaches=lambda options: True,
    state={"average": 0.0},
    variants=({"filter": 0.0}, {"alpha": 0.0, "momentum": 0.0}),
)


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    """Offer `beta_dpo`."""
    yield BETA_DPO
