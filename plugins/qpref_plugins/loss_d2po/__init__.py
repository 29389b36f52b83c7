"""The loss `d2po`: DPO in which a token counts less the later it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs, TokenLogProbs


class D2poOptions(Options):
    """Options of the loss `d2po`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the tie to the reference, as in dpo. Usual: 0.1 to 0.5.",
    )
    gamma: float = Field(
        default=0.98,
        gt=0,
        le=1,
        description="Factor on a token's weight from each token to the next one. 1 is plain DPO; the authors' "
        "configuration has 0.98, with which the 35th token counts half. Usual: 0.95 to 1.",
    )


def build(options: D2poOptions) -> Callable[[PairedInputs], LossOutput]:
    """-log sigmoid(beta (D(chosen) - D(rejected)) - m), D = sum_t gamma^t d_t with t from 0.

    Shao et al. 2025, "Earlier Tokens Contribute More". The authors' code has gamma^1 at the first token, which is a
    beta of gamma times theirs here.
    """

    def d2po(inputs: PairedInputs) -> LossOutput:
        policy, reference = inputs.policy, inputs.reference
        assert reference is not None  # needs has "reference"
        chosen = options.beta * _decayed(policy.chosen, reference.chosen, options.gamma)
        rejected = options.beta * _decayed(policy.rejected, reference.rejected, options.gamma)
        losses = -logsigmoid(chosen - rejected - inputs.margin)
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return d2po


def _decayed(policy: TokenLogProbs, reference: TokenLogProbs, gamma: float) -> Tensor:
    """Return [N] sums of the log-ratios of each response's tokens, weighted 1, gamma, gamma^2 and so on."""
    values = policy.values
    weights = gamma ** torch.arange(max(policy.lengths), dtype=values.dtype, device=values.device)
    of_tokens = torch.cat([weights[:length] for length in policy.lengths])
    return policy.sum(of_tokens * (values - reference.values))


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield PairedLoss(
        name="d2po",
        summary="DPO with weights that decay from token to token (Shao et al. 2025)",
        formula="-log sigmoid(beta (D(chosen) - D(rejected)) - m), D = sum_t gamma^t d_t",
        paper="Shao et al. 2025, Earlier Tokens Contribute More: Learning Direct Preference Optimization From Temporal "
        "Decay Perspective",
        options=D2poOptions,
        build=build,
        starts_at=lambda options: math.log(2),
        log_ratios_only=True,
        variants=({"gamma": 0.5}, {"gamma": 1.0}, {"beta": 1.0, "gamma": 0.9}),
    )
