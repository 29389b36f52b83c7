"""DPO with an offset: how far chosen has to be ahead follows from the scores of the two responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs

LEAST_LEAD = 1e-6
"""Lead of the chosen response's score below which its logarithm is that of this lead."""


class OdpoOptions(Options):
    """Options of the loss `odpo`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the tie to the reference: the implicit reward is beta times the change in a "
        "response's log-probability. Usual: 0.1 to 0.5.",
    )
    alpha: float = Field(
        default=1.0,
        ge=0,
        description="Factor on the offset that the scores give, in units of the reward margin. 0 is plain DPO. Usual: "
        "0.1 to 1.",
    )
    scale: Literal["log", "linear"] = Field(
        default="log",
        description="Offset of a pair: log: the logarithm of the difference of its scores, the paper's choice; linear: "
        "the difference itself, for scores in units of the reward.",
    )
    chosen_column: str = Field(
        default="score_chosen", min_length=1, description="Column with the score of the chosen response."
    )
    rejected_column: str = Field(
        default="score_rejected", min_length=1, description="Column with the score of the rejected response."
    )

    @model_validator(mode="after")
    def refuse_one_column_for_both(self) -> Self:
        if self.chosen_column == self.rejected_column:
            raise ValueError(f"chosen_column and rejected_column are both {self.chosen_column!r}")
        return self


def odpo(options: OdpoOptions) -> Callable[[PairedInputs], LossOutput]:
    """-log sigmoid(beta h - alpha f(score_chosen - score_rejected) - m), f the logarithm or the identity.

    The logarithm of a lead below 1e-6 is that of 1e-6: a tie, or scores that contradict the label, then have an offset
    of -14 alpha, and hardly any gradient.

    Amini et al. 2024, "Direct Preference Optimization with an Offset".
    """

    def offset(lead: Tensor) -> Tensor:
        return options.alpha * (lead.clamp(min=LEAST_LEAD).log() if options.scale == "log" else lead)

    def odpo(inputs: PairedInputs) -> LossOutput:
        policy, reference, columns = inputs.policy, inputs.reference, inputs.columns
        assert reference is not None  # needs = {"reference"}
        chosen = options.beta * (policy.chosen.total - reference.chosen.total)
        rejected = options.beta * (policy.rejected.total - reference.rejected.total)
        lead = columns[options.chosen_column] - columns[options.rejected_column]
        losses = -logsigmoid(chosen - rejected - offset(lead) - inputs.margin)
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return odpo


ODPO = PairedLoss(
    name="odpo",
    summary="DPO with an offset from the scores of the two responses (Amini et al. 2024)",
    formula="-log sigmoid(beta h - alpha f(score_chosen - score_rejected) - margin), f = log or the identity",
    paper='Amini et al. 2024, "Direct Preference Optimization with an Offset"',
    options=OdpoOptions,
    build=odpo,
    log_ratios_only=True,
    columns=lambda options: (options.chosen_column, options.rejected_column),
    variants=({"scale": "linear", "alpha": 0.1}, {"alpha": 0.0}),
)


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    """Offer `odpo`."""
    yield ODPO
