"""Stream a JSON array, or objects over several lines; a few rows are in memory, whatever the file's size."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import IO

from qpref.errors import DataError
from qpref.hooks.streams import BrokenStreamError
from qpref.records import Finding, Row, Source
from qpref_plugins.read_jsonl.causes import INCOMPLETE, cause_of
from qpref_plugins.read_jsonl.lines import CUT_OFF, row_of, unreadable
from qpref_plugins.read_jsonl.parse import MAX_ROW_BYTES, BadJsonError, JsonParser, reason_of

_SPACE = re.compile(r"[ \t\r\n]*")
_UNTERMINATED = "Unterminated string"
_MARGIN = 16
"""Maximum characters of a token that the window's end may cut."""
_NO_END = "the array has no end: the file is cut off, or lacks its closing bracket"


def rows_of_array(file: IO[bytes], path: str) -> Iterator[Row | Finding]:
    """Yield each element as a row; its number, from 1, is its line.

    Raises:
        DataError: the file is not an array, or reading cannot continue after an element.
    """
    window, parser, number = _Window(file, path), JsonParser(), 0
    if window.next_character() != "[":
        raise window.error(_not_an_array(window))
    window.at += 1
    if window.next_character() == "]":
        window.at += 1
    else:
        separator = ","
        while separator == ",":
            if not window.next_character():
                raise window.error(_NO_END)
            number += 1
            yield window.element(parser, Source(path=path, line=number))
            separator = window.next_character()
            if separator not in (",", "]"):
                raise window.error(f"not JSON: {_missing_comma(separator)}" if separator else _NO_END)
            window.at += 1
    if window.next_character():
        raise window.error("not JSON: more after the array's end")


def rows_of_objects(file: IO[bytes], path: str) -> Iterator[Row | Finding]:
    """Yield each object as a row, with the line on which it starts; commas between them are ignored.

    Raises:
        DataError: an object isn't JSON, or the file is truncated or damaged.
    """
    window, parser, last = _Window(file, path), JsonParser(), 0
    while window.next_character():
        if window.line == last:
            raise window.error("several objects on one line; write each on a line of its own: jq -c . FILE")
        last = window.line
        yield window.element(parser, Source(path=path, line=last))
        if window.next_character() == ",":
            window.at += 1


def _missing_comma(found: str) -> str:
    return "a comma is missing between two rows" if found == "{" else "Expecting ',' delimiter"


def _not_an_array(window: _Window) -> str:
    """Explain a file that doesn't start with `[`."""
    first = window.next_character()
    return (
        f"expected an array of objects, found {first!r}" if first else "the file is empty; expected an array of objects"
    )


class _Window:
    """The decoded part of the file that is in memory: at least one row of maximum size ahead of `at`."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        self._file, self._path = file, path
        self._undecoded, self._num_read = b"", 0  # num_read counts decoded bytes
        self._line, self._counted = 1, 0  # the line of text[_counted]
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

    @property
    def line(self) -> int:
        """Line of the file that `at` is on, from 1."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def element(self, parser: JsonParser, source: Source) -> Row | Finding:
        """Parse the value at the next character as a row and move `at` past it."""
        self.next_character()
        try:
            value, end = parser.parse_at(self.text, self.at)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith(_UNTERMINATED) or error.pos >= len(self.text) - _MARGIN
            if cut and not self._ended:
                raise self.error(f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB") from None
            cause = cause_of(self.text, error)
            self.at = error.pos
            raise self.error(f"not JSON: {CUT_OFF if cause == INCOMPLETE else cause or reason_of(error)}") from None
        except RecursionError:
            raise self.error("the row is nested too deeply") from None
        length, self.at = end - self.at, end
        if length > MAX_ROW_BYTES:
            return unreadable(f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB", source)
        return unreadable(str(value), source) if isinstance(value, BadJsonError) else row_of(value, source)

    def error(self, message: str) -> DataError:
        """Build the error that ends the reading, with the line and column of `at`."""
        column = self.at - self.text.rfind("\n", 0, self.at)
        return DataError(f"{self._path}:{self.line}: {message} (column {column})")

    def _fill(self) -> None:
        if self._ended or len(self.text) - self.at > MAX_ROW_BYTES:
            return
        line, pieces = self.line, [self.text[self.at :]]
        self._line, self.at, self._counted, missing = line, 0, 0, 2 * MAX_ROW_BYTES - len(pieces[0])
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
