"""Convert Arrow tables to rows of JSON values: those that the same rows have as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow

from qpref.errors import DataError
from qpref.records import Finding, Row, Source
from qpref_plugins.read_arrow.json_values import BadCellError, Convert, conversion, temporal_as_text

MAX_ROW_BYTES = 4 * 2**20
BATCH_ROWS = 128
MAX_BATCH_BYTES = 16 * 2**20
"""Larger tables are converted row by row."""
_NOT_CONVERTIBLE = (ValueError, OverflowError, pyarrow.ArrowException)


def rows_of_table(table: Any, path: str, first: int) -> Iterator[Row | Finding]:
    """Yield the rows of a pyarrow table or record batch; the first one has the number `first`.

    Raises:
        DataError: a column's name occurs twice.
    """
    name, count = Counter(table.schema.names).most_common(1)[0] if table.schema.names else ("", 0)
    if count > 1:
        raise DataError(f"{path}: duplicate column {name[:40]!r}")
    # A dictionary column stores a long value once, but every row that refers to it gets a copy.
    one_by_one = table.nbytes > MAX_BATCH_BYTES or "dictionary<" in str(table.schema.types)
    pieces = (table.slice(index, 1) for index in range(table.num_rows)) if one_by_one else (table,)
    convert = {field.name: convert for field in table.schema if (convert := conversion(field.type)) is not None}
    is_measured = one_by_one or table.nbytes > MAX_ROW_BYTES
    number = first
    for piece in pieces:
        for values in _values(piece):
            yield _row(values, convert, Source(path=path, line=number), is_measured)
            number += 1


def _values(piece: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the values of each row, or the reason that they cannot be converted."""
    try:
        rows = piece.to_pylist()
    except _NOT_CONVERTIBLE:
        rows = [_values_of_one(piece.slice(index, 1)) for index in range(piece.num_rows)]
    yield from rows


def _values_of_one(row: Any) -> dict[str, Any] | str:
    """Convert a table of one row; dates that Python cannot express become Arrow's texts of them."""
    try:
        return _first(row)
    except UnicodeDecodeError as error:
        return f"a text is not UTF-8 (byte {error.start + 1})"
    except _NOT_CONVERTIBLE:
        pass
    try:
        return _first(temporal_as_text(row))
    except _NOT_CONVERTIBLE as error:
        return f"a value cannot be converted: {str(error).splitlines()[0]}"


def _first(table: Any) -> dict[str, Any]:
    values: dict[str, Any] = table.to_pylist()[0]
    return values


def _row(values: dict[str, Any] | str, convert: dict[str, Convert], source: Source, is_measured: bool) -> Row | Finding:
    if isinstance(values, str):
        return _unreadable(values, source)
    if is_measured and _size(values) > MAX_ROW_BYTES:
        return _unreadable(f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB", source)
    try:
        for name, to_json in convert.items():
            values[name] = to_json(values[name])
    except BadCellError as error:
        return _unreadable(f"column {name}: {error}", source)
    return Row(values=values, source=source)


def _size(value: Any) -> int:
    """Estimate the bytes of a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8


def _unreadable(message: str, source: Source) -> Finding:
    return Finding(code="unreadable", severity="error", message=message, source=source)
