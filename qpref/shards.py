"""A content-addressed cache on disk: append-only shards, one for each run that computed something new.

A run reads the shards as they were when it started, plus its own. Records that other runs add later stay invisible to
it, so that a resumed run reads the same records as an uninterrupted one.
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
from qpref.opening import open_plain

log = logging.getLogger("qpref")

KEY_BYTES = 16
HEADER = struct.Struct(f"<{KEY_BYTES}sII")
"""Header of a record: key, number of 4-byte words, and the CRC-32 of both and of the words that follow."""
WORD = 4
SYNC_EVERY = 64
"""Appends per fsync: the most that a power cut can lose. A killed process loses none."""


Entry = tuple[str, mmap.mmap, int, int]
"""Where a record is: shard name, the shard's bytes, byte offset and number of words."""


@dataclass(slots=True)
class ShardStore:
    """The shards that one run reads, and the one that it writes.

    Attributes:
        folder: folder of the shards; its records all have the same meaning.
        run: id of the run, which names its own shard.
        seen: shard name -> bytes of it that this run reads, its own shard left out.
        loss_level: log level of the message about bytes that are not whole records.
    """

    folder: Path
    run: str
    seen: dict[str, int]
    loss_level: int = logging.WARNING
    _index: dict[bytes, Entry] = field(default_factory=dict)
    _others: dict[bytes, list[Entry]] = field(default_factory=dict)
    _own: fsio.AppendLog | None = None
    _appends: int = 0

    @classmethod
    def open(
        cls, folder: Path, run: str, seen: Mapping[str, int] | None = None, loss_level: int = logging.WARNING
    ) -> ShardStore:
        """Open the folder and index its shards.

        Args:
            seen: `seen` of the run that is resumed; None reads every shard in the folder.
        """
        fsio.make_entry(folder)
        own = folder / f"{run}.shard"
        if seen is None:
            paths = sorted(path for path in folder.glob("*.shard") if path != own)
            seen = {}
            for path in paths:
                with suppress(FileNotFoundError):  # another run may be shrinking the cache
                    seen[path.name] = path.lstat().st_size
        cache = cls(folder, run, dict(seen), loss_level)
        for name, size in seen.items():
            cache._read(folder / name, size)
        if own.is_file():
            kept = cache._read(own, own.lstat().st_size)
            cache._open_own(kept)  # cuts off a half-written record of a killed process
        return cache

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def get(self, key: bytes) -> bytes | None:
        """Return the content of a record, or None."""
        entry = self._index.get(key)
        if entry is None:
            return None
        _, data, start, count = entry
        return data[start : start + WORD * count]

    def shard_of(self, key: bytes) -> str | None:
        """Return the name of the shard that holds a record, or None."""
        entry = self._index.get(key)
        return None if entry is None else entry[0]

    def shards(self) -> set[str]:
        """Return the names of the shards that records are read from."""
        return {name for name, *_ in self._index.values()}

    def put_aside(self, names: Collection[str]) -> None:
        """Stop reading these shards; records that other shards hold too stay readable.

        The run's own shard is removed and begun again: in an older one, the first record of a key would be read.
        """
        if not names:
            return
        self.seen = {name: size for name, size in self.seen.items() if name not in names}
        for key in [key for key, (name, *_) in self._index.items() if name in names]:
            kept = [entry for entry in self._others.pop(key, ()) if entry[0] not in names]
            if kept:
                self._index[key], self._others[key] = kept[0], kept[1:]
            else:
                del self._index[key]
        if self._own is not None and f"{self.run}.shard" in names:
            self._begin_again()

    def _begin_again(self) -> None:
        """Remove the run's own shard, which others may have mapped: its bytes must not change under them."""
        assert self._own is not None
        self._own.close()
        self._own = None
        try:
            fsio.remove_tree(self.folder / f"{self.run}.shard")
        except DiskError as error:
            self._stop_writing(error)

    def _open_own(self, keep: int | None = None) -> None:
        try:
            self._own = fsio.AppendLog(self.folder / f"{self.run}.shard", keep)
        except DiskError as error:
            self._stop_writing(error)

    def _stop_writing(self, error: DiskError) -> None:
        fsio.warn_unwritable("the cache is no longer written", error)
        self._appends = -1

    def add(self, records_by_key: Mapping[bytes, bytes]) -> None:
        """Append records to the run's own shard; each content is whole 4-byte words.

        If the disk refuses, one warning is logged and the run continues without the cache.
        """
        records = b"".join(record(key, content) for key, content in records_by_key.items())
        if not records or self._appends < 0:
            return
        if self._own is None:
            self._open_own()
        if self._own is None:
            return
        try:
            self._own.append(records, durable=self._appends % SYNC_EVERY == 0)
            self._appends += 1
        except DiskError as error:
            self._stop_writing(error)

    def close(self) -> None:
        """Flush the added records to the disk and close the shard; a refusal is logged."""
        if self._own is None:
            return
        try:
            if self._appends > 0:
                self._own.append(b"")
        except DiskError as error:
            fsio.warn_unwritable("the cache may have lost its last records", error)
        self._own.close()
        self._own = None

    def _read(self, path: Path, size: int) -> int:
        """Index the records in the first `size` bytes of a shard; returns the length of its whole records in bytes."""
        try:
            with os.fdopen(open_plain(path), "rb") as file:
                found = os.fstat(file.fileno()).st_size
                data = mmap.mmap(file.fileno(), min(size, found), access=mmap.ACCESS_READ) if min(size, found) else None
        except OSError:
            found, data = 0, None
        with suppress(DiskError):  # a cache that can be read alone is still read
            fsio.touch(path)
        end = 0
        for key, start, count in _records(data) if data else ():
            assert data is not None
            entry = (path.name, data, start, count)
            if self._index.setdefault(key, entry) is not entry:
                self._others.setdefault(key, []).append(entry)
            end = start + WORD * count
        if end < size:
            # The rest of a record that a process was writing when it was killed, or is still writing.
            log.log(self.loss_level, "%s: %d of %d bytes are not whole records and are ignored", path, size - end, size)
        return end


