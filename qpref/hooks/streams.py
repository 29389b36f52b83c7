"""Open a data file for reading as UTF-8 text, whatever it is packed and encoded in.

gzip data and UTF-16 or UTF-32 text are recognized by their first bytes, not by the file's name, and read. Other files
that aren't text are refused in one sentence, see `signatures`. A gzip bomb is refused before it exhausts memory.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qpref.errors import DataError
from qpref.hooks.signatures import HEAD_BYTES, signature_of
from qpref.records import Finding, Source

MAX_RATIO = 200
FREE_BYTES = 2**20
"""Decompressed bytes that are allowed at any ratio, so that tiny files of repeated rows are read."""
BUFFER_BYTES = 256 * 2**10
MAX_LINE_BYTES = 4 * 2**20
_HIGH = re.compile(rb"[\x80-\xff]+")
_GZIP = b"\x1f\x8b"
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ZEROS = {"x0x0": "utf-16-le", "0x0x": "utf-16-be", "x000": "utf-32-le", "000x": "utf-32-be"}
"""Zeros among a text's first four bytes, where its first characters are ASCII: RFC 4627, section 3."""


class BrokenStreamError(Exception):
    """A truncated, damaged or refused file; the reader adds path and line."""


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file as a stream of UTF-8 text; a byte order mark of UTF-8 is left in it.

    Reading raises BrokenStreamError where packed data are truncated, damaged or a bomb.

    Raises:
        DataError: the file is neither text nor gzipped text.
    """
    with ExitStack() as stack:
        stream: io.BufferedReader = io.BufferedReader(stack.enter_context(io.FileIO(path)), BUFFER_BYTES)
        try:
            if stream.peek(2).startswith(_GZIP):
                unpacked = stack.enter_context(gzip.GzipFile(fileobj=stream))
                stream = io.BufferedReader(_Guarded(stream, unpacked), BUFFER_BYTES)
            head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
        except BrokenStreamError as error:
            raise DataError(f"{path}:1: {error}") from None
        encoding = encoding_of(head)
        if encoding is None and (signature := signature_of(head)):
            raise DataError(f"{path}: {signature}")
        if encoding is not None:
            stream = io.BufferedReader(_Transcoded(stream, encoding), BUFFER_BYTES)
        yield stream


def numbered_lines(path: Path) -> Iterator[tuple[str, Source] | Finding]:
    """Yield each line of a text file without its end, with its source; a finding for one that isn't UTF-8.

    Blank lines are left out.

    Raises:
        DataError: the file isn't text, is truncated or damaged, or has a line of more than `MAX_LINE_BYTES`.
    """
    with opened(path) as file:
        number = 0
        try:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                source = Source(path=str(path), line=number)
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{source}: the line is longer than {MAX_LINE_BYTES >> 20} MiB")
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                try:
                    text = line.decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    message = not_utf8(line, error)
                    yield Finding(code="unreadable", severity="error", message=message, source=source)
                    continue
                if text:
                    yield text, source
        except BrokenStreamError as error:
            raise DataError(f"{path}:{number + 1}: {error}") from None


def encoding_of(head: bytes) -> str | None:
    """Return the UTF-16 or UTF-32 of a text's first bytes, by its byte order mark or its zeros; else None."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    is_ascii = all(byte in b"\0\t\n\r" or 0x20 <= byte < 0x7F for byte in head[:4])
    return _ZEROS.get("".join("x" if byte else "0" for byte in head[:4])) if is_ascii else None


def not_utf8(line: bytes, error: UnicodeDecodeError, part: str = "line") -> str:
    """Explain a part of a file that isn't UTF-8, with the character in Windows-1252 if it can be that."""
    message = f"not UTF-8 (byte {error.start + 1} of the {part})"
    runs = _HIGH.findall(line)
    characters = (_HIGH.match(line, error.start) or [b""])[0].decode("cp1252", "ignore")
    # Windows-1252 has its few letters alone or in twos; other encodings have runs of them.
    is_likely = max(map(len, runs), default=0) <= 2 and characters.isprintable() and characters
    is_cut = part == "line" and line.rstrip(b"\r\n").endswith(runs[-1])  # JSON would end in a bracket
    if not is_likely or is_cut:
        return f"{message}; convert the file: iconv -f ITS-ENCODING -t UTF-8"
    return f"{message}; in Windows-1252 it is '{characters}': iconv -f WINDOWS-1252 -t UTF-8 converts the file"


class _Guarded(io.RawIOBase):
    """Decompressed bytes with a limit on the compression ratio."""

    def __init__(self, packed: io.BufferedReader, unpacked: gzip.GzipFile) -> None:
        self._packed, self._unpacked = packed, unpacked

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            count = self._unpacked.readinto1(buffer)  # returns the bytes before the damage
        except EOFError:
            raise BrokenStreamError("the gzip data end too early; the file is truncated") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise BrokenStreamError(f"damaged gzip data: {error}") from None
        if self._unpacked.tell() > FREE_BYTES + MAX_RATIO * self._packed.tell():
            raise BrokenStreamError(
                f"the gzip data decompress to more than {MAX_RATIO} times their size; decompress the file first if "
                "you trust it"
            )
        return count


class _Transcoded(io.RawIOBase):
    """UTF-16 or UTF-32 as UTF-8; a lone surrogate stays one, so that its line alone is refused as not UTF-8."""

    def __init__(self, file: io.BufferedReader, encoding: str) -> None:
        self._file, self._name = file, encoding[:6].upper()
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._left:
            raw = self._file.read(BUFFER_BYTES)
            try:
                self._left = self._decoder.decode(raw, final=not raw).encode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                truncated = "; the file is truncated" if not raw else ""
                raise BrokenStreamError(f"damaged {self._name} text: {error.reason}{truncated}") from None
            if not raw:
                break
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count
