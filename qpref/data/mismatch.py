"""Gives each completion a mismatched partner: another example's completion after this one's prompt.

The log-ratios of such pairs estimate the KL divergence of policy and reference (Ethayarajh et al. 2024, section 4). A
partner is fixed for the whole run, so its reference scores are computed once.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

from qpref.errors import DataError
from qpref.records import TokenizedExample

MAX_SEARCH = 1000
"""Examples of other prompts among which a different completion is looked for, before an equal one will do."""


def with_mismatched(examples: Sequence[TokenizedExample], seed: int, max_length: int) -> list[TokenizedExample]:
    """The examples, each with a second branch: the completion of the next one, in a seeded order, of another prompt.

    The partner is cut on the right where it would not fit `max_length`.

    Raises:
        DataError: all examples have one prompt, so every completion matches.
    """
    order = list(range(len(examples)))
    random.Random(f"{seed}/mismatched").shuffle(order)
    around = [examples[place] for place in order]
    joined = list(examples)
    for here, place in enumerate(order):
        joined[place] = _joined(around[here], _partner(around, here), max_length)
    return joined


def alone(example: TokenizedExample) -> TokenizedExample:
    """The example without its partner."""
    return replace(example, branches=example.branches[:1], truncated=example.truncated[:1])


def partner_alone(example: TokenizedExample) -> TokenizedExample:
    """The example's prompt with its partner's completion alone."""
    return replace(example, branches=example.branches[1:], truncated=example.truncated[1:])


def _partner(around: Sequence[TokenizedExample], here: int) -> TokenizedExample:
    """The next example of another prompt, one that says something else where there is such a one near."""
    own = around[here]
    ahead = (around[(here + step) % len(around)] for step in range(1, len(around)))
    others = (example for example in ahead if example.prompt != own.prompt)
    near = list(itertools.islice(others, 1))
    if not near:
        raise DataError("all examples have the same prompt, and the loss needs completions of other prompts")
    candidates = itertools.chain(near, itertools.islice(others, MAX_SEARCH))
    return next((example for example in candidates if example.branches[0] != own.branches[0]), near[0])


def _joined(example: TokenizedExample, partner: TokenizedExample, max_length: int) -> TokenizedExample:
    room = max_length - len(example.prompt)
    mismatched = partner.branches[0][:room]
    return replace(
        example,
        branches=(example.branches[0], mismatched),
        truncated=(example.truncated[0], partner.truncated[0] or len(mismatched) < len(partner.branches[0])),
    )
