"""Reward and KL of a policy, on responses that are sampled from it to held-out prompts."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from qpref.data.tokenize import PairTokenizer
from qpref.evaluation.generate import prompt_ids
from qpref.evaluation.sequence_kl import Mode, sequence_kl
from qpref.evaluation.statistics import Bootstrap, Estimate, Floats
from qpref.evaluation.subjects import Subject
from qpref.policy.kept_base import KeptBase
from qpref.policy.policy import Policy
from qpref.policy.reference import as_base, as_start
from qpref.records import TokenizedExample, UnpairedExample
from qpref.sampling.batches import drawn_batches, load_sampler
from qpref.sampling.decode import Draws
from qpref.sampling.journal import Entry
from qpref.sampling.sample import Score, scored

RESAMPLES, SEED = 2000, 0
"""Of the bootstrap over prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A policy's sampled responses to N held-out prompts, k to each, in numbers.

    Attributes:
        rewards: [N][k].
        kl_base: [N][k] KL of each response from the base, nats.
        kl_start: [N][k] from what its run started from, nats.
        ended: share of the responses that ended by themselves.
        tokens: mean length of a response.
    """

    rewards: list[list[float]]
    kl_base: list[list[float]]
    kl_start: list[list[float]]
    ended: float
    tokens: float

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Measured:
        return cls(**values)

    def as_json(self) -> dict[str, Any]:
        """Convert to JSON values, from which `of_json` makes the same again."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """Return its estimates as JSON values."""
        estimates = {"reward": self.reward, "kl_from_base": self.kl_from_base, "kl_from_start": self.kl_from_start}
        return {name: estimate_as_json(one) for name, one in estimates.items()} | {
            "ended": self.ended,
            "tokens": self.tokens,
        }

    @property
    def reward(self) -> Estimate:
        """Mean reward of a response, with a 95 % interval over prompts."""
        return _mean(self.rewards)

    @property
    def kl_from_base(self) -> Estimate:
        """KL(policy || base) of a response, nats."""
        return _mean(self.kl_base)

    @property
    def kl_from_start(self) -> Estimate:
        """KL of a response from what the run started from, nats."""
        return _mean(self.kl_start)

    def gain(self, before: Measured) -> Estimate:
        """Mean difference of the reward from an earlier policy's on the same prompts."""
        return _mean((np.array(self.rewards) - np.array(before.rewards)).tolist())


def measure(
    subject: Subject,
    prompts: Sequence[UnpairedExample],
    draws: Draws,
    score: Score,
    batch_size: int,
    kept: KeptBase | None = None,
) -> Measured:
    """Sample responses of a model to each prompt at temperature 1, score them, and compute their KL.

    Raises:
        DataError: a prompt can't be rendered.
        PolicyError: the model can't be loaded.
        DeviceMemoryError: not even one prompt's responses fit.
        PluginError: the reward broke its contract.
    """
    draws = replace(draws, temperature=1.0, top_p=1.0)
    tokenizer = subject.tokenizer()
    ids = prompt_ids(tokenizer, prompts)
    policy = load_sampler(subject, kept)
    responses: dict[int, list[list[int]]] = {}
    entries: dict[int, Entry] = {}
    for batch, drawn in drawn_batches(policy, tokenizer, ids, range(len(ids)), draws, batch_size):
        responses |= dict(zip(batch, drawn, strict=True))
        entries |= {entry.index: entry for entry in scored(prompts, tokenizer, batch, drawn, score)}
    examples = [_example(ids[index], responses[index], prompts[index], tokenizer) for index in range(len(ids))]
    kl_base, kl_start = _kl(policy, examples)
    in_order = [entries[index] for index in range(len(ids))]
    return Measured(
        rewards=[list(entry.scores) for entry in in_order],
        kl_base=kl_base.tolist(),
        kl_start=kl_start.tolist(),
        ended=float(np.mean([entry.ended for entry in in_order])),
        tokens=float(np.mean([len(branch) for example in examples for branch in example.branches])),
    )


def estimate_as_json(estimate: Estimate) -> dict[str, float]:
    """Convert an estimate of finite values to JSON values."""
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _kl(policy: Policy, examples: Sequence[TokenizedExample]) -> tuple[Floats, Floats]:
    """Compute the KL from the base and from what the run started from; 0 for a model without adapters."""
    if not policy.has_adapters:
        nothing = np.zeros((len(examples), len(examples[0].branches)))
        return nothing, nothing
    modes: list[Mode] = [as_base, as_start] if policy.starts_from_adapter else [as_base]
    found = sequence_kl(policy, examples, modes)
    return found[0], found[-1]


def _example(
    prompt: Sequence[int], responses: Sequence[Sequence[int]], asked: UnpairedExample, tokenizer: PairTokenizer
) -> TokenizedExample:
    """Make an example of the responses as they were drawn: tokenizing their texts may give other tokens."""
    return TokenizedExample(
        prompt=array("i", prompt),
        branches=tuple(array("i", response) for response in responses),
        truncated=tuple(response[-1] not in tokenizer.stop_tokens for response in responses),
        weight=1.0,
        margin=0.0,
        source=asked.source,
    )


def _mean(values: Sequence[Sequence[float]]) -> Estimate:
    """Estimate the mean of [N][k] values; prompts are resampled, each with its k responses."""
    array_of = np.array(values)
    cluster = np.repeat(np.arange(len(array_of)), array_of.shape[1])
    return Bootstrap(cluster, RESAMPLES, SEED).mean(array_of.ravel())
