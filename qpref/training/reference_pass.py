"""A run's reference before training: open the cache, confirm it on this machine, count and fill in what is missing."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from qpref import fsio, shards
from qpref.data.pack import num_fed_tokens, pack
from qpref.errors import DiskError
from qpref.memory.tune import shrink_microbatch
from qpref.policy import reference_cache
from qpref.policy.out_of_memory import fits
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore, row_keys
from qpref.policy.reference_cache import ReferenceCache
from qpref.records import TokenizedExample
from qpref.training import invariants
from qpref.training.checkpoint import Checkpoint
from qpref.training.prepare import Prepared
from qpref.training.reference_check import check_cache

log = logging.getLogger("qpref")

BATCH_FACTOR = 4
"""A pass without gradients keeps no activations, so it takes more tokens at once than training."""

SHARD = re.compile(r"[0-9a-f]{32}\.shard")


def open_references(
    prepared: Prepared, cache_before: Mapping[str, Any] | None = None, saved: Checkpoint | None = None
) -> ReferenceStore | None:
    """Open the reference store, with the cached rows that this machine confirms; None for losses without a reference.

    Args:
        cache_before: run.json's `cache_description`, for a resumed run.
        saved: the checkpoint that it resumes from.
    """
    if not prepared.objective.needs_reference:
        return None
    is_cached = prepared.plan.recipe.reference.cache
    references = ReferenceStore(open_cache(prepared, cache_before) if is_cached else None)
    if saved is not None:
        references.restore(saved.tensors["reference"])
    if is_cached:
        batch = invariants.first_batch(prepared.first_step_examples(), prepared.policy)
        check_cache(references, prepared.policy, batch, prepared.all_examples)
        known, total = count_known(references, prepared.all_examples)
        log.info("reference: %d of %d responses are in the cache (%.0f %%)", known, total, 100 * known / total)
    return references


def open_cache(prepared: Prepared, before: Mapping[str, Any] | None) -> ReferenceCache | None:
    """Open the cache of this reference; None, with a warning, where the disk has no space for one."""
    model, base, policy = prepared.plan.recipe.model, prepared.base, prepared.policy
    reference = {
        "weights": base.weights,
        "config": base.config,
        "quantization": [model.quantization, model.double_quantization],
        "experts": _experts(policy),
        "dtype": model.dtype,
        "device": policy.device.type,
        "attention": policy.attention,
        "start": prepared.fingerprints["start adapter"],
    }
    folder = reference_cache.folder_of(reference)
    try:
        reference_cache.describe(folder, reference)
        shards.shrink(reference_cache.root(), reference_cache.size_limit(), keep=folder)
        if before is None or not _is_description(before):
            return ReferenceCache.open(folder, uuid.uuid4().hex)
        return ReferenceCache.open(folder, before["run"], before["seen"])
    except DiskError as error:
        fsio.warn_unwritable("the reference is not cached", error)
        return None


def _experts(policy: Policy) -> str:
    """Describe the weights of experts, and the function that computes them, whose rounding may differ."""
    if policy.packed_experts():
        return "nf4"
    return "as in the files, computed by qpref" if policy.adapts_experts() else "as in the files"


def cache_description(references: ReferenceStore | None) -> dict[str, Any] | None:
    """Describe the cache for run.json, so that a resumed run reads the same rows; None without a cache."""
    if references is None or references.cache is None:
        return None
    return {"run": references.cache.store.run, "seen": references.cache.store.seen}


def _is_description(before: Mapping[str, Any]) -> bool:
    """Return whether run.json has a `cache_description`: its names are file names, its sizes bytes."""
    if not isinstance(before, dict) or not isinstance(before.get("seen"), dict):
        return False
    names = [f"{before.get('run')}.shard", *before["seen"]]
    sizes = before["seen"].values()
    return all(SHARD.fullmatch(name) for name in names) and all(type(size) is int and size >= 0 for size in sizes)


def count_known(references: ReferenceStore, examples: Sequence[TokenizedExample]) -> tuple[int, int]:
    """Count the responses whose scores are known, and all responses."""
    found = [references.has(key) for example in examples for key in row_keys(example)]
    return sum(found), len(found)


def fill(references: ReferenceStore, policy: Policy, examples: Sequence[TokenizedExample], tokens: int) -> None:
    """Score the unknown examples in one pass, longest first, in batches of similar lengths.

    Each batch is in the cache before the next begins, so a pass that is killed resumes where it was.

    Args:
        tokens: size of the largest batch.

    Raises:
        DeviceMemoryError: one example is too large for the memory.
    """
    todo = [example for example in examples if not all(references.has(key) for key in row_keys(example))]
    if not todo:
        return
    policy.model.eval()  # so that running out of memory recomputes no layers, which would save nothing here
    log.info("reference: scoring %d examples before training", len(todo))
    todo.sort(key=lambda example: -num_fed_tokens(example, policy.shares_prompts))
    done = 0
    while done < len(todo):
        count = max(1, tokens // num_fed_tokens(todo[done], policy.shares_prompts))
        members = todo[done : done + count]
        if fits(partial(_score, references, policy, members)):
            done += count
        else:
            tokens = shrink_microbatch(policy, members, tokens)


def _score(references: ReferenceStore, policy: Policy, members: Sequence[TokenizedExample]) -> None:
    """Score a batch into the store."""
    references.logprobs(policy, pack(members, policy.device))
