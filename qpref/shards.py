"""What was computed once, on disk, by content: append-only shards, one for each run that found something new.

A run sees the shards as they were when it started and what it adds itself: what another run adds meanwhile doesn't
reach it, so that a resumed run reads what it would have read without the interruption.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qpref import fsio
from qpref.errors import DiskError, RecipeError

log = logging.getLogger("qpref")

KEY_BYTES = 16
HEADER = struct.Struct(f"<{KEY_BYTES}sII")
"""Of a record: its key, the number of its 4-byte words, and a checksum of these and of the words that follow."""
WORD = 4
SYNC_EVERY = 64
"""Appends between two that wait for the disk. A killed process loses none either way; a power cut may lose so many."""


@dataclass(slots=True)
class ShardStore:
    """The shards that one run reads, and the one that it writes.

    Attributes:
        folder: of everything with the same meaning.
        run: the run's id, the name of its own shard.
        seen: shard name -> bytes of it that this run reads; its own isn't among them.
        loss_level: of the log, for bytes that are no whole records.
    """

    folder: Path
    run: str
    seen: dict[str, int]
    loss_level: int = logging.WARNING
    _places: dict[bytes, tuple[str, mmap.mmap, int, int]] = field(default_factory=dict)
    _own: fsio.AppendLog | None = None
    _appends: int = 0

    @classmethod
    def open(
        cls, folder: Path, run: str, seen: Mapping[str, int] | None = None, loss_level: int = logging.WARNING
    ) -> ShardStore:
        """Read the folder's shards.

        Args:
            seen: what a run that goes on saw at its start; None takes all that is there.
        """
        fsio.make_folder(folder)
        own = folder / f"{run}.shard"
        if seen is None:
            paths = sorted(path for path in folder.glob("*.shard") if path != own)
            seen = {}
            for path in paths:
                with suppress(FileNotFoundError):  # another run may be shrinking the cache
                    seen[path.name] = path.stat().st_size
        cache = cls(folder, run, dict(seen), loss_level)
        for name, size in seen.items():
            cache._read(folder / name, size)
        if own.is_file():
            kept = cache._read(own, own.stat().st_size)
            cache._own = fsio.AppendLog(own, kept)  # cuts off what a killed process wrote half
        return cache

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> bytes | None:
        """A record's content, or None."""
        place = self._places.get(key)
        if place is None:
            return None
        _, data, start, count = place
        return data[start : start + WORD * count]

    def shard_of(self, key: bytes) -> str | None:
        """Name of the shard that a record is read from, or None."""
        place = self._places.get(key)
        return None if place is None else place[0]

    def shards(self) -> set[str]:
        """Names of the shards that records are read from."""
        return {place[0] for place in self._places.values()}

    def put_aside(self, names: Collection[str]) -> None:
        """Stop reading these shards; a record that another shard holds too is found there."""
        own = self.folder / f"{self.run}.shard"
        self.seen = {name: size for name, size in self.seen.items() if name not in names}
        self._places.clear()
        for name, size in self.seen.items():
            self._read(self.folder / name, size)
        if self._own is not None and own.name not in names:
            self._read(own, own.stat().st_size)

    def add(self, records_by_key: Mapping[bytes, bytes]) -> None:
        """Append records, of whole words, to the run's own shard.

        A disk that refuses is warned of once; the run goes on without.
        """
        records = b"".join(record(key, content) for key, content in records_by_key.items())
        if not records or self._appends < 0:
            return
        try:
            if self._own is None:
                self._own = fsio.AppendLog(self.folder / f"{self.run}.shard")
            self._own.append(records, durable=self._appends % SYNC_EVERY == 0)
            self._appends += 1
        except DiskError as error:
            log.warning("the cache is not written any more: %s", error.what)
            self._appends = -1

    def close(self) -> None:
        """Bring all that was added to the disk, if it takes it."""
        if self._own is None:
            return
        try:
            if self._appends > 0:
                self._own.append(b"")
        except DiskError as error:
            log.warning("the cache may have lost its last records: %s", error.what)
        self._own.close()
        self._own = None

    def _read(self, path: Path, size: int) -> int:
        """Note where the records of a shard's first `size` bytes stand; returns the bytes that are whole records."""
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                data = mmap.mmap(file.fileno(), min(size, found), access=mmap.ACCESS_READ) if min(size, found) else None
            fsio.touch(path)
        except (OSError, DiskError):
            found, data = 0, None
        end = 0
        for key, start, count in _records(data) if data else ():
            self._places.setdefault(key, (path.name, data, start, count))  # type: ignore[arg-type]
            end = start + WORD * count
        if end < size:
            # What a killed process, or one that still writes, has left.
            log.log(
                self.loss_level, "%s: %d of %d bytes are no whole records and are passed over", path, size - end, size
            )
        return end


def record(key: bytes, content: bytes) -> bytes:
    """A record as it stands in a shard."""
    count = len(content) // WORD
    return HEADER.pack(key, count, _checksum(key, content)) + content


def _checksum(key: bytes, content: bytes | memoryview) -> int:
    return zlib.crc32(content, zlib.crc32(key + struct.pack("<I", len(content) // WORD)))


def _records(data: mmap.mmap) -> Iterator[tuple[bytes, int, int]]:
    """Key, byte offset of the content, and its number of words, up to the first record that isn't whole."""
    place = 0
    with memoryview(data) as view:
        while place + HEADER.size <= len(view):
            key, count, checksum = HEADER.unpack_from(view, place)
            start = place + HEADER.size
            place = start + WORD * count
            if place > len(view) or _checksum(key, view[start:place]) != checksum:
                return
            yield key, start, count


def size_limit(variable: str, default: int) -> int:
    """Bytes that an environment variable allows.

    Raises:
        RecipeError: it is no whole number.
    """
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise RecipeError(f"${variable}: expected a number of bytes, got {value!r}")
    return int(value)


def shrink(root: Path, limit: int, keep: Path | None = None) -> int:
    """Remove the shards that were used longest ago until all take at most `limit` bytes; returns the bytes freed.

    Args:
        root: folder of the folders of shards.
        limit: bytes.
        keep: a folder that is in use.
    """
    shards = []
    for path in root.glob("*/*.shard"):
        with suppress(FileNotFoundError):  # another run may be shrinking too
            status = path.stat()
            shards.append((status.st_mtime, status.st_size, path))
    excess = sum(size for _, size, _ in shards) - limit
    freed = 0
    for _, size, path in sorted(shards):
        if freed >= excess:
            break
        if path.parent != keep:
            fsio.remove_tree(path)
            freed += size
    return freed
