"""Odds ratio preference optimization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, TrlCase, hookimpl, reward_metrics
from qpref.records import LossOutput, PairedInputs, PairLogProbs

CERTAIN = -1e-6
"""Cap of the log-probability per token in the odds, which are infinite at 0."""

MICRO_BATCH_NLL = "TRL averages the NLL over the tokens of the micro-batch, qpref over the tokens of each example"


class OrpoOptions(Options):
    """Options of the loss `orpo`."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="Weight of the odds-ratio term beside the NLL (lambda in the paper). At 0.1 the NLL dominates, at "
        "1 the odds ratio. Usual: 0.1 to 0.5.",
    )
    nll: Literal["all", "response"] = Field(
        default="all",
        description="Tokens of the NLL: all: prompt and chosen response; response: the chosen response alone.",
    )


def log1mexp(x: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) for x <= 0, with x capped at CERTAIN; beyond the cap the gradient is 0.

    `torch.where` also differentiates the branch that it doesn't take, so `far`, which would be infinite where exp(x)
    rounds to 1, gets a finite argument there. `near` is finite for every capped x.
    """
    x = x.clamp(max=CERTAIN)
    is_far = x < -math.log(2)
    near = (-torch.expm1(x)).log()
    far = torch.log1p(-x.where(is_far, -1.0).exp())
    return far.where(is_far, near)


def nll_of(policy: PairLogProbs, tokens: Literal["all", "response"]) -> Tensor:
    """Return the [N] negative log-probability per token of the chosen response, or of prompt and response."""
    if tokens == "response":
        return -policy.chosen.mean
    assert policy.prompt is not None  # needs = {"prompt"}
    return -(policy.prompt.total + policy.chosen.total) / (policy.prompt.count + policy.chosen.count)


def build(options: OrpoOptions) -> Callable[[PairedInputs], LossOutput]:
    """NLL - beta log sigmoid(log OR), log OR = c' - r' - (log(1 - e^c') - log(1 - e^r')), c' and r' per token.

    Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", eq. 6 and 7, with the odds
    of eq. 3 to 5. The NLL is the mean over the tokens of the prompt (but the first) and of the chosen response, or of
    the response alone. The argument of log(1 - e^x) is capped at -1e-6, so a response of probability 1 has finite odds.
    A row's margin is not used: the paper compares odds without an offset.
    """

    def orpo(inputs: PairedInputs) -> LossOutput:
        policy = inputs.policy
        chosen, rejected = policy.chosen.mean, policy.rejected.mean
        log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
        nll = nll_of(policy, options.nll)
        losses = nll - options.beta * logsigmoid(log_odds_ratio)
        metrics = reward_metrics(options.beta * chosen, options.beta * rejected)
        metrics |= {"log_odds_ratio": log_odds_ratio.detach(), "nll": nll.detach()}
        return LossOutput(losses=losses, metrics=metrics)

    return orpo


def needs(options: OrpoOptions) -> frozenset[str]:
    """Return "prompt" if the NLL includes the prompt."""
    return frozenset({"prompt"}) if options.nll == "all" else frozenset()


@hookimpl
def qpref_losses() -> Iterator[PairedLoss]:
    yield PairedLoss(
        name="orpo",
        summary="odds ratio preference optimization, without a reference (Hong et al. 2024)",
        formula="NLL - beta log sigmoid((c' - r') - (log(1 - e^c') - log(1 - e^r'))), c' and r' per token",
        paper='Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", eq. 6 and 7',
        options=OrpoOptions,
        build=build,
        needs=needs,
        ignores=frozenset({"margin"}),
        variants=({"nll": "response"}, {"beta": 1.0}),
        trl_cases=(
            TrlCase(
                trainer="ORPOTrainer", config={"beta": 0.1}, options={"beta": 0.1}, num_examples=1, dtype="float32"
            ),
            TrlCase(
                trainer="ORPOTrainer", config={"beta": 1.0}, options={"beta": 1.0}, num_examples=1, dtype="float32"
            ),
            TrlCase(
                trainer="ORPOTrainer",
                config={"beta": 0.1},
                options={"beta": 0.1, "nll": "response"},
                reason="TRL takes the NLL over the prompt too",
                same_as={"beta": 0.1},
                num_examples=1,
                dtype="float32",
            ),
            TrlCase(
                trainer="ORPOTrainer",
                config={"beta": 0.1},
                options={"beta": 0.1},
                reason=MICRO_BATCH_NLL,
                dtype="float32",
            ),
        ),
    )
