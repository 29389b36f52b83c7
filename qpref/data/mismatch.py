"""Gives each completion a mismatched partner: another example's completion after this one's prompt.

The log-ratios of such pairs estimate the KL divergence of policy and reference (Ethayarajh et al. 2024, section 4). A
partner is fixed for the whole run, so its reference scores are computed once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from qpref.errors import DataError
from qpref.records import TokenizedExample

MAX_SEARCH = 1000
"""How far ahead a partner is looked for whose completion differs too, before an equal one of another prompt will do."""


def with_mismatched(examples: Sequence[TokenizedExample], seed: int, max_length: int) -> list[TokenizedExample]:
    """The examples, each with a second branch: the completion of the next one, in a seeded order, of another prompt.

    The partner is cut on the right where it would not fit `max_length`.

    Raises:
        DataError: all examples have one prompt, so every completion matches.
    """
    order = list(range(len(examples)))
    random.Random(f"{seed}/mismatched").shuffle(order)
    around = [examples[place] for place in order]
    partners: list[TokenizedExample | None] = [None] * len(examples)
    following: TokenizedExample | None = None
    # Twice round, backwards: the nearest one ahead whose prompt differs is the last that was met, or the one before.
    for turn in range(2 * len(order) - 1, -1, -1):
        place = turn % len(order)
        current, after = around[place], around[(place + 1) % len(order)]
        if after.prompt != current.prompt:
            following = after
        partners[order[place]] = following
    if following is None:
        raise DataError("all examples have the same prompt, and the loss needs completions of other prompts")
    for here, place in enumerate(order):
        if partners[place].branches[0] == around[here].branches[0]:  # type: ignore[union-attr]
            ahead = (around[(here + step) % len(order)] for step in range(1, min(len(order), MAX_SEARCH)))
            partners[place] = next((other for other in ahead if _differ(other, around[here])), partners[place])
    return [_joined(example, partner, max_length) for example, partner in zip(examples, partners, strict=True)]


def _differ(one: TokenizedExample, other: TokenizedExample) -> bool:
    return one.prompt != other.prompt and one.branches[0] != other.branches[0]


def _joined(example: TokenizedExample, partner: TokenizedExample | None, max_length: int) -> TokenizedExample:
    assert partner is not None
    room = max_length - len(example.prompt)
    mismatched = partner.branches[0][:room]
    return replace(
        example,
        branches=(example.branches[0], mismatched),
        truncated=(example.truncated[0], partner.truncated[0] or len(mismatched) < len(partner.branches[0])),
    )
