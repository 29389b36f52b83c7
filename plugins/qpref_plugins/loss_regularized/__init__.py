"""DPO with a further restraint: on the chosen response, on length, on the scale of the rewards, on the ratios.

Dc and Dr are the summed log-ratios of policy to reference of the chosen and the rejected response, h = Dc - Dr,
ls is log sigmoid and m the row's margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs

LARGEST_EXPONENT = 80.0
"""exp(80) is 5.5e34, so the reward of `chipo` stays finite in float32 with `beta` at its limit."""


class DpopOptions(Options):
    """Options of the loss `dpop`."""

    beta: float = Field(
        default=0.3,
        gt=0,
        description="Strength of the tie to the reference, as in dpo. Usual: 0.1 to 0.5.",
    )
    penalty: float = Field(
        default=50.0,
        ge=0,
        description="The paper's lambda: each nat by which the chosen response is less probable than under the "
        "reference costs as much as this many nats of difference between the two responses. 0 is plain DPO. Usual: 5 "
        "to 500.",
    )


class RDpoOptions(Options):
    """Options of the loss `r_dpo`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the tie to the reference, as in dpo. Usual: 0.05 to 0.5.",
    )
    alpha: float = Field(
        default=0.01,
        ge=0,
        description="Reward per token: a chosen response that is longer by 100 tokens counts as ahead by 100 alpha, "
        "so less is learned from it, and more from one that is shorter. 0 is plain DPO. Usual: 0.005 to 0.1.",
    )


