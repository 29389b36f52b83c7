"""metrics.jsonl, the averages in it, and sinks that cannot hurt a run whatever they do."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import preference_rows, write_jsonl

import qpref
from qpref.hooks import Options
from qpref.hooks.manager import Loaded, Offer
from qpref.hooks.process_state import ProcessState
from qpref.hooks.types import MetricSink, SinkContext
from qpref.recipe.choices import Choice
from qpref.recipe.resolve import make_plan
from qpref.records import MetricRow
from qpref.training import metrics
from qpref.training.metrics import Averages, Recorder
from qpref.training.run import train_plan

SHARED_KEYS = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
LOGPS = ["logps/chosen", "logps/rejected"]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(folder: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows_of(folder)]


# The averages.


def test_average_is_over_pairs_and_not_over_microbatches():
    # C17: micro-batches of 3 and 1 pairs; (1 + 2 + 3 + 10) / 4 = 4, not (2 + 10) / 2 = 6
    averages = Averages()
    averages.add({"loss": torch.tensor([1.0, 2.0, 3.0])})
    averages.add({"loss": torch.tensor([10.0])})
    assert averages.means() == {"loss": 4.0}


def test_average_leaves_out_what_is_not_a_number():
    averages = Averages()
    averages.add({"loss": torch.tensor([2.0, math.nan]), "other": torch.tensor([1.0, 5.0])})
    averages.add({"loss": torch.tensor([8.0, 5.0]), "other": torch.tensor([1.0, 5.0])})
    assert averages.means() == {"loss": 5.0, "other": 3.0}  # (2 + 8 + 5) / 3 and (1 + 5 + 1 + 5) / 4


def test_average_of_nothing_but_not_a_number_is_not_a_number():
    averages = Averages()
    averages.add({"loss": torch.tensor([math.nan, math.nan])})
    assert math.isnan(averages.means()["loss"])


def test_average_shows_an_infinite_pair():
    averages = Averages()
    averages.add({"loss": torch.tensor([1.0, math.inf])})
    assert averages.means() == {"loss": math.inf}


def test_average_of_a_name_that_comes_late_is_over_its_own_pairs():
    averages = Averages()
    averages.add({"loss": torch.tensor([1.0, 3.0])})
    averages.add({"loss": torch.tensor([5.0]), "late": torch.tensor([7.0])})
    assert averages.means() == {"loss": 3.0, "late": 7.0}


def test_averages_start_anew_after_clear():
    averages = Averages()
    averages.add({"loss": torch.tensor([1.0])})
    averages.means()
    averages.clear()
    averages.add({"loss": torch.tensor([4.0])})
    assert averages.means() == {"loss": 4.0}


def test_averages_keep_no_graph():
    values = torch.ones(2, requires_grad=True)
    averages = Averages()
    averages.add({"loss": values * 2})
    assert not any(totals.requires_grad for _, totals in averages._pending)


# The rows.


def recipe_of(base: Path, folder: Path, dropout: float = 0.0, **train: object) -> dict[str, dict[str, object]]:
    """12 pairs in batches of 4, so 3 steps an epoch, and 5 held-out pairs."""
    return {
        "model": {"base": str(base), "quantization": "none", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": dropout},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", preference_rows(12))),
            "heldout": str(write_jsonl(folder / "heldout.jsonl", preference_rows(5, start=100))),
        },
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo"},
        "train": {"learning_rate": 1e-3, "batch_size": 4, "gradient_checkpointing": False} | train,
        "sinks": [],
    }


@pytest.fixture(scope="module")
def finished(make_base, tmp_path_factory) -> Path:
    """A run of 2 epochs with held-out rows every 2 steps."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_of(make_base(), folder, epochs=2, eval_every=2, warmup_ratio=0.5, schedule="linear")
    return qpref.train(recipe, output=folder / "run").path


