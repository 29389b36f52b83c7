"""Losses that need no reference model.

c and r are the summed log-probabilities of the chosen and the rejected response under the policy, c' and r'
their means per token, and ls is log sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, TrlCase, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs

MICRO_BATCH_NLL = "TRL averages the NLL over the tokens of the micro-batch, qpref over the tokens of each example"

LARGEST_EXPONENT = 80.0
"""exp(80) is 5.5e34, so a reward of AlphaPO stays finite in float32 with `beta` at its limit."""

SMOOTHING = Field(
    default=0.0,
    ge=0,
    lt=0.5,
    description="Assumed share of swapped labels; 0 trusts all of them.",
)
GAMMA = (
    "Target margin in units of the reward: the loss is below ln 2 once the chosen reward exceeds the rejected one by "
    "gamma. SimPO's code is configured by the ratio gamma / beta instead. "
)


class CpoOptions(Options):
    """Options of the loss `cpo`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Scale of the reward, beta times a response's summed log-probability: a pair's gradient vanishes "
        "once the two rewards are a few units apart, which is tens of nats at 0.1 and a few at 1. Only the NLL ties "
        "the policy to the data.",
    )
    alpha: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the chosen response's negative log-likelihood, which keeps the policy on the preferred "
        "data; 0 leaves it out.",
    )
    nll: Literal["mean", "sum"] = Field(
        default="mean",
        description="mean: the negative log-likelihood per token, as the paper's code has it; sum: of the whole "
        "response, as the paper writes it.",
    )
    label_smoothing: float = SMOOTHING


class SimpoOptions(Options):
    """Options of the loss `simpo`."""

    beta: float = Field(
        default=2.0,
        gt=0,
        description="Scale of the reward, beta times a response's log-probability per token: a larger beta requires a "
        "smaller gap per token. Far larger than DPO's, since a mean is far smaller than a sum. Usual: 2 to 10.",
    )
    gamma: float = Field(default=0.5, ge=0, description=GAMMA + "Usual: 0.3 to 1.6 at beta = 2.")
    alpha: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the chosen response's negative log-likelihood per token; the paper has none (CPO-SimPO "
        "does).",
    )
    label_smoothing: float = SMOOTHING


class AlphapoOptions(Options):
    """Options of the loss `alphapo`."""

    beta: float = Field(
        default=2.5,
        gt=0,
        le=40,
        description="Scale of the reward, as in `simpo`. Usual: 2 to 10.",
    )
    gamma: float = Field(default=0.1, ge=0, description=GAMMA + "Usual: 0.1 to 1.6.")
    alpha: float = Field(
        default=0.25,
        ge=-10,
        le=10,
        description="Shape of the reward (1 - p^-alpha) / alpha, p the geometric mean of the token probabilities. "
        "Above 0 it falls faster than log p as p falls, which penalizes unlikely responses; below 0 it flattens; 0 is "
        "log p, which is SimPO. Usual: -0.25 to 0.5.",
    )


class SimperOptions(Options):
    """The loss `simper` has no options."""


class SftOptions(Options):
    """The loss `sft` has no options."""


def build_cpo(options: CpoOptions) -> Callable[[PairedInputs], LossOutput]:
    """-(1 - eps) ls(x) - eps ls(-x) + alpha NLL, x = beta (c - r) - m, m the row's margin, NLL = -c' or -c.

    Xu et al. 2024, "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
    Translation", eq. 3 plus its NLL term.
    """

    def cpo(inputs: PairedInputs) -> LossOutput:
        chosen = options.beta * inputs.policy.chosen.total
        rejected = options.beta * inputs.policy.rejected.total
        likelihood = inputs.policy.chosen.mean if options.nll == "mean" else inputs.policy.chosen.total
        losses = _preference(chosen - rejected - inputs.margin, options.label_smoothing) - options.alpha * likelihood
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return cpo


