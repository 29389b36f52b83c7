"""A run's reference before training: open the cache, confirm it on this machine, count and fill in what is missing."""

from __future__ import annotations

import hashlib
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from qpref import fsio, shards
from qpref.data.pack import num_fed_tokens, pack
from qpref.distributed.world import ALONE, World
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

SHARED_AT_ONCE = 1024
"""Examples after which processes share what they have scored: the most that is scored again where one of them dies and
its cache is lost."""

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
        prepared.world.wait("the opening of the reference cache")  # until all have listed the shards of earlier runs
        restored = set(references.rows)
        batch = invariants.first_batch(prepared.first_step_examples(), prepared.policy)
        check_cache(references, prepared.policy, batch, prepared.all_examples)
        prepared.policy.finish_passes()
        _agree_on_rows(prepared.world, references, restored)
        known, total = count_known(references, prepared.all_examples)
        log.info("reference: %d of %d responses are in the cache (%.0f %%)", known, total, 100 * known / total)
    return references


def open_cache(prepared: Prepared, before: Mapping[str, Any] | None) -> ReferenceCache | None:
    """Open the cache of this reference; None, with a warning, where the disk has no space for one."""
    model, base, policy, world = prepared.plan.recipe.model, prepared.base, prepared.policy, prepared.world
    reference = {
        "weights": base.weights,
        "config": base.config,
        "quantization": [model.quantization, model.double_quantization],
        "experts": _experts(policy),
        "dtype": model.dtype,
        "device": policy.device.type,
        "attention": policy.attention,
        "start": "" if prepared.plan.recipe.adapter.reference == "base" else prepared.fingerprints["start adapter"],
    }
    folder = reference_cache.folder_of(reference)
    is_resumed = before is not None and _is_description(before)
    run, seen = world.share(
        [before["run"], before["seen"]] if before and is_resumed else [uuid.uuid4().hex, None], "the reference cache"
    )
    if seen is not None and not world.is_first:  # another host has other shards
        seen = {name: size for name, size in seen.items() if (folder / name).is_file()}
    try:
        reference_cache.describe(folder, reference)
        shards.shrink(reference_cache.root(), reference_cache.size_limit(), keep=folder)
        return ReferenceCache.open(folder, run_of(run, world.rank), seen)
    except DiskError as error:
        fsio.warn_unwritable("the reference is not cached", error)
        return None


def run_of(run: str, rank: int) -> str:
    """Name the shard that a process writes, for a run's id: rank 0's is the run's, and each has its own."""
    return hashlib.blake2b(f"{run}/{rank}".encode(), digest_size=16).hexdigest() if rank else run


def _agree_on_rows(world: World, references: ReferenceStore, restored: set[bytes]) -> None:
    """Leave the same rows in all processes' stores, each of which has checked its own cache: those of the checkpoint,
    or none where one process doesn't confirm them."""
    if world.size == 1:
        return
    if any(world.exchange(not restored <= references.rows.keys(), "the check of the reference cache")):
        references.rows.clear()
    else:
        references.rows = {key: references.rows[key] for key in restored}


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


def fill(
    references: ReferenceStore,
    policy: Policy,
    examples: Sequence[TokenizedExample],
    tokens: int,
    world: World = ALONE,
) -> None:
    """Score the unknown examples in one pass, longest first, in batches of similar lengths.

    Each batch is in the cache before the next begins, so a pass that is killed resumes where it was. Several processes
    divide the examples, and all of them have all new rows in the end; one whose cache knows an example provides it.

    Args:
        tokens: size of the largest batch.

    Raises:
        DeviceMemoryError: one example is too large for the memory.
    """
    todo = _unknown(references, examples, world)
    if not todo:
        return
    policy.model.eval()  # so that running out of memory recomputes no layers, which would save nothing here
    log.info("reference: scoring %d examples before training", len(todo))
    todo.sort(key=lambda each: -num_fed_tokens(each[0], policy.shares_prompts))
    for start in range(0, len(todo), SHARED_AT_ONCE):
        window = todo[start : start + SHARED_AT_ONCE]
        missing = references.missing(example for example, _ in window) if world.size > 1 else []
        for members in _dealt(window, world):
            tokens = _fill_own(references, policy, members, tokens, world)
        policy.finish_passes()
        references.share(world, missing)


def _unknown(
    references: ReferenceStore, examples: Sequence[TokenizedExample], world: World
) -> list[tuple[TokenizedExample, int | None]]:
    """List the examples that a process doesn't know, each with the first one that does, or None."""
    own = [all(references.has(key) for key in row_keys(example)) for example in examples]
    everywhere = [bytes.fromhex(each) for each in world.exchange(bytes(own).hex(), "the known reference scores")]
    found = []
    for example, *known in zip(examples, *everywhere, strict=True):
        if not all(known):
            found.append((example, known.index(1) if any(known) else None))
    return found


def _dealt(
    window: Sequence[tuple[TokenizedExample, int | None]], world: World
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """Select this process's examples: those that it is the first to know, and its share of those that none knows."""
    provided = [example for example, first in window if first == world.rank]
    unknown = [example for example, first in window if first is None]
    return provided, unknown[world.rank :: world.size]


def _fill_own(
    references: ReferenceStore, policy: Policy, todo: Sequence[TokenizedExample], tokens: int, world: World
) -> int:
    """Score examples, the longest first; returns the size of the largest batch that the memory sufficed for."""
    done = 0
    while done < len(todo):
        world.note(f"reference scores: {done} of {len(todo)} examples are done")
        count = max(1, tokens // num_fed_tokens(todo[done], policy.shares_prompts))
        members = todo[done : done + count]
        if fits(partial(_score, references, policy, members)):
            done += count
        else:
            tokens = shrink_microbatch(policy, members, tokens)
    return tokens


def _score(references: ReferenceStore, policy: Policy, members: Sequence[TokenizedExample]) -> None:
    """Score a batch into the store."""
    references.logprobs(policy, pack(members, policy.device))
