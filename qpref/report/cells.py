"""Convert any JSON value to the cells of a page: texts, named fields and tables, within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qpref.credentials import redact
from qpref.report.read import is_number, number
from qpref.report.text import bounded, number_text

MAX_ROWS, MAX_COLUMNS, MAX_LEVELS = 100, 40, 5
MAX_LABEL = 200
"""Characters of a name."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Names with their values, each a text, Fields or a Table."""

    pairs: list[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells, each a text, Fields or a Table; `left_out` counts the rows that are not shown."""

    header: list[str]
    rows: list[list[Any]]
    left_out: int = 0


def cell(value: Any, levels: int = MAX_LEVELS) -> str | Fields | Table:
    """Convert a JSON value: an object to Fields, an array of objects or arrays to a Table, anything else to a text.

    Args:
        levels: nesting levels to show; deeper values become "...".
    """
    if levels == 0 and isinstance(value, dict | list):
        return "..."
    if isinstance(value, dict):
        first = [(label_of(key), cell(part, levels - 1)) for key, part in islice(value.items(), MAX_ROWS)]
        return Fields(
            first + ([("", f"{len(value) - MAX_ROWS:,} more are not shown")] if len(value) > MAX_ROWS else [])
        )
    if isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        return _table(value, levels - 1)
    if isinstance(value, list):
        more = f" and {len(value) - MAX_ROWS:,} more" if len(value) > MAX_ROWS else ""
        return ", ".join(cell_text(part) for part in value[:MAX_ROWS]) + more
    return cell_text(value)


def _table(values: Sequence[Any], levels: int) -> Table:
    """Tabulate objects, one per row, with a column for each name; other values go in a single column."""
    first = values[:MAX_ROWS]
    left_out = len(values) - len(first)
    if not all(isinstance(value, dict) for value in first):
        return Table([""], [[cell(value, levels)] for value in first], left_out)
    names = list(dict.fromkeys(name for value in first for name in value))[:MAX_COLUMNS]
    rows = [[cell(value[name], levels) if name in value else "" for name in names] for value in first]
    return Table([label_of(name) for name in names], rows, left_out)


def cell_text(value: Any) -> str:
    """Format a scalar."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number_text(number(value)) if is_number(value) else bounded(str(value))


def label_of(name: str) -> str:
    """Turn a JSON key into a label; a token in it is hidden first, which has underscores."""
    return bounded(redact(name).replace("_", " ") if "_" in name else name, MAX_LABEL)
