"""KL of whole responses that were sampled from the policy, from the base or from what its run started from.

KL(policy || reference) of a response is the expectation, over the policy's own responses, of the sum over tokens of
log policy - log reference. Given the tokens before it, each term is taken over the whole vocabulary and not at the
sampled token alone: the same expectation, with less noise, and never below 0 (Amini, Vieira and Cotterell 2025, "Better
Estimation of the KL Divergence Between Language Models").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qpref.data.pack import longest_first, num_fed_tokens, pack
from qpref.memory.fit import MOST_TOKENS
from qpref.memory.tune import shrink_microbatch
from qpref.policy.divergence import NextTokens, token_kl
from qpref.policy.logprobs import completion_hidden
from qpref.policy.out_of_memory import fits
from qpref.policy.policy import Policy
from qpref.policy.reference import frozen
from qpref.records import TokenizedExample

Floats = NDArray[np.float64]
Mode = Callable[[Policy], AbstractContextManager[None]]
"""Context in which the model is what the policy is compared with: `as_base`, `as_start` or `as_reference`."""


def sequence_kl(policy: Policy, examples: Sequence[TokenizedExample], modes: Sequence[Mode]) -> list[Floats]:
    """Sum the KL of the next token over each sampled response, from the model in each mode.

    Args:
        examples: prompts with the same number of responses each, drawn from the policy at temperature 1.

    Returns:
        For each mode [N, responses] nats.

    Raises:
        DeviceMemoryError: not even one example fits.
    """
    found = [np.zeros((len(examples), len(examples[0].branches))) for _ in modes]
    order = longest_first(examples, policy.shares_prompts)
    tokens, done = MOST_TOKENS[policy.device.type], 0
    while done < len(order):
        longest = num_fed_tokens(examples[order[done]], policy.shares_prompts)
        indices = order[done : done + max(1, tokens // longest)]
        members = [examples[index] for index in indices]
        if fits(partial(_compare, policy, members, modes, found, indices)):
            done += len(indices)
        else:
            tokens = shrink_microbatch(policy, members, tokens)
    return found


def _compare(
    policy: Policy,
    members: Sequence[TokenizedExample],
    modes: Sequence[Mode],
    found: Sequence[Floats],
    indices: Sequence[int],
) -> None:
    """Write the KL of a batch's responses to the rows `indices` of each mode's array."""
    batch = pack(members, policy.device)
    with frozen(policy):
        own = NextTokens.of(policy.head, completion_hidden(policy, batch))
    for mode, values in zip(modes, found, strict=True):
        with mode(policy):
            other = NextTokens.of(policy.head, completion_hidden(policy, batch))
        parts = token_kl(own, other).cpu().split(list(batch.lengths))
        values[indices] = np.reshape([part.sum().item() for part in parts], (len(members), -1))
