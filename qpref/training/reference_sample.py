"""Compare a random sample of a run's cached reference rows, over all of its data, with their scores on this machine.

The check rows of a shard and the run's first batch say that a shard's writer had this reference. They cannot say that
each of its rows is right: one row that went wrong in the writer's memory has a good checksum. Each row of the sample is
judged by itself, since an average over many hides one.

Of a run's N cached examples it scores n, as many as `SAMPLE_TOKENS` holds. If k of them are wrong, the chance that one
of these is found is 1 - (1 - n/N)^k or more: n/N for a single one, certain where n = N. Each run draws its own sample.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qpref.data.pack import num_fed_tokens, pack
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.policy.reference import row_keys
from qpref.policy.reference_cache import ReferenceCache
from qpref.records import TokenizedExample

SAMPLE_TOKENS = 8192
"""Tokens that are scored at most, which bounds the cost whatever the size of the data."""


def sample(
    cache: ReferenceCache, examples: Sequence[TokenizedExample], policy: Policy, budget: int
) -> Iterator[list[TokenizedExample]]:
    """Draw examples whose rows all come from other runs' shards, in batches of at most `budget` tokens.

    A run's own rows were computed by the very machine that would score them again.
    """
    own = f"{cache.store.run}.shard"
    draw = random.Random(cache.store.run)
    members: list[TokenizedExample] = []
    total = in_batch = 0
    for index in draw.sample(range(len(examples)), len(examples)):
        example = examples[index]
        if {cache.store.shard_of(key) for key in row_keys(example)} & {None, own}:
            continue
        tokens = num_fed_tokens(example, policy.shares_prompts)
        total += tokens
        if total > SAMPLE_TOKENS:
            break
        if members and in_batch + tokens > budget:
            yield members
            members, in_batch = [], 0
        members.append(example)
        in_batch += tokens
    if members:
        yield members


def row_differences(cache: ReferenceCache, examples: Sequence[TokenizedExample], policy: Policy) -> dict[bytes, float]:
    """Compute each row's mean difference from its scores on this machine, nats a token.

    A row of another length, which no reader takes, is left out.
    """
    batch = pack(examples, policy.device)
    scores = completion_logprobs(policy, batch).values.cpu().split(list(batch.lengths))
    keys = [key for example in examples for key in row_keys(example)]
    cached = {key: cache.get(key) for key in keys}
    return {
        key: _mean_difference(values, score)
        for key, score in zip(keys, scores, strict=True)
        if (values := cached[key]) is not None and len(values) == len(score)
    }


def largest_rounding(arrangements: Sequence[Tensor], lengths: Sequence[int]) -> float:
    """Return the largest mean difference of a row between the batches that it was scored in, nats a token.

    Args:
        arrangements: [tokens] scores of the same rows in different batches.
        lengths: tokens of each row.
    """
    together, *others = [scores.split(list(lengths)) for scores in arrangements]
    return max(
        (_mean_difference(row, again) for other in others for row, again in zip(together, other, strict=True)),
        default=0.0,
    )


def _mean_difference(values: Tensor, scores: Tensor) -> float:
    return float(torch.nan_to_num((values - scores).abs(), nan=torch.inf).mean())
