"""Check cached reference log-probabilities on this machine before a run reads them.

Machines round differently, and some round the same row differently in another batch: in bf16 by 0.045 nats a token on a
CPU with AMX, not at all on other CPUs. No fixed tolerance separates that from a wrong reference, so two checks measure
it:

1. Each shard of the cache holds check rows, scored as one batch by one thread. That batch is scored again: the same
   reference on the same machine gives the same numbers; another base, or a weight that is 2 % off, does not.
2. Rows of the run's first batch are compared with the cache's, which were scored in other batches. They may differ by
   three times the rounding between batches, measured on this machine.

A shard that fails is put aside and its rows are recomputed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from qpref.data.pack import num_fed_tokens, pack
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore, as_reference, row_keys
from qpref.policy.reference_cache import CheckRows
from qpref.records import PackedBatch, TokenizedExample

log = logging.getLogger("qpref")

SAME_BATCH_TOLERANCE = 1e-5
"""Mean difference, nats a token, that a rescored batch may have."""
SAME_BATCH_SHARE = 0.25
"""Likewise as a share of the rounding between batches, where that is more. A reference whose weights differ a little
rounds as differently as another batch does, so it is off by all of that."""
OTHER_BATCH_TOLERANCE = 1e-3
"""Mean difference, nats a token, that rows scored in another batch may have."""
OTHER_BATCH_FACTOR = 3.0
"""Likewise as a multiple of the measured rounding between batches, where that is more."""
LARGE_BATCH_TOKENS = 1024
"""Size of the larger batch that rounding is measured in."""


def check_cache(references: ReferenceStore, policy: Policy, batch: PackedBatch) -> None:
    """Put aside the cached rows that this machine does not confirm.

    Args:
        batch: a few rows of the run's first step; they become the check rows of the shard that this run adds.
    """
    cache = references.cache
    if cache is None:
        return
    with as_reference(policy):
        scored: dict[tuple[bytes, ...], Tensor] = {}
        failed: dict[str, float] = {}
        for shard, rows in cache.check_rows_by_shard().items():
            difference = _rescored_difference(rows, policy, scored)
            if not difference <= SAME_BATCH_TOLERANCE and not _is_rounding(difference, rows, policy):
                failed[shard] = difference
        cache.put_aside(failed)
        failed |= _compare_rows(references, policy, batch)
        cache.check_rows = _check_rows(batch, policy, scored)
    if failed:
        worst = max(failed.values(), key=lambda value: (value != value, value))
        log.warning(
            "reference: the cached scores of %d earlier runs are put aside and recomputed: this machine scores the "
            "same rows differently, by %.3f nats a token; another machine, torch version or reference wrote them",
            len(failed), worst,
        )  # fmt: skip


def _rescored_difference(rows: CheckRows | None, policy: Policy, scored: dict[tuple[bytes, ...], Tensor]) -> float:
    """Return the mean difference of check rows from their scores here, nats a token; infinite for unusable rows."""
    if rows is None or not _fits_vocabulary(rows.examples, policy):
        return float("inf")
    if rows.key not in scored:
        scored[rows.key] = _scores(rows.examples, policy)
    return (scored[rows.key] - rows.values).abs().mean().item()


def _is_rounding(difference: float, rows: CheckRows | None, policy: Policy) -> bool:
    """Return whether the rounding of a machine that doesn't repeat its own numbers explains a difference."""
    if rows is None or not difference < float("inf"):
        return False
    return difference <= SAME_BATCH_SHARE * measured_rounding(rows.examples, policy)


def _compare_rows(references: ReferenceStore, policy: Policy, batch: PackedBatch) -> dict[str, float]:
    """Compare the batch's rows with the cache's and put aside the shards that fail.

    Returns:
        Shard -> mean difference, nats a token, of those that failed.
    """
    cache = references.cache
    assert cache is not None
    keys = [key for example in batch.examples for key in row_keys(example)]
    known = [key for key in keys if references.fetch(key)]
    if not known:
        return {}
    scores = dict(zip(keys, completion_logprobs(policy, batch).values.cpu().split(list(batch.lengths)), strict=True))
    cached, fresh = (torch.cat([rows[key] for key in known]) for rows in (references.rows, scores))
    difference = (cached - fresh).abs().mean().item()
    if not difference <= OTHER_BATCH_TOLERANCE:
        rounding = measured_rounding(batch.examples, policy)
        if not difference <= OTHER_BATCH_FACTOR * rounding:
            shards = {cache.store.shard_of(key) or f"{cache.store.run}.shard" for key in known}
            references.rows.clear()
            cache.put_aside(shards)
            return dict.fromkeys(shards, difference)
    log.info("reference: one recomputed batch agrees with the cache, %.4f nats a token apart on average", difference)
    return {}


def measured_rounding(examples: Sequence[TokenizedExample], policy: Policy) -> float:
    """Measure the rounding between batches: the mean difference of these rows' scores, nats a token, on this machine.

    The rows are scored together, each alone, and repeated in one larger batch.
    """
    together = completion_logprobs(policy, pack(examples, policy.device)).values
    alone = torch.cat([completion_logprobs(policy, pack([example], policy.device)).values for example in examples])
    tokens = sum(num_fed_tokens(example, policy.shares_prompts) for example in examples)
    repeats = 1 + LARGE_BATCH_TOKENS // tokens
    many = completion_logprobs(policy, pack([*examples] * repeats, policy.device)).values[: len(together)]
    return max((together - other).abs().mean().item() for other in (alone, many))


def _check_rows(batch: PackedBatch, policy: Policy, scored: dict[tuple[bytes, ...], Tensor]) -> CheckRows:
    rows = CheckRows(batch.examples, torch.empty(0))
    values = scored.get(rows.key)
    return replace(rows, values=_scores(batch.examples, policy) if values is None else values)


def _scores(examples: Sequence[TokenizedExample], policy: Policy) -> Tensor:
    """Score one batch by one thread, since the order of a sum may depend on the number of threads.

    Returns:
        [tokens] float32 nats on the CPU.
    """
    with _one_thread():
        return completion_logprobs(policy, pack(examples, policy.device)).values.cpu()


def _fits_vocabulary(examples: Sequence[TokenizedExample], policy: Policy) -> bool:
    """Return whether all tokens are in the model's vocabulary."""
    vocabulary = policy.head.weight.shape[0]
    return all(max(piece) < vocabulary for example in examples for piece in (example.prompt, *example.branches))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
