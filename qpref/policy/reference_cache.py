"""Reference log-probabilities on disk, by content, for all runs of a machine.

Each reference (base weights, config, quantization, dtype, attention) has a folder with shards of `qpref.shards`. Each
shard holds check rows: a few rows and the scores that its run computed for them, in that very batch.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qpref import fsio, shards
from qpref.records import Source, TokenizedExample
from qpref.shards import KEY_BYTES, ShardStore

FORMAT = 5
"""Part of every reference's key: raise it when the same tokens are scored differently."""

DESCRIPTION = "reference.json"
"""In each folder: the description of its reference."""
LIMIT_BYTES = 20 * 2**30
"""Limit on the size of all shards together, unless QPREF_REFERENCE_CACHE_BYTES sets another: 13 million pairs whose two
responses have 400 tokens together."""


def root() -> Path:
    """Return the folder that holds each reference's folder."""
    return fsio.cache_folder() / "reference"


def size_limit() -> int:
    """Return the limit in bytes on the shards of all references together."""
    return shards.size_limit("QPREF_REFERENCE_CACHE_BYTES", LIMIT_BYTES)


def folder_of(reference: Mapping[str, Any]) -> Path:
    """Return a reference's folder, named by a hash of everything that its scores depend on."""
    content = json.dumps({"format": FORMAT, **reference}, sort_keys=True)
    return root() / hashlib.blake2b(content.encode(), digest_size=KEY_BYTES).hexdigest()


def describe(folder: Path, reference: Mapping[str, Any]) -> None:
    """Write the description of a folder's reference, for readers without a model."""
    if not (folder / DESCRIPTION).is_file():
        fsio.make_entry(folder)
        fsio.write_json(folder / DESCRIPTION, dict(reference))


@dataclass(frozen=True, slots=True)
class CheckRows:
    """Rows scored by the run that wrote a shard, as one batch in one thread, so that another run can repeat it.

    Attributes:
        examples: the batch, in its order.
        values: [tokens] float32 nats of all branches.
    """

    examples: tuple[TokenizedExample, ...]
    values: Tensor

    def to_bytes(self) -> bytes:
        """Serialize the rows as safetensors."""
        rows = [(example.prompt, *example.branches) for example in self.examples]
        tokens = [token for row in rows for piece in row for token in piece]
        lengths = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int32)  # 0 after a shorter list's last
        for row, pieces in zip(lengths, rows, strict=True):
            row[: len(pieces)] = torch.tensor([len(piece) for piece in pieces])
        content: bytes = save(
            {
                "tokens": torch.tensor(tokens, dtype=torch.int32),
                "lengths": lengths,
                "values": self.values.detach().to("cpu", torch.float32).contiguous(),
            }
        )
        return content

    @classmethod
    def from_bytes(cls, content: bytes, max_tokens: int) -> CheckRows | None:
        """Read the rows back from `to_bytes`; None for any other content, which others may have written."""
        try:
            found = load(content)
            tokens, lengths, values = (found[name] for name in ("tokens", "lengths", "values"))
        except (SafetensorError, KeyError, RuntimeError):
            return None
        if not _are_rows(tokens, lengths, values, max_tokens):
            return None
        pieces = iter(tokens.split(lengths.flatten().tolist()))
        rows = [[array("i", piece.tolist()) for piece in islice(pieces, len(row)) if len(piece)] for row in lengths]
        return cls(tuple(_example(prompt, branches) for prompt, *branches in rows), values)

    @property
    def key(self) -> tuple[bytes, ...]:
        """Token ids of the rows, which identify the batch."""
        return tuple(
            piece.tobytes() for example in self.examples for piece in (array("i"), example.prompt, *example.branches)
        )


def _are_rows(tokens: Tensor, lengths: Tensor, values: Tensor, max_tokens: int) -> bool:
    """Return whether the tensors are as `CheckRows.to_bytes` makes them, and of at most `max_tokens` tokens."""
    layout = [(each.dtype, each.dim()) for each in (tokens, lengths, values)]
    if layout != [(torch.int32, 1), (torch.int32, 2), (torch.float32, 1)]:
        return False
    if not 0 < len(tokens) <= max_tokens or lengths.shape[1] < 2 or len(lengths) == 0:
        return False
    no_negative = int(tokens.min()) >= 0 and int(lengths.min()) >= 0 and int(lengths[:, :2].min()) > 0
    return no_negative and int(lengths.sum()) == len(tokens) and int(lengths[:, 1:].sum()) == len(values)


def _example(prompt: array[int], branches: list[array[int]]) -> TokenizedExample:
    source = Source(path="the reference cache", line=0)
    return TokenizedExample(
        prompt=prompt,
        branches=tuple(branches),
        truncated=(False,) * len(branches),
        weight=1.0,
        margin=0.0,
        source=source,
    )


@dataclass(slots=True)
class ReferenceCache:
    """The scores of one reference on disk: [tokens] float32 nats for each row.

    Attributes:
        check_rows: written into this run's own shard before its first rows; other runs ignore a shard without them.
    """

    store: ShardStore
    check_rows: CheckRows | None = None

    @classmethod
    def open(cls, folder: Path, run: str, seen: Mapping[str, int] | None = None) -> ReferenceCache:
        """Read the folder's shards; arguments as for `ShardStore.open`."""
        return cls(ShardStore.open(folder, run, seen))

    def __len__(self) -> int:
        return len(self.store) - sum(check_key(name) in self.store for name in self.store.shards())

    def __contains__(self, key: bytes) -> bool:
        return key in self.store

    def get(self, key: bytes) -> Tensor | None:
        """Read a row: [tokens] float32 nats, or None."""
        content = self.store.get(key)
        return None if content is None else torch.from_numpy(numpy.frombuffer(content, "<f4").copy())

    def add(self, rows: Mapping[bytes, Tensor]) -> None:
        """Append rows, the first time after the check rows."""
        records = {key: to_bytes(values) for key, values in rows.items()}
        if self.check_rows is not None:
            records = {check_key(f"{self.store.run}.shard"): self.check_rows.to_bytes()} | records
            self.check_rows = None
        self.store.add(records)

    def check_rows_of(self, shard: str, max_tokens: int) -> CheckRows | None:
        """Read a shard's check rows; None where it has none, or some of more than `max_tokens` tokens."""
        content = self.store.get(check_key(shard))
        return None if content is None else CheckRows.from_bytes(content, max_tokens)

    def put_aside(self, shards: Collection[str]) -> None:
        """Ignore these shards' rows from here on; the run's own shard begins again."""
        self.store.put_aside(shards)

    def close(self) -> None:
        """Flush the added rows to the disk, if it takes them."""
        self.store.close()


def check_key(shard: str) -> bytes:
    """Return the key of a shard's check rows; it depends on the shard's name, so a copy under another name has none."""
    return hashlib.blake2b(f"check rows of {shard}".encode(), digest_size=KEY_BYTES).digest()


def to_bytes(values: Tensor) -> bytes:
    """Serialize a row's values as shards store them: little-endian float32."""
    return values.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes()
