"""Rules of metric sinks: rows as a run hands them over, NaN among them, a resumed run, and a close at any time."""

from __future__ import annotations

import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref.hooks.types import MetricSink, Printing, SinkContext, SinkWriter, Table
from qpref.installed import missing
from qpref.records import MetricRow
from qpref.testing.calls import BrokenRule, attempt

TOTAL_STEPS = 8
RESUMED_AT = 2
RESUME_SECONDS = 1.1
"""Time between two starts of a run: files that are named by the second, such as TensorBoard's, then have two names."""
NUM_FAST = 500
OPEN_SECONDS, WRITE_SECONDS = 10.0, 1.0
"""Processor time that a run allows a sink to open, and for `NUM_FAST` rows."""
SUMMARY = {"steps": TOTAL_STEPS, "seconds": 1.5, "verdict": {"learned": True, "accuracy": 0.75, "notes": ["a"]}}
RECIPE = {"model": {"base": "org/base"}, "loss": {"name": "example", "beta": 0.1}, "train": {"batch_size": 4}}


@dataclass(frozen=True, slots=True)
class OpenableSink:
    """A metric sink and its options."""

    record: MetricSink
    options: Any

    def open(self, folder: Path, first_step: int = 0, printing: Printing = "nothing") -> SinkWriter:
        context = SinkContext(
            run_folder=folder,
            first_step=first_step,
            total_steps=TOTAL_STEPS,
            printing=printing,
            planned_bytes=2**30,
            limit_bytes=2**31,
            peak_bytes=lambda: 2**29,
            recipe=RECIPE,
            samples=lambda count: Table(columns=("prompt",), rows=(("What is 1?",),) * min(count, 3)),
        )
        writer: SinkWriter = attempt("open", self.record.open, self.options, context)
        for method in ("write", "close"):
            if not callable(getattr(writer, method, None)):
                raise BrokenRule(f"open returns {type(writer).__name__}, which has no method {method}")
        return writer


def rows_of_run(first_step: int = 0) -> Iterator[MetricRow]:
    """Yield rows of a short run after a step: metrics that come and go, and held-out ones every fourth step."""
    for step in range(first_step + 1, TOTAL_STEPS + 1):
        values = {"loss": 0.7 / step, "learning_rate": 1e-4, "rewards/margins": -0.1 + step, "grad_norm": 1e12}
        yield MetricRow(step=step, split="train", values=values, tokens=1000 * step, seconds=0.25 * step)
        if step % 4 == 0:
            held_out = {"eval_loss": 0.6, "eval_rewards/accuracies": 1.0}
            yield MetricRow(step=step, split="eval", values=held_out, tokens=1000 * step, seconds=0.25 * step)


@contextmanager
def _run_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _write(writer: SinkWriter, rows: Iterator[MetricRow]) -> None:
    for row in rows:
        attempt(f"write of step {row.step}", writer.write, row)


def _close(writer: SinkWriter) -> None:
    attempt("close", writer.close)


def check_record(sink: OpenableSink) -> None:
    """Fields of the record have the right types, and what it requires is installed."""
    if lacking := missing(sink.record.requires):
        raise BrokenRule(f"it requires {', '.join(lacking)}, which isn't installed")


def check_run(sink: OpenableSink) -> None:
    """A whole run: rows of both splits, the summary for a writer that takes it, close."""
    with _run_folder() as folder:
        writer = sink.open(folder)
        _write(writer, rows_of_run())
        summarize = getattr(writer, "summarize", None)
        if summarize is not None:
            attempt("summarize", summarize, dict(SUMMARY))
        _close(writer)


def check_undefined(sink: OpenableSink) -> None:
    """A metric that is undefined at a step is NaN there, and none may be the rule's one."""
    with _run_folder() as folder:
        writer = sink.open(folder)
        values = {"loss": math.nan, "rewards/chosen": math.nan, "rewards/rejected": math.inf}
        _write(writer, iter([MetricRow(step=1, split="train", values=values, tokens=0, seconds=0.0)]))
        _write(writer, iter([MetricRow(step=2, split="train", values={}, tokens=0, seconds=0.0)]))
        _close(writer)


