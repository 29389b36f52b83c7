"""Readers of JSON rows: JSON Lines, one array of objects, or objects over several lines; plain or gzipped.

The suffix doesn't decide between them, since public data named .json are JSON Lines as often as not: the file's start
does. It matters only where the start is neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qpref.errors import DataError
from qpref.hooks import Reader, hookimpl
from qpref.hooks.streams import opened
from qpref.records import Finding, Row
from qpref_plugins.read_jsonl.array import rows_of_array, rows_of_objects
from qpref_plugins.read_jsonl.layout import Layout, layout_of, refuse_foreign, refuse_wrapped
from qpref_plugins.read_jsonl.lines import rows_of_lines

_ROWS = {"lines": rows_of_lines, "array": rows_of_array, "objects": rows_of_objects}


def read_lines(path: Path) -> Iterator[Row | Finding]:
    """Yield the rows of a file; of an empty one, or one that doesn't start as JSON, those of its lines."""
    yield from _rows(path, "lines")


def read_array(path: Path) -> Iterator[Row | Finding]:
    """Yield the rows of a file; one that doesn't start as JSON is refused as no array."""
    yield from _rows(path, "array")


def read_text(path: Path) -> Iterator[Row | Finding]:
    """Yield the rows of a text file that holds JSON.

    Raises:
        DataError: it holds something else.
    """
    yield from _rows(path, None)


def _rows(path: Path, otherwise: Layout | None) -> Iterator[Row | Finding]:
    with opened(path) as file:
        head = file.peek().decode("utf-8-sig", "replace").lstrip()
        layout = layout_of(head) or otherwise
        if layout is None:
            raise DataError(
                f"{path}: a .txt file is read if it holds JSON objects, and this one doesn't start with one; for a "
                'table with a header set [data] reader = "csv" or "tsv"'
            )
        if layout == "lines":
            refuse_foreign(head, str(path))
        refuse_wrapped(head, str(path))
        yield from _ROWS[layout](file, str(path))


@hookimpl
def qpref_readers() -> Iterator[Reader]:
    for suffix, packed in (("", ""), (".gz", ", gzipped")):
        yield Reader(name=f"jsonl{suffix}", summary=f"JSON Lines: one object a line{packed}", read=read_lines)
        yield Reader(name=f"ndjson{suffix}", summary=f"the same as jsonl{suffix}", read=read_lines)
        yield Reader(name=f"json{suffix}", summary=f"a JSON array of objects{packed}", read=read_array)
        yield Reader(name=f"txt{suffix}", summary=f"text files that hold JSON objects{packed}", read=read_text)
