"""Write the kept rows of a data set to new files, and the refused rows with the reasons."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qpref import fsio
from qpref.data.check import CheckedData, CheckedRows
from qpref.data.source import DataSource
from qpref.errors import RecipeError
from qpref.records import Finding, Row


def write_clean(checked: CheckedData, path: Path) -> list[Path]:
    """Write the kept training rows to `path` as JSON Lines, and the held-out and the refused rows beside it.

    Kept rows have their original values under qpref's column names; refused rows are unchanged. Values that JSON lacks
    (NaN) become null.
    """
    train, heldout, refused = files_beside(path)
    files = {train: _kept(checked.train)}
    if checked.heldout is not None:
        files[heldout] = _kept(checked.heldout)
    files[refused] = _refused(checked)
    for file, lines in files.items():
        fsio.write_lines(file, lines)
    return list(files)


def files_beside(path: Path) -> tuple[Path, Path, Path]:
    """Return the three files for `clean.jsonl`: itself, `clean.heldout.jsonl` and `clean.refused.jsonl`.

    Raises:
        RecipeError: one of them exists, the folder is missing, or the suffix isn't .jsonl.
    """
    if path.suffix != ".jsonl":
        raise RecipeError(f"{path}: the output is JSON Lines; name a .jsonl file")
    files = path, path.with_suffix(".heldout.jsonl"), path.with_suffix(".refused.jsonl")
    if taken := [file for file in files if file.exists()]:
        raise RecipeError(f"{taken[0]}: exists already", "name another file")
    if not path.parent.is_dir():
        raise RecipeError(f"{path.parent}: no such folder")
    return files


def _kept(rows: CheckedRows) -> Iterator[str]:
    for source, row in _raw(rows):
        if isinstance(row, Row) and not rows.report.leaves_out(row.source):
            named = source.named(row)
            assert isinstance(named, Row)  # rows that lack a mapped column are refused
            yield _json(dict(named.values))


def _refused(checked: CheckedData) -> Iterator[str]:
    reasons = checked.report.reasons()
    for rows in (checked.train, checked.heldout):
        for _, row in _raw(rows) if rows is not None else ():
            location = {"path": row.source.path, "line": row.source.line}
            if isinstance(row, Finding):
                yield _json(location | {"reasons": [row.message]})
            elif checked.report.leaves_out(row.source):
                yield _json(location | {"reasons": reasons(row.source), "row": dict(row.values)})


def _raw(rows: CheckedRows) -> Iterator[tuple[DataSource, Row | Finding]]:
    """Read the split's raw rows, each with its source."""
    for source in rows.sources:
        for raw in source.raw():
            if rows.share is None or rows.share.split_of(source.records(raw)) == rows.split:
                yield source, raw


def _json(value: dict[str, Any]) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
