"""Direct preference optimization, with variants of the score inside its sigmoid and of the weight outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from pydantic import ValidationInfo, field_validator
from torch import Tensor, expm1
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, TrlCase, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs, PairLogProbs, TokenLogProbs

ALPHA = 0.5
MAX_EXPONENT = 80.0
MAX_LOG_WEIGHT = 40.0


class DpoOptions(Options):
    """Options of the loss `dpo`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the tie to the reference: the implicit reward is beta times the change in a "
        "response's log-probability. 0.1 lets the policy move far for a given margin, 0.5 keeps it close. "
        "Usual: 0.1 to 0.5.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Assumed share of swapped labels (conservative DPO): above 0 the reward margin has a finite target "
        "instead of growing without bound. Usual: 0 to 0.3.",
    )
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        default="reverse_kl",
        description="Divergence between policy and reference (f-DPO): reverse_kl: standard DPO; forward_kl: "
        "mass-covering; js: Jensen-Shannon, between the two; alpha: interpolates between the two KLs.",
    )
    alpha: float = Field(
        default=ALPHA,
        description='Only for divergence = "alpha": 0 is the forward KL, toward 1 it approaches the reverse KL; 1 '
        "itself is refused. The paper's alpha is 1 less this one.",
    )
    ld_alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Weight of the longer response's tokens beyond the length of the shorter one (LD-DPO): lower "
        "values make answers shorter. 1, or leaving it out, is plain DPO. Usual: 0.3 to 0.6.",
    )
    wpo: bool = Field(
        default=False,
        description="Weight each pair by the likelihood of its responses under the policy (WPO), for data from other "
        "models.",
    )

    @field_validator("alpha")
    @classmethod
    def _only_where_it_means_something(cls, alpha: float, info: ValidationInfo) -> float:
        divergence = info.data.get("divergence", "alpha")
        if divergence != "alpha" and alpha != ALPHA:
            raise ValueError(f'goes with divergence = "alpha", not "{divergence}"')
        if abs(alpha - 1) < 0.01:
            raise ValueError('must be 0.01 or more away from 1, where it is the reverse KL: divergence = "reverse_kl"')
        return alpha


def build(options: DpoOptions) -> Callable[[PairedInputs], LossOutput]:
    """-(1 - eps) log sigmoid(z) - eps log sigmoid(-z), z = beta (f(D_chosen) - f(D_rejected)) - m.

    D is a response's log-ratio of policy to reference, f(D) = D but for `divergence`, eps the label smoothing and m the
    row's margin.

    Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", eq. 7;
    eps > 0: Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO", eq. 3.
    """
    eps = options.label_smoothing

    def dpo(inputs: PairedInputs) -> LossOutput:
        policy, reference = inputs.policy, inputs.reference
        assert reference is not None  # needs has "reference"
        shared = tuple(map(min, policy.chosen.lengths, policy.rejected.lengths))
        chosen = options.beta * score(log_ratio(policy.chosen, reference.chosen, shared, options), options)
        rejected = options.beta * score(log_ratio(policy.rejected, reference.rejected, shared, options), options)
        z = chosen - rejected - inputs.margin
        losses = -(1 - eps) * logsigmoid(z) - eps * logsigmoid(-z)
        if options.wpo:
            losses = losses * on_policy_weight(policy)
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return dpo


def log_ratio(policy: TokenLogProbs, reference: TokenLogProbs, shared: Sequence[int], options: DpoOptions) -> Tensor:
    """Return the [N] summed log-ratios; tokens from `shared` on are weighted by `ld_alpha`.

    Liu et al. 2024, "Length Desensitization in Direct Preference Optimization".
    """
    if options.ld_alpha is None:
        return policy.total - reference.total
    return desensitized(policy, shared, options.ld_alpha) - desensitized(reference, shared, options.ld_alpha)


def desensitized(scores: TokenLogProbs, shared: Sequence[int], ld_alpha: float) -> Tensor:
    """Sum each response's log-probabilities, [N], with its tokens from `shared` on weighted by `ld_alpha`."""
    weights = scores.values.new_ones(scores.values.shape)
    for weight, length in zip(weights.split(list(scores.lengths)), shared, strict=True):
        weight[length:] = ld_alpha
    return TokenLogProbs(values=scores.values * weights, lengths=scores.lengths).total


