"""Rows that a program has in memory, written beside a run as the file of data that its recipe names.

So a run on them is like any other: it resumes, is evaluated and merged from any process, and a resumption with other
rows is refused. The file has the hash of its content in its name, and is never written over. What keeps no run, such as
a check, has them in a temporary file.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from qpref.errors import DataError

Rows = Iterable[Mapping[str, Any]]
DIGITS = 16


def store_rows(rows: Rows, folder: Path, split: str) -> Path:
    """Write rows as JSON Lines, once for each content, and return the file.

    Args:
        folder: where to write it; made where it is missing.
        split: start of the file's name: "train" or "heldout".

    Raises:
        DataError: a row is no mapping of JSON values, or there is none.
        DiskError: the disk refuses the file.
    """
    from qpref import fsio

    content = "".join(_line(row, f"{split} row {number}") for number, row in enumerate(rows, start=1)).encode()
    if not content:
        raise DataError(f"{split}: no rows")
    path = folder / f"{split}-{hashlib.sha256(content).hexdigest()[:DIGITS]}.jsonl"
    if not (path.is_file() and path.read_bytes() == content):
        fsio.make_folder(folder)
        fsio.write_bytes(path, content)
    return path


@contextmanager
def as_location(data: str | PathLike[str] | Rows, name: str = "data") -> Iterator[str]:
    """Give data as a location: a name as it is, rows as a file for as long as this lasts.

    Args:
        name: of rows, in messages.

    Raises:
        DataError: as `store_rows`.
    """
    if isinstance(data, str | PathLike):
        yield fspath(data)
        return
    with tempfile.TemporaryDirectory(prefix="qpref-rows-") as folder:
        yield str(store_rows(data, Path(folder), name))


def rows_folder(run: Path) -> Path:
    """Return the folder of a run's rows, which stands beside the run's own."""
    run = run.absolute()
    return run.with_name(f"{run.name}.rows")


def source_override(split: str, path: Path) -> tuple[str, object]:
    """Return the override by which a recipe names stored rows."""
    return f"data.{split}", [{"path": str(path), "reader": "jsonl"}]


def _line(row: Mapping[str, Any], name: str) -> str:
    """Return a row as a line of JSON."""
    if not isinstance(row, Mapping):
        raise DataError(f"{name}: expected a dict of columns, as a row of a JSON Lines file, got {type(row).__name__}")
    try:
        line = json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n"
        line.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON: {error}") from None
    return line
