"""What to do when the device runs out of memory: compute the same in smaller parts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from qpref.data.pack import num_fed_tokens, split_by_tokens
from qpref.errors import DeviceMemoryError
from qpref.policy.policy import Policy
from qpref.records import TokenizedExample

log = logging.getLogger("qpref")


def shrink_microbatch(policy: Policy, examples: Sequence[TokenizedExample], budget: int) -> int:
    """The tokens per micro-batch to repeat the examples with, after `budget` of them didn't fit the memory.

    Called outside the `except` block, where the failed attempt's tensors are gone. Once each micro-batch that is as
    large as the largest holds one example, all layers are checkpointed instead.

    Raises:
        DeviceMemoryError: there is nothing left to make smaller.
    """
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()
    smaller = smaller_budget(examples, budget, policy.shares_prompts)
    if smaller is not None:
        log.warning("out of memory: %d tokens per micro-batch instead of %d; the step is repeated", smaller, budget)
        return smaller
    if policy.model.training and policy.recomputed_layers < policy.num_layers:
        log.warning("out of memory: all layers are checkpointed now; the step is repeated")
        policy.recompute_layers(policy.num_layers)
        return budget
    longest = max(num_fed_tokens(example, policy.shares_prompts) for example in examples)
    raise DeviceMemoryError(
        f"the device ran out of memory on one example of {longest} tokens",
        "lower [data] max_length or [adapter] rank, take an 8-bit or paged [train] optimizer, or a smaller base; "
        "`qpref plan` says what each saves; go on with --resume where checkpoints exist",
    )


def smaller_budget(examples: Sequence[TokenizedExample], budget: int, shared: bool) -> int | None:
    """Half the budget, or less, such that the largest micro-batch is smaller; None where one example is as large."""

    def largest(limit: int) -> int:
        parts = split_by_tokens(examples, limit, shared)
        return max(sum(num_fed_tokens(member, shared) for member in part) for part in parts)

    before = largest(budget)
    if before == max(num_fed_tokens(example, shared) for example in examples):
        return None
    while largest(budget) == before:
        budget //= 2
    return budget
