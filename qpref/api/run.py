"""A run's folder as an object: its metrics, its result and its adapter"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpref.api.words import python_words

if TYPE_CHECKING:
    from qpref.records import MetricRow


@dataclass(frozen=True, slots=True, init=False)
class Run:
    """A run's folder, finished or not: `qpref.Run("runs/mine")`.

    A path, too: whatever takes one takes a run, and `run / "run.json"` is a file of it.

    Attributes:
        path: the run folder.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "path", Path(path))

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def adapter(self) -> Path:
        """The trained adapter's folder, in PEFT's format; it is there once the run is finished."""
        return self.path / "adapter"

    @property
    def metrics(self) -> list[MetricRow]:
        """Rows of metrics.jsonl so far, training and held-out; a value that wasn't finite is NaN.

        Raises:
            RecipeError: the folder holds no run.
            DataError: a line isn't one that training wrote.
        """
        with python_words():
            return _read_metrics(self.path)

    @property
    def result(self) -> dict[str, Any]:
        """The content of result.json: the verdict, the best step, time and memory; empty until the run is finished.

        Raises:
            DataError: it isn't as training wrote it.
        """
        from qpref import sealed
        from qpref.errors import DataError

        path = self.path / "result.json"
        if not path.is_file():
            return {}
        try:
            return sealed.read_sealed(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None

    @property
    def verdict(self) -> str | None:
        """The verdict's sentence; None for an unfinished run, and for one without held-out pairs."""
        verdict = self.result.get("verdict")
        return None if verdict is None else str(verdict["sentence"])


def _read_metrics(folder: Path) -> list[MetricRow]:
    """Read metrics.jsonl; the last line of a run in training may be incomplete, and is left out then."""
    from qpref.errors import DataError, RecipeError

    if not (folder / "run.json").is_file():
        raise RecipeError(f"{folder}: holds no run")
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}:{number}: is not a row of metrics") from None
    return rows


def _row(values: dict[str, Any]) -> MetricRow:
    from qpref.records import MetricRow

    known = {name: values.pop(name) for name in ("step", "split", "tokens", "seconds")}
    return MetricRow(**known, values={name: math.nan if one is None else one for name, one in values.items()})
