"""Byte streams of plain and gzipped files; a gzip bomb is refused before it exhausts memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

MAX_RATIO = 200
FREE_BYTES = 2**20
"""Decompressed bytes that are allowed at any ratio, so that tiny files of repeated rows are read."""
BUFFER_BYTES = 256 * 2**10


class BrokenStreamError(Exception):
    """A truncated, damaged or refused file."""


@contextmanager
def plain(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain file."""
    with path.open("rb") as file:
        yield file


@contextmanager
def gunzipped(path: Path) -> Iterator[IO[bytes]]:
    """Open a gzip file; reading raises BrokenStreamError where it is truncated, damaged or a bomb."""
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as unpacked:
        yield io.BufferedReader(_Guarded(packed, unpacked), BUFFER_BYTES)


class _Guarded(io.RawIOBase):
    """Decompressed bytes with a limit on the compression ratio."""

    def __init__(self, packed: IO[bytes], unpacked: gzip.GzipFile) -> None:
        self._packed, self._unpacked = packed, unpacked

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            count = self._unpacked.readinto1(buffer)  # returns the bytes before the damage
        except EOFError:
            raise BrokenStreamError("the gzip data end too early; the file is truncated") from None
        except gzip.BadGzipFile as error:
            raise BrokenStreamError(f"damaged gzip data: {error}") from None
        except zlib.error as error:
            raise BrokenStreamError(f"damaged gzip data: {error}") from None
        if self._unpacked.tell() > FREE_BYTES + MAX_RATIO * self._packed.tell():
            raise BrokenStreamError(
                f"the gzip data decompress to more than {MAX_RATIO} times their size; decompress the file first if "
                "you trust it"
            )
        return count
