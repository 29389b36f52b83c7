"""Writes a data set's rows to new files: those that were kept, and those that weren't, with the reasons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qpref import fsio
from qpref.data.check import CheckedData, CheckedRows
from qpref.errors import RecipeError
from qpref.records import Finding, Row


def write_clean(checked: CheckedData, path: Path) -> list[Path]:
    """Write the kept training rows to `path`, as JSON Lines; the kept held-out rows and all refused ones beside it.

    A row is written as its reader found it, with its own columns. Of `clean.jsonl` the other two files are
    `clean.heldout.jsonl` and `clean.refused.jsonl`.

    Raises:
        RecipeError: one of the files exists.
    """
    files = {path: _kept(checked.train)}
    if checked.heldout is not None:
        files[path.with_suffix(f".heldout{path.suffix}")] = _kept(checked.heldout)
    files[path.with_suffix(f".refused{path.suffix}")] = _refused(checked)
    if taken := [file for file in files if file.exists()]:
        raise RecipeError(f"{taken[0]}: exists already", "name another file with --fix")
    if not path.parent.is_dir():
        raise RecipeError(f"{path.parent}: no such folder")
    for file, lines in files.items():
        fsio.write_lines(file, lines)
    return list(files)


def _kept(rows: CheckedRows) -> Iterator[str]:
    for row in _raw(rows):
        if isinstance(row, Row) and not rows.report.leaves_out(row.source):
            yield _json(dict(row.values))


def _refused(checked: CheckedData) -> Iterator[str]:
    reasons = checked.report.reasons()
    for rows in (checked.train, checked.heldout):
        for row in _raw(rows) if rows is not None else ():
            place = {"path": row.source.path, "line": row.source.line}
            if isinstance(row, Finding):
                yield _json(place | {"reasons": [row.message]})
            elif checked.report.leaves_out(row.source):
                yield _json(place | {"reasons": reasons(row.source), "row": dict(row.values)})


def _raw(rows: CheckedRows) -> Iterator[Row | Finding]:
    """The split's rows as their readers found them."""
    for source in rows.sources:
        for raw in source.raw():
            if rows.share is None or rows.share.split_of(source.records(raw)) == rows.split:
                yield raw


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
