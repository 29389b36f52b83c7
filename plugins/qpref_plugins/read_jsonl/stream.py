"""The bytes of a file, plain or gzipped; a gzip bomb is refused before it has filled the memory."""

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
"""Bytes that may come out of a gzip file whatever its ratio, so that tiny files of repeated rows are read."""
BUFFER_BYTES = 256 * 2**10


class BrokenStreamError(Exception):
    """The bytes end before the file's end."""


@contextmanager
def plain(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        yield file


@contextmanager
def gunzipped(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes; reading raises BrokenStreamError where the data are damaged, cut or a bomb."""
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as unpacked:
        yield io.BufferedReader(_Guarded(packed, unpacked), BUFFER_BYTES)


class _Guarded(io.RawIOBase):
    def __init__(self, packed: IO[bytes], unpacked: gzip.GzipFile) -> None:
        self._packed, self._unpacked = packed, unpacked

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            count = self._unpacked.readinto1(buffer)  # what comes before the damage is not lost with it
        except EOFError:
            raise BrokenStreamError("the gzip data end too early; the file was cut off") from None
        except gzip.BadGzipFile as error:
            raise BrokenStreamError(f"damaged gzip data: {error}") from None
        except zlib.error as error:
            raise BrokenStreamError(f"damaged gzip data: {error}") from None
        if self._unpacked.tell() > FREE_BYTES + MAX_RATIO * self._packed.tell():
            raise BrokenStreamError(
                f"the gzip data grow to more than {MAX_RATIO} times their size; decompress the file first if you "
                "trust it"
            )
        return count
