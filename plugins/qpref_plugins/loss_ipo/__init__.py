"""Identity preference optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor

from qpref.hooks import Field, Options, PairedLoss, TrlCase, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs, TokenLogProbs


class IpoOptions(Options):
    """Options of the loss `ipo`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Regularization (tau in the paper): the target of the log-ratio margin is 1 / (2 beta), which is "
        "5 nats per token at 0.1 and 1 at 0.5.",
    )
    normalize: Literal["mean", "sum"] = Field(
        default="mean",
        description="mean: log-ratios per token, as the paper's authors advise; sum: of whole responses, as in the "
        "paper.",
    )


def build(options: IpoOptions) -> Callable[[PairedInputs], LossOutput]:
    """(h - 1 / (2 beta))^2, h the difference of the two log-ratios, per token or summed.

    Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17. A row's
    margin is added to the distance that h has to reach.
    """

    def log_ratio(policy: TokenLogProbs, reference: TokenLogProbs) -> Tensor:
        ratio = policy.total - reference.total
        return ratio / policy.count if options.normalize == "mean" else ratio

    def ipo(inputs: PairedInputs) -> LossOutput:
        policy, reference = inputs.policy, inputs.reference
        assert reference is not None  # needs = {"reference"}
        chosen = log_ratio(policy.chosen, reference.chosen)
        rejected = log_ratio(policy.rejected, reference.rejected)
        losses = (chosen - rejected - inputs.margin - 1 / (2 * options.beta)).square()
        return LossOutput(losses=losses, metrics=reward_metrics(options.beta * chosen, options.beta * rejected))

    return ipo


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield PairedLoss(
        name="ipo",
        summary="identity preference optimization (Azar et al. 2023)",
        formula="(h - margin - 1 / (2 beta))^2, h = D_chosen / n_chosen - D_rejected / n_rejected, "
        "D = log policy - log reference, n = tokens",
        paper='Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", '
        "eq. 17",
        options=IpoOptions,
        build=build,
        starts_at=lambda options: (1 / (2 * options.beta)) ** 2,
        log_ratios_only=True,
        variants=({"normalize": "sum"},),
        trl_cases=(
            TrlCase(trainer="DPOTrainer", config={"loss_type": ["ipo"], "beta": 0.3}, options={"beta": 0.3}),
            TrlCase(
                trainer="DPOTrainer",
                config={"loss_type": ["ipo"], "beta": 0.3},
                options={"beta": 0.3, "normalize": "sum"},
                reason="TRL has log-ratios per token alone, not the sums of the paper",
                same_as={"beta": 0.3},
            ),
        ),
    )
