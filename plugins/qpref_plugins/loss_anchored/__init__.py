"""Losses that compare each response's reward with an anchor, not only the two rewards with each other.

Dc and Dr are the summed log-ratios of policy to reference of the chosen and the rejected response, ls is log sigmoid
and sg the sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, TrlCase, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs


class AnchoredOptions(Options):
    """The option shared by the losses with a reward inside a sigmoid."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the tie to the reference: a response's reward is beta times the change in its "
        "log-probability, and the sigmoid of the reward is almost flat beyond 5 in either direction, which is 50 nats "
        "from the reference at 0.1 and 10 nats at 0.5. Usual: 0.01 to 0.5.",
    )


class NcaPairOptions(AnchoredOptions):
    """Options of the loss `nca_pair`."""


class SppoHardOptions(Options):
    """Options of the loss `sppo_hard`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="The inverse of the paper's step size eta: a chosen response's log-ratio is driven to 1 / (2 beta) "
        "and a rejected one's to -1 / (2 beta), no further, so 0.1 aims 5 nats away from the reference and the "
        "paper's 0.001 aims 500 away.",
    )


class BcoPairOptions(AnchoredOptions):
    """Options of the loss `bco_pair`."""

    baseline: Literal["none", "step"] = Field(
        default="none",
        description="Threshold above which a reward is classified as chosen. none: 0; step: the mean of all chosen and "
        "rejected rewards of the optimizer step, without gradient (the paper's reward shift).",
    )


class ApoZeroOptions(AnchoredOptions):
    """Options of the loss `apo_zero`."""


class ApoDownOptions(AnchoredOptions):
    """Options of the loss `apo_down`."""


def build_nca_pair(options: NcaPairOptions) -> Callable[[PairedInputs], LossOutput]:
    """-ls(beta Dc) - ls(-beta Dc) / 2 - ls(-beta Dr) / 2. A row's margin is ignored: no rewards are compared.

    Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards", the NCA loss of a pair.
    """

    def nca_pair(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = _rewards(inputs, options.beta)
        losses = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return nca_pair


def build_sppo_hard(options: SppoHardOptions) -> Callable[[PairedInputs], LossOutput]:
    """(Dc - 1 / (2 beta))^2 + (Dr + 1 / (2 beta))^2. A row's margin is ignored: no rewards are compared.

    Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment", eq. 4.7, with a win rate of 1 for
    the chosen and 0 for the rejected response, and eta = 1 / beta.
    """
    target = 1 / (2 * options.beta)

    def sppo_hard(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = _rewards(inputs, beta=1.0)
        losses = (chosen - target).square() + (rejected + target).square()
        return LossOutput(losses=losses, metrics=reward_metrics(options.beta * chosen, options.beta * rejected))

    return sppo_hard


def build_bco_pair(options: BcoPairOptions) -> Callable[[PairedInputs], LossOutput]:
    """-ls(beta Dc - delta) - ls(delta - beta Dr), delta = 0 or the step's mean of (beta Dc + beta Dr) / 2.

    Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", its binary cross-entropy with
    the reward shift delta; delta has no gradient. A row's margin is ignored: no rewards are compared.
    """

    def bco_pair(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = _rewards(inputs, options.beta)
        delta = 0.5 * (chosen + rejected).detach().mean() if options.baseline == "step" else 0.0
        losses = -logsigmoid(chosen - delta) - logsigmoid(delta - rejected)
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return bco_pair


def build_apo_zero(options: ApoZeroOptions) -> Callable[[PairedInputs], LossOutput]:
    """1 - sg(beta Dc) + sg(beta Dr). A row's margin is ignored: no rewards are compared.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", eq. 7, plus 1.
    """

    def apo_zero(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = _rewards(inputs, options.beta)
        losses = (-chosen).sigmoid() + rejected.sigmoid()
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return apo_zero


def build_apo_down(options: ApoDownOptions) -> Callable[[PairedInputs], LossOutput]:
    """sg(beta Dc) + 1 - sg(beta (Dc - Dr) - m), m the row's margin.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", eq. 8, plus 1.
    """

    def apo_down(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = _rewards(inputs, options.beta)
        losses = chosen.sigmoid() + (inputs.margin - (chosen - rejected)).sigmoid()
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return apo_down


def _rewards(inputs: PairedInputs, beta: float) -> tuple[Tensor, Tensor]:
    """Return beta times the log-ratios of the chosen and of the rejected responses, each [N]."""
    policy, reference = inputs.policy, inputs.reference
    assert reference is not None  # needs = {"reference"}
    chosen = beta * (policy.chosen.total - reference.chosen.total)
    rejected = beta * (policy.rejected.total - reference.rejected.total)
    return chosen, rejected


NCA_PAIR = PairedLoss(
    name="nca_pair",
    summary="noise contrastive alignment of pairs (Chen et al. 2024)",
    formula="-ls(beta Dc) - ls(-beta Dc) / 2 - ls(-beta Dr) / 2",
    paper="Chen et al. 2024, Noise Contrastive Alignment of Language Models with Explicit Rewards, NCA of a pair",
    options=NcaPairOptions,
    build=build_nca_pair,
    starts_at=lambda options: 2 * math.log(2),
    log_ratios_only=True,
    ignores=frozenset({"margin"}),
    variants=[{"beta": 0.5}],
    trl_cases=(TrlCase(trainer="DPOTrainer", config={"loss_type": ["nca_pair"], "beta": 0.3}, options={"beta": 0.3}),),
)

SPPO_HARD = PairedLoss(
    name="sppo_hard",
    summary="self-play preference optimization with certain preferences (Wu et al. 2024)",
    formula="(Dc - 1 / (2 beta))^2 + (Dr + 1 / (2 beta))^2",
    paper="Wu et al. 2024, Self-Play Preference Optimization for Language Model Alignment, eq. 4.7",
    options=SppoHardOptions,
    build=build_sppo_hard,
    starts_at=lambda options: 1 / (2 * options.beta**2),
    log_ratios_only=True,
    ignores=frozenset({"margin"}),
    variants=[{"beta": 0.5}],
    trl_cases=(TrlCase(trainer="DPOTrainer", config={"loss_type": ["sppo_hard"], "beta": 0.3}, options={"beta": 0.3}),),
)

BCO_PAIR = PairedLoss(
    name="bco_pair",
    summary="binary classifier optimization on pairs (Jung et al. 2024)",
    formula="-ls(beta Dc - delta) - ls(delta - beta Dr)",
    paper="Jung et al. 2024, Binary Classifier Optimization for Large Language Model Alignment, reward shift",
    options=BcoPairOptions,
    build=build_bco_pair,
    scope=lambda options: "step" if options.baseline == "step" else "example",
    starts_at=lambda options: 2 * math.log(2),
    log_ratios_only=True,
    ignores=frozenset({"margin"}),
    detaches=lambda options: bool(options.baseline == "step"),
    variants=[{"beta": 0.5}, {"baseline": "step"}],
    trl_cases=(
        TrlCase(trainer="DPOTrainer", config={"loss_type": ["bco_pair"], "beta": 0.3}, options={"beta": 0.3}),
        TrlCase(
            trainer="DPOTrainer",
            config={"loss_type": ["bco_pair"], "beta": 0.3},
            options={"beta": 0.3, "baseline": "step"},
            reason="TRL has no reward shift",
            same_as={"beta": 0.3},
        ),
    ),
)

APO_ZERO = PairedLoss(
    name="apo_zero",
    summary="anchored preference optimization, chosen up and rejected down (D'Oosterlinck et al. 2024)",
    formula="1 - sg(beta Dc) + sg(beta Dr)",
    paper="D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions, eq. 7",
    options=ApoZeroOptions,
    build=build_apo_zero,
    starts_at=lambda options: 1.0,
    log_ratios_only=True,
    ignores=frozenset({"margin"}),
    variants=[{"beta": 0.5}],
    trl_cases=(TrlCase(trainer="DPOTrainer", config={"loss_type": ["apo_zero"], "beta": 0.3}, options={"beta": 0.3}),),
)

APO_DOWN = PairedLoss(
    name="apo_down",
    summary="anchored preference optimization, chosen down and rejected further down (D'Oosterlinck et al. 2024)",
    formula="sg(beta Dc) + 1 - sg(beta (Dc - Dr) - m)",
    paper="D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions, eq. 8",
    options=ApoDownOptions,
    build=build_apo_down,
    starts_at=lambda options: 1.0,
    log_ratios_only=True,
    variants=[{"beta": 0.5}],
    trl_cases=(TrlCase(trainer="DPOTrainer", config={"loss_type": ["apo_down"], "beta": 0.3}, options={"beta": 0.3}),),
)


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield from (NCA_PAIR, SPPO_HARD, BCO_PAIR, APO_ZERO, APO_DOWN)
