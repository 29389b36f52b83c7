"""Mismatched partners for single completions: another example's completion after this example's prompt.

Their log-ratios estimate the KL divergence of policy and reference (Ethayarajh et al. 2024, section 4). Partners are
fixed for the whole run, so that their reference log-probabilities are computed once.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

from qpref.errors import DataError
from qpref.records import TokenizedExample

MAX_SEARCH = 1000
"""Examples of other prompts to search for a different completion, before an equal one is accepted."""


def with_mismatched(examples: Sequence[TokenizedExample], seed: int, max_length: int) -> list[TokenizedExample]:
    """Add a second branch to each example: the completion of the next example, in a seeded order, with another prompt.

    Partners are cut on the right to fit `max_length`.

    Raises:
        DataError: all examples have the same prompt, so that no completion is mismatched.
    """
    order = list(range(len(examples)))
    random.Random(f"{seed}/mismatched").shuffle(order)
    shuffled = [examples[index] for index in order]
    joined = list(examples)
    for position, index in enumerate(order):
        joined[index] = _joined(shuffled[position], _partner(shuffled, position), max_length)
    return joined


def without_partner(example: TokenizedExample) -> TokenizedExample:
    """Return the example without its partner."""
    return _only(example, slice(0, 1))


def only_partner(example: TokenizedExample) -> TokenizedExample:
    """Return the example's prompt with only its partner's completion."""
    return _only(example, slice(1, None))


def _only(example: TokenizedExample, kept: slice) -> TokenizedExample:
    """Keep some of the branches."""
    return replace(
        example, branches=example.branches[kept], truncated=example.truncated[kept], masks=example.masks[kept]
    )


def _partner(shuffled: Sequence[TokenizedExample], position: int) -> TokenizedExample:
    """Return the next example with another prompt and, if one is near, with a different completion."""
    own = shuffled[position]
    ahead = (shuffled[(position + step) % len(shuffled)] for step in range(1, len(shuffled)))
    others = (example for example in ahead if example.prompt != own.prompt)
    near = list(itertools.islice(others, 1))
    if not near:
        raise DataError("all examples have the same prompt, and the loss needs completions of other prompts")
    candidates = itertools.chain(near, itertools.islice(others, MAX_SEARCH))
    return next((example for example in candidates if example.branches[0] != own.branches[0]), near[0])


def _joined(example: TokenizedExample, partner: TokenizedExample, max_length: int) -> TokenizedExample:
    max_tokens = max_length - len(example.prompt)
    mismatched = partner.branches[0][:max_tokens]
    return replace(
        example,
        branches=(example.branches[0], mismatched),
        truncated=(example.truncated[0], partner.truncated[0] or len(mismatched) < len(partner.branches[0])),
        masks=_masks(example, partner, len(mismatched)),
    )


def _masks(example: TokenizedExample, partner: TokenizedExample, num_tokens: int) -> tuple[bytes, ...]:
    """Return the masks of a completion and of its partner's first tokens, which all count where else none would."""
    if not example.masks and not partner.masks:
        return ()
    own, other = (each.masks[0] if each.masks else b"\1" * len(each.branches[0]) for each in (example, partner))
    cut = other[:num_tokens]
    return own, cut if any(cut) else b"\1" * num_tokens
