"""Readers of comma- and tab-separated values with a header (RFC 4180: quoted fields may contain newlines).

A header without the reader's separator is split at the one that it has: spreadsheets write semicolons in countries with
a decimal comma, and call the file .csv.

Python's csv module isn't used: its maximum field length is global to the process, it accepts text after a closing quote
as part of the field, and an unclosed quote swallows all rows after it. Here such a row is refused and reading continues
on the next line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

from qpref.errors import DataError
from qpref.hooks import Reader, hookimpl
from qpref.hooks.streams import BrokenStreamError, not_utf8, opened
from qpref.records import Finding, Row, Source
from qpref_plugins.read_csv.separator import NAMES, separator_of

MAX_ROW_BYTES = 4 * 2**20
MAX_LINES_AGAIN = 100
INDEX = "Unnamed: 0"
"""pandas' name of a first column without a name: its `to_csv` writes the rows' numbers there."""
"""Maximum lines of a record within lines that are read a second time."""
_JSON = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*)?\{\s*"[^"]*"\s*:')
_INSIDE = re.compile(rb'[^"]*(?:""[^"]*)*')
"""The inside of a quoted field, in which a quote is doubled."""


class _BadRowError(ValueError):
    """Lines that are not a valid record."""


def read_separated(separator: bytes, path: Path) -> Iterator[Row | Finding]:
    """Yield a row for each record after the header; its line is the one on which it starts."""
    with opened(path) as file:
        _refuse_json(file.peek(), path)
        found = separator_of(file.peek(), separator)
        lines = _Lines(file, found.num_lines)
        if found.separator != separator and not found.num_lines:
            message = f"the header has {NAMES[found.separator]} between its columns; rows are split there"
            yield Finding(code="separator", severity="warning", message=message, source=Source(path=str(path), line=0))
        try:
            yield from _rows(lines, found.separator, str(path))
        except BrokenStreamError as error:
            raise DataError(f"{path}:{lines.number + 1}: {error}") from None


def _refuse_json(head: bytes, path: Path) -> None:
    if _JSON.match(head):
        raise DataError(f'{path}: JSON, not a table; name it .jsonl, or set [data] reader = "jsonl"')


def _rows(lines: _Lines, separator: bytes, path: str) -> Iterator[Row | Finding]:
    """Yield the rows; an empty field is null, as tables have no other way to write it."""
    header = None
    for line, fields in _records(lines, separator):
        source = Source(path=path, line=line)
        if header is None:
            header, problem = _header(fields)
            lines.max_fields = len(header)
            if problem:
                raise DataError(f"{source}: the header: {problem}")
        elif isinstance(fields, str):
            yield _unreadable(fields, source)
        elif len(fields) != len(header):
            yield _unreadable(f"{len(fields)} fields, where the header has {len(header)}", source)
        else:
            yield Row(values=dict(zip(header, (field or None for field in fields), strict=True)), source=source)


def _header(fields: list[str] | str) -> tuple[list[str], str | None]:
    """Check the header; returns the column names and the problem, if there is one."""
    if isinstance(fields, str):
        return [], fields
    if any("\r" in field for field in fields):
        return fields, "lines end in carriage returns only; convert them to newlines"
    name, count = Counter(fields).most_common(1)[0]
    if count > 1:
        return fields, f"duplicate column {name[:40]!r}"
    if "" in fields[1:]:
        return fields, "a column has no name"
    return [INDEX, *fields[1:]] if fields[0] == "" else fields, None


def _records(lines: _Lines, separator: bytes) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the first line of each record with its fields, or with the reason that it is invalid; skip blank lines.

    After an invalid record, reading continues on its second line. Within its lines no record may be longer than
    `MAX_LINES_AGAIN` lines, or each of many invalid records would be read to the end of the file.
    """
    again_until = 0
    while line := lines.next():
        start = lines.number
        if not line.strip(b"\r\n"):
            continue
        taken, size = [line], len(line)
        try:
            record = _Record(separator, lines.max_fields)
            while not record.feed(line, size):
                line = lines.next()
                if not line:
                    raise _BadRowError("an unclosed quote")
                taken.append(line)
                if start <= again_until and len(taken) > MAX_LINES_AGAIN:
                    raise _BadRowError(f"a quote that isn't closed within {MAX_LINES_AGAIN} lines")
                size += len(line)
            yield start, record.texts()
        except _BadRowError as error:
            again_until = max(again_until, lines.number)
            lines.put_back(taken[1:])
            yield start, str(error)


