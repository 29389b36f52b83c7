"""Metrics: averages over examples, the core's own metrics.jsonl, and sinks that cannot hurt the run."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from qpref import fsio, opening
from qpref.hooks.types import SinkContext, SinkWriter
from qpref.recipe.choices import Choice
from qpref.records import MetricRow

log = logging.getLogger("qpref")

QUEUE_ROWS = 1000
CLOSE_SECONDS = 5.0


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

    def settle(self) -> None:
        """Copy the added totals to the host at once."""
        if self._pending:
            joined = torch.cat([totals for _, totals in self._pending], dim=1).tolist()
            names = [name for part, _ in self._pending for name in part]
            for name, total, count in zip(names, *joined, strict=True):
                self.sums[name] = self.sums.get(name, 0.0) + total
                self.counts[name] = self.counts.get(name, 0.0) + count
            self._pending.clear()

    def means(self) -> dict[str, float]:
        self.settle()
        return {name: total / self.counts[name] if self.counts[name] else math.nan for name, total in self.sums.items()}

    def clear(self) -> None:
        self.sums, self.counts = {}, {}


class Recorder:
    """Writes rows to metrics.jsonl, then hands them to the sinks.

    Args:
        path: metrics.jsonl.
        keep: bytes of it to keep; rows that a killed run wrote after its last checkpoint are cut off.
        sinks: the recipe's metric sinks, opened for `context`.
    """

    def __init__(self, path: Path, keep: int, sinks: Sequence[Choice], context: SinkContext) -> None:
        self._lines = fsio.AppendLog(path, keep)
        self._hash = hashlib.sha256(opening.read_bytes(path, keep))
        self._sinks = [GuardedSink(sink, context) for sink in sinks]

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self._lines.size

    @property
    def sha256(self) -> str:
        """SHA-256 of metrics.jsonl as it was written, whatever the disk has made of it."""
        return self._hash.hexdigest()

    def write(self, row: MetricRow) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in row.values.items()}
        flat = {"step": row.step, "split": row.split} | values | {"tokens": row.tokens, "seconds": row.seconds}
        line = json.dumps(flat, allow_nan=False)
        self._lines.append_line(line)
        self._hash.update(line.encode() + b"\n")
        for sink in self._sinks:
            sink.write(replace(row, values=dict(row.values)))  # a copy, in case the sink changes it

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for sink in self._sinks:
            sink.finish()
        for sink in self._sinks:
            sink.join(deadline)
        self._lines.close()


class GuardedSink:
    """A sink on its own thread; one that raises or hangs is reported once and dropped."""

    def __init__(self, choice: Choice, context: SinkContext) -> None:
        self._name = f"metric sink '{choice.plugin.record.name}' ({choice.plugin.offer})"
        self._rows: queue.Queue[MetricRow | None] = queue.Queue(QUEUE_ROWS)
        self._dropped = False
        self._thread = threading.Thread(target=self._run, args=(choice, context), daemon=True, name=self._name)
        self._thread.start()

    def write(self, row: MetricRow) -> None:
        if self._dropped:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._drop("takes no more rows")

    def finish(self) -> None:
        """Signal that no row follows."""
        if not self._dropped:
            try:
                self._rows.put_nowait(None)
            except queue.Full:
                self._drop("takes no more rows")

    def join(self, deadline: float) -> None:
        """Wait until the sink has closed, or the deadline (of the monotonic clock) has passed."""
        if not self._dropped:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._drop(f"didn't finish within {CLOSE_SECONDS:.0f} s")

    def _run(self, choice: Choice, context: SinkContext) -> None:
        try:
            writer: SinkWriter = choice.plugin.record.open(choice.options, context)
            while (row := self._rows.get()) is not None:
                writer.write(row)
            writer.close()
        except BaseException as error:  # noqa: BLE001 - the plugin border: not even SystemExit ends the run
            self._drop(f"raised {type(error).__name__}: {error}")

    def _drop(self, why: str) -> None:
        if not self._dropped:
            self._dropped = True
            log.warning("%s %s; it gets no more rows, metrics.jsonl has them all", self._name, why)
