"""Measures of a policy on held-out openings: the reward of what it writes, and how far it is from its reference."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from benchmarks.frontier.task import Model, Pair, continue_openings
from qpref.data.pack import pack
from qpref.evaluation.generate import as_prompt, prompt_ids
from qpref.evaluation.statistics import Bootstrap, Estimate
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.reference import as_reference, frozen
from qpref.records import Source, TokenizedExample

BATCH = 16
"""Openings whose responses are scored together."""
BOOTSTRAP_SAMPLES = 2000
HERE = Source(path="benchmarks/frontier", line=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """Numbers of each sampled response, [openings][k].

    Attributes:
        rewards: VADER's compound score, from -1 to 1.
        log_ratios: log policy - log reference of the response, nats, summed over its tokens. Their mean estimates the
            sequence-level KL(policy || reference), since the responses are the policy's own; it can be below 0.
        lengths: tokens.
        ended: False for a response that was cut off.
    """

    rewards: list[list[float]]
    log_ratios: list[list[float]]
    lengths: list[list[int]]
    ended: list[list[bool]]


def measure(model: Model, openings: Sequence[str], k: int, seed: int) -> Measures:
    """Sample k responses to each opening from a model with an adapter, and score them."""
    sampled = continue_openings(model, openings, k, seed)
    return Measures(
        rewards=[list(one.rewards) for one in sampled],
        log_ratios=log_ratios(model, [(one.prompt, one.tokens) for one in sampled]),
        lengths=[[len(tokens) for tokens in one.tokens] for one in sampled],
        ended=[list(one.ended) for one in sampled],
    )


def log_ratios(model: Model, responses: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> list[list[float]]:
    """Compute log policy - log reference of the responses to each prompt, nats; the same number to each prompt."""
    found: list[list[float]] = []
    for start in range(0, len(responses), BATCH):
        examples = [_example(prompt, branches) for prompt, branches in responses[start : start + BATCH]]
        batch = pack(examples, model.policy.device)
        with frozen(model.policy):
            policy = completion_logprobs(model.policy, batch)
        with as_reference(model.policy):
            reference = completion_logprobs(model.policy, batch)
        totals = [float(part.sum()) for part in (policy.values - reference.values).double().split(list(batch.lengths))]
        k = len(examples[0].branches)
        found += [totals[first : first + k] for first in range(0, len(totals), k)]
    return found


def pair_changes(model: Model, pairs: Sequence[Pair]) -> tuple[float, float]:
    """Return the mean change of the chosen and of the rejected responses' log-probabilities, nats."""
    tokenizer = model.tokenizer.tokenizer
    prompts = prompt_ids(model.tokenizer, [as_prompt(pair.opening) for pair in pairs])
    responses = [
        (prompt, [tokenizer.encode(text, add_special_tokens=False) for text in (pair.chosen, pair.rejected)])
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    changes = log_ratios(model, responses)
    return fmean(chosen for chosen, _ in changes), fmean(rejected for _, rejected in changes)


def _example(prompt: Sequence[int], branches: Sequence[Sequence[int]]) -> TokenizedExample:
    return TokenizedExample(
        prompt=array("i", prompt),
        branches=tuple(array("i", branch) for branch in branches),
        truncated=(False,) * len(branches),
        weight=1.0,
        margin=0.0,
        source=HERE,
    )


def estimate(values: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """Estimate the mean over all responses, with a 95 % interval by resampling whole openings.

    Args:
        values: [openings][responses]; those of several seeds side by side.
    """
    flat = np.array([value for row in values for value in row], dtype=np.float64)
    names = [str(index) for index, row in enumerate(values) for _ in row]
    return Bootstrap.of(names, BOOTSTRAP_SAMPLES, seed).mean(flat)
