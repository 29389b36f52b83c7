"""Read a run folder in any state: running, killed, from an older version, or partly damaged.

Nothing in it is trusted. Unreadable lines of metrics.jsonl are counted and left out; a missing file is None.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from qpref import fsio, opening, sealed
from qpref.errors import DataError, RecipeError
from qpref.opening import real_path
from qpref.training.folder import RunFolder

T = TypeVar("T")
SPLITS = {"train": "", "eval": "eval_"}
"""Splits of metrics.jsonl, each with the prefix of its metric names."""
MAX_LINE = 2**20
"""Longest line of metrics.jsonl in bytes; a longer one is no row."""
MAX_METRICS = 1000
"""Most metrics of a split; later ones are left out."""
LARGEST = 1e200
"""A larger number counts as missing: sums and differences of such numbers overflow."""


@dataclass(slots=True)
class Column:
    """One metric of one split, row by row; NaN where a row has no value."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: float, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(slots=True)
class Metrics:
    """metrics.jsonl by split and name, held-out names without their `eval_`.

    Attributes:
        bad_lines: numbers of the lines that aren't rows, from 1.
        is_torn: the last line is incomplete: the run is writing it, or was killed.
    """

    columns: dict[str, dict[str, Column]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    bad_lines: list[int] = field(default_factory=list)
    is_torn: bool = False

    def column(self, split: str, name: str) -> Column | None:
        return self.columns[split].get(name)

    def last(self, split: str, name: str) -> float:
        """Return the newest value; NaN if there is none."""
        column = self.column(split, name)
        return column.values[-1] if column else math.nan

    @property
    def names(self) -> list[str]:
        """Metric names without repetition, in file order."""
        return list(dict.fromkeys(name for columns in self.columns.values() for name in columns))

    @property
    def last_step(self) -> int:
        steps = [column.steps[-1] for columns in self.columns.values() for column in columns.values()]
        return int(max(steps, default=0))

    def add(self, row: object) -> bool:
        """Add a row; return False if it isn't a valid one."""
        if not isinstance(row, dict) or row.get("split") not in tuple(SPLITS):
            return False
        step = number(row.get("step"))
        if not step >= 0:
            return False
        columns, prefix = self.columns[row["split"]], SPLITS[row["split"]]
        for name, value in row.items():
            if name not in ("step", "split") and (value is None or is_number(value)):
                own = name.removeprefix(prefix)
                if own in columns or len(columns) < MAX_METRICS:
                    columns.setdefault(own, Column()).add(step, number(value))
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The contents of a run's folder.

    Attributes:
        name: for people; unique within a report.
        facts: run.json.
        recipe, recipe_text: recipe.lock.toml, parsed and verbatim.
        result: result.json, the run's own measurements; None before its end.
        data: data.json, the data report; None if missing.
        is_finished: the adapter is written.
        unreadable: name of an optional file -> why it can't be read.
        changed: names of the files that aren't as training wrote them, by the hashes that other files have of them.
    """

    path: Path
    name: str
    facts: dict[str, Any]
    recipe: dict[str, Any]
    recipe_text: str
    metrics: Metrics
    result: dict[str, Any] | None
    data: dict[str, Any] | None
    is_finished: bool
    unreadable: dict[str, str] = field(default_factory=dict)
    changed: tuple[str, ...] = ()


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read several run folders.

    Raises:
        RecipeError: a folder is no run, or is named twice.
    """
    repeated = {path for path in paths if [real_path(other) for other in paths].count(real_path(path)) > 1}
    if repeated:
        raise RecipeError(f"{min(repeated)}: is named twice")
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_run(path: Path, name: str) -> RunRecord:
    """Read one run folder.

    Raises:
        RecipeError: it is no run.
    """
    folder = RunFolder(path)
    if not folder.run_json.is_file():
        raise RecipeError(f"{path}: no run of qpref (it has no run.json)", "name a folder that qpref train has made")
    unreadable: dict[str, str] = {}

    def optional(file: Path, read: Callable[[Path], T]) -> T | None:
        try:
            return read(file) if os.path.lexists(file) else None
        except DataError as error:
            unreadable[file.name] = error.what.removeprefix(f"{file}: ")
        except OSError as error:
            unreadable[file.name] = error.strerror or type(error).__name__
        return None

    facts, result = read_object(folder.run_json), optional(folder.result, read_object)
    text = optional(folder.recipe, _text) or ""
    return RunRecord(
        path=path,
        name=name,
        facts=facts,
        recipe=_toml(text),
        recipe_text=text,
        metrics=optional(folder.metrics, read_metrics) or Metrics(),
        result=result,
        data=optional(folder.data_json, read_object),
        is_finished=folder.adapter.is_dir(),
        unreadable=unreadable,
        changed=tuple(_changed(folder, facts, result or {})),
    )


def _changed(folder: RunFolder, facts: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files that differ from their hashes; a file that no hash is known of isn't among them."""
    hashes = {path: nested(facts, "files", path.name) for path in (folder.recipe, folder.data_json)}
    for path, values in ((folder.run_json, facts), (folder.result, result)):
        if sealed.SEAL in values and not sealed.is_sealed(values):
            yield path.name
    for path, digest in (hashes | {folder.metrics: result.get("metrics_sha256")}).items():
        with suppress(OSError):  # named as unreadable
            if digest is not None and path.is_file() and fsio.sha256_file(path, follow=False) != digest:
                yield path.name


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    metrics = Metrics()
    with os.fdopen(opening.open_plain(path), "rb") as file:
        for line_number, line in enumerate(_lines(file), 1):
            if not line.endswith(b"\n"):
                metrics.is_torn = True
            elif len(line) > MAX_LINE or not metrics.add(_parsed(line)):
                metrics.bad_lines.append(line_number)
    return metrics


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file; of one over MAX_LINE bytes, a part that is too long as well."""
    while line := file.readline(MAX_LINE + 1):
        end = line
        while len(end) > MAX_LINE and not end.endswith(b"\n"):
            end = file.readline(MAX_LINE + 1)
        yield line if end is line else line + end[-1:]


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _text(path: Path) -> str:
    return opening.read_bytes(path).decode(errors="replace")


def read_json(path: Path, *, follow: bool = False) -> Any:
    """Read any JSON file.

    Args:
        follow: follow links, for a file that the user has named; one inside a folder may lead to somebody's secrets.

    Raises:
        DataError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(opening.read_bytes(path, follow=follow).decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DataError: it cannot be read, or holds another type.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {_kind(value)}")
    return value


def _kind(value: object) -> str:
    return {list: "an array", str: "a text", type(None): "null", bool: "a boolean"}.get(type(value), "a number")


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: object) -> float:
    """Convert a JSON number to a float; NaN for any other value and beyond `LARGEST`."""
    if not is_number(value):
        return math.nan
    assert isinstance(value, int | float)
    return float(value) if abs(value) <= LARGEST else math.nan


def nested(document: Mapping[str, Any] | None, *keys: str) -> Any:
    """Look up a value in nested objects; None if a key is missing."""
    value: Any = document
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested tables with its dotted name; arrays of tables are numbered."""
    for key, value in document.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            yield from flatten({str(index): part for index, part in enumerate(value)}, f"{name}.")
        else:
            yield name, value


def _names(paths: Sequence[Path]) -> list[str]:
    """Choose the runs' names: folder names, or the paths where folder names repeat."""
    names = [real_path(path).name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