def test_every_line_is_one_flat_object(finished):
    kinds = {type(value) for row in rows_of(finished) for value in row.values()}
    assert kinds == {int, float, str}


def test_training_rows_have_the_fields_names(finished):
    wanted = {"step", "split", *SHARED_KEYS, *LOGPS, "grad_norm", "learning_rate", "tokens", "seconds"}
    assert {frozenset(row) for row in rows_of(finished) if row["split"] == "train"} == {frozenset(wanted)}


def test_held_out_rows_have_the_fields_names_with_eval_before_them(finished):
    averaged = [f"eval_{name}" for name in (*SHARED_KEYS, *LOGPS, "logps/accuracies")]
    wanted = {"step", "split", *averaged, "tokens", "seconds"}
    first, *others = (row for row in rows_of(finished) if row["split"] == "eval")
    assert frozenset(first) == wanted
    assert {frozenset(row) for row in others} == {frozenset({*wanted, "eval_logps/length_bias"})}


def test_rows_come_in_order_with_held_out_ones_at_the_start_and_the_end(finished):
    assert [(row["split"], row["step"]) for row in rows_of(finished)] == [
        ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4),
        ("train", 5), ("train", 6), ("eval", 6),
    ]  # fmt: skip


def test_margins_are_chosen_less_rejected(finished):
    for row in rows_of(finished):
        prefix = "" if row["split"] == "train" else "eval_"
        difference = row[f"{prefix}rewards/chosen"] - row[f"{prefix}rewards/rejected"]
        assert row[f"{prefix}rewards/margins"] == pytest.approx(difference, abs=1e-6)


def test_learning_rates_are_the_schedules(finished):
    # 1e-3, half of 6 steps warming up: 1/3, 2/3, 3/3, then a line to 0: 3/3, 2/3, 1/3
    rates = [row["learning_rate"] for row in rows_of(finished) if row["split"] == "train"]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])


def test_tokens_and_seconds_only_grow(finished):
    counts = [(row["tokens"], row["seconds"]) for row in rows_of(finished)]
    assert counts[0] == (0, 0.0)
    assert counts == sorted(counts)


def test_tokens_are_those_that_were_fed(finished):
    # Bytes are tokens. A prompt is fed once; of each response all but the last token, so its text without <|im_end|>.
    prompts = [f"<user\nQuestion {number}: what comes after {number}?>\n<assistant\n" for number in range(12)]
    chosen = [f"After {number} comes {number + 1}." + " It does." * (number % 3) for number in range(12)]
    rejected = [f"WHO KNOWS WHAT {number} IS!!" + " NOT ME!" * (number % 2) for number in range(12)]
    assert rows_of(finished)[-1]["tokens"] == 2 * len("".join(prompts + chosen + rejected))


def test_accuracy_at_step_0_is_by_log_probability(finished):
    first = rows_of(finished)[0]
    assert first["eval_rewards/margins"] == 0.0
    assert first["eval_rewards/accuracies"] == first["eval_logps/accuracies"]
    assert (first["eval_logps/accuracies"] * 5) % 1 == pytest.approx(0, abs=1e-6)  # a share of 5 pairs, no halves


def test_row_of_a_window_averages_over_its_pairs(make_recipe, tmp_path):
    # 10 pairs in batches of 4: steps of 4, 4, 2. A row every 3 steps weighs them so: (4 a + 4 b + 2 c) / 10.
    data = str(write_jsonl(tmp_path / "ten.jsonl", preference_rows(10)))
    for every in (1, 3):
        qpref.train(make_recipe({"data.train": data, "train.log_every": every}), output=tmp_path / f"every-{every}")
    single = [row for row in rows_of(tmp_path / "every-1") if row["split"] == "train"]
    (window,) = [row for row in rows_of(tmp_path / "every-3") if row["split"] == "train"]
    for name in (*SHARED_KEYS, *LOGPS):
        weighted = sum(size * row[name] for size, row in zip((4, 4, 2), single, strict=True)) / 10
        assert window[name] == pytest.approx(weighted, rel=1e-5, abs=1e-7)


