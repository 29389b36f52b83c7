"""Losses of the reward margin z = beta h - m, h the difference of the two log-ratios and m the row's margin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, TrlCase, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs, TokenLogProbs

MICRO_BATCH_NLL = "TRL averages the NLL over the tokens of the micro-batch, qpref over the tokens of each example"


class MarginOptions(Options):
    """The option that these losses share."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the tie to the reference: the implicit reward is beta times the change in a "
        "response's log-probability. Usual: 0.1 to 0.5.",
    )


class HingeOptions(MarginOptions):
    """Options of the loss `hinge`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="A pair has no gradient once its log-ratios differ by 1 / beta nats: 10 at 0.1. Usual: 0.05 to "
        "0.5.",
    )


class RobustOptions(MarginOptions):
    """Options of the loss `robust`."""

    label_smoothing: float = Field(
        default=0.1,
        ge=0,
        lt=0.5,
        description="Estimated share of swapped labels. 0 is plain DPO; the closer to 0.5, the noisier the gradient. "
        "Usual: 0.05 to 0.3.",
    )


class ExoPairOptions(MarginOptions):
    """Options of the loss `exo_pair`."""

    label_smoothing: float = Field(
        default=1e-3,
        gt=0,
        lt=0.5,
        description="Probability that the rejected response is the better one; the target of the reward margin is "
        "log(1 / label_smoothing - 1), 6.9 at 0.001. Usual: 0.001 to 0.1.",
    )


class DiscopopOptions(MarginOptions):
    """Options of the loss `discopop`."""

    beta: float = Field(
        default=0.05,
        gt=0,
        description="Strength of the tie to the reference. The loss is not convex and was found at 0.05. Usual: 0.01 "
        "to 0.1.",
    )
    tau: float = Field(
        default=0.05,
        ge=1e-3,
        le=1,
        description="Width of the transition from the logistic to the exponential loss as the reward margin turns "
        "positive; smaller is sharper. Usual: 0.05.",
    )


class SigmoidNormOptions(MarginOptions):
    """Options of the loss `sigmoid_norm`."""

    beta: float = Field(
        default=5.0,
        gt=0,
        description="As in dpo, but on log-ratios per token, which are smaller by the length: the paper uses 5. Usual: "
        "2 to 10.",
    )


class RpoOptions(MarginOptions):
    """Options of the loss `rpo`."""

    alpha: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the chosen response's negative log-likelihood per token, which keeps its probability "
        "from falling. 0 is plain DPO. Usual: 0.1 to 1.",
    )


def hinge(options: HingeOptions) -> Callable[[PairedInputs], LossOutput]:
    """max(0, 1 - z).

    Zhao et al. 2023, "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", in the form with a reference of
    Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization" (there: hinge-norm).
    """
    return loss_of_margin(options, lambda z: (1 - z).relu())


def robust(options: RobustOptions) -> Callable[[PairedInputs], LossOutput]:
    """[-(1 - eps) log sigmoid(z) + eps log sigmoid(-z)] / (1 - 2 eps): unbiased where a share eps of labels is swapped.

    Unlike every other loss here it is negative, without bound, for large z.

    Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback".
    """
    eps = options.label_smoothing
    return loss_of_margin(options, lambda z: (-(1 - eps) * logsigmoid(z) + eps * logsigmoid(-z)) / (1 - 2 * eps))


def exo_pair(options: ExoPairOptions) -> Callable[[PairedInputs], LossOutput]:
    """s (log s - log(1 - eps)) + (1 - s) (log(1 - s) - log eps), s = sigmoid(z): the reverse KL to the labels.

    Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment", eq. 16.
    """
    log_chosen, log_rejected = math.log1p(-options.label_smoothing), math.log(options.label_smoothing)

    def divergence(z: Tensor) -> Tensor:
        return z.sigmoid() * (logsigmoid(z) - log_chosen) + (-z).sigmoid() * (logsigmoid(-z) - log_rejected)

    return loss_of_margin(options, divergence)


def discopop(options: DiscopopOptions) -> Callable[[PairedInputs], LossOutput]:
    """-(1 - s) log sigmoid(z) + s e^-z, s = sigmoid(z / tau).

    s e^-z is computed as exp(log sigmoid(z / tau) - z), whose argument is below 0 for every tau <= 1, so that neither
    overflow nor 0 times infinity can arise.

    Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large Language Models", eq. 5.
    """
    tau = options.tau

    def modulated(z: Tensor) -> Tensor:
        return -(-z / tau).sigmoid() * logsigmoid(z) + (logsigmoid(z / tau) - z).exp()

    return loss_of_margin(options, modulated)


def sigmoid_norm(options: SigmoidNormOptions) -> Callable[[PairedInputs], LossOutput]:
    """-log sigmoid(z), z = beta (D_chosen / n_chosen - D_rejected / n_rejected) - m, n the tokens of each response.

    Lambert et al. 2024, "Tulu 3: Pushing Frontiers in Open Language Model Post-Training", eq. 6.
    """
    return loss_of_margin(options, lambda z: -logsigmoid(z), per_token=True)


def rpo(options: RpoOptions) -> Callable[[PairedInputs], LossOutput]:
    """-log sigmoid(z) - alpha log p(chosen) / n_chosen.

    Pang et al. 2024, "Iterative Reasoning Preference Optimization", eq. 1.
    """
    dpo = loss_of_margin(options, lambda z: -logsigmoid(z))

    def rpo(inputs: PairedInputs) -> LossOutput:
        output = dpo(inputs)
        return LossOutput(losses=output.losses - options.alpha * inputs.policy.chosen.mean, metrics=output.metrics)

    return rpo


def loss_of_margin(
    options: MarginOptions, of_margin: Callable[[Tensor], Tensor], *, per_token: bool = False
) -> Callable[[PairedInputs], LossOutput]:
    """Make the loss `of_margin(z)`, with log-ratios summed or per token."""

    def reward(policy: TokenLogProbs, reference: TokenLogProbs) -> Tensor:
        log_ratio = policy.total - reference.total
        return options.beta * (log_ratio / policy.count if per_token else log_ratio)

    def loss(inputs: PairedInputs) -> LossOutput:
        policy, reference = inputs.policy, inputs.reference
        assert reference is not None  # needs = {"reference"}
        chosen = reward(policy.chosen, reference.chosen)
        rejected = reward(policy.rejected, reference.rejected)
        return LossOutput(losses=of_margin(chosen - rejected - inputs.margin), metrics=reward_metrics(chosen, rejected))

    return loss


def exo_pair_starts_at(options: ExoPairOptions) -> float:
    """Compute the KL divergence of (1/2, 1/2) from (1 - eps, eps)."""
    eps = options.label_smoothing
    return -math.log(2) - (math.log1p(-eps) + math.log(eps)) / 2


HINGE = PairedLoss(
    name="hinge",
    summary="hinge loss on the reward margin, SLiC's with a reference (Zhao et al. 2023)",
    formula="max(0, 1 - z), z = beta h - margin",
    paper='Zhao et al. 2023, "SLiC-HF: Sequence Likelihood Calibration with Human Feedback"; Liu et al. 2023, '
    '"Statistical Rejection Sampling Improves Preference Optimization" (hinge-norm)',
    options=HingeOptions,
    build=hinge,
    starts_at=lambda options: 1.0,
    log_ratios_only=True,
    trl_cases=(TrlCase(trainer="DPOTrainer", config={"loss_type": ["hinge"], "beta": 0.3}, options={"beta": 0.3}),),
)

ROBUST = PairedLoss(
    name="robust",
    summary="DPO made unbiased under swapped labels (Chowdhury et al. 2024)",
    formula="[-(1 - eps) log sigmoid(z) + eps log sigmoid(-z)] / (1 - 2 eps), z = beta h - margin",
    paper='Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback"',
    options=RobustOptions,
    build=robust,
    starts_at=lambda options: math.log(2),
    log_ratios_only=True,
    variants=({"label_smoothing": 0.0}, {"label_smoothing": 0.4}),
    trl_cases=(
        TrlCase(
            trainer="DPOTrainer",
            config={"loss_type": ["robust"], "label_smoothing": 0.2},
            options={"label_smoothing": 0.2},
        ),
    ),
)

EXO_PAIR = PairedLoss(
    name="exo_pair",
    summary="efficient exact optimization on pairs (Ji et al. 2024)",
    formula="s (log s - log(1 - eps)) + (1 - s) (log(1 - s) - log eps), s = sigmoid(z), z = beta h - margin",
    paper='Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment", eq. 16',
    options=ExoPairOptions,
    build=exo_pair,
    starts_at=exo_pair_starts_at,
    log_ratios_only=True,
    variants=({"label_smoothing": 0.1},),
    trl_cases=(
        TrlCase(
            trainer="DPOTrainer",
            config={"loss_type": ["exo_pair"], "label_smoothing": 0.01},
            options={"label_smoothing": 0.01},
            dtype="float32",
        ),
    ),
)

DISCOPOP = PairedLoss(
    name="discopop",
    summary="the log-ratio modulated loss that a language model found (Lu et al. 2024)",
    formula="-(1 - s) log sigmoid(z) + s e^-z, s = sigmoid(z / tau), z = beta h - margin",
    paper='Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large Language Models", eq. 5',
    options=DiscopopOptions,
    build=discopop,
    starts_at=lambda options: (math.log(2) + 1) / 2,
    log_ratios_only=True,
    is_monotone=False,
    variants=({"tau": 1.0}, {"tau": 1e-3}),
    trl_cases=(
        TrlCase(trainer="DPOTrainer", config={"loss_type": ["discopop"], "beta": 0.05}, options={"beta": 0.05}),
        TrlCase(
            trainer="DPOTrainer",
            config={"loss_type": ["discopop"], "beta": 0.1, "discopop_tau": 0.2},
            options={"beta": 0.1, "tau": 0.2},
        ),
    ),
)

SIGMOID_NORM = PairedLoss(
    name="sigmoid_norm",
    summary="DPO on log-ratios per token (Lambert et al. 2024)",
    formula="-log sigmoid(beta (D_chosen / n_chosen - D_rejected / n_rejected) - margin), "
    "D = log policy - log reference, n = tokens",
    paper='Lambert et al. 2024, "Tulu 3: Pushing Frontiers in Open Language Model Post-Training", eq. 6',
    options=SigmoidNormOptions,
    build=sigmoid_norm,
    starts_at=lambda options: math.log(2),
    log_ratios_only=True,
    trl_cases=(
        TrlCase(trainer="DPOTrainer", config={"loss_type": ["sigmoid_norm"], "beta": 5.0}, options={"beta": 5.0}),
    ),
)

RPO = PairedLoss(
    name="rpo",
    summary="DPO and the chosen response's likelihood, iterative RPO's loss (Pang et al. 2024)",
    formula="-log sigmoid(beta h - margin) - alpha log p(chosen) / n_chosen",
    paper='Pang et al. 2024, "Iterative Reasoning Preference Optimization", eq. 1',
    options=RpoOptions,
    build=rpo,
    variants=({"alpha": 0.1},),
    trl_cases=(
        TrlCase(
            trainer="DPOTrainer",
            config={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.3},
            options={"beta": 0.3, "alpha": 0.5},
            num_examples=1,
        ),
        TrlCase(
            trainer="DPOTrainer",
            config={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.3},
            options={"beta": 0.3, "alpha": 0.5},
            reason=MICRO_BATCH_NLL,
        ),
    ),
)


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield from (HINGE, ROBUST, EXO_PAIR, DISCOPOP, SIGMOID_NORM, RPO)