class _Lines:
    """Numbered lines of a file; lines can be put back to be read a second time."""

    def __init__(self, file: IO[bytes], num_skipped: int) -> None:
        self._file = file
        self._again: list[bytes] = []
        self.number = 0
        for _ in range(num_skipped):
            self.next()
        self.max_fields = MAX_ROW_BYTES

    def next(self) -> bytes:
        """Return the next line with its line end, cut if it is too long; empty at the end of the file."""
        line = self._again.pop() if self._again else self._read()
        self.number += bool(line)
        return line

    def put_back(self, lines: list[bytes]) -> None:
        self._again += reversed(lines)
        self.number -= len(lines)

    def _read(self) -> bytes:
        line = rest = self._file.readline(MAX_ROW_BYTES + 1)
        while len(line) > MAX_ROW_BYTES and rest and not rest.endswith(b"\n"):
            rest = self._file.readline(MAX_ROW_BYTES)
        return line if self.number else line.removeprefix(b"\xef\xbb\xbf")


class _Record:
    """A record that is parsed line by line."""

    def __init__(self, separator: bytes, max_fields: int) -> None:
        self._separator, self._max_fields = separator, max_fields
        self._fields: list[bytes] = []
        self._open: list[bytes] | None = None

    def feed(self, line: bytes, size: int) -> bool:
        """Parse one more line; returns True if the record ends with it.

        Args:
            size: bytes of the record so far, this line included.

        Raises:
            _BadRowError: the lines are not a valid record.
        """
        if size > MAX_ROW_BYTES:
            quote = ", or has an unclosed quote" if self._open is not None else ""
            raise _BadRowError(f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB{quote}")
        end = len(line.removesuffix(b"\n").removesuffix(b"\r"))
        if self._open is None and b'"' not in line:
            self._fields = line[:end].split(self._separator)
            return True
        offset = self._field(line, 0, end) if self._open is None else self._quoted(line, 0)
        while self._open is None and offset < end:
            if not line.startswith(self._separator, offset):
                raise _BadRowError("text after a closing quote; a quote inside a quoted field has to be doubled")
            if len(self._fields) == self._max_fields:
                raise _BadRowError(f"more fields than the {self._max_fields} of the header")
            offset = self._field(line, offset + 1, end)
        return self._open is None

    def _field(self, line: bytes, start: int, end: int) -> int:
        """Parse the field at `start`; returns the offset after it. A quoted field may stay open."""
        if line.startswith(b'"', start):
            self._open = []
            return self._quoted(line, start + 1)
        after = line.find(self._separator, start, end)
        after = end if after < 0 else after
        self._fields.append(line[start:after])
        return after

    def _quoted(self, line: bytes, start: int) -> int:
        """Parse the inside of a quoted field from `start`; returns the offset after the closing quote."""
        inside = _INSIDE.match(line, start)
        assert inside is not None
        assert self._open is not None
        self._open.append(inside[0])
        if inside.end() < len(line):
            self._fields.append(b"".join(self._open).replace(b'""', b'"'))
            self._open = None
        return inside.end() + 1

    def texts(self) -> list[str]:
        """Decode the fields."""
        texts = []
        for field in self._fields:
            try:
                texts.append(field.decode())
            except UnicodeDecodeError as error:
                raise _BadRowError(f"the row is {not_utf8(field, error, 'field')}") from None
        return texts


def _unreadable(message: str, source: Source) -> Finding:
    return Finding(code="unreadable", severity="error", message=message, source=source)


@hookimpl
def qpref_readers() -> Iterator[Reader]:
    for suffix, packed in (("", ""), (".gz", ", gzipped")):
        comma, tab = (partial(read_separated, separator) for separator in (b",", b"\t"))
        yield Reader(name=f"csv{suffix}", summary=f"comma-separated values with a header{packed}", read=comma)
        yield Reader(name=f"tsv{suffix}", summary=f"tab-separated values with a header{packed}", read=tab)