def test_last_training_row_stands_though_its_window_is_not_full(make_recipe, tmp_path):
    qpref.train(make_recipe({"train.epochs": 2, "train.log_every": 4}), output=tmp_path / "run")
    assert [row["step"] for row in rows_of(tmp_path / "run") if row["split"] == "train"] == [4, 6]


def a_row(step: int, **values: float) -> MetricRow:
    return MetricRow(step=step, split="train", values=values, tokens=10 * step, seconds=0.5 * step)


def context_of(folder: Path) -> SinkContext:
    return SinkContext(run_folder=folder, first_step=0, total_steps=9)


def test_what_is_no_number_is_written_as_null(tmp_path):
    recorder = Recorder(tmp_path / "metrics.jsonl", 0, (), context_of(tmp_path))
    recorder.write(a_row(1, nan=math.nan, inf=math.inf, low=-math.inf, loss=0.5))
    recorder.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "split": "train", "nan": null, "inf": null, "low": null, "loss": 0.5, "tokens": 10, '
        '"seconds": 0.5}\n'
    )


def test_recorder_keeps_the_given_bytes_and_cuts_the_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    recorder = Recorder(path, 12, (), context_of(tmp_path))
    recorder.write(a_row(2))
    recorder.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "split": "train", "tokens": 20, "seconds": 1.0}\n'


# The sinks.


class Sink:
    """A well-behaved sink; `rows` are those that it got."""

    def __init__(self, options: object, context: SinkContext) -> None:
        self.context, self.rows, self.closed = context, [], False
        self.thread = threading.current_thread()

    def write(self, row: MetricRow) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True


class Keeper:
    """Opens sinks of a class and keeps them."""

    def __init__(self, kind: type[Sink] = Sink) -> None:
        self._kind, self.sinks = kind, []

    def __call__(self, options: object, context: SinkContext) -> Sink:
        self.sinks.append(self._kind(options, context))
        return self.sinks[-1]


def sink_of(opener: Callable[[object, SinkContext], object], name: str = "odd", close_seconds: float = 5.0) -> Choice:
    record = MetricSink(name=name, summary="", options=Options, open=opener, close_seconds=close_seconds)
    return Choice(Loaded(record, Offer("sink", name, "acme-sinks", "3.1", "acme_sinks")), Options())


def test_sink_gets_every_row_in_order_and_is_closed(tmp_path):
    keeper = Keeper()
    recorder = Recorder(tmp_path / "metrics.jsonl", 0, [sink_of(keeper)], context_of(tmp_path))
    rows = [a_row(step, loss=float(step)) for step in range(50)]
    for row in rows:
        recorder.write(row)
    recorder.close()
    assert (keeper.sinks[0].rows, keeper.sinks[0].closed, keeper.sinks[0].context) == (rows, True, context_of(tmp_path))


def test_sink_that_takes_the_result_gets_it_after_all_rows_and_others_do_not(tmp_path):
    class Summarizing(Sink):
        def summarize(self, summary: dict[str, object]) -> None:
            self.rows.append(summary)

    keepers = [Keeper(Summarizing), Keeper()]
    sinks = [sink_of(keeper) for keeper in keepers]
    recorder = Recorder(tmp_path / "metrics.jsonl", 0, sinks, context_of(tmp_path))
    recorder.write(a_row(1))
    recorder.summarize({"steps": 1})
    recorder.close()
    assert [keeper.sinks[0].rows for keeper in keepers] == [[a_row(1), {"steps": 1}], [a_row(1)]]
    assert all(keeper.sinks[0].closed for keeper in keepers)