def check_no_row(sink: OpenableSink) -> None:
    """A run that fails before its first row closes the sink all the same."""
    with _run_folder() as folder:
        _close(sink.open(folder))


def check_resumed(sink: OpenableSink) -> None:
    """A resumed run opens the sink again, and what it wrote before stays."""
    with _run_folder() as folder:
        writer = sink.open(folder)
        _write(writer, rows_of_run())
        _close(writer)
        before = _size(folder)
        time.sleep(RESUME_SECONDS)
        writer = sink.open(folder, first_step=RESUMED_AT)
        _write(writer, rows_of_run(RESUMED_AT))
        _close(writer)
        if (lost := before - _size(folder)) > 0:
            raise BrokenRule(f"after a resumed run its files have {lost} bytes less; open them to append")


def check_closed_twice(sink: OpenableSink) -> None:
    """A second close does nothing."""
    with _run_folder() as folder:
        writer = sink.open(folder)
        _close(writer)
        attempt("a second close", writer.close)


def check_folder(sink: OpenableSink) -> None:
    """Files are in `context.make_folder()`: others in the run folder stop it from being overwritten."""
    with _run_folder() as folder:
        writer = sink.open(folder)
        _write(writer, rows_of_run())
        _close(writer)
        if strays := sorted(path.name for path in folder.iterdir() if path.name != "sinks"):
            raise BrokenRule(f"it writes {strays[0]} into the run folder; use context.make_folder()")


def check_printing(sink: OpenableSink) -> None:
    """Standard output follows `context.printing`: nothing under --quiet, a JSON object a line under --log-json."""
    printings: tuple[Printing, ...] = ("nothing", "json")
    for printing in printings:
        printed = io.StringIO()
        with _run_folder() as folder, redirect_stdout(printed), redirect_stderr(io.StringIO()):
            writer = sink.open(folder, printing=printing)
            _write(writer, rows_of_run())
            _close(writer)
        lines = [line for line in printed.getvalue().splitlines() if line.strip()]
        if printing == "nothing" and lines:
            raise BrokenRule(f"it prints {lines[0][:80]!r}, where context.printing is 'nothing'")
        if odd := [line for line in lines if not _is_object(line)]:
            raise BrokenRule(f"it prints {odd[0][:80]!r}, where context.printing is 'json'")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def check_speed(sink: OpenableSink) -> None:
    """Opening and writing take no more processor time than a run allows: beyond it the sink is dropped."""
    with _run_folder() as folder:
        start = time.thread_time()
        writer = sink.open(folder)
        opening = time.thread_time() - start
        rows = [
            MetricRow(step=step, split="train", values={"loss": 0.5, "grad_norm": 1.0}, tokens=step, seconds=step / 4)
            for step in range(1, NUM_FAST + 1)
        ]
        start, writing = time.thread_time(), 0.0
        for row in rows:
            _write(writer, iter([row]))
            writing = time.thread_time() - start
            if writing > WRITE_SECONDS:
                break
        _close(writer)
    for what, seconds, limit in (("opening", opening, OPEN_SECONDS), (f"{NUM_FAST} rows", writing, WRITE_SECONDS)):
        if seconds > limit:
            raise BrokenRule(f"{what} took more than {limit:.0f} s of processor time")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


SINK_RULES: Mapping[str, Callable[[OpenableSink], None]] = {
    "record": check_record,
    "run": check_run,
    "undefined": check_undefined,
    "no_row": check_no_row,
    "resumed": check_resumed,
    "closed_twice": check_closed_twice,
    "folder": check_folder,
    "printing": check_printing,
    "speed": check_speed,
}
