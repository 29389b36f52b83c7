"""Check cached reference log-probabilities on this machine before a run reads them.

Machines round differently, and some round the same row differently in another batch: in bf16 by 0.045 nats a token on a
CPU with AMX, not at all on other CPUs. No fixed tolerance separates that from a wrong reference, so three checks
measure it:

1. Each shard of the cache holds check rows, scored as one batch by one thread. That batch is scored again: the same
   reference on the same machine gives the same numbers; another base, or a weight that is 2 % off, does not.
2. Rows of the run's first batch are compared with the cache's, which were scored in other batches. They may differ by
   three times the rounding between batches, measured on this machine.
3. So is each row of a random sample over all of the run's data (`reference_sample`).

A shard that fails is put aside and its rows are recomputed. Others may have written the shards, so whatever their check
rows hold must neither end the run nor take long.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from qpref.data.pack import num_fed_tokens, pack
from qpref.policy.layer_configs import layer_settings
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.out_of_memory import attempt
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore, as_reference, row_keys
from qpref.policy.reference_cache import CheckRows, ReferenceCache
from qpref.records import PackedBatch, TokenizedExample
from qpref.training.reference_sample import largest_rounding, row_differences, sample

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
MAX_BATCHES = 16
"""Batches of check rows that are scored at most, those of the shards with the most of the run's rows. Runs on the same
data and seed have the same one."""
MAX_CHECK_TOKENS = 8192
"""Tokens of check rows that are scored at most, unless the run's own first batch has more."""
INFINITE = float("inf")

T = TypeVar("T")


def check_cache(
    references: ReferenceStore,
    policy: Policy,
    batch: PackedBatch,
    examples: Sequence[TokenizedExample] | None = None,
) -> None:
    """Put aside the cached rows that this machine does not confirm.

    Args:
        batch: a few rows of the run's first step; they become the check rows of the shard that this run adds.
        examples: the run's; shards that hold none of them are not checked. None checks all shards.
    """
    cache = references.cache
    if cache is None:
        return
    keys = None if examples is None else {key for example in examples for key in row_keys(example)}
    with as_reference(policy):
        rescoring = Rescoring(policy, batch)
        failed = _check_shards(cache, rescoring, keys)
        failed |= _compare_rows(references, rescoring, batch)
        if examples is not None:
            failed |= _compare_sample(references, rescoring, examples)
        whole = tuple(replace(example, masks=()) for example in batch.examples)  # a later run may mask other tokens
        values = rescoring.scores(CheckRows(whole, torch.empty(0)))
        cache.check_rows = None if values is None else CheckRows(whole, values)
    if failed:
        usable = [value for value in failed.values() if value < INFINITE]
        by = f", by up to {max(usable):.3f} nats a token" if usable else ""
        log.warning(
            "reference: the cached scores of %d earlier runs are put aside and recomputed: this machine scores the "
            "same rows differently%s; another machine, torch version or reference wrote them", len(failed), by,
        )  # fmt: skip


@dataclass(slots=True)
class Rescoring:
    """Scores of check rows on this machine, each batch once.

    Attributes:
        batch: the run's own rows, which bound the size of others'.
    """

    policy: Policy
    batch: PackedBatch
    _scored: dict[tuple[bytes, ...], Tensor | None] = field(default_factory=dict)
    _rounding: dict[tuple[bytes, ...], float] = field(default_factory=dict)

    @property
    def max_tokens(self) -> int:
        """Tokens of check rows that may be scored."""
        return max(MAX_CHECK_TOKENS, sum(len(piece) for row in self.batch.examples for piece in _pieces(row)))

    def has_room_for(self, rows: CheckRows) -> bool:
        """Return whether these rows have been scored, or another batch may be."""
        return rows.key in self._scored or len(self._scored) < MAX_BATCHES

    def scores(self, rows: CheckRows) -> Tensor | None:
        """Score check rows; None where this model or this machine can't."""
        if rows.key not in self._scored:
            self._scored[rows.key] = _attempt(self.policy, lambda: _scores(rows.examples, self.policy))
        return self._scored[rows.key]

    def rounding(self, rows: CheckRows) -> float:
        """Measure the rounding between batches, nats a token; 0 where the memory doesn't suffice for it."""
        if rows.key not in self._rounding:
            measured = _attempt(self.policy, lambda: measured_rounding(rows.examples, self.policy))
            self._rounding[rows.key] = 0.0 if measured is None else measured
        return self._rounding[rows.key]

    def difference(self, rows: CheckRows) -> float:
        """Return the mean difference of check rows from their present scores, nats a token; infinite for rows that
        cannot be scored."""
        present = self.scores(rows) if self._fits_model(rows.examples) else None
        return INFINITE if present is None else (present - rows.values).abs().mean().item()

    def _fits_model(self, examples: Sequence[TokenizedExample]) -> bool:
        """Return whether all tokens and positions are the model's: a GPU would fail for good on others."""
        embedded = self.policy.plain_model.get_input_embeddings().weight.shape[0]
        vocabulary = min(embedded, self.policy.head.num_tokens)
        own = max(map(_longest_row, self.batch.examples))
        config = self.policy.plain_model.config.get_text_config()
        positions = max([own, *map(int, layer_settings(config, "max_position_embeddings"))])
        largest = max(max(piece) for example in examples for piece in _pieces(example))
        return largest < vocabulary and max(map(_longest_row, examples)) <= positions


