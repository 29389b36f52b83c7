"""The hinge loss on the reward margin."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import relu

from qpref.hooks import Field, Options, PairedLoss, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs


class HingeOptions(Options):
    """Options of the loss `hinge`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="A pair is done with once the difference of its two log-ratios reaches 1 / beta nats: 10 for 0.1, "
        "2 for 0.5.",
    )


def build(options: HingeOptions) -> Callable[[PairedInputs], LossOutput]:
    """relu(1 - (beta h - m)), h the difference of the two log-ratios, m the row's margin.

    Liu et al. 2024, "Statistical Rejection Sampling Improves Preference Optimization" (hinge-norm), after Zhao et al.
    2023, "SLiC-HF: Sequence Likelihood Calibration with Human Feedback".
    """

    def hinge(inputs: PairedInputs) -> LossOutput:
        policy, reference = inputs.policy, inputs.reference
        assert reference is not None  # needs = {"reference"}
        chosen = options.beta * (policy.chosen.total - reference.chosen.total)
        rejected = options.beta * (policy.rejected.total - reference.rejected.total)
        losses = relu(1 - (chosen - rejected - inputs.margin))
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return hinge


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield PairedLoss(
        name="hinge",
        summary="hinge on the reward margin (Zhao et al. 2023, Liu et al. 2024)",
        options=HingeOptions,
        build=build,
        starts_at=lambda options: 1.0,
    )
