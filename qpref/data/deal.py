"""Deal examples to the processes of a run: the same share of tokens to each, as nearly as examples allow."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qpref.data.pack import by_prompt, num_fed_tokens, split_indices
from qpref.records import TokenizedExample

CUTS = 4
"""Sizes to try for pieces of a group of one prompt: a fair share, half of it, and so on."""


WHOLE = 17 / 16
"""Largest share of whole micro-batches, relative to that of single examples, that their equal rounding is worth."""


class _Piece(NamedTuple):
    """Examples that are dealt together, by index, and their input tokens."""

    members: list[int]
    num_tokens: int


def deal(
    examples: Sequence[TokenizedExample], num_shares: int, shared: bool = True, budget: int | None = None
) -> list[list[int]]:
    """Deal examples to `num_shares` processes by their input tokens, the largest first to whoever has the fewest.

    (Graham 1969, "Bounds on Multiprocessing Timing Anomalies": the largest share is at most 4/3 of the smallest
    possible.) Examples with the same prompt stay together, as it is computed once for all of them, unless the largest
    share gets smaller where such groups are cut. The result depends on the arguments alone, so all processes deal alike
    without a message.

    With a budget, the micro-batches that one process would compute are dealt whole where they make nearly equal shares.
    `split_indices` splits such a share into the same micro-batches again, so that the numbers of several processes are
    those of one, but for the order of the last sum.

    Args:
        shared: each prompt is computed once for its examples, as in `num_fed_tokens`.
        budget: tokens per micro-batch, the same in all processes.

    Returns:
        Indices of each share, ascending; a share is empty where there are more of them than pieces.
    """
    if num_shares == 1:
        return [list(range(len(examples)))]
    groups = list(by_prompt(examples)) if shared else [[index] for index in range(len(examples))]
    whole = [_Piece(members, _num_tokens(examples, members, shared)) for members in groups]
    dealt = [_deal(whole, num_shares)]
    if any(len(members) > 1 for members in groups):
        fair = sum(piece.num_tokens for piece in whole) // num_shares
        for limit in (fair >> cut for cut in range(CUTS)):
            pieces = [piece for group in whole for piece in _cut(examples, group, limit)]
            dealt.append(_deal(pieces, num_shares))
    best = min(dealt, key=lambda each: each[0])[1]  # the first of equals, which has the fewest cuts
    if budget is None:
        return best
    bins = split_indices(examples, budget, shared)
    _, by_microbatch = _deal([_Piece(each, _num_tokens(examples, each, shared)) for each in bins], num_shares)
    largest, without = (
        max(_num_tokens(examples, share, shared) for share in shares) for shares in (by_microbatch, best)
    )
    return by_microbatch if largest <= WHOLE * without else best


def _deal(pieces: Sequence[_Piece], num_shares: int) -> tuple[int, list[list[int]]]:
    """Deal pieces; returns the tokens of the largest share, and the shares."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0, number) for number in range(num_shares)]
    for piece in sorted(pieces, key=lambda piece: -piece.num_tokens):
        load, number = loads[0]
        heapq.heapreplace(loads, (load + piece.num_tokens, number))
        shares[number] += piece.members
    return max(loads)[0], [sorted(share) for share in shares]


def _cut(examples: Sequence[TokenizedExample], group: _Piece, limit: int) -> Iterator[_Piece]:
    """Cut a group that shares a prompt into pieces of at most `limit` tokens, or of one example."""
    if group.num_tokens <= limit:
        yield group
        return
    members: list[int] = []
    used = 0
    for index in group.members:
        alone = num_fed_tokens(examples[index])
        more = alone - len(examples[index].prompt) if members else alone
        if members and used + more > limit:
            yield _Piece(members, used)
            members, used, more = [], 0, alone
        members.append(index)
        used += more
    yield _Piece(members, used)


def _num_tokens(examples: Sequence[TokenizedExample], members: Sequence[int], shared: bool) -> int:
    """Count the input tokens of examples, each prompt once if it is shared."""
    own = [examples[index] for index in members]
    repeated = sum(len(own[same[0]].prompt) * (len(same) - 1) for same in by_prompt(own)) if shared else 0
    return sum(num_fed_tokens(example, shared) for example in own) - repeated
