"""Readers of JSON Lines and of JSON arrays of objects, plain or gzipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qpref.hooks import Reader, hookimpl
from qpref.records import Finding, Row
from qpref_plugins.read_jsonl.array import rows_of_array
from qpref_plugins.read_jsonl.lines import rows_of_lines
from qpref_plugins.read_jsonl.stream import gunzipped, plain


def read_lines(path: Path) -> Iterator[Row | Finding]:
    with plain(path) as file:
        yield from rows_of_lines(file, str(path))


def read_array(path: Path) -> Iterator[Row | Finding]:
    with plain(path) as file:
        yield from rows_of_array(file, str(path))


def read_gzipped_lines(path: Path) -> Iterator[Row | Finding]:
    with gunzipped(path) as file:
        yield from rows_of_lines(file, str(path))


def read_gzipped_array(path: Path) -> Iterator[Row | Finding]:
    with gunzipped(path) as file:
        yield from rows_of_array(file, str(path))


@hookimpl
def qpref_readers() -> Iterator[Reader]:
    yield Reader(name="jsonl", summary="JSON Lines: one object a line", read=read_lines)
    yield Reader(name="jsonl.gz", summary="JSON Lines, gzipped", read=read_gzipped_lines)
    yield Reader(name="json", summary="a JSON array of objects", read=read_array)
    yield Reader(name="json.gz", summary="a JSON array of objects, gzipped", read=read_gzipped_array)