def test_sink_of_a_run_gets_its_recipe_its_samples_and_its_result(make_base, tmp_path):
    class Summarizing(Sink):
        def summarize(self, summary: dict[str, object]) -> None:
            self.summary = summary

    keeper = Keeper(Summarizing)
    folder = train_with((sink_of(keeper),), make_base(), tmp_path)
    [sink] = keeper.sinks
    assert sink.context.recipe["loss"]["name"] == "dpo"
    samples = sink.context.samples(2)
    assert (samples.columns, len(samples.rows)) == (("prompt", "chosen", "rejected"), 2)
    assert [cell.split("<|im_end|>")[0] for cell in samples.rows[1][1:]] == [
        "After 101 comes 102. It does. It does.",
        "WHO KNOWS WHAT 101 IS!! NOT ME!",
    ]
    result = json.loads((folder / "result.json").read_text())
    assert sink.summary == {
        name: value for name, value in result.items() if name not in ("adapter_files", "metrics_sha256", "sha256")
    }


def test_sink_runs_on_a_thread_that_no_process_waits_for(tmp_path):
    keeper = Keeper()
    Recorder(tmp_path / "metrics.jsonl", 0, [sink_of(keeper)], context_of(tmp_path)).close()
    assert keeper.sinks[0].thread.daemon


def refuse_to_open(options: object, context: SinkContext) -> Sink:
    raise ConnectionError("no route")


class RaisesOnWrite(Sink):
    def write(self, row: MetricRow) -> None:
        raise ConnectionError("no route")


class RaisesOnClose(Sink):
    def close(self) -> None:
        raise ConnectionError("no route")


class Exits(Sink):
    def write(self, row: MetricRow) -> None:
        sys.exit("no route")


class SpoilsTheRow(Sink):
    def write(self, row: MetricRow) -> None:
        row.values.clear()
        raise ConnectionError("no route")


RAISING = {
    "on open": refuse_to_open,
    "on write": RaisesOnWrite,
    "on close": RaisesOnClose,
    "sys.exit": Exits,
    "spoils the row": SpoilsTheRow,
}


@pytest.fixture(scope="module")
def without_sinks(make_base, tmp_path_factory) -> Path:
    return train_with((), make_base(), tmp_path_factory.mktemp("plain"))


def train_with(sinks: tuple[Choice, ...], base: Path, folder: Path) -> Path:
    """A run with dropout, with these sinks in the place of the recipe's."""
    plan = make_plan(recipe_of(base, folder, dropout=0.1), (), folder / "run")
    return train_plan(replace(plan, sinks=sinks))


def same_result(folder: Path, other: Path) -> bool:
    adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (folder, other)]
    return adapters[0] == adapters[1] and without_seconds(folder) == without_seconds(other)


@pytest.mark.parametrize("failure", RAISING)
def test_run_with_a_raising_sink_ends_as_without_it(make_base, without_sinks, tmp_path, failure):
    folder = train_with((sink_of(RAISING[failure]),), make_base(), tmp_path)
    assert same_result(folder, without_sinks)


def test_run_with_a_hanging_sink_ends_as_without_it(make_base, without_sinks, tmp_path):
    hanging = sink_of(hanging_until(threading.Event()), close_seconds=0.2)  # the wait itself is measured below
    folder = train_with((hanging,), make_base(), tmp_path)
    assert same_result(folder, without_sinks)


def hanging_until(released: threading.Event) -> type[Sink]:
    class Hangs(Sink):
        def write(self, row: MetricRow) -> None:
            released.wait(30)

    return Hangs


@pytest.mark.parametrize("failure", RAISING)
def test_raising_sink_is_reported_once_by_name_and_origin(tmp_path, said, failure):
    recorder = Recorder(tmp_path / "metrics.jsonl", 0, [sink_of(RAISING[failure])], context_of(tmp_path))
    for step in range(5):
        recorder.write(a_row(step, loss=1.0))
        time.sleep(0.01)
    recorder.close()
    kind = "SystemExit" if failure == "sys.exit" else "ConnectionError"
    assert said == [
        f"metric sink 'odd' (acme-sinks 3.1 [sink-odd]) raised {kind}: no route; "
        "it gets no more rows, metrics.jsonl has them all"
    ]


