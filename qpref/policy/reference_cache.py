"""Reference log-probabilities on disk, by content, for all runs of a machine.

A folder for each reference (base weights, config, quantization, type, attention), in it the shards of `qpref.shards`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from qpref import fsio, shards
from qpref.shards import KEY_BYTES, ShardStore

FORMAT = 2
"""Part of every reference's key: raise it when the same tokens are scored differently."""

DESCRIPTION = "reference.json"
"""In each folder: what it is the cache of."""
LIMIT_BYTES = 20 * 2**30
"""What all shards may take together, unless QPREF_REFERENCE_CACHE_BYTES says otherwise: 13 million pairs whose two
responses have 400 tokens together."""


def root() -> Path:
    return fsio.cache_folder() / "reference"


def size_limit() -> int:
    """Bytes that the shards of all references may take together."""
    return shards.size_limit("QPREF_REFERENCE_CACHE_BYTES", LIMIT_BYTES)


def folder_of(reference: Mapping[str, Any]) -> Path:
    """The folder of a reference, named by a hash of all that decides what it says of a row's tokens."""
    content = json.dumps({"format": FORMAT, **reference}, sort_keys=True)
    return root() / hashlib.blake2b(content.encode(), digest_size=KEY_BYTES).hexdigest()


def describe(folder: Path, reference: Mapping[str, Any]) -> None:
    """Write down what a folder is the cache of, for whoever wants to read it without a model."""
    if not (folder / DESCRIPTION).is_file():
        fsio.make_folder(folder)
        fsio.write_json(folder / DESCRIPTION, dict(reference))


@dataclass(frozen=True, slots=True)
class ReferenceCache:
    """What is known of one reference: [tokens] float32 nats for each row."""

    store: ShardStore

    @classmethod
    def open(cls, folder: Path, run: str, seen: Mapping[str, int] | None = None) -> ReferenceCache:
        """Read the folder's shards; arguments as for `ShardStore.open`."""
        return cls(ShardStore.open(folder, run, seen))

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, key: bytes) -> bool:
        return key in self.store

    def get(self, key: bytes) -> Tensor | None:
        """[tokens] float32 nats of a row, or None."""
        content = self.store.get(key)
        return None if content is None else torch.from_numpy(numpy.frombuffer(content, "<f4").copy())

    def add(self, rows: Mapping[bytes, Tensor]) -> None:
        """Append rows."""
        self.store.add({key: words(values) for key, values in rows.items()})

    def close(self) -> None:
        """Bring all that was added to the disk, if it takes it."""
        self.store.close()


def words(values: Tensor) -> bytes:
    """Values as they stand in a shard."""
    return values.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes()
