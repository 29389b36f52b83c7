"""The squared hinge loss on the reward margin."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import relu

from qpref.hooks import Field, Options, PairedLoss, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs


class SquaredHingeOptions(Options):
    """Options of the loss `squared_hinge`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="A pair is done with once the difference of its two log-ratios reaches 1 / beta nats: 10 for 0.1, "
        "2 for 0.5.",
    )


def build(options: SquaredHingeOptions) -> Callable[[PairedInputs], LossOutput]:
    """relu(1 - (beta h - m))^2, h the difference of the two log-ratios, m the row's margin.

    The square of the hinge of Zhao et al. 2023, "SLiC-HF: Sequence Likelihood Calibration with Human Feedback": a pair
    that is nearly done pulls less than one that is far from it.
    """

    def squared_hinge(inputs: PairedInputs) -> LossOutput:
        policy, reference = inputs.policy, inputs.reference
        assert reference is not None  # needs = {"reference"}
        chosen = options.beta * (policy.chosen.total - reference.chosen.total)
        rejected = options.beta * (policy.rejected.total - reference.rejected.total)
        losses = relu(1 - (chosen - rejected - inputs.margin)).square()
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return squared_hinge


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield PairedLoss(
        name="squared_hinge",
        summary="squared hinge on the reward margin",
        formula="relu(1 - beta h)^2",
        paper='the square of the hinge of Zhao et al. 2023, "SLiC-HF"',
        options=SquaredHingeOptions,
        build=build,
        starts_at=lambda options: 1.0,
        log_ratios_only=True,
    )