def test_a_sink_that_changes_the_process_is_named_and_undone(tmp_path, said):
    """Its thread shares the working directory, the recursion limit and more with training."""
    before, written = ProcessState.now(), threading.Event()

    class Changes(Sink):
        def write(self, row: MetricRow) -> None:
            if row.step == 1:
                os.chdir("/")
                sys.setrecursionlimit(4321)
                torch.set_default_dtype(torch.float64)
            else:
                os.umask(0)
            written.set()

        def close(self) -> None:
            gc.disable()

    recorder = Recorder(tmp_path / "metrics.jsonl", 0, [sink_of(Keeper(Changes))], context_of(tmp_path))
    recorder.write(a_row(1))
    assert written.wait(30)
    recorder.write(a_row(2))
    name = "metric sink 'odd' (acme-sinks 3.1 [sink-odd])"
    assert said == [
        f"{name} changed torch's default dtype, the working directory, the recursion limit, which is set back"
    ]
    recorder.close()
    assert said[1:] == [f"{name} changed the umask, garbage collection, which is set back"]
    assert ProcessState.now() == before


def test_hanging_sinks_hold_the_end_up_for_five_seconds_together(tmp_path, said):
    released = threading.Event()
    sinks = [sink_of(hanging_until(released), f"odd-{place}") for place in range(3)]
    recorder = Recorder(tmp_path / "metrics.jsonl", 0, sinks, context_of(tmp_path))
    recorder.write(a_row(1, loss=1.0))
    started = time.monotonic()
    recorder.close()
    waited = time.monotonic() - started
    released.set()
    assert 4.9 <= waited <= 6.0
    assert said == [
        f"metric sink 'odd-{place}' (acme-sinks 3.1 [sink-odd-{place}]) didn't finish within 5 s; "
        "it gets no more rows, metrics.jsonl has them all"
        for place in range(3)
    ]


def test_hanging_sink_never_holds_up_a_row(tmp_path, said, monkeypatch):
    # More rows than its queue of 1000 takes: the sink is dropped, metrics.jsonl has them all.
    released = threading.Event()
    monkeypatch.setattr(metrics.fsio.os, "fsync", lambda descriptor: None)  # 1200 of them take seconds
    recorder = Recorder(tmp_path / "metrics.jsonl", 0, [sink_of(hanging_until(released))], context_of(tmp_path))
    for step in range(1200):
        recorder.write(a_row(step))
    recorder.close()
    released.set()
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1200))
    assert [line.partition(";")[0] for line in said] == [
        "metric sink 'odd' (acme-sinks 3.1 [sink-odd]) takes no more rows"
    ]


def test_slow_sink_gets_all_its_rows_before_the_end(tmp_path):
    class Slow(Sink):
        def write(self, row: MetricRow) -> None:
            time.sleep(0.01)
            super().write(row)

    keeper = Keeper(Slow)
    recorder = Recorder(tmp_path / "metrics.jsonl", 0, [sink_of(keeper)], context_of(tmp_path))
    for step in range(20):
        recorder.write(a_row(step))
    recorder.close()
    assert (len(keeper.sinks[0].rows), keeper.sinks[0].closed) == (20, True)


@pytest.mark.parametrize("failure", ["on write", "spoils the row"])
def test_one_sinks_failure_leaves_the_others_their_rows(tmp_path, failure):
    keeper = Keeper()
    sinks = [sink_of(RAISING[failure]), sink_of(keeper)]
    recorder = Recorder(tmp_path / "metrics.jsonl", 0, sinks, context_of(tmp_path))
    rows = [a_row(step, loss=1.0) for step in range(5)]
    for row in rows:
        recorder.write(row)
    recorder.close()
    assert keeper.sinks[0].rows == [a_row(step, loss=1.0) for step in range(5)]
