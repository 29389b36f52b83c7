"""Direct preference optimization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs


class DpoOptions(Options):
    """Options of the loss `dpo`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="How tightly the policy is held to the reference: the implicit reward is beta times the change in "
        "a response's log-probability. 0.1 lets the policy move far for a given margin, 0.5 holds it close. "
        "Usual: 0.1 to 0.5.",
    )


def build(options: DpoOptions) -> Callable[[PairedInputs], LossOutput]:
    """-log sigmoid(beta h - m), h the difference of the two log-ratios, m the row's margin.

    Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", eq. 7.
    """

    def dpo(inputs: PairedInputs) -> LossOutput:
        policy, reference = inputs.policy, inputs.reference
        assert reference is not None  # needs = {"reference"}
        chosen = options.beta * (policy.chosen.total - reference.chosen.total)
        rejected = options.beta * (policy.rejected.total - reference.rejected.total)
        losses = -logsigmoid(chosen - rejected - inputs.margin)
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return dpo


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield PairedLoss(
        name="dpo",
        summary="direct preference optimization (Rafailov et al. 2023)",
        options=DpoOptions,
        build=build,
        starts_at=lambda options: math.log(2),
    )
