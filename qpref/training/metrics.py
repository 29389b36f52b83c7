"""Metrics: averages over examples, the core's own metrics.jsonl, and sinks that cannot hurt the run."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpref import fsio, opening
from qpref.distributed.world import ALONE, World
from qpref.errors import DiskError
from qpref.hooks.border import described
from qpref.hooks.process_state import ProcessState
from qpref.hooks.types import SinkContext, SinkWriter, SummaryWriter
from qpref.recipe.choices import Choice
from qpref.records import MetricRow
from qpref.training.listener import Listener
from qpref.training.sink_budget import SinkBudget, SinkWatch
from qpref.training.symptoms import Watch

log = logging.getLogger("qpref")

QUEUE_ROWS = 1000


@dataclass(slots=True)
class Averages:
    """Running means over examples; an example whose value is NaN doesn't count for that name."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    _pending: list[tuple[list[str], Tensor]] = field(default_factory=list)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add [N] values by name. Nothing is copied from the device before `settle`."""
        if not values:
            return
        stacked = torch.stack([value.detach().float() for value in values.values()])
        known = ~stacked.isnan()
        totals = torch.stack([torch.where(known, stacked, 0).sum(1), known.sum(1)])
        self._pending.append((list(values), totals))

    def settle(self, world: World = ALONE) -> None:
        """Copy the added totals to the host at once, and add those of all processes, in the order of ranks.

        Args:
            world: the run's processes, each of which settles its own totals; this process alone by default.
        """
        for totals in world.exchange(self._take_pending(), "the metrics"):
            for name, total, count in totals:
                self.sums[name] = self.sums.get(name, 0.0) + total
                self.counts[name] = self.counts.get(name, 0.0) + count

    def _take_pending(self) -> list[tuple[str, float, float]]:
        """Return name, sum and count of what has been added since the last call."""
        if not self._pending:
            return []
        joined = torch.cat([totals for _, totals in self._pending], dim=1).tolist()
        names = [name for part, _ in self._pending for name in part]
        self._pending.clear()
        return list(zip(names, *joined, strict=True))

    def means(self) -> dict[str, float]:
        self.settle()
        return {name: total / self.counts[name] if self.counts[name] else math.nan for name, total in self.sums.items()}

    def clear(self) -> None:
        self.sums, self.counts = {}, {}


class Recorder:
    """Writes rows to metrics.jsonl, then hands them to the sinks.

    Rows that the disk refuses stay in memory, and are written with the next one that it takes.

    Args:
        path: metrics.jsonl.
        keep: bytes of it to keep; rows that a killed run wrote after its last checkpoint are cut off.
        sinks: the recipe's metric sinks, opened for `context`.
        symptoms: looks at each row, too.
        on_metrics: a program's own function, called last.
    """

    def __init__(
        self,
        path: Path,
        keep: int,
        sinks: Sequence[Choice],
        context: SinkContext,
        symptoms: Watch | None = None,
        on_metrics: Callable[[MetricRow], object] | None = None,
    ) -> None:
        self._lines = fsio.AppendLog(path, keep)
        self._size = self._lines.size
        kept = opening.read_bytes(path, keep)
        self._hash = hashlib.sha256(kept)
        self._symptoms = symptoms
        if symptoms is not None:
            symptoms.replay(kept)
        self._unwritten: list[bytes] = []
        self._sinks = [GuardedSink(sink, context) for sink in sinks]
        self._watch = SinkWatch([sink.check_budget for sink in self._sinks])
        self._process = ProcessState.now().shared()
        self._listener = None if on_metrics is None else Listener(on_metrics)

    @property
    def size(self) -> int:
        """Bytes of the rows in metrics.jsonl."""
        return self._size

    @property
    def sha256(self) -> str:
        """SHA-256 of metrics.jsonl as it was written, whatever the disk has made of it."""
        return self._hash.hexdigest()

    def write(self, row: MetricRow) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in row.values.items()}
        flat = {"step": row.step, "split": row.split} | values | {"tokens": row.tokens, "seconds": row.seconds}
        self._unwritten.append(json.dumps(flat, allow_nan=False).encode() + b"\n")
        try:
            self.flush()
        except DiskError as error:
            if len(self._unwritten) == 1:
                log.warning("%s; rows stay in memory until they can be written", error.what)
        self._undo_changes()
        for sink in self._sinks:
            sink.write(replace(row, values=dict(row.values)))  # a copy, in case the sink changes it
        if self._symptoms is not None:
            self._symptoms.look(row)
        if self._listener is not None:
            self._listener.write(row)

    def _undo_changes(self) -> None:
        """Set back settings of the process that the sinks have changed; their threads share them with training."""
        if self._sinks and (changed := self._process.restore()):
            log.warning("%s changed %s, which is set back", " or ".join(map(str, self._sinks)), ", ".join(changed))

    def flush(self) -> None:
        """Write the rows that the disk has refused so far.

        Raises:
            DiskError: it refuses them still.
        """
        if not self._unwritten:
            return
        lines = b"".join(self._unwritten)
        try:
            self._lines.cut(self._size)  # of a part of a row that the disk took before it was full
            self._lines.append(lines)
        except DiskError:
            with suppress(DiskError):
                self._lines.cut(self._size)
            raise
        self._size += len(lines)
        self._hash.update(lines)
        self._unwritten.clear()

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Hand the result of a finished run to the sinks that take it."""
        for sink in self._sinks:
            sink.summarize(summary)

    def close(self) -> None:
        """Close the file, and the sinks; what they say then is logged."""
        started = time.monotonic()
        for sink in self._sinks:
            sink.finish()
        for sink in self._sinks:
            sink.join(started)
        self._undo_changes()
        self._watch.close()
        self._lines.close()


class NoRecorder(Recorder):
    """The recorder of a process that writes nothing, since another one does."""

    def __init__(self) -> None:
        pass

    @property
    def size(self) -> int:
        return 0

    @property
    def sha256(self) -> str:
        return ""

    def write(self, row: MetricRow) -> None:
        """Take a row and drop it."""

    def flush(self) -> None:
        """Have nothing to write."""

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Take a result and drop it."""

    def close(self) -> None:
        """Have nothing to close."""


