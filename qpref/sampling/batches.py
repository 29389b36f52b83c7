"""Batches of prompts through the sampler, smaller where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from qpref.data.tokenize import PairTokenizer
from qpref.errors import DeviceMemoryError
from qpref.evaluation.generate import sharing_a_batch
from qpref.evaluation.subjects import Subject
from qpref.policy.kept_base import KeptBase
from qpref.policy.out_of_memory import attempt, out_of_memory_as
from qpref.policy.policy import Policy
from qpref.sampling.decode import Draws, sample

log = logging.getLogger("qpref")


def load_sampler(subject: Subject, kept: KeptBase | None = None) -> Policy:
    """Load a model to sample from it.

    Args:
        kept: a base that stays for later models of the process.

    Raises:
        PolicyError: it can't be loaded.
        DeviceMemoryError: it doesn't fit.
    """
    subject.announce_device()
    with out_of_memory_as(f"{subject.name}: the device ran out of memory", "free its memory, or take a smaller base"):
        policy = subject.load(subject.dtype, kept)
    policy.share_prompts(False)
    return policy


def drawn_batches(
    policy: Policy,
    tokenizer: PairTokenizer,
    ids: Sequence[list[int]],
    left: Sequence[int],
    draws: Draws,
    batch_size: int,
) -> Iterator[tuple[list[int], list[list[list[int]]]]]:
    """Yield indices of prompts and the token ids of their responses, the longest prompts first: memory runs out early
    or never.

    Args:
        ids: of all prompts.
        left: indices of those to sample responses to.
        batch_size: responses that are drawn together, at least k; halved where memory runs out.

    Raises:
        DeviceMemoryError: not even one prompt's responses fit.
    """
    order = sorted(left, key=lambda index: -len(ids[index]))
    size = max(1, batch_size // draws.num_responses)
    while order:
        batch = sharing_a_batch(policy, order[:size], ids, draws.max_new_tokens)
        found = _attempted(policy, tokenizer, [ids[index] for index in batch], draws)
        if found is None:
            if len(batch) == 1:
                raise DeviceMemoryError(
                    "the device ran out of memory on one prompt",
                    "draw fewer responses or fewer new tokens (k, max_new_tokens), or shorten the prompt",
                )
            size = (len(batch) + 1) // 2
            log.warning("out of memory: continuing with %d prompts per batch", size)
            continue
        yield batch, found
        order = order[len(batch) :]


def _attempted(
    policy: Policy, tokenizer: PairTokenizer, prompts: Sequence[list[int]], draws: Draws
) -> list[list[list[int]]] | None:
    return attempt(lambda: sample(policy, prompts, draws, tokenizer.stop_tokens))
