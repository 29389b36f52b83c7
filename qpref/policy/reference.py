"""The reference, which is the model with its adapters off or its frozen start adapter on, and a store of its scores."""

from __future__ import annotations

import base64
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qpref.distributed.world import World
from qpref.policy.adapter import REFERENCE, TRAINED
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.partners import logprobs_with_partners
from qpref.policy.policy import Policy
from qpref.policy.reference_cache import ReferenceCache
from qpref.records import PackedBatch, TokenizedExample, TokenLogProbs
from qpref.shards import KEY_BYTES
from qpref.staging import to_device


@contextmanager
def frozen(policy: Policy) -> Iterator[None]:
    """Switch dropout and gradients off inside; the mode is restored on leaving, by an exception too."""
    was_training = policy.model.training
    policy.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.model.train(was_training)


@contextmanager
def as_base(policy: Policy) -> Iterator[None]:
    """Make the model its base inside: all adapters off. Nothing has a gradient, and dropout is off."""
    layers = policy.model.base_model
    with frozen(policy):
        try:
            layers.disable_adapter_layers()
            yield
        finally:
            layers.enable_adapter_layers()


@contextmanager
def as_start(policy: Policy) -> Iterator[None]:
    """Make the model what its training starts from inside: the base, or the start adapter's frozen copy on it."""
    if not policy.starts_from_adapter:
        with as_base(policy):
            yield
        return
    layers = policy.model.base_model
    with frozen(policy):
        try:
            layers.set_adapter(REFERENCE, inference_mode=True)
            yield
        finally:
            layers.set_adapter(TRAINED)


@contextmanager
def as_reference(policy: Policy) -> Iterator[None]:
    """Make the model its own reference inside: what its training starts from, or the base where the recipe says so.

    Dropout is off and nothing has a gradient. The policy is restored on leaving, by an exception too.
    """
    with as_base(policy) if policy.base_is_reference else as_start(policy):
        yield


