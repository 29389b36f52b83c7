"""What a model says of pairs: both responses' log-probabilities, and how far its next tokens are from a reference's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qpref.data.pack import num_fed_tokens, pack
from qpref.memory.fit import MOST_TOKENS
from qpref.memory.tune import shrink_microbatch
from qpref.policy.divergence import NextTokens, token_kl
from qpref.policy.head import score_tokens
from qpref.policy.logprobs import completion_hidden
from qpref.policy.policy import Policy
from qpref.policy.reference import as_reference, frozen, row_keys
from qpref.records import TokenizedExample, TokenLogProbs

KL_POSITIONS = 8192
"""Response tokens, over all pairs, at which the whole vocabulary is compared; bounds what is kept of a reference."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """What one model says of N pairs, chosen before rejected.

    Attributes:
        policy: [N, 2] summed log-probabilities, nats.
        reference: [N, 2] the reference's; None without one.
        lengths: [N, 2] response tokens.
        kl: [N] KL(policy || reference) a token, a mean over the pair's positions that were looked at; None without a
            reference, or with one of another vocabulary.
    """

    policy: Floats
    reference: Floats | None
    lengths: NDArray[np.int64]
    kl: Floats | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a reference says of the pairs, for its own model and for those that have none.

    Attributes:
        name: the model whose reference it is.
        keys: of each pair's token ids: another tokenizer's pairs are others.
        totals: [N, 2] summed log-probabilities.
        next_tokens: its distributions at the positions of each pair that are looked at.
    """

    name: str
    keys: list[list[bytes]]
    totals: Floats
    next_tokens: list[NextTokens]

    def fits(self, examples: Sequence[TokenizedExample]) -> bool:
        """Whether these are the same token ids."""
        return self.keys == [row_keys(example) for example in examples]


def positions(examples: Sequence[TokenizedExample], seed: int, most: int = KL_POSITIONS) -> list[Tensor]:
    """For each pair, at which of its response tokens the whole vocabulary is compared, at random where all are too
    many."""
    each = max(1, most // len(examples))
    chosen = []
    for place, example in enumerate(examples):
        count = sum(map(len, example.branches))
        draw = random.Random(f"{seed} {place}").sample(range(count), each) if count > each else range(count)
        chosen.append(torch.tensor(sorted(draw)))
    return chosen


def score_reference(
    name: str, policy: Policy, examples: Sequence[TokenizedExample], looked_at: Sequence[Tensor]
) -> Reference:
    """What the policy's own reference says."""
    with as_reference(policy):
        totals, next_tokens = _pass(policy, examples, looked_at)
    return Reference(
        name=name, keys=[row_keys(example) for example in examples], totals=totals, next_tokens=next_tokens
    )


def score_pairs(
    policy: Policy, examples: Sequence[TokenizedExample], looked_at: Sequence[Tensor], reference: Reference | None
) -> PairScores:
    """What the policy says, beside what a reference has said of the same pairs."""
    apart: dict[int, float] = {}
    comparable = reference is not None and reference.next_tokens[0].num_tokens == policy.head.weight.shape[0]

    def compare(place: int, ours: NextTokens) -> None:
        assert reference is not None
        theirs = reference.next_tokens[place].on(policy.device)
        apart[place] = token_kl(ours, theirs).mean().item()

    with frozen(policy):
        totals, _ = _pass(policy, examples, looked_at, compare if comparable else _ignore)
    return PairScores(
        policy=totals,
        reference=None if reference is None else reference.totals,
        lengths=np.array([[len(branch) for branch in example.branches] for example in examples]),
        kl=np.array([apart[place] for place in range(len(examples))]) if comparable else None,
    )


def _ignore(place: int, found: NextTokens) -> None:
    """For a pass whose distributions nobody asks for."""


def _pass(
    policy: Policy,
    examples: Sequence[TokenizedExample],
    looked_at: Sequence[Tensor],
    take: Callable[[int, NextTokens], None] | None = None,
) -> tuple[Floats, list[NextTokens]]:
    """[N, 2] log-probabilities under the policy as it stands, and the distributions at the positions looked at.

    The longest pairs go first, so that memory runs out at once if it does; the batches are then smaller.

    Args:
        take: gets each pair's distributions instead, on the device, as soon as they are there.
    """
    totals = np.empty((len(examples), 2))
    kept: dict[int, NextTokens] = {}
    take = take or (lambda place, found: kept.__setitem__(place, found.on(torch.device("cpu"))))
    order = sorted(range(len(examples)), key=lambda place: -num_fed_tokens(examples[place], policy.shares_prompts))
    tokens, done = MOST_TOKENS[policy.device.type], 0
    while done < len(order):
        longest = num_fed_tokens(examples[order[done]], policy.shares_prompts)
        places = order[done : done + max(1, tokens // longest)]
        members = [examples[place] for place in places]
        scored = _score(policy, members)
        if scored is None:
            tokens = shrink_microbatch(policy, members, tokens)
            continue
        values, hidden = scored
        totals[places] = values.total.double().cpu().numpy().reshape(-1, 2)
        starts = np.cumsum([0, *(sum(map(len, member.branches)) for member in members)])
        for place, start in zip(places, starts[:-1].tolist(), strict=True):
            take(place, NextTokens.of(policy.head, hidden[start + looked_at[place].to(hidden.device)]))
        done += len(places)
    return totals, [kept[place] for place in sorted(kept)]


def _score(policy: Policy, members: Sequence[TokenizedExample]) -> tuple[TokenLogProbs, Tensor] | None:
    """The log-probabilities and the hidden states that make them; None where the memory didn't suffice."""
    batch = pack(members, policy.device)
    try:
        hidden = completion_hidden(policy, batch)
        values, _ = score_tokens(policy.head, hidden, batch.score_token)
    except torch.OutOfMemoryError:
        return None
    return TokenLogProbs(values=values, lengths=batch.lengths), hidden
