"""What a run does about its reference before training: opens the cache, says how much is known, fills in the rest."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qpref import shards
from qpref.data.pack import num_fed_tokens, pack
from qpref.errors import DiskError
from qpref.memory.tune import shrink_microbatch
from qpref.policy import reference_cache
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore, row_keys
from qpref.policy.reference_cache import ReferenceCache
from qpref.policy.source import BaseFolder
from qpref.recipe.sections import Recipe
from qpref.records import TokenizedExample

log = logging.getLogger("qpref")

BATCH_FACTOR = 4
"""A pass without gradients keeps no activations, so it takes more tokens at once than training."""


def open_cache(
    recipe: Recipe, base: BaseFolder, start_digest: str, policy: Policy, before: Mapping[str, Any] | None
) -> ReferenceCache | None:
    """The cache of this reference; None, with a warning, where the disk has no place for one.

    Args:
        start_digest: of the start adapter and its config, or nothing.
        before: `describe`'s answer at the start of a run that goes on.
    """
    reference = {
        "weights": base.weights,
        "config": base.config,
        "quantization": [recipe.model.quantization, recipe.model.double_quantization],
        "dtype": recipe.model.dtype,
        "device": policy.device.type,
        "attention": policy.attention,
        "start": start_digest,
    }
    folder = reference_cache.folder_of(reference)
    try:
        reference_cache.describe(folder, reference)
        shards.shrink(reference_cache.root(), reference_cache.size_limit(), keep=folder)
        if before is None:
            return ReferenceCache.open(folder, uuid.uuid4().hex)
        return ReferenceCache.open(folder, before["run"], before["seen"])
    except DiskError as error:
        log.warning("the reference is not cached: %s", error.what)
        return None


def describe(memory: ReferenceStore | None) -> dict[str, Any] | None:
    """For run.json: what a resumed run has to know to read the same rows; None without a cache."""
    if memory is None or memory.cache is None:
        return None
    return {"run": memory.cache.store.run, "seen": memory.cache.store.seen}


def count_known(memory: ReferenceStore, examples: Sequence[TokenizedExample]) -> tuple[int, int]:
    """Responses whose scores are known, and all responses."""
    found = [memory.has(key) for example in examples for key in row_keys(example)]
    return sum(found), len(found)


def fill(memory: ReferenceStore, policy: Policy, examples: Sequence[TokenizedExample], tokens: int) -> None:
    """Score what isn't known yet in one pass, the longest first, at most `tokens` of about one length in a batch.

    Each batch is in the cache when the next begins, so a pass that is killed goes on where it was.
    """
    todo = [example for example in examples if not all(memory.has(key) for key in row_keys(example))]
    if not todo:
        return
    policy.model.eval()  # so that nothing is checkpointed for want of memory
    log.info("reference: scoring %d examples before training", len(todo))
    todo.sort(key=lambda example: -num_fed_tokens(example, policy.shares_prompts))
    done = 0
    while done < len(todo):
        count = max(1, tokens // num_fed_tokens(todo[done], policy.shares_prompts))
        if _score(memory, policy, todo[done : done + count]):
            done += count
        else:
            tokens = shrink_microbatch(policy, todo[done : done + count], tokens)


def _score(memory: ReferenceStore, policy: Policy, members: Sequence[TokenizedExample]) -> bool:
    """Whether the memory sufficed."""
    try:
        memory.logprobs(policy, pack(members, policy.device))
    except torch.OutOfMemoryError:
        return False
    return True
