"""A tracker gets each row once, whatever was killed, failed or added in between."""

from __future__ import annotations

import json
import math

import pytest

from qpref.errors import PluginError
from qpref.hooks import RunRecord, SinkContext, Table, TrackerWriter, flattened
from qpref.records import MetricRow


class Kept:
    """A tracker that keeps what it gets."""

    def __init__(self):
        self.rows, self.tables, self.summaries = [], {}, []

    def log(self, values, step):
        self.rows.append((step, dict(values)))

    def add_table(self, name, table):
        self.tables[name] = table

    def finish(self, summary):
        self.summaries.append(summary)


NO_TABLE = Table()


def context_of(folder, first_step=0, samples=NO_TABLE):
    return SinkContext(run_folder=folder, first_step=first_step, total_steps=9, samples=lambda count: samples)


def row(step, split="train", **values):
    return MetricRow(step=step, split=split, values=values or {"loss": 0.5}, tokens=step, seconds=0.5)


def line(step, split="train", **values):
    return json.dumps({"step": step, "split": split} | values | {"tokens": step, "seconds": 0.5}) + "\n"


def opened(context, parts=None, samples=0):
    record = RunRecord(context, "kept", parts=parts)
    if record.id is None:
        record.begin("run-1")
    tracker = Kept()
    return TrackerWriter(tracker, record, context, samples), tracker, record


def test_rows_that_the_tracker_has_are_not_sent_again(tmp_path):
    writer, _, _ = opened(context_of(tmp_path))
    for one in (row(0, "eval"), row(1), row(2), row(2, "eval"), row(3)):
        writer.write(one)
    (tmp_path / "metrics.jsonl").write_text(line(0, "eval") + line(1) + line(2) + line(2, "eval"))
    writer, tracker, record = opened(context_of(tmp_path, first_step=2))  # the process was killed after step 3
    for one in (row(3), row(4), row(4, "eval")):
        writer.write(one)
    assert record.id == "run-1"
    assert [step for step, _ in tracker.rows] == [4, 4]


@pytest.mark.parametrize("parts", [None, "part-*"])
def test_rows_that_the_tracker_lacks_come_from_metrics_jsonl(tmp_path, parts):
    writer, _, _ = opened(context_of(tmp_path), parts)
    writer.write(row(1))  # and then the tracker fails, or the process is killed
    (tmp_path / "metrics.jsonl").write_text(line(1, loss=0.5) + line(2, loss=None, margin=0.25) + line(3, loss=9))
    _, tracker, _ = opened(context_of(tmp_path, first_step=2), parts)
    assert tracker.rows == ([(1, {"loss": 0.5, "tokens": 1, "seconds": 0.5})] if parts else []) + [
        (2, {"margin": 0.25, "tokens": 2, "seconds": 0.5})
    ]


def test_a_part_that_was_not_finished_is_removed_and_its_rows_are_sent_again(tmp_path):
    context = context_of(tmp_path)
    writer, _, _ = opened(context, "part-*")
    (tmp_path / "sinks" / "part-1").mkdir()
    writer.write(row(1))
    writer.close()
    (tmp_path / "metrics.jsonl").write_text(line(1, loss=0.5) + line(2, loss=0.25))
    resumed = context_of(tmp_path, first_step=2)
    _, tracker, record = opened(resumed, "part-*")
    (tmp_path / "sinks" / "part-2").mkdir()  # and the process is killed
    assert [step for step, _ in tracker.rows] == [2]
    _, tracker, record = opened(resumed, "part-*")
    assert [path.name for path in sorted((tmp_path / "sinks").glob("part-*"))] == ["part-1"]
    assert ([step for step, _ in tracker.rows], record.is_empty) == ([2], False)


def test_what_is_no_number_is_left_out(tmp_path):
    writer, tracker, _ = opened(context_of(tmp_path))
    writer.write(row(1, "eval", loss=math.nan, low=-math.inf, margin=1.0))
    assert tracker.rows == [(1, {"margin": 1.0})]


def test_tables_and_summary_are_those_of_a_finished_run(tmp_path):
    samples = Table(columns=("prompt",), rows=(("Why?",),))
    lines = (
        line(0, "eval", eval_loss=0.5, eval_late=None),
        line(1, loss=1),
        line(1, "eval", eval_loss=0.25, eval_late=1),
    )
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    writer, tracker, _ = opened(context_of(tmp_path, samples=samples), samples=1)
    writer.summarize({"steps": 1, "verdict": {"sentence": "better"}})
    writer.close()
    assert tracker.tables == {
        "heldout": Table(columns=("step", "eval_loss"), rows=((0, 0.5), (1, 0.25))),
        "samples": samples,
    }
    assert tracker.summaries == [{"steps": 1, "verdict.sentence": "better"}]


def test_no_text_leaves_the_machine_unless_asked_for(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    writer, tracker, _ = opened(context_of(tmp_path, samples=Table(columns=("prompt",), rows=(("Why?",),))))
    writer.summarize({"steps": 1})
    writer.close()
    assert tracker.tables == {}


def test_a_stopped_run_closes_without_a_summary(tmp_path):
    writer, tracker, _ = opened(context_of(tmp_path))
    writer.close()
    assert (tracker.summaries, tracker.tables) == ([None], {})


def test_a_nested_document_gets_dotted_keys():
    document = {"loss": [{"name": "dpo", "beta": 0.1}], "data": {"heldout": None}, "train": {"max": True}, "tags": []}
    assert flattened(document) == {"loss.0.name": "dpo", "loss.0.beta": 0.1, "train.max": True}


@pytest.mark.parametrize("text", ["{", "[]", '{"run_id": 1}', '{"run_id": "a", "last_steps": {"train": "x"}}'])
def test_a_damaged_record_is_named(tmp_path, text):
    context = context_of(tmp_path)
    (context.make_folder() / "kept.json").write_text(text)
    with pytest.raises(PluginError, match="damaged"):
        RunRecord(context, "kept")
