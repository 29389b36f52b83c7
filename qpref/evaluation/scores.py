"""Score pairs under a model: log-probabilities of both responses, and the KL of its next tokens from a reference's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qpref.data.pack import num_fed_tokens, pack
from qpref.memory.fit import MOST_TOKENS
from qpref.memory.tune import shrink_microbatch
from qpref.policy.divergence import NextTokens, token_kl
from qpref.policy.logprobs import completion_hidden
from qpref.policy.out_of_memory import fits
from qpref.policy.policy import Policy
from qpref.policy.reference import as_reference, frozen, row_keys
from qpref.policy.token_scores import score_tokens
from qpref.records import TokenizedExample, TokenLogProbs

KL_POSITIONS = 8192
"""Response tokens, over all pairs, at which the KL over the whole vocabulary is computed; bounds the memory for a
reference's distributions."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """One model's scores of N pairs, chosen before rejected.

    Attributes:
        policy: [N, 2] summed log-probabilities, nats.
        reference: [N, 2] the reference's; None without one.
        lengths: [N, 2] response tokens.
        kl: [N] KL(policy || reference) per token, nats, a mean over the pair's `kl_positions`; None without a
            reference, or with one of another vocabulary.
    """

    policy: Floats
    reference: Floats | None
    lengths: NDArray[np.int64]
    kl: Floats | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A reference's scores of the pairs, for its own model and for models without a reference.

    Attributes:
        name: the model whose reference it is.
        keys: hashes of each pair's token ids; they differ between tokenizers.
        totals: [N, 2] summed log-probabilities, nats.
        next_tokens: its distributions at each pair's `kl_positions`.
    """

    name: str
    keys: list[list[bytes]]
    totals: Floats
    next_tokens: list[NextTokens]

    def fits(self, examples: Sequence[TokenizedExample]) -> bool:
        """Return whether these examples have the token ids that were scored."""
        return self.keys == [row_keys(example) for example in examples]


def kl_positions(examples: Sequence[TokenizedExample], seed: int, most: int = KL_POSITIONS) -> list[Tensor]:
    """Choose the response tokens of each pair at which the KL is computed: all, or a random sample beyond `most`.

    Args:
        most: bound on the positions of all pairs; each pair has at least one.
    """
    each = max(1, most // len(examples))
    chosen = []
    for index, example in enumerate(examples):
        count = sum(example.num_scored)
        draw = random.Random(f"{seed} {index}").sample(range(count), each) if count > each else range(count)
        chosen.append(torch.tensor(sorted(draw)))
    return chosen


def score_reference(
    name: str, policy: Policy, examples: Sequence[TokenizedExample], positions: Sequence[Tensor]
) -> Reference:
    """Score the pairs under the policy's own reference."""
    with as_reference(policy):
        totals, next_tokens = _forward_all(policy, examples, positions)
    return Reference(
        name=name, keys=[row_keys(example) for example in examples], totals=totals, next_tokens=next_tokens
    )


def score_pairs(
    policy: Policy, examples: Sequence[TokenizedExample], positions: Sequence[Tensor], reference: Reference | None
) -> PairScores:
    """Score the pairs under the policy, and compare it with a reference that has scored the same pairs."""
    kl: dict[int, float] = {}
    comparable = reference is not None and reference.next_tokens[0].num_tokens == policy.head.weight.shape[0]

    def compare(index: int, of_policy: NextTokens) -> None:
        assert reference is not None
        of_reference = reference.next_tokens[index].on(policy.device)
        kl[index] = token_kl(of_policy, of_reference).mean().item()

    with frozen(policy):
        totals, _ = _forward_all(policy, examples, positions, compare if comparable else _ignore)
    return PairScores(
        policy=totals,
        reference=None if reference is None else reference.totals,
        lengths=np.array([example.num_scored for example in examples]),
        kl=np.array([kl[index] for index in range(len(examples))]) if comparable else None,
    )


def log_probabilities(policy: Policy, examples: Sequence[TokenizedExample]) -> Floats:
    """Score the pairs under the policy in its current mode: [N, 2] summed log-probabilities, nats."""
    nowhere = [torch.empty(0, dtype=torch.long)] * len(examples)
    return _forward_all(policy, examples, nowhere, _ignore)[0]


def _ignore(index: int, next_tokens: NextTokens) -> None:
    """Drop the distributions, where there is nothing to compare them with."""


def _forward_all(
    policy: Policy,
    examples: Sequence[TokenizedExample],
    positions: Sequence[Tensor],
    take: Callable[[int, NextTokens], None] | None = None,
) -> tuple[Floats, list[NextTokens]]:
    """Compute [N, 2] log-probabilities under the policy in its current mode, and the next-token distributions.

    The longest pairs go first, so that memory runs out in the first batch if at all; the batches then shrink.

    Args:
        positions: for each pair, the response tokens whose distributions are wanted.
        take: receives each pair's distributions on the device; by default they are moved to the CPU and returned.
    """
    totals = np.empty((len(examples), 2))
    kept: dict[int, NextTokens] = {}
    take = take or (lambda index, next_tokens: kept.__setitem__(index, next_tokens.on(torch.device("cpu"))))

    def score(indices: Sequence[int], members: Sequence[TokenizedExample]) -> None:
        values, hidden = _score(policy, members)
        totals[indices] = values.total.double().cpu().numpy().reshape(-1, 2)
        starts = np.cumsum([0, *(sum(member.num_scored) for member in members)])
        for index, start in zip(indices, starts[:-1].tolist(), strict=True):
            take(index, NextTokens.of(policy.head, hidden[start + positions[index].to(hidden.device)]))

    order = sorted(range(len(examples)), key=lambda index: -num_fed_tokens(examples[index], policy.shares_prompts))
    tokens, done = MOST_TOKENS[policy.device.type], 0
    while done < len(order):
        longest = num_fed_tokens(examples[order[done]], policy.shares_prompts)
        indices = order[done : done + max(1, tokens // longest)]
        members = [examples[index] for index in indices]
        if fits(partial(score, indices, members)):
            done += len(indices)
        else:
            tokens = shrink_microbatch(policy, members, tokens)
    return totals, [kept[index] for index in sorted(kept)]


def _score(policy: Policy, members: Sequence[TokenizedExample]) -> tuple[TokenLogProbs, Tensor]:
    """Compute the log-probabilities and the hidden states behind them."""
    batch = pack(members, policy.device)
    hidden = completion_hidden(policy, batch)
    values, _ = score_tokens(policy.head, hidden, batch.score_token)
    return TokenLogProbs(values=values, lengths=batch.lengths), hidden