def _check_shards(cache: ReferenceCache, rescoring: Rescoring, keys: set[bytes] | None) -> dict[str, float]:
    """Score the check rows of the shards that hold the run's rows, and put aside the shards that fail.

    Another shard may hold the rows of one that is put aside, and is checked then.

    Returns:
        Shard -> mean difference, nats a token, of those that failed.
    """
    failed: dict[str, float] = {}
    confirmed: set[str] = set()
    while unknown := [shard for shard in _shards_of(cache, keys) if shard not in confirmed]:
        wrong: dict[str, float] = {}
        unread: set[str] = set()
        for shard in unknown:
            rows = cache.check_rows_of(shard, rescoring.max_tokens)
            if rows is not None and not rescoring.has_room_for(rows):
                unread.add(shard)
                continue
            difference = INFINITE if rows is None else rescoring.difference(rows)
            if rows is None or not (difference <= SAME_BATCH_TOLERANCE or _is_rounding(difference, rows, rescoring)):
                wrong[shard] = difference
        cache.put_aside(wrong.keys() | unread)
        if unread:
            log.info("reference: %d earlier runs are not read: their check would take too long", len(unread))
        failed |= wrong
        confirmed |= set(unknown)
    return failed


def _shards_of(cache: ReferenceCache, keys: set[bytes] | None) -> list[str]:
    """List the shards that these rows, or all, are read from: the run's own, then those with the most rows."""
    if keys is None:
        return sorted(cache.store.shards())
    counts = Counter(shard for key in keys if (shard := cache.store.shard_of(key)))
    own = f"{cache.store.run}.shard"
    return sorted(counts, key=lambda shard: (shard != own, -counts[shard], shard))


def _is_rounding(difference: float, rows: CheckRows, rescoring: Rescoring) -> bool:
    """Return whether the rounding of a machine that doesn't repeat its own numbers explains a difference."""
    return difference < INFINITE and difference <= SAME_BATCH_SHARE * rescoring.rounding(rows)


def _compare_rows(references: ReferenceStore, rescoring: Rescoring, batch: PackedBatch) -> dict[str, float]:
    """Compare the batch's rows with the cache's and put aside the shards that fail.

    Returns:
        Shard -> mean difference, nats a token, of those that failed.
    """
    cache = references.cache
    assert cache is not None
    lengths = dict(zip((key for example in batch.examples for key in row_keys(example)), batch.lengths, strict=True))
    known = [key for key in lengths if references.has(key)]
    if not known:
        return {}
    difference = _difference_of_rows(references, rescoring.policy, batch, {key: lengths[key] for key in known})
    if not difference <= OTHER_BATCH_TOLERANCE:
        rounding = rescoring.rounding(CheckRows(batch.examples, torch.empty(0))) if difference < INFINITE else 0.0
        if not difference <= OTHER_BATCH_FACTOR * rounding:
            shards = {cache.store.shard_of(key) or f"{cache.store.run}.shard" for key in known}
            references.rows.clear()
            cache.put_aside(shards)
            return dict.fromkeys(shards, difference)
    log.info("reference: one recomputed batch agrees with the cache, %.4f nats a token apart on average", difference)
    return {}