class GuardedSink:
    """A sink on its own thread; one that raises, hangs, or computes too much is reported once and dropped."""

    def __init__(self, choice: Choice, context: SinkContext) -> None:
        self._name = f"metric sink '{choice.plugin.record.name}' ({choice.plugin.offer})"
        self._close_seconds: float = choice.plugin.record.close_seconds
        self._rows: queue.Queue[MetricRow | Mapping[str, Any] | None] = queue.Queue(QUEUE_ROWS)
        self._dropped = False
        self._budget: SinkBudget | None = None
        self._thread = threading.Thread(target=self._run, args=(choice, context), daemon=True, name=self._name)
        self._thread.start()

    def __str__(self) -> str:
        return self._name

    def write(self, row: MetricRow) -> None:
        self._put(row)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Hand over the result of a finished run, after all rows."""
        self._put(dict(summary))

    def finish(self) -> None:
        """Signal that no row follows."""
        self._put(None)

    def _put(self, item: MetricRow | Mapping[str, Any] | None) -> None:
        if self._dropped:
            return
        try:
            self._rows.put_nowait(item)
        except queue.Full:
            self._drop("takes no more rows")

    def join(self, started: float) -> None:
        """Wait until the sink has closed, or its time since `started` (of the monotonic clock) is over."""
        if not self._dropped:
            self._thread.join(max(0.0, started + self._close_seconds - time.monotonic()))
            if self._thread.is_alive():
                self._drop(f"didn't finish within {self._close_seconds:.0f} s")

    def check_budget(self) -> None:
        """Drop the sink where it has taken more than its share of the processor, and end what it computes."""
        budget = self._budget
        if budget is None or not self._thread.is_alive():
            return
        if not self._dropped and (excess := budget.excess()):
            self._drop(excess)
        if self._dropped:
            budget.stop()

    def _run(self, choice: Choice, context: SinkContext) -> None:
        try:
            self._budget = SinkBudget()
            writer: SinkWriter = choice.plugin.record.open(choice.options, context)
            self._budget.start_writing()
            while (item := self._rows.get()) is not None:
                if isinstance(item, MetricRow):
                    writer.write(item)
                elif isinstance(writer, SummaryWriter):
                    writer.summarize(item)
            writer.close()
        except BaseException as error:  # noqa: BLE001 - the plugin border: not even SystemExit ends the run
            self._drop(f"raised {described(error)}")

    def _drop(self, why: str) -> None:
        if not self._dropped:
            self._dropped = True
            log.warning("%s %s; it gets no more rows, metrics.jsonl has them all", self._name, why)