def record(key: bytes, content: bytes) -> bytes:
    """Encode a record as the bytes of a shard."""
    count = len(content) // WORD
    return HEADER.pack(key, count, _checksum(key, content)) + content


def _checksum(key: bytes, content: bytes | memoryview) -> int:
    return zlib.crc32(content, zlib.crc32(key + struct.pack("<I", len(content) // WORD)))


def _records(data: mmap.mmap) -> Iterator[tuple[bytes, int, int]]:
    """Yield each record's key, byte offset and number of words, up to the first that isn't whole."""
    end = 0
    with memoryview(data) as view:
        while end + HEADER.size <= len(view):
            key, count, checksum = HEADER.unpack_from(view, end)
            start = end + HEADER.size
            end = start + WORD * count
            if end > len(view) or _checksum(key, view[start:end]) != checksum:
                return
            yield key, start, count


def size_limit(variable: str, default: int) -> int:
    """Read a size limit in bytes from an environment variable.

    Raises:
        RecipeError: it isn't a whole number.
    """
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise RecipeError(f"${variable}: expected a number of bytes, got {value!r}")
    return int(value)


def shrink(root: Path, limit: int, keep: Path | None = None) -> int:
    """Remove the least recently used shards until the rest take at most `limit` bytes; returns the bytes freed.

    Args:
        root: folder whose subfolders hold the shards.
        limit: bytes.
        keep: subfolder in use, which is left alone.
    """
    shards = []
    for path in root.glob("*/*.shard"):
        with suppress(FileNotFoundError):  # another run may be shrinking too
            status = path.lstat()
            shards.append((status.st_mtime, status.st_size, path))
    excess = sum(size for _, size, _ in shards) - limit
    freed = 0
    for _, size, path in sorted(shards):
        if freed >= excess:
            break
        if path.parent != keep:
            try:
                fsio.remove_tree(path)
            except DiskError as error:
                fsio.warn_unwritable("the cache stays larger than its limit", error)
                break
            freed += size
    return freed
