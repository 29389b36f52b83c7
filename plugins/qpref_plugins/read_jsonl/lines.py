"""Stream JSON Lines: one object per line, one line in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from qpref.errors import DataError
from qpref.records import Finding, Row, Source
from qpref_plugins.read_jsonl.parse import MAX_ROW_BYTES, BadJsonError, JsonParser
from qpref_plugins.read_jsonl.stream import BrokenStreamError


def rows_of_lines(file: IO[bytes], path: str) -> Iterator[Row | Finding]:
    """Yield a row for each line that isn't blank.

    Raises:
        DataError: the file is truncated or damaged.
    """
    parser, number = JsonParser(), 0
    try:
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if line.isspace():
                continue
            source = Source(path=path, line=number)
            if len(line) > MAX_ROW_BYTES:
                _skip_line(file, line)
                yield unreadable(f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB", source)
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield row_of(parser.parse(text), source)
            except UnicodeDecodeError as error:
                yield unreadable(f"not UTF-8 (byte {error.start + 1} of the line)", source)
            except BadJsonError as error:
                array = "json.gz" if path.endswith(".gz") else "json"
                hint = f'; for a file with one array, set [data] reader = "{array}"' if line[:1] == b"[" else ""
                yield unreadable(f"{error}{hint}", source)
    except BrokenStreamError as error:
        raise DataError(f"{path}:{number + 1}: {error}") from None


def _skip_line(file: IO[bytes], line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_ROW_BYTES)


def row_of(value: object, source: Source) -> Row | Finding:
    if not isinstance(value, dict):
        return unreadable(f"expected a JSON object, found {kind_of(value)}", source)
    return Row(values=value, source=source)


def kind_of(value: object) -> str:
    names = {list: "an array", str: "a text", bool: "true or false", type(None): "null", dict: "an object"}
    return names.get(type(value), "a number")


def unreadable(message: str, source: Source) -> Finding:
    return Finding(code="unreadable", severity="error", message=message, source=source)
