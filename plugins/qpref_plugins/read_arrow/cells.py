"""Convert Arrow tables to rows of JSON values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow
from pyarrow import types

from qpref.records import Finding, Row, Source

MAX_ROW_BYTES = 4 * 2**20
BATCH_ROWS = 128
MAX_BATCH_BYTES = 16 * 2**20
"""Larger tables are converted row by row."""


def rows_of_table(table: Any, path: str, first: int) -> Iterator[Row | Finding]:
    """Yield the rows of a pyarrow table or record batch; the first one has the number `first`."""
    # A dictionary column stores a long value once, but every row that refers to it gets a copy.
    one_by_one = table.nbytes > MAX_BATCH_BYTES or "dictionary<" in str(table.schema.types)
    pieces = (table.slice(index, 1) for index in range(table.num_rows)) if one_by_one else (table,)
    number = first
    for piece in pieces:
        for values in piece.to_pylist():
            yield _row(values, table.schema, Source(path=path, line=number), measured=one_by_one)
            number += 1


def _row(values: dict[str, Any], schema: Any, source: Source, measured: bool) -> Row | Finding:
    if measured and _size(values) > MAX_ROW_BYTES:
        return _unreadable(f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB", source)
    try:
        return Row(
            values={name: _plain(value, schema.field(name).type) for name, value in values.items()}, source=source
        )
    except (ValueError, RecursionError) as error:
        return _unreadable(f"invalid JSON in a column of the type JSON: {error}", source)


def _plain(value: Any, kind: Any) -> Any:
    """Convert a value to JSON values: parse the Arrow type JSON and drop null fields of structs.

    Arrow gives every struct of a column the fields of all, null where they aren't its own.
    """
    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if types.is_struct(kind):
        fields = {name: _plain(inner, kind.field(name).type) for name, inner in value.items()}
        return {name: inner for name, inner in fields.items() if inner is not None}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_plain(inner, kind.value_type) for inner in value]
    return value


def _size(value: Any) -> int:
    """Estimate the bytes of a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8


def _unreadable(message: str, source: Source) -> Finding:
    return Finding(code="unreadable", severity="error", message=message, source=source)
