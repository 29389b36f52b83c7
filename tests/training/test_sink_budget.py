"""A metric sink that computes on and on costs training little, and the end of the run no more than its seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qpref.hooks import Options
from qpref.hooks.manager import Loaded, Offer
from qpref.hooks.types import MetricSink, SinkContext
from qpref.recipe.choices import Choice
from qpref.records import MetricRow
from qpref.training import sink_budget
from qpref.training.metrics import Recorder

WHO = "metric sink 'busy' (acme 2.0 [sink-busy])"


@pytest.fixture(autouse=True)
def _small_budgets(monkeypatch) -> None:
    monkeypatch.setattr(sink_budget, "OPEN_SECONDS", 0.1)
    monkeypatch.setattr(sink_budget, "WRITE_SECONDS", 0.1)
    monkeypatch.setattr(sink_budget, "CHECK_EVERY", 0.02)


class Sink:
    """Writes nothing; `busy` names the call that computes, for `seconds`; `ended` has the exceptions that it met.

    Args:
        swallows: exceptions after which it goes on.
    """

    def __init__(self, busy: str, seconds: float, swallows: int = 0) -> None:
        self.busy, self.seconds, self.swallows = busy, seconds, swallows
        self.ended: list[str] = []
        self.rows = 0

    def open(self, options: object, context: SinkContext) -> Sink:
        self.compute("open")
        return self

    def write(self, row: MetricRow) -> None:
        self.rows += 1
        self.compute("write")

    def close(self) -> None:
        self.compute("close")

    def compute(self, call: str) -> None:
        end = time.monotonic() + (self.seconds if self.busy == call else 0)
        while time.monotonic() < end:
            try:
                while time.monotonic() < end:
                    pass
            except BaseException as error:
                self.ended.append(type(error).__name__)
                if len(self.ended) > self.swallows:
                    raise


def record(sink: Sink, folder: Path, rows: int = 3, pause: float = 0.0, close_seconds: float = 0.5) -> Recorder:
    plugin = MetricSink(name="busy", summary="", options=Options, open=sink.open, close_seconds=close_seconds)
    choice = Choice(Loaded(plugin, Offer("sink", "busy", "acme", "2.0", "acme_sinks")), Options())
    context = SinkContext(run_folder=folder, first_step=0, total_steps=rows)
    recorder = Recorder(folder / "metrics.jsonl", 0, [choice], context)
    for step in range(rows):
        recorder.write(MetricRow(step=step, split="train", values={}, tokens=0, seconds=0.0))
        time.sleep(pause)
    return recorder


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("call", ["open", "write"])
@pytest.mark.parametrize("swallows", [0, 2], ids=["stops", "swallows the exception twice"])
def test_a_busy_sink_is_ended_and_named(tmp_path, said, call, swallows):
    sink = Sink(call, 20, swallows)
    recorder = record(sink, tmp_path)
    wait_for(lambda: len(sink.ended) > swallows)
    recorder.close()
    assert set(sink.ended) == {"SinkStopped"}
    assert len(said) == 1
    assert said[0].startswith(f"{WHO} took 0.")
    assert "s of processor time within" in said[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_sink_that_is_busy_at_the_end_holds_it_up_for_its_seconds_alone(tmp_path, said):
    recorder = record(Sink("close", 20), tmp_path)
    started = time.monotonic()
    recorder.close()
    assert time.monotonic() - started < 3
    assert len(said) == 1


def test_many_short_rows_count_together(tmp_path, said):
    sink = Sink("write", 0.01)
    recorder = record(sink, tmp_path, rows=200)
    wait_for(lambda: said)
    recorder.close()
    assert sink.rows < 200


def test_a_sink_that_waits_costs_nothing_and_stays(tmp_path, said, monkeypatch):
    sink = Sink("none", 0)
    monkeypatch.setattr(sink, "compute", lambda call: time.sleep(0.15))
    record(sink, tmp_path, rows=2, pause=0.2, close_seconds=10).close()
    assert (sink.rows, said) == (2, [])


def test_a_longer_run_allows_its_sinks_more(monkeypatch):
    now, used = [100.0], [5.0]
    monkeypatch.setattr(sink_budget.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sink_budget.time, "clock_gettime", lambda clock: used[0])
    budget = sink_budget.SinkBudget()
    budget.start_writing()
    now[0], used[0] = 200.0, 5.0 + 0.1 + 2.0  # 2 % of 100 s
    assert budget.excess() is None
    used[0] += 0.01
    assert budget.excess() == "took 2.1 s of processor time within 100 s, which slows training down"