def _compare_sample(
    references: ReferenceStore, rescoring: Rescoring, examples: Sequence[TokenizedExample]
) -> dict[str, float]:
    """Compare a sample of the cached rows over all data, and put aside the shards of rows that fail.

    Returns:
        Shard -> mean difference of its worst row, nats a token, of those that failed.
    """
    cache, policy, rounding = references.cache, rescoring.policy, 0.0
    assert cache is not None
    failed: dict[str, float] = {}
    own = sum(num_fed_tokens(example, policy.shares_prompts) for example in rescoring.batch.examples)
    budget = max(own, LARGE_BATCH_TOKENS)
    for members in sample(cache, examples, policy, budget):
        found = _attempt(policy, partial(row_differences, cache, members, policy))
        if found is None:
            continue  # too large for the memory left now; training shrinks its batches
        worst = max(found.values(), default=0.0)
        if worst > max(OTHER_BATCH_TOLERANCE, OTHER_BATCH_FACTOR * rounding):
            measured = _attempt(policy, partial(_rounding_of_rows, members, policy)) if worst < INFINITE else None
            rounding = max(rounding, measured or 0.0)
        allowed = max(OTHER_BATCH_TOLERANCE, OTHER_BATCH_FACTOR * rounding)
        for key, difference in found.items():
            shard = cache.store.shard_of(key)
            if shard is not None and not difference <= allowed:
                failed[shard] = max(failed.get(shard, 0.0), difference)
    if failed:
        references.rows.clear()
        cache.put_aside(failed)
    return failed


def _rounding_of_rows(examples: Sequence[TokenizedExample], policy: Policy) -> float:
    """Measure the largest rounding of one of these rows between batches, nats a token."""
    lengths = [count for example in examples for count in example.num_scored]
    return largest_rounding(_arrangements(examples, policy), lengths)


def _difference_of_rows(
    references: ReferenceStore, policy: Policy, batch: PackedBatch, known: dict[bytes, int]
) -> float:
    """Return the mean difference of known rows from their present scores, nats a token; infinite for unusable rows.

    Args:
        known: key -> number of tokens.
    """
    usable = [references.fetch(key, num_tokens) for key, num_tokens in known.items()]
    present = _attempt(policy, lambda: completion_logprobs(policy, batch).values.cpu()) if all(usable) else None
    if present is None:
        return INFINITE
    keys = [key for example in batch.examples for key in row_keys(example)]
    scores = dict(zip(keys, present.split(list(batch.lengths)), strict=True))
    cached, fresh = (torch.cat([rows[key] for key in known]) for rows in (references.rows, scores))
    return (cached - fresh).abs().mean().item()


def measured_rounding(examples: Sequence[TokenizedExample], policy: Policy) -> float:
    """Measure the rounding between batches on this machine: the mean difference of these rows' scores, nats a token."""
    together, *others = _arrangements(examples, policy)
    return max((together - other).abs().mean().item() for other in others)


def _arrangements(examples: Sequence[TokenizedExample], policy: Policy) -> list[Tensor]:
    """Score rows together, each alone, and repeated in one larger batch: three times [tokens] nats."""
    together = completion_logprobs(policy, pack(examples, policy.device)).values
    alone = torch.cat([completion_logprobs(policy, pack([example], policy.device)).values for example in examples])
    if policy.shares_prompts:  # a repeated example adds its responses alone
        tokens = sum(len(branch) for example in examples for branch in example.branches)
    else:
        tokens = sum(num_fed_tokens(example, shared=False) for example in examples)
    repeats = 1 + LARGE_BATCH_TOKENS // tokens
    many = completion_logprobs(policy, pack([*examples] * repeats, policy.device)).values[: len(together)]
    return [together, alone, many]


def _scores(examples: Sequence[TokenizedExample], policy: Policy) -> Tensor:
    """Score one batch by one thread, since the order of a sum may depend on the number of threads.

    Returns:
        [tokens] float32 nats on the CPU.
    """
    with _one_thread():
        return completion_logprobs(policy, pack(examples, policy.device)).values.cpu()


def _attempt(policy: Policy, work: Callable[[], T]) -> T | None:
    """Return the result; None where memory runs out or the model refuses the rows.

    Raises:
        DeviceMemoryError: memory has run out, and processes share the base.
        RuntimeError: the model refuses the rows, and processes share the base: they wait for this one's pass.
    """
    try:
        result = attempt(work)
    except RuntimeError as error:
        if policy.shards is not None:
            raise
        log.debug("reference: rows of the cache cannot be checked: %s", error)
        return None
    if result is None:
        policy.refuse_repeating("in the check of the reference cache", "set [reference] cache = false")
    return result


def _pieces(example: TokenizedExample) -> tuple[Sequence[int], ...]:
    return (example.prompt, *example.branches)


def _longest_row(example: TokenizedExample) -> int:
    """Tokens of the prompt and the longest branch."""
    return len(example.prompt) + max(map(len, example.branches))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
