"""Stream a JSON array element by element; a few rows are in memory, whatever the file's size."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import IO

from qpref.errors import DataError
from qpref.records import Finding, Row, Source
from qpref_plugins.read_jsonl.lines import row_of, unreadable
from qpref_plugins.read_jsonl.parse import MAX_ROW_BYTES, BadJsonError, JsonParser, reason_of
from qpref_plugins.read_jsonl.stream import BrokenStreamError

_SPACE = re.compile(r"[ \t\r\n]*")
_UNTERMINATED = "Unterminated string"
_MARGIN = 16
"""Maximum characters of a token that the window's end may cut."""


def rows_of_array(file: IO[bytes], path: str) -> Iterator[Row | Finding]:
    """Yield each element as a row; its number, from 1, is its line.

    Raises:
        DataError: the file is not an array, or reading cannot continue after an element.
    """
    window, parser, number = _Window(file, path), JsonParser(), 0
    if window.next_character() != "[":
        raise window.error(_not_an_array(window, path))
    window.at += 1
    if window.next_character() == "]":
        window.at += 1
    else:
        separator = ","
        while separator == ",":
            number += 1
            yield window.element(parser, Source(path=path, line=number))
            separator = window.next_character()
            if separator not in (",", "]"):
                raise window.error("not JSON: Expecting ',' delimiter" if separator else "the array has no end")
            window.at += 1
    if window.next_character():
        raise window.error("not JSON: more after the array's end")


def _not_an_array(window: _Window, path: str) -> str:
    """Explain a file that doesn't start with `[`."""
    first = window.next_character()
    if not first:
        return "the file is empty; expected an array of objects"
    lines = "jsonl.gz" if path.endswith(".gz") else "jsonl"
    hint = f'; for one object per line, set [data] reader = "{lines}"' if first == "{" else ""
    return f"expected an array of objects, found {first!r}{hint}"


class _Window:
    """The decoded part of the file that is in memory: at least one row of maximum size ahead of `at`."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        self._file, self._path = file, path
        self._undecoded, self._num_read, self._num_lines = b"", 0, 0  # num_read counts decoded bytes
        self._ended = False
        self.text, self.at = "", 0

    def next_character(self) -> str:
        """Move `at` to the next character that isn't white space and return it; empty at the end of the file."""
        while True:
            self._fill()
            space = _SPACE.match(self.text, self.at)
            assert space is not None
            self.at = space.end()
            if self.at < len(self.text) or self._ended:
                return self.text[self.at : self.at + 1]

    def element(self, parser: JsonParser, source: Source) -> Row | Finding:
        """Parse the value at the next character as a row and move `at` past it."""
        self.next_character()
        try:
            value, end = parser.parse_at(self.text, self.at)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith(_UNTERMINATED) or error.pos >= len(self.text) - _MARGIN
            if cut and not self._ended:
                raise self.error(f"row {source.line} is longer than {MAX_ROW_BYTES // 2**20} MiB") from None
            self.at = error.pos
            raise self.error(f"not JSON: {reason_of(error)}") from None
        except RecursionError:
            raise self.error(f"row {source.line} is nested too deeply") from None
        length, self.at = end - self.at, end
        if length > MAX_ROW_BYTES:
            return unreadable(f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB", source)
        return unreadable(str(value), source) if isinstance(value, BadJsonError) else row_of(value, source)

    def error(self, message: str) -> DataError:
        """Build the error that ends the reading, with the line and column of `at`."""
        line = self._num_lines + self.text.count("\n", 0, self.at) + 1
        column = self.at - self.text.rfind("\n", 0, self.at)
        return DataError(f"{self._path}:{line}: {message} (column {column})")

    def _fill(self) -> None:
        if self._ended or len(self.text) - self.at > MAX_ROW_BYTES:
            return
        self._num_lines += self.text.count("\n", 0, self.at)
        pieces = [self.text[self.at :]]
        self.at, missing = 0, 2 * MAX_ROW_BYTES - len(pieces[0])
        while missing > 0 and not self._ended:
            pieces.append(self._read(missing))
            missing -= len(pieces[-1])
        self.text = "".join(pieces)

    def _read(self, count: int) -> str:
        try:
            raw = self._file.read(count)
        except BrokenStreamError as error:
            raise DataError(f"{self._path}: {error} (after {self._num_read} bytes)") from None
        self._ended = not raw
        if not self._num_read and raw.startswith(BOM_UTF8):
            raw, self._num_read = raw.removeprefix(BOM_UTF8), len(BOM_UTF8)
        raw, self._undecoded = self._undecoded + raw, b""
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            if self._ended or error.start < len(raw) - 3:
                byte = self._num_read + error.start + 1
                raise DataError(f"{self._path}: not UTF-8 (byte {byte})") from None
            text, self._undecoded = raw[: error.start].decode(), raw[error.start :]
        self._num_read += len(raw) - len(self._undecoded)
        return text