def score(log_ratio: Tensor, options: DpoOptions) -> Tensor:
    """Compute f'(e^D) of the divergence minus its value at D = 0.

    Wang et al. 2023, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints", table 1: reverse_kl D; forward_kl 1 - e^-D; js log 2 + log sigmoid(D);
    alpha (e^((alpha - 1) D) - 1) / (alpha - 1). The argument of exp is capped at 80; beyond the cap the gradient is 0.
    """
    if options.divergence == "reverse_kl":
        return log_ratio
    if options.divergence == "js":
        return math.log(2) + logsigmoid(log_ratio)
    power = -1.0 if options.divergence == "forward_kl" else options.alpha - 1
    return expm1((power * log_ratio).clamp(max=MAX_EXPONENT)) / power


def on_policy_weight(policy: PairLogProbs) -> Tensor:
    """Compute exp(mean over tokens of (log p - log sum p^2)), the product over both responses, detached, [N].

    Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization", eq. 2, with its sampled alignment.
    Its logarithm is capped at 40, which no distribution over fewer than 10^17 tokens reaches.
    """
    return (aligned(policy.chosen) + aligned(policy.rejected)).clamp(max=MAX_LOG_WEIGHT).exp()


def aligned(scores: TokenLogProbs) -> Tensor:
    """Compute the mean of log p - log sum p^2 over each response's tokens, [N]."""
    assert scores.log_sum_squares is not None  # needs has "log_sum_squares"
    return TokenLogProbs(values=scores.values.detach() - scores.log_sum_squares, lengths=scores.lengths).mean


def needs(options: DpoOptions) -> frozenset[str]:
    return frozenset({"reference", "log_sum_squares"} if options.wpo else {"reference"})


def starts_at(options: DpoOptions) -> float | None:
    """Return log 2 for every divergence, since each f(0) is 0; under WPO it depends on the pair's weight."""
    return None if options.wpo else math.log(2)


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield PairedLoss(
        name="dpo",
        summary="direct preference optimization (Rafailov et al. 2023)",
        formula="-(1 - label_smoothing) log sigmoid(z) - label_smoothing log sigmoid(-z), "
        "z = beta (D_chosen - D_rejected) - margin, D = log policy - log reference",
        paper='Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", '
        "eq. 7",
        options=DpoOptions,
        build=build,
        needs=needs,
        starts_at=starts_at,
        detaches=lambda options: bool(options.wpo),
        variants=(
            {"label_smoothing": 0.1},
            {"divergence": "forward_kl"},
            {"divergence": "js"},
            {"divergence": "alpha", "alpha": ALPHA},
            {"ld_alpha": 0.5},
            {"wpo": True},
        ),
        trl_cases=(
            TrlCase(trainer="DPOTrainer", config={"loss_type": ["sigmoid"], "beta": 0.3}, options={"beta": 0.3}),
            TrlCase(
                trainer="DPOTrainer", config={"f_divergence_type": "forward_kl"}, options={"divergence": "forward_kl"}
            ),
            TrlCase(trainer="DPOTrainer", config={"f_divergence_type": "js_divergence"}, options={"divergence": "js"}),
            TrlCase(
                trainer="DPOTrainer",
                config={"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
                options={"divergence": "alpha", "alpha": 0.3},
                dtype="float32",
            ),
            TrlCase(trainer="DPOTrainer", config={"ld_alpha": 0.4}, options={"ld_alpha": 0.4}),
            TrlCase(trainer="DPOTrainer", config={"use_weighting": True}, options={"wpo": True}),
            TrlCase(
                trainer="DPOTrainer",
                config={"loss_type": ["sigmoid"], "label_smoothing": 0.2},
                options={"label_smoothing": 0.2},
                reason="TRL ignores label_smoothing under loss_type sigmoid",
                same_as={},
            ),
        ),
    )
