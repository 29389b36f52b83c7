"""Comma- and tab-separated values with a header, as RFC 4180 has them: quoted fields may hold newlines.

Not Python's csv module: its longest field is a setting of the whole process, it takes text after a closing quote for
part of the field, and a quote that is never closed swallows all rows after it. Here such a row is refused and the next
line is read.
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
from qpref.records import Finding, Row, Source

MAX_ROW_BYTES = 4 * 2**20
MAX_LINES_AGAIN = 100
_INSIDE = re.compile(rb'[^"]*(?:""[^"]*)*')
"""What stands within quotes: a quote there is written twice."""


class _BadRowError(ValueError):
    """Why lines are no row."""


def read_separated(separator: bytes, path: Path) -> Iterator[Row | Finding]:
    """One row for each record after the header; its place is the line where it begins."""
    with path.open("rb") as file:
        lines, header = _Lines(file), None
        for line, fields in _records(lines, separator):
            source = Source(path=str(path), line=line)
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
                yield Row(values=dict(zip(header, fields, strict=True)), source=source)


def _header(fields: list[str] | str) -> tuple[list[str], str | None]:
    if isinstance(fields, str):
        return [], fields
    if any("\r" in field for field in fields):
        return fields, "lines end in carriage returns alone; write them with newlines"
    name, count = Counter(fields).most_common(1)[0]
    if count > 1:
        return fields, f"the column {name[:40]!r} stands twice"
    return fields, "a column has no name" if "" in fields else None


def _records(lines: _Lines, separator: bytes) -> Iterator[tuple[int, list[str] | str]]:
    """The line where each record begins, and its fields, or why it is none. Blank lines are no records.

    After lines that are no record, reading goes on with the second of them. Within those, no record may be longer than
    `MAX_LINES_AGAIN` lines, or many broken ones after each other would each be read to the end.
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
                    raise _BadRowError("a quote is opened that is not closed")
                taken.append(line)
                if start <= again_until and len(taken) > MAX_LINES_AGAIN:
                    raise _BadRowError("a quote is opened that is not closed in the next lines")
                size += len(line)
            yield start, record.texts()
        except _BadRowError as error:
            again_until = max(again_until, lines.number)
            lines.give_back(taken[1:])
            yield start, str(error)


class _Lines:
    """The lines of a file with their numbers; some may be given back to be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._again: list[bytes] = []
        self.number = 0
        self.max_fields = MAX_ROW_BYTES

    def next(self) -> bytes:
        """The next line with its end; of one that is too long its beginning alone. Empty at the file's end."""
        line = self._again.pop() if self._again else self._read()
        self.number += bool(line)
        return line

    def give_back(self, lines: list[bytes]) -> None:
        self._again += reversed(lines)
        self.number -= len(lines)

    def _read(self) -> bytes:
        line = rest = self._file.readline(MAX_ROW_BYTES + 1)
        while len(line) > MAX_ROW_BYTES and rest and not rest.endswith(b"\n"):
            rest = self._file.readline(MAX_ROW_BYTES)
        return line if self.number else line.removeprefix(b"\xef\xbb\xbf")


class _Record:
    """One record, fed line by line."""

    def __init__(self, separator: bytes, max_fields: int) -> None:
        self._separator, self._max_fields = separator, max_fields
        self._fields: list[bytes] = []
        self._open: list[bytes] | None = None

    def feed(self, line: bytes, size: int) -> bool:
        """Whether the record ends with this line; `size` counts all its bytes so far.

        Raises:
            _BadRowError: the lines are no record.
        """
        if size > MAX_ROW_BYTES:
            quote = ", or a quote is opened that is not closed" if self._open is not None else ""
            raise _BadRowError(f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB{quote}")
        end = len(line.removesuffix(b"\n").removesuffix(b"\r"))
        if self._open is None and b'"' not in line:
            self._fields = line[:end].split(self._separator)
            return True
        place = self._field(line, 0, end) if self._open is None else self._quoted(line, 0)
        while self._open is None and place < end:
            if not line.startswith(self._separator, place):
                raise _BadRowError("text after a closing quote; a quote within quotes is written twice")
            if len(self._fields) == self._max_fields:
                raise _BadRowError(f"more fields than the {self._max_fields} of the header")
            place = self._field(line, place + 1, end)
        return self._open is None

    def _field(self, line: bytes, place: int, end: int) -> int:
        """The place after the field that begins here; a quoted one may stay open."""
        if line.startswith(b'"', place):
            self._open = []
            return self._quoted(line, place + 1)
        after = line.find(self._separator, place, end)
        after = end if after < 0 else after
        self._fields.append(line[place:after])
        return after

    def _quoted(self, line: bytes, place: int) -> int:
        inside = _INSIDE.match(line, place)
        assert inside is not None
        assert self._open is not None
        self._open.append(inside[0])
        if inside.end() < len(line):
            self._fields.append(b"".join(self._open).replace(b'""', b'"'))
            self._open = None
        return inside.end() + 1

    def texts(self) -> list[str]:
        try:
            return [field.decode() for field in self._fields]
        except UnicodeDecodeError:
            raise _BadRowError("the row is not UTF-8") from None


def _unreadable(message: str, source: Source) -> Finding:
    return Finding(code="unreadable", severity="error", message=message, source=source)


@hookimpl
def qpref_readers() -> Iterator[Reader]:
    yield Reader(name="csv", summary="comma-separated values with a header", read=partial(read_separated, b","))
    yield Reader(name="tsv", summary="tab-separated values with a header", read=partial(read_separated, b"\t"))
