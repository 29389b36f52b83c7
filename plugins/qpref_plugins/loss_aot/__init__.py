"""Alignment via optimal transport: the optimizer step's rewards are compared quantile by quantile, not row by row.

Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport". The transport between two
samples of one dimension is solved by sorting both, so a row's value depends on all rows of its step. A row's partner
changes where two values swap ranks, and the row's value may jump there; the step's sum does not while all rows have the
same weight and margin.

c, r and c0, r0 are the summed log-probabilities of the chosen and the rejected response under policy and
reference, and ls is log sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, TrlCase, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs

MICRO_BATCH_SORTS = "TRL sorts each micro-batch, qpref the whole optimizer step"


class TransportOptions(Options):
    """The options of both losses."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the tie to the reference: the gap between two quantiles is multiplied by beta, and "
        "saturates at a few units. 0.1 lets the distributions move far apart, 0.5 keeps them close. "
        "Usual: 0.01 to 0.5.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Assumed share of swapped labels; 0 trusts all of them.",
    )


class AotOptions(TransportOptions):
    """Options of the loss `aot`."""


class AotUnpairedOptions(TransportOptions):
    """Options of the loss `aot_unpaired`."""


def build_aot(options: AotOptions) -> Callable[[PairedInputs], LossOutput]:
    """-(1 - eps) ls(x) - eps ls(-x), x = beta ((c - r) - (c0 - r0 of equal rank)) - m, m the row's margin.

    The paper's paired setting with the logistic cost; eps > 0 smooths the labels as conservative DPO does. Each value
    belongs to the row of its c - r, and uses that row's margin.
    """

    def aot(inputs: PairedInputs) -> LossOutput:
        policy, reference = inputs.policy, inputs.reference
        assert reference is not None  # needs = {"reference"}
        ours = policy.chosen.total - policy.rejected.total
        theirs = reference.chosen.total - reference.rejected.total
        return _transport(inputs, options, ours, theirs)

    return aot


def build_aot_unpaired(options: AotUnpairedOptions) -> Callable[[PairedInputs], LossOutput]:
    """-(1 - eps) ls(x) - eps ls(-x), x = beta ((c - c0) - (r - r0 of equal rank)) - m, m the row's margin.

    The paper's unpaired setting with the logistic cost; eps > 0 smooths the labels as conservative DPO does. Each value
    belongs to the row of its chosen response, and uses that row's margin.
    """

    def aot_unpaired(inputs: PairedInputs) -> LossOutput:
        return _transport(inputs, options, *_log_ratios(inputs))

    return aot_unpaired


def _transport(inputs: PairedInputs, options: TransportOptions, upper: Tensor, lower: Tensor) -> LossOutput:
    """Push each value of `upper` above the value of `lower` of the same rank in the step."""
    rank = upper.detach().argsort(stable=True).argsort()
    x = options.beta * (upper - lower.sort(stable=True).values[rank]) - inputs.margin
    eps = options.label_smoothing
    losses = -(1 - eps) * logsigmoid(x) - eps * logsigmoid(-x)
    chosen, rejected = _log_ratios(inputs)
    return LossOutput(losses=losses, metrics=reward_metrics(options.beta * chosen, options.beta * rejected))


def _log_ratios(inputs: PairedInputs) -> tuple[Tensor, Tensor]:
    """Return the log-ratios of the chosen and of the rejected responses, each [N]."""
    policy, reference = inputs.policy, inputs.reference
    assert reference is not None  # needs = {"reference"}
    return policy.chosen.total - reference.chosen.total, policy.rejected.total - reference.rejected.total


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield PairedLoss(
        name="aot",
        summary="alignment via optimal transport, paired (Melnyk et al. 2024)",
        formula="-(1 - eps) ls(x) - eps ls(-x), x = beta (sorted(c - r) - sorted(c0 - r0)) - m",
        paper="Melnyk et al. 2024, Distributional Preference Alignment of LLMs via Optimal Transport, paired setting",
        options=AotOptions,
        build=build_aot,
        scope="step",
        starts_at=lambda options: math.log(2),
        # A shift of one row's c and c0 reorders both sorts: what each row is compared with changes.
        log_ratios_only=False,
        variants=[{"beta": 0.5}, {"label_smoothing": 0.1}],
        trl_cases=(
            TrlCase(trainer="DPOTrainer", config={"loss_type": ["aot"], "beta": 0.3}, options={"beta": 0.3}),
            TrlCase(
                trainer="DPOTrainer",
                config={"loss_type": ["aot"], "label_smoothing": 0.2},
                options={"label_smoothing": 0.2},
            ),
            TrlCase(
                trainer="DPOTrainer",
                config={"loss_type": ["aot"], "beta": 0.3},
                options={"beta": 0.3},
                reason=MICRO_BATCH_SORTS,
                same_as={"beta": 0.3},
                micro_batch=2,
            ),
        ),
    )
    yield PairedLoss(
        name="aot_unpaired",
        summary="alignment via optimal transport, unpaired (Melnyk et al. 2024)",
        formula="-(1 - eps) ls(x) - eps ls(-x), x = beta (sorted(c - c0) - sorted(r - r0)) - m",
        paper="Melnyk et al. 2024, Distributional Preference Alignment of LLMs via Optimal Transport, unpaired setting",
        options=AotUnpairedOptions,
        build=build_aot_unpaired,
        scope="step",
        starts_at=lambda options: math.log(2),
        log_ratios_only=True,
        variants=[{"beta": 0.5}, {"label_smoothing": 0.1}],
        trl_cases=(
            TrlCase(trainer="DPOTrainer", config={"loss_type": ["aot_unpaired"], "beta": 0.3}, options={"beta": 0.3}),
            TrlCase(
                trainer="DPOTrainer",
                config={"loss_type": ["aot_unpaired"], "label_smoothing": 0.2},
                options={"label_smoothing": 0.2},
            ),
            TrlCase(
                trainer="DPOTrainer",
                config={"loss_type": ["aot_unpaired"], "beta": 0.3},
                options={"beta": 0.3},
                reason=MICRO_BATCH_SORTS,
                same_as={"beta": 0.3},
                micro_batch=2,
            ),
        ),
    )
