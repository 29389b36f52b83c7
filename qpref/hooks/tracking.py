"""Tools for sinks to experiment trackers: a flat recipe, and one run of the tracker across resumptions.

A tracker has a run of its own, with an id that is kept beside the steps of its last rows in `sinks/NAME.json` of the
run folder. A run that was killed resumes from a checkpoint before its last rows: the tracker has the rows between, and
gets no row twice. They are the same rows, since training is deterministic, whatever their seconds. Rows before the
checkpoint that the tracker lacks, since it was added later or had failed, come from metrics.jsonl.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qpref import fsio, opening
from qpref.errors import PluginError
from qpref.hooks.types import SinkContext, Table
from qpref.records import MetricRow

Scalar = str | int | float | bool
METRICS = "metrics.jsonl"


def flattened(document: Mapping[str, Any]) -> dict[str, Scalar]:
    """Flatten nested tables to dotted keys, such as `loss.beta` or `sinks.0.name`; empty ones and None are left out."""
    return dict(_leaves(document, ""))


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Scalar]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{index}")
    elif isinstance(value, str | int | float):
        yield key, value
    elif value is not None:
        yield key, str(value)


class RunRecord:
    """A tracker's run: its id, and the last step of each split that the tracker has.

    Args:
        parts: pattern of the files or folders below `sinks` that the tracker writes, one for each start of the run. A
            killed process leaves its part damaged: it is removed here, and since rows are noted only once a part is
            finished, they are sent again. None where the tracker has each row at once.

    Attributes:
        id: the tracker's; None until `begin`.

    Raises:
        PluginError: the record of an earlier start is damaged.
    """

    def __init__(self, context: SinkContext, sink: str, *, parts: str | None = None) -> None:
        self._folder = context.make_folder()
        self._path = self._folder / f"{sink}.json"
        self._pattern = parts
        self.id: str | None = None
        self._last: dict[str, int] = {}
        self._finished: list[str] = []
        if self._path.is_file():
            self.id, self._last, self._finished = _read(self._path)
        for part in self._parts():
            if part.name not in self._finished:
                fsio.remove_tree(part)

    @property
    def is_empty(self) -> bool:
        """True where the tracker has no row."""
        return not self._last

    def begin(self, run_id: str) -> None:
        """Keep the id of the tracker's run."""
        self.id = run_id
        self._write()

    def has(self, row: MetricRow) -> bool:
        """Return whether the tracker got this row before the run was resumed."""
        return row.step <= self._last.get(row.split, -1)

    def add(self, row: MetricRow) -> None:
        """Note that the tracker has a row."""
        self._last[row.split] = row.step
        if self._pattern is None:
            self._write()

    def finish(self) -> None:
        """Note all rows, and the part that has them: the tracker is finished."""
        self._finished = [part.name for part in self._parts()]
        self._write()

    def _parts(self) -> list[Path]:
        return [] if self._pattern is None else sorted(self._folder.glob(self._pattern))

    def _write(self) -> None:
        fsio.write_json(self._path, {"run_id": self.id, "last_steps": self._last, "finished_parts": self._finished})


def _read(path: Path) -> tuple[str, dict[str, int], list[str]]:
    try:
        values = opening.read_object(path)
        steps = {str(split): int(step) for split, step in values["last_steps"].items()}
        return str(values["run_id"]), steps, [str(part) for part in values["finished_parts"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PluginError(f"{path}: is damaged", "delete it, and the tracker gets a new run") from error


class Tracker(Protocol):
    """A run of an experiment tracker that is open."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send finite metrics of a step; both splits may have the same one."""

    def add_table(self, name: str, table: Table) -> None:
        """Send a table; a tracker without tables does nothing."""

    def finish(self, summary: Mapping[str, Scalar] | None) -> None:
        """End the run, finished with its flat summary, or without one stopped: it may be resumed."""


class TrackerWriter:
    """Writes a run to a tracker: each row once, held-out rows and samples as tables, the result as summary.

    Args:
        record: the tracker's run, begun.
        samples: number of held-out examples to send as text.
    """

    def __init__(self, tracker: Tracker, record: RunRecord, context: SinkContext, samples: int = 0) -> None:
        self._tracker, self._record, self._samples = tracker, record, samples
        self._context = context
        self._summary: dict[str, Scalar] | None = None
        if context.first_step:
            for row in _rows(context.run_folder / METRICS):
                if row.step <= context.first_step:
                    self.write(row)

    def write(self, row: MetricRow) -> None:
        if self._record.has(row):
            return
        finite = {name: value for name, value in row.values.items() if math.isfinite(value)}
        counts = {} if row.split == "eval" else {"tokens": row.tokens, "seconds": row.seconds}
        self._tracker.log(finite | counts, row.step)
        self._record.add(row)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        self._summary = flattened(summary)

    def close(self) -> None:
        if self._summary is not None:
            heldout = [row for row in _rows(self._context.run_folder / METRICS) if row.split == "eval"]
            if heldout:
                self._tracker.add_table("heldout", heldout_table(heldout))
            if self._samples and (samples := self._context.samples(self._samples)).rows:
                self._tracker.add_table("samples", samples)
        self._tracker.finish(self._summary)
        self._record.finish()


def heldout_table(rows: Sequence[MetricRow]) -> Table:
    """Return held-out rows as one table: a column for the step, then one for each metric that is finite in all."""
    names = [name for name in rows[0].values if all(math.isfinite(row.values.get(name, math.nan)) for row in rows)]
    return Table(
        columns=("step", *names), rows=tuple((row.step, *(row.values[name] for name in names)) for row in rows)
    )


def _rows(path: Path) -> Iterator[MetricRow]:
    """Yield the rows of a metrics.jsonl, which the core writes.

    Raises:
        OSError: it can't be read.
    """
    with os.fdopen(opening.open_plain(path), "rb") as lines:
        for line in lines:
            values = json.loads(line)
            known = {name: values.pop(name) for name in ("step", "split", "tokens", "seconds")}
            finite = {name: math.nan if value is None else value for name, value in values.items()}
            yield MetricRow(**known, values=finite)
