"""Kahneman-Tversky optimization, and the unpaired form of anchored preference optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from qpref.hooks import Field, Options, TrlCase, UnpairedLoss, hookimpl, unpaired_reward_metrics
from qpref.records import LossOutput, TokenLogProbs, UnpairedInputs


class KtoOptions(Options):
    """Options of the loss `kto`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Scale of the implicit reward, beta times the change in the completion's log-probability. Examples "
        "whose reward is far from the step's KL estimate have little gradient, so 0.1 lets the policy move far from "
        "the reference and 0.5 keeps it close. Usual: 0.01 to 0.5.",
    )
    desirable_weight: float | None = Field(
        default=None,
        gt=0,
        description="Factor on the loss of desirable examples; left out, the value that balances the two classes "
        "over the training set.",
    )
    undesirable_weight: float | None = Field(
        default=None,
        gt=0,
        description="Factor on the loss of undesirable examples; left out, the value that balances the two classes "
        "over the training set.",
    )


def class_weights(options: KtoOptions, class_counts: tuple[int, int]) -> tuple[float, float]:
    """Compute the factors on desirable and undesirable examples.

    The paper recommends desirable_weight n_D / (undesirable_weight n_U) in [1, 4/3] (Ethayarajh et al. 2024, eq. 8). A
    missing weight is set to make it 1; if both are missing, the more frequent class has weight 1 and the rarer one
    more. If a class has no examples, a missing weight is 1.
    """
    desirable, undesirable = options.desirable_weight, options.undesirable_weight
    num_desirable, num_undesirable = class_counts
    if not num_desirable or not num_undesirable:
        num_desirable = num_undesirable = 1
        desirable, undesirable = desirable or 1.0, undesirable or 1.0
    if desirable is None and undesirable is None:
        most = max(num_desirable, num_undesirable)
        return most / num_desirable, most / num_undesirable
    if desirable is None:
        assert undesirable is not None
        return undesirable * num_undesirable / num_desirable, undesirable
    if undesirable is None:
        return desirable, desirable * num_desirable / num_undesirable
    return desirable, undesirable


def log_ratio(policy: TokenLogProbs, reference: TokenLogProbs | None) -> Tensor:
    """Return the [N] summed log-ratios of policy to reference, in nats."""
    assert reference is not None  # needs holds "reference"
    return policy.total - reference.total


def sign(inputs: UnpairedInputs) -> Tensor:
    """Return 1 for each desirable example and -1 for each undesirable one, [N], in the inputs' dtype."""
    return inputs.desirable.to(inputs.policy.values.dtype) * 2 - 1


def build_kto(options: KtoOptions) -> Callable[[UnpairedInputs], LossOutput]:
    """w_D (1 - sigmoid(beta (D - kl))) if desirable, w_U (1 - sigmoid(beta (kl - D))) if not, D the log-ratio.

    Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", eq. 7. kl is the mean log-ratio
    of the optimizer step's mismatched completions, at least 0, without gradient. 1 - sigmoid(x) is computed as
    sigmoid(-x), which keeps its digits where x is large. Weights that aren't given balance the classes: see
    `class_weights`.
    """

    def kto(inputs: UnpairedInputs) -> LossOutput:
        assert inputs.mismatched_policy is not None  # needs holds "mismatched"
        ratio = log_ratio(inputs.policy, inputs.reference)
        kl = log_ratio(inputs.mismatched_policy, inputs.mismatched_reference).mean().clamp(min=0).detach()
        desirable_weight, undesirable_weight = class_weights(options, inputs.class_counts)
        weight = ratio.new_full(ratio.shape, desirable_weight).where(inputs.desirable, undesirable_weight)
        losses = weight * (-options.beta * sign(inputs) * (ratio - kl)).sigmoid()
        metrics = unpaired_reward_metrics(options.beta * ratio, inputs.desirable)
        return LossOutput(losses=losses, metrics=metrics | {"kl": kl.repeat(len(losses))})

    return kto


def kto_starts_at(options: KtoOptions) -> float | None:
    """Return half the class weight if both classes share one, else None; without weights, that of balanced data."""
    if options.desirable_weight != options.undesirable_weight:
        return None
    return 0.5 if options.desirable_weight is None else 0.5 * options.desirable_weight