def build_simpo(options: SimpoOptions) -> Callable[[PairedInputs], LossOutput]:
    """-(1 - eps) ls(x) - eps ls(-x) - alpha c', x = beta (c' - r') - gamma - m, m the row's margin.

    Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", eq. 6 (alpha = eps = 0).
    """

    def simpo(inputs: PairedInputs) -> LossOutput:
        likelihood = inputs.policy.chosen.mean
        chosen, rejected = options.beta * likelihood, options.beta * inputs.policy.rejected.mean
        x = chosen - rejected - options.gamma - inputs.margin
        losses = _preference(x, options.label_smoothing) - options.alpha * likelihood
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return simpo


def build_alphapo(options: AlphapoOptions) -> Callable[[PairedInputs], LossOutput]:
    """-ls(Rc - Rr - gamma - m), R = beta (1 - p^-alpha) / alpha, p = e^c' or e^r', m the row's margin.

    Gupta et al. 2025, "AlphaPO: Reward Shape Matters for LLM Alignment". p^-alpha is capped at e^80; beyond
    the cap the gradient is 0.
    """

    def reward(mean: Tensor) -> Tensor:
        if abs(options.alpha) < 1e-12:  # the limit; the quotient would underflow to 0 / 0
            return options.beta * mean
        exponent = (-options.alpha * mean).clamp(max=LARGEST_EXPONENT)
        return (-options.beta / options.alpha) * exponent.expm1()

    def alphapo(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = reward(inputs.policy.chosen.mean), reward(inputs.policy.rejected.mean)
        losses = -logsigmoid(chosen - rejected - options.gamma - inputs.margin)
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))

    return alphapo


def build_simper(options: SimperOptions) -> Callable[[PairedInputs], LossOutput]:
    """e^r' - e^c': the difference of the two responses' inverse perplexities, from -1 to 1. The margin is ignored.

    Xiao et al. 2025, "SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters". The reported
    rewards are the inverse perplexities.
    """

    def simper(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = inputs.policy.chosen.mean.exp(), inputs.policy.rejected.mean.exp()
        return LossOutput(losses=rejected - chosen, metrics=reward_metrics(chosen, rejected))

    return simper


def build_sft(options: SftOptions) -> Callable[[PairedInputs], LossOutput]:
    """-c': the negative log-likelihood per token of the chosen response. The rejected one and the margin are ignored.

    The reported rewards are c' and r', in nats per token.
    """

    def sft(inputs: PairedInputs) -> LossOutput:
        chosen, rejected = inputs.policy.chosen.mean, inputs.policy.rejected.mean
        return LossOutput(losses=-chosen, metrics=reward_metrics(chosen, rejected))

    return sft


def _preference(x: Tensor, label_smoothing: float) -> Tensor:
    """Compute -(1 - eps) ls(x) - eps ls(-x): cross-entropy with a label that is right with probability 1 - eps."""
    return -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)


CPO = PairedLoss(
    name="cpo",
    summary="contrastive preference optimization, no reference (Xu et al. 2024)",
    formula="-(1 - eps) ls(x) - eps ls(-x) - alpha c', x = beta (c - r) - m",
    paper="Xu et al. 2024, Contrastive Preference Optimization, eq. 3 plus its NLL term",
    options=CpoOptions,
    build=build_cpo,
    needs=frozenset(),
    variants=[{"beta": 0.5}, {"alpha": 0.0}, {"nll": "sum"}, {"label_smoothing": 0.1}],
    trl_cases=(
        TrlCase(trainer="CPOTrainer", config={"cpo_alpha": 0.0}, options={"alpha": 0.0}),
        TrlCase(
            trainer="CPOTrainer",
            config={"beta": 0.3, "cpo_alpha": 0.5},
            options={"beta": 0.3, "alpha": 0.5},
            num_examples=1,
        ),
        TrlCase(
            trainer="CPOTrainer", config={"label_smoothing": 0.2}, options={"label_smoothing": 0.2}, num_examples=1
        ),
        TrlCase(
            trainer="CPOTrainer",
            config={"beta": 0.3},
            options={"beta": 0.3, "nll": "sum"},
            reason="TRL takes the NLL per token, as the code of the paper does",
            same_as={"beta": 0.3},
            num_examples=1,
        ),
        TrlCase(trainer="CPOTrainer", config={"beta": 0.3}, options={"beta": 0.3}, reason=MICRO_BATCH_NLL),
    ),
)

