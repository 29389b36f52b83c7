"""Write the kept rows of a data set to files that stand in for its sources, and the refused rows with the reasons."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref import fsio
from qpref.data.check import CheckedData, CheckedRows
from qpref.data.source import DataSource
from qpref.errors import RecipeError
from qpref.hooks.types import Split
from qpref.records import Finding, Row


@dataclass(frozen=True, slots=True)
class FixedFile:
    """A file of kept rows, and the source that it stands in for under the same recipe."""

    path: Path
    split: Split
    location: str


def write_clean(checked: CheckedData, path: Path) -> tuple[list[FixedFile], Path]:
    """Write the kept rows as JSON Lines, one file for each source of a split, and the refused rows to one file.

    Rows have all the columns that their reader gave them, under their own names and in their order, so that a recipe
    reads the same records from them. Values that JSON lacks become null (NaN), Base64 (bytes) or text.

    Args:
        path: `clean.jsonl` for the training rows; `clean.heldout.jsonl` and `clean.refused.jsonl` are beside it. Where
            a split has several sources, each has a number, in the recipe's order: `clean.1.jsonl`, `clean.2.jsonl`.

    Raises:
        RecipeError: one of the files exists.
    """
    targets = [
        (FixedFile(_file_for(path, rows, number), rows.split, source.choice.location), rows, source)
        for rows in checked.splits
        for number, source in enumerate(rows.sources, 1)
    ]
    refused = path.with_suffix(".refused.jsonl")
    refuse_existing([refused, *(fixed.path for fixed, _, _ in targets)])
    for fixed, rows, source in targets:
        fsio.write_lines(fixed.path, _kept(rows, source))
    fsio.write_lines(refused, _refused(checked))
    return [fixed for fixed, _, _ in targets], refused


def refuse_early(path: Path) -> None:
    """Refuse, before the rows are read, an output that `write_clean` would refuse for a data set of one source.

    Raises:
        RecipeError: one of its files exists, the folder is missing, or the suffix isn't .jsonl.
    """
    if path.suffix != ".jsonl":
        raise RecipeError(f"{path}: the output is JSON Lines; name a .jsonl file")
    if not path.parent.is_dir():
        raise RecipeError(f"{path.parent}: no such folder")
    refuse_existing([path, path.with_suffix(".heldout.jsonl"), path.with_suffix(".refused.jsonl")])


def refuse_existing(files: Iterable[Path]) -> None:
    """Refuse to replace a file.

    Raises:
        RecipeError: one of them exists.
    """
    for file in files:
        if file.exists():
            raise RecipeError(f"{file}: exists already", "name another file")


def _file_for(path: Path, rows: CheckedRows, number: int) -> Path:
    split = ".heldout" if rows.split == "heldout" else ""
    return path.with_suffix(f"{split}.{number}.jsonl" if len(rows.sources) > 1 else f"{split}.jsonl")


def _kept(rows: CheckedRows, source: DataSource) -> Iterator[str]:
    for row in rows.raw_rows(source):
        if isinstance(row, Row) and not rows.report.leaves_out(row.source):
            yield _json(row.values)


def _refused(checked: CheckedData) -> Iterator[str]:
    reasons = checked.report.reasons()
    raw_rows = (row for rows in checked.splits for source in rows.sources for row in rows.raw_rows(source))
    for row in raw_rows:
        location = {"path": row.source.path, "line": row.source.line}
        if isinstance(row, Finding):
            yield _json(location | {"reasons": [row.message]})
        elif checked.report.leaves_out(row.source):
            yield _json(location | {"reasons": reasons(row.source), "row": row.values})


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, default=_as_text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _as_text(value: Any) -> str:
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)
