"""Stream JSON Lines: one object per line, one line in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from qpref.errors import DataError
from qpref.hooks.streams import BrokenStreamError, not_utf8
from qpref.records import Finding, Row, Source
from qpref_plugins.read_jsonl.causes import INCOMPLETE
from qpref_plugins.read_jsonl.parse import MAX_ROW_BYTES, BadJsonError, JsonParser

COMMAS = "a comma follows each object, as in an array without its brackets; read as JSON Lines"
TWICE = "the object was encoded twice; write it with one json.dumps"
CUT_OFF = "the file ends within this row: it is cut off; write or download it again, or remove the line"


def rows_of_lines(file: IO[bytes], path: str) -> Iterator[Row | Finding]:
    """Yield a row for each line that isn't blank; a comma after an object is ignored, and reported once.

    Raises:
        DataError: the file is truncated or damaged.
    """
    parser, number, has_commas = JsonParser(), 0, False
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
            if not has_commas and line.rstrip().endswith(b"},"):
                has_commas = True
                yield Finding(code="commas", severity="warning", message=COMMAS, source=Source(path=path, line=0))
            if (row := _row(parser, line, source)) is not None:
                yield row
    except BrokenStreamError as error:
        raise DataError(f"{path}:{number + 1}: {error}") from None


def _row(parser: JsonParser, line: bytes, source: Source) -> Row | Finding | None:
    """Parse a line; None where nothing but a byte order mark is on it."""
    try:
        text = line.decode("utf-8-sig" if source.line == 1 else "utf-8").strip()
        if text.endswith("},"):
            text = text[:-1]
        return row_of(parser.parse(text), source) if text else None
    except UnicodeDecodeError as error:
        return unreadable(not_utf8(line, error), source)
    except BadJsonError as error:
        is_cut_off = error.cause == INCOMPLETE and not line.endswith(b"\n")
        return unreadable(f"not JSON: {CUT_OFF}" if is_cut_off else str(error), source)


def _skip_line(file: IO[bytes], line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_ROW_BYTES)


def row_of(value: object, source: Source) -> Row | Finding:
    if isinstance(value, str) and value.lstrip()[:1] == "{":
        return unreadable(f"expected a JSON object, found a text: {TWICE}", source)
    if not isinstance(value, dict):
        return unreadable(f"expected a JSON object, found {kind_of(value)}", source)
    return Row(values=value, source=source)


def kind_of(value: object) -> str:
    names = {list: "an array", str: "a text", bool: "true or false", type(None): "null", dict: "an object"}
    return names.get(type(value), "a number")


def unreadable(message: str, source: Source) -> Finding:
    return Finding(code="unreadable", severity="error", message=message, source=source)