SIMPO = PairedLoss(
    name="simpo",
    summary="simple preference optimization, no reference (Meng et al. 2024)",
    formula="-(1 - eps) ls(x) - eps ls(-x) - alpha c', x = beta (c' - r') - gamma - m",
    paper="Meng et al. 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward, eq. 6",
    options=SimpoOptions,
    build=build_simpo,
    needs=frozenset(),
    variants=[{"beta": 10.0}, {"gamma": 1.6}, {"alpha": 1.0}, {"label_smoothing": 0.1}],
    trl_cases=(
        TrlCase(
            trainer="CPOTrainer",
            config={"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
            options={"beta": 2.0, "gamma": 1.0},
        ),
        TrlCase(
            trainer="CPOTrainer",
            config={"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "label_smoothing": 0.2},
            options={"label_smoothing": 0.2},
        ),
        TrlCase(
            trainer="CPOTrainer",
            config={"loss_type": "simpo", "beta": 2.0},
            options={"beta": 2.0, "gamma": 0.5, "alpha": 1.0},
            num_examples=1,
        ),
        TrlCase(
            trainer="CPOTrainer",
            config={"loss_type": "simpo", "beta": 2.0},
            options={"beta": 2.0},
            reason="TRL adds an NLL term unless cpo_alpha is 0",
            same_as={"beta": 2.0, "alpha": 1.0},
            num_examples=1,
        ),
    ),
)

ALPHAPO = PairedLoss(
    name="alphapo",
    summary="SimPO with a shaped reward, no reference (Gupta et al. 2025)",
    formula="-ls(Rc - Rr - gamma - m), R = beta (1 - p^-alpha) / alpha, p = e^c' or e^r'",
    paper="Gupta et al. 2025, AlphaPO: Reward Shape Matters for LLM Alignment",
    options=AlphapoOptions,
    build=build_alphapo,
    needs=frozenset(),
    variants=[{"beta": 40.0}, {"gamma": 1.6}, {"alpha": -0.25}, {"alpha": 0.0}, {"alpha": 10.0}],
    trl_cases=(
        TrlCase(
            trainer="CPOTrainer",
            config={"loss_type": "alphapo", "beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25},
            options={"beta": 2.5, "gamma": 0.1, "alpha": 0.25},
        ),
        TrlCase(
            trainer="CPOTrainer",
            config={"loss_type": "alphapo", "beta": 2.5, "simpo_gamma": 0.1, "alpha": -0.25},
            options={"beta": 2.5, "gamma": 0.1, "alpha": -0.25},
        ),
    ),
)

SIMPER = PairedLoss(
    name="simper",
    summary="inverse perplexities without options, no reference (Xiao et al. 2025)",
    formula="e^r' - e^c'",
    paper="Xiao et al. 2025, SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters",
    options=SimperOptions,
    build=build_simper,
    ignores=frozenset({"margin"}),
    needs=frozenset(),
)

SFT = PairedLoss(
    name="sft",
    summary="the likelihood of the chosen responses, no reference",
    formula="-c'",
    paper="maximum likelihood",
    options=SftOptions,
    build=build_sft,
    needs=frozenset(),
    ignores=frozenset({"margin", "rejected"}),
    trl_cases=(
        TrlCase(trainer="DPOTrainer", config={"loss_type": ["sft"]}, num_examples=1),
        TrlCase(trainer="DPOTrainer", config={"loss_type": ["sft"]}, reason=MICRO_BATCH_NLL),
    ),
)


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield from (CPO, SIMPO, ALPHAPO, SIMPER, SFT)