class CalDpoOptions(Options):
    """Options of the loss `cal_dpo`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="A chosen response's log-ratio is driven to 1 / (2 beta) and a rejected one's to -1 / (2 beta): 5 "
        "nats away from the reference at 0.1, 500 at 0.001. It doesn't scale the sigmoid.",
    )
    calibration: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the two squares. The authors' code has 0.5.",
    )


class ChipoOptions(Options):
    """Options of the loss `chipo`."""

    beta: float = Field(
        default=0.05,
        gt=0,
        le=100,
        description="Strength of the tie to the reference: a response's reward is beta times the sum of its log-ratio "
        "and its ratio. Smaller than DPO's, since a response that becomes e^5 times as probable has a ratio of 148. "
        "Usual: 0.005 to 0.05.",
    )
    clip: float = Field(
        default=10.0,
        gt=0,
        description="The paper's 2 R_max: a pair whose reward margin is beyond it, in either direction, has no "
        "gradient.",
    )


def build_dpop(options: DpopOptions) -> Callable[[PairedInputs], LossOutput]:
    """-ls(beta (h - lambda max(0, -Dc)) - m).

    Pal et al. 2024, "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive", the DPOP loss. At the
    reference the gradient is DPO's: the penalty begins where the chosen response has become less probable.
    """

    def dpop(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = _log_ratios(inputs)
        z = options.beta * (chosen - rejected - options.penalty * (-chosen).relu()) - inputs.margin
        return LossOutput(losses=-logsigmoid(z), metrics=reward_metrics(options.beta * chosen, options.beta * rejected))

    return dpop


def build_r_dpo(options: RDpoOptions) -> Callable[[PairedInputs], LossOutput]:
    """-ls(beta h + alpha (n_c - n_r) - m), n_c and n_r the responses' tokens.

    Park et al. 2024, "Disentangling Length from Quality in Direct Preference Optimization". The sign follows from its
    objective: with r - alpha n maximized under the KL, r is beta times the log-ratio plus alpha n.
    """

    def r_dpo(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = (options.beta * log_ratio for log_ratio in _log_ratios(inputs))
        tokens = inputs.policy.chosen.count - inputs.policy.rejected.count
        z = chosen - rejected + options.alpha * tokens - inputs.margin
        return LossOutput(losses=-logsigmoid(z), metrics=reward_metrics(chosen, rejected))

    return r_dpo


def build_cal_dpo(options: CalDpoOptions) -> Callable[[PairedInputs], LossOutput]:
    """-ls(h) + w [(Dc - 1 / (2 beta))^2 + (Dr + 1 / (2 beta))^2]. A row's margin is ignored: rewards have targets.

    Xiao et al. 2024, "Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment".
    """
    target = 1 / (2 * options.beta)

    def cal_dpo(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = _log_ratios(inputs)
        squares = (chosen - target).square() + (rejected + target).square()
        losses = -logsigmoid(chosen - rejected) + options.calibration * squares
        return LossOutput(losses=losses, metrics=reward_metrics(options.beta * chosen, options.beta * rejected))

    return cal_dpo


def build_chipo(options: ChipoOptions) -> Callable[[PairedInputs], LossOutput]:
    """-ls(clip(beta (phi(Dc) - phi(Dr))) - m), phi(D) = D + e^D, clip to [-2 R_max, 2 R_max].

    Huang et al. 2024, "Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via
    Chi-Squared Preference Optimization", algorithm 1. Rewards are beta (phi(D) - 1), 0 at the reference; the 1 cancels
    in the loss. The argument of exp is capped at 80.
    """

    def reward(log_ratio: Tensor) -> Tensor:
        return options.beta * (log_ratio + log_ratio.clamp(max=LARGEST_EXPONENT).expm1())

    def chipo(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = map(reward, _log_ratios(inputs))
        z = (chosen - rejected).clamp(-options.clip, options.clip) - inputs.margin
        return LossOutput(losses=-logsigmoid(z), metrics=reward_metrics(chosen, rejected))

    return chipo


def _log_ratios(inputs: PairedInputs) -> tuple[Tensor, Tensor]:
    """Return the log-ratios of the chosen and of the rejected responses, each [N], in nats."""
    policy, reference = inputs.policy, inputs.reference
    assert reference is not None  # needs = {"reference"}
    return policy.chosen.total - reference.chosen.total, policy.rejected.total - reference.rejected.total


DPOP = PairedLoss(
    name="dpop",
    summary="DPO with a penalty on a sinking chosen response (Pal et al. 2024)",
    formula="-ls(beta (h - lambda max(0, -Dc)) - m)",
    paper="Pal et al. 2024, Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
    options=DpopOptions,
    build=build_dpop,
    starts_at=lambda options: math.log(2),
    log_ratios_only=True,
    variants=[{"penalty": 0.0}, {"beta": 0.1, "penalty": 5.0}],
)

R_DPO = PairedLoss(
    name="r_dpo",
    summary="DPO regularized by length (Park et al. 2024)",
    formula="-ls(beta h + alpha (n_c - n_r) - m)",
    paper="Park et al. 2024, Disentangling Length from Quality in Direct Preference Optimization",
    options=RDpoOptions,
    build=build_r_dpo,
    starts_at=lambda options: None if options.alpha else math.log(2),
    log_ratios_only=True,
    variants=[{"alpha": 0.0}, {"beta": 0.5, "alpha": 0.1}],
)

CAL_DPO = PairedLoss(
    name="cal_dpo",
    summary="DPO with calibrated rewards (Xiao et al. 2024)",
    formula="-ls(h) + w [(Dc - 1 / (2 beta))^2 + (Dr + 1 / (2 beta))^2]",
    paper="Xiao et al. 2024, Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment",
    options=CalDpoOptions,
    build=build_cal_dpo,
    ignores=frozenset({"margin"}),
    starts_at=lambda options: math.log(2) + options.calibration / (2 * options.beta**2),
    log_ratios_only=True,
    variants=[{"beta": 0.5}, {"calibration": 0.5}, {"calibration": 0.0}],
)

CHIPO = PairedLoss(
    name="chipo",
    summary="DPO on ratio plus log-ratio, the chi-squared divergence (Huang et al. 2024)",
    formula="-ls(clip(beta (phi(Dc) - phi(Dr))) - m), phi(D) = D + e^D",
    paper="Huang et al. 2024, Correcting the Mythos of KL-Regularization, algorithm 1",
    options=ChipoOptions,
    build=build_chipo,
    starts_at=lambda options: math.log(2),
    log_ratios_only=True,
    variants=[{"beta": 0.005}, {"clip": 2.0}, {"beta": 100.0, "clip": 1000.0}],
)


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield from (DPOP, R_DPO, CAL_DPO, CHIPO)
