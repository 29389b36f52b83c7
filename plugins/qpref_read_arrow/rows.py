"""Arrow tables -> rows, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qpref.records import Finding, Row, Source

MAX_ROW_BYTES = 4 * 2**20
BATCH_ROWS = 128
MAX_BATCH_BYTES = 16 * 2**20
"""Tables above this are taken apart row by row: one value may stand in many rows, and stands once in Arrow."""


def rows_of_table(table: Any, path: str, first: int) -> Iterator[Row | Finding]:
    """The rows of a pyarrow table or batch; the first of them is row number `first`."""
    if table.nbytes > MAX_BATCH_BYTES and table.num_rows > 1:
        for place in range(table.num_rows):
            yield from rows_of_table(table.slice(place, 1), path, first + place)
        return
    if table.num_rows == 1 and table.nbytes > MAX_ROW_BYTES:
        message = f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB"
        yield unreadable(message, Source(path=path, line=first))
        return
    for number, values in enumerate(table.to_pylist(), start=first):
        yield Row(values={name: _plain(value) for name, value in values.items()}, source=Source(path=path, line=number))


def _plain(value: Any) -> Any:
    """The value without the null fields of structs: Arrow gives every struct of a column the fields of all."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def unreadable(message: str, source: Source) -> Finding:
    return Finding(code="unreadable", severity="error", message=message, source=source)
