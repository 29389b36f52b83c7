"""The loss `tdpo_sampled`: token-level DPO with sequential KL divergences estimated at the responses' own tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs, TokenLogProbs

MAX_LOG_RATIO = 20.0
"""Log-ratio of a token, in nats, from which on its divergence is constant: its exponential would take over the loss."""


class TdpoSampledOptions(Options):
    """Options of the loss `tdpo_sampled`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the tie to the reference: the implicit reward is beta times the change in a "
        "response's log-probability. Usual: 0.1 to 0.5.",
    )
    alpha: float = Field(
        default=0.5,
        ge=0,
        description="Weight of the difference of the two divergences. 0 is plain DPO; the paper uses 0.5. Usual: 0.1 "
        "to 1.",
    )
    variant: Literal["tdpo1", "tdpo2"] = Field(
        default="tdpo2",
        description="tdpo2: the chosen response's divergence is a constant, so that nothing keeps it large. tdpo1: "
        "both have a gradient; the paper's has alpha = 1.",
    )


def build(options: TdpoSampledOptions) -> Callable[[PairedInputs], LossOutput]:
    """-log sigmoid(beta h - m - alpha beta (K(rejected) - K(chosen))).

    Zeng et al. 2024, "Token-level Direct Preference Optimization", the losses TDPO1 and TDPO2 of section 4, with K in
    place of the sequential KL divergence D_SeqKL(reference || policy), which sums over the vocabulary at each position.
    """

    def tdpo_sampled(inputs: PairedInputs) -> LossOutput:
        policy, reference = inputs.policy, inputs.reference
        assert reference is not None  # needs has "reference"
        chosen, chosen_kl = _log_ratio(policy.chosen, reference.chosen)
        rejected, rejected_kl = _log_ratio(policy.rejected, reference.rejected)
        kept = chosen_kl.detach() if options.variant == "tdpo2" else chosen_kl
        margin = chosen - rejected - options.alpha * (rejected_kl - kept)
        metrics = reward_metrics(options.beta * chosen, options.beta * rejected)
        metrics |= {"seq_kl/chosen": chosen_kl.detach(), "seq_kl/rejected": rejected_kl.detach()}
        return LossOutput(losses=-logsigmoid(options.beta * margin - inputs.margin), metrics=metrics)

    return tdpo_sampled


def _log_ratio(policy: TokenLogProbs, reference: TokenLogProbs) -> tuple[Tensor, Tensor]:
    """Return [N] log-ratios of the responses, and [N] sums of e^d - 1 - d over their tokens' log-ratios d.

    For a token that the reference has drawn, e^d - 1 - d has the mean KL(reference || policy), is never negative, and
    varies little (Schulman 2020, "Approximating KL Divergence", k3). The plain estimate -d would not do: with alpha = 1
    it would subtract from the margin just what that is.
    """
    ratios = policy.values - reference.values
    capped = ratios.clamp(max=MAX_LOG_RATIO)
    return policy.sum(ratios), policy.sum(capped.expm1() - capped)


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield PairedLoss(
        name="tdpo_sampled",
        summary="TDPO with the sequential KL estimated at the responses' own tokens",
        formula="-log sigmoid(beta h - m - alpha beta (K(rejected) - K(chosen))), K = sum(e^d - 1 - d)",
        paper="Zeng et al. 2024, Token-level Direct Preference Optimization, section 4, with sampled divergences",
        options=TdpoSampledOptions,
        build=build,
        starts_at=lambda options: math.log(2),
        log_ratios_only=True,
        detaches=lambda options: options.variant == "tdpo2",
        variants=({"variant": "tdpo1", "alpha": 1.0}, {"alpha": 0.0}, {"beta": 1.0, "alpha": 2.0}),
    )