@dataclass(slots=True)
class ReferenceStore:
    """Reference log-probabilities by content: computed at a row's first use, in that batch's own layout, then reused.

    So policy and reference see the same packed stream in the first epoch, and a fresh adapter's rewards are exactly 0.

    Attributes:
        cache: rows of earlier runs on disk, to which this one adds; None for no cache.
        rows: key of prompt and response -> [tokens] float32 nats on the CPU, for the rows that this run has used.
        num_computed: examples that the reference model has scored, training and held-out.
    """

    cache: ReferenceCache | None = None
    rows: dict[bytes, Tensor] = field(default_factory=dict)
    num_computed: int = 0

    def logprobs(self, policy: Policy, batch: PackedBatch) -> TokenLogProbs:
        """Return the reference's scores of a batch, computing them unless the store or the cache has all its rows."""
        if not self._knows(batch):
            with as_reference(policy):
                self._keep(batch, completion_logprobs(policy, batch))
            self.num_computed += len(batch.examples)
        return self._stored(policy, batch)

    def logprobs_with_partners(
        self, policy: Policy, batch: PackedBatch, partners: PackedBatch
    ) -> tuple[TokenLogProbs, TokenLogProbs]:
        """Return the scores of two batches with the same prompts, computed in one as the policy's are."""
        if not (self._knows(batch) & self._knows(partners)):  # both fetch rows from the cache
            with as_reference(policy):
                own, others = logprobs_with_partners(policy, batch, partners)
            self._keep(batch, own)
            self._keep(partners, others)
            self.num_computed += len(batch.examples)
        return self._stored(policy, batch), self._stored(policy, partners)

    def _knows(self, batch: PackedBatch) -> bool:
        """Fetch a batch's rows; returns whether all of them are in the store then."""
        fetched = [self.fetch(key, length) for key, length in zip(batch_keys(batch), batch.lengths, strict=True)]
        return all(fetched)

    def _stored(self, policy: Policy, batch: PackedBatch) -> TokenLogProbs:
        values = to_device([torch.cat([self.rows[key] for key in batch_keys(batch)])], policy.device)[0]
        return TokenLogProbs(values=values, lengths=batch.lengths)

    def has(self, key: bytes) -> bool:
        """Return whether the store or the cache has a row's scores."""
        return key in self.rows or (self.cache is not None and key in self.cache)

    def fetch(self, key: bytes, num_tokens: int) -> bool:
        """Copy a row's scores from the cache into the store where they are not in it yet, and return whether it has
        them. Others may have written the cache: scores that are not one finite number per token are not taken."""
        if key not in self.rows and self.cache is not None:
            values = self.cache.get(key)
            if values is not None and len(values) == num_tokens and bool(values.isfinite().all()):
                self.rows[key] = values
        return key in self.rows

    def _keep(self, batch: PackedBatch, scores: TokenLogProbs) -> None:
        """Store the rows that are new, on disk too."""
        pieces = dict(zip(batch_keys(batch), scores.values.cpu().split(list(batch.lengths)), strict=True))
        new = {key: values.clone() for key, values in pieces.items() if key not in self.rows}
        self.rows |= new
        if self.cache is not None:
            self.cache.add(new)

    def missing(self, examples: Iterable[TokenizedExample]) -> list[bytes]:
        """List the keys of the examples' rows that the store lacks, each once.

        All processes of a run have the same rows between two calls of `share`, and so the same list.
        """
        keys = dict.fromkeys(key for example in examples for key in row_keys(example))
        return [key for key in keys if key not in self.rows]

    def share(self, world: World, missing: Sequence[bytes]) -> None:
        """Give all processes the rows that only some of them have got since `missing` listed their keys.

        Of a row that several have, all keep the lowest rank's, since two batches round differently. Bytes travel in
        base64 between the hosts, which have the rows.
        """
        if not missing:
            return
        own = {
            number: base64.b64encode(self.rows[key].numpy().tobytes()).decode()
            for number, key in enumerate(missing)
            if key in self.rows
        }
        found: dict[bytes, Tensor] = {}
        for rows in world.exchange(own, "reference scores"):
            for number, encoded in rows.items():
                values = torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.float32)
                found.setdefault(missing[int(number)], values)
        self.rows |= found

    def to_tensors(self) -> dict[str, Tensor]:
        """Flatten the rows into three tensors for a checkpoint, sorted by key."""
        keys = sorted(self.rows)
        joined = b"".join(keys)
        return {
            "keys": torch.frombuffer(bytearray(joined), dtype=torch.uint8)
            if keys
            else torch.empty(0, dtype=torch.uint8),
            "lengths": torch.tensor([len(self.rows[key]) for key in keys], dtype=torch.int32),
            "values": torch.cat([self.rows[key] for key in keys]) if keys else torch.empty(0),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Read the rows back from `to_tensors`."""
        keys = tensors["keys"].numpy().tobytes()
        pieces: Sequence[Tensor] = tensors["values"].split(tensors["lengths"].tolist())
        starts = range(0, len(keys), KEY_BYTES)
        self.rows = {keys[start : start + KEY_BYTES]: values for start, values in zip(starts, pieces, strict=True)}


def batch_keys(batch: PackedBatch) -> list[bytes]:
    """Return the keys of a batch's rows, in the order of its lengths."""
    return [key for example in batch.examples for key in row_keys(example)]


def row_keys(example: TokenizedExample) -> list[bytes]:
    """Hash the token ids of prompt and response of each branch, and which are scored: the key of its row."""
    keys = []
    for branch, scored in zip(example.branches, example.scored, strict=True):
        digest = hashlib.blake2b(len(example.prompt).to_bytes(4, "little"), digest_size=KEY_BYTES)
        digest.update(example.prompt.tobytes())
        digest.update(branch.tobytes())
        if len(scored) < len(branch):
            digest.update(b"scored" + array("i", scored).tobytes())
        keys.append(digest.digest())
    return keys