class ApoZeroUnpairedOptions(Options):
    """Options of the loss `apo_zero_unpaired`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Scale of the implicit reward, beta times the change in the completion's log-probability. Examples "
        "whose reward is far from 0 have little gradient, so 0.1 lets the policy move far from the reference and 0.5 "
        "keeps it close. Usual: 0.1 to 0.5.",
    )


def build_apo_zero_unpaired(options: ApoZeroUnpairedOptions) -> Callable[[UnpairedInputs], LossOutput]:
    """1 - sigmoid(beta D) if desirable, sigmoid(beta D) if not, D the log-ratio.

    The two terms of eq. 7 of D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions:
    Addressing Underspecification in Alignment", each on the examples of its class. It is `kto` with kl = 0 and
    weights of 1.
    """

    def apo_zero_unpaired(inputs: UnpairedInputs) -> LossOutput:
        rewards = options.beta * log_ratio(inputs.policy, inputs.reference)
        losses = (-sign(inputs) * rewards).sigmoid()
        return LossOutput(losses=losses, metrics=unpaired_reward_metrics(rewards, inputs.desirable))

    return apo_zero_unpaired


KTO = UnpairedLoss(
    name="kto",
    summary="Kahneman-Tversky optimization, on single completions (Ethayarajh et al. 2024)",
    formula="w_D (1 - sigmoid(beta (D - kl))) if desirable, w_U (1 - sigmoid(beta (kl - D))) if not; "
    "kl = max(0, mean D of the step's mismatched completions)",
    paper='Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", eq. 7',
    options=KtoOptions,
    build=build_kto,
    needs=frozenset({"reference", "mismatched"}),
    scope="mismatched",
    starts_at=kto_starts_at,
    log_ratios_only=True,
    variants=(
        {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        {"desirable_weight": 4.0, "undesirable_weight": 0.5},
        {"desirable_weight": 2.0},
        {"undesirable_weight": 2.0},
    ),
    trl_cases=(
        TrlCase(trainer="KTOTrainer", config={"beta": 0.1}, options={"beta": 0.1}),
        TrlCase(trainer="KTOTrainer", config={"beta": 0.5}, options={"beta": 0.5}),
        TrlCase(
            trainer="KTOTrainer",
            config={"desirable_weight": 1.5, "undesirable_weight": 0.5},
            options={"desirable_weight": 1.5, "undesirable_weight": 0.5},
        ),
        TrlCase(
            trainer="KTOTrainer",
            config={"beta": 0.5},
            options={"beta": 0.5},
            reason="TRL weighs both classes 1 by default, qpref balances them by their counts",
            same_as={"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.0},
            num_examples=5,
        ),
        TrlCase(
            trainer="KTOTrainer",
            config={"beta": 0.5},
            options={"beta": 0.5},
            reason="TRL estimates the KL on each micro-batch, qpref on the whole optimizer step",
            same_as={"beta": 0.5},
            micro_batch=2,
        ),
    ),
)

APO_ZERO_UNPAIRED = UnpairedLoss(
    name="apo_zero_unpaired",
    summary="anchored preference optimization, on single completions (D'Oosterlinck et al. 2024)",
    formula="1 - sigmoid(beta D) if desirable, sigmoid(beta D) if not",
    paper="D'Oosterlinck et al. 2024, \"Anchored Preference Optimization and Contrastive Revisions: Addressing "
    'Underspecification in Alignment", eq. 7 without pairs',
    options=ApoZeroUnpairedOptions,
    build=build_apo_zero_unpaired,
    starts_at=lambda options: 0.5,
    log_ratios_only=True,
    variants=({"beta": 0.5},),
    trl_cases=(
        TrlCase(trainer="KTOTrainer", config={"loss_type": "apo_zero_unpaired", "beta": 0.3}, options={"beta": 0.3}),
    ),
)


@hookimpl
def qpref_losses() -> Iterator[UnpairedLoss]:
    yield from (KTO, APO_ZERO_UNPAIRED)
