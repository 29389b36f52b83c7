"""Kits for validators, readers and sinks: each wrong plugin breaks the rule that it is for, the built-in ones none."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import BaseModel

from qpref.hooks import Field, MetricSink, Options, Reader, Reward, Validator
from qpref.hooks.manager import CHECK, READER, SINK, PluginHost
from qpref.hooks.streams import numbered_lines
from qpref.records import Finding, Row, Source
from qpref.testing import READER_RULES, REWARD_RULES, SINK_RULES, VALIDATOR_RULES, assert_conforms, check_plugin

HOST = PluginHost()
ROWS = [{"prompt": f"What is {number}?", "chosen": "One of them.", "rejected": "Größer."} for number in range(40)]


def broken(record, **arguments):
    return [result.rule for result in check_plugin(record, **arguments) if result.status == "broken"]


# Validators.


def finding(source, **changes):
    return Finding(**({"code": "odd", "severity": "warning", "message": "odd", "source": source} | changes))


class Sound:
    """Finds each example whose prompt has a question mark, and counts them at the end."""

    def __init__(self, options):
        self.count = 0

    def look(self, example, split):
        if "?" in example.prompt[-1].content:
            self.count += 1
            yield finding(example.source)

    def finish(self):
        return [finding(Source(path="train.jsonl", line=0), message=f"{self.count} of them")] if self.count else ()


class Wordless(Sound):
    def look(self, example, split):
        return None


class NoFinish:
    def __init__(self, options):
        pass

    def look(self, example, split):
        return ()


class PairsAlone(Sound):
    def look(self, example, split):
        return [finding(example.source)] if example.chosen == example.rejected else []


class NeedsRows(Sound):
    def finish(self):
        return [finding(Source(path="train.jsonl", line=0), message=f"{1 / self.count}")]


class Elsewhere(Sound):
    def look(self, example, split):
        yield finding(Source(path=example.source.path, line=example.source.line + 1000))


class Moody(Sound):
    calls = 0

    def look(self, example, split):
        Moody.calls += 1
        return [finding(example.source)] if Moody.calls % 7 == 0 else []


class Shared(Sound):
    """Keeps what it has seen in the class, so that the next run's check begins with it."""

    seen: list[Source] = []  # noqa: RUF012 - the mistake that the rule is for

    def __init__(self, options):
        self.first = len(self.seen)

    def look(self, example, split):
        self.seen.append(example.source)
        return ()

    def finish(self):
        return [finding(source) for source in self.seen[self.first :][:1]]


class Changing(Sound):
    def look(self, example, split):
        for turn in example.prompt:
            turn.extra.clear()
        return ()


class Hoarder(Sound):
    def __init__(self, options):
        self.texts = []

    def look(self, example, split):
        self.texts.append(example.prompt[0].content)
        return ()


class ChangesFolder(Sound):
    def look(self, example, split):
        import os

        os.chdir("/")
        return ()


def severity(value):
    return type("Severe", (Sound,), {"look": lambda self, example, split: [finding(example.source, severity=value)]})


WRONG_VALIDATORS = {
    "look returns None": (Wordless, "findings"),
    "no finish": (NoFinish, "record"),
    "it raises on single completions": (PairsAlone, "findings"),
    "it divides by the number of rows": (NeedsRows, "any_data"),
    "its findings are about no row": (Elsewhere, "findings"),
    "its findings change from run to run": (Moody, "repeatable"),
    "it keeps state in its class": (Shared, "stateless"),
    "it changes the examples": (Changing, "input"),
    "it keeps the texts": (Hoarder, "memory"),
    "it changes the working directory": (ChangesFolder, "findings"),
    "a severity of the recipe's": (severity("warn"), "findings"),
    "no severity": (severity(None), "findings"),
}


@pytest.mark.parametrize("case", WRONG_VALIDATORS)
def test_a_wrong_validator_breaks_its_rule(case):
    start, rule = WRONG_VALIDATORS[case]
    assert rule in broken(Validator(name="odd", summary="", options=Options, start=start))


def test_a_validator_that_is_started_once_for_all_breaks_the_record():
    only = Sound(None)
    assert broken(Validator(name="odd", summary="", options=Options, start=lambda options: only)) == ["record"]


def test_a_sound_validator_breaks_no_rule():
    results = check_plugin(Validator(name="sound", summary="", options=Options, start=Sound))
    assert [(result.rule, result.status) for result in results] == [(rule, "passed") for rule in VALIDATOR_RULES]


@pytest.mark.parametrize("name", ["pairs", "duplicates", "leakage", "bias", "text"])
def test_a_built_in_validator_breaks_no_rule(name):
    assert_conforms(HOST.load(CHECK, name).record)


# Readers.


def read_lines(path):
    for line in numbered_lines(path):
        if isinstance(line, Finding):
            yield line
            continue
        text, source = line
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if isinstance(values, dict):
            yield Row(values=values, source=source)
        else:
            yield finding(source, code="unreadable", severity="error")


def changed(**changes):
    """A reader that yields what the sound one does, each row with these changes."""

    def read(path):
        for item in read_lines(path):
            values = {name: change(item) for name, change in changes.items()}
            yield Row(**({"values": item.values, "source": item.source} | values)) if isinstance(item, Row) else item

    return read


def read_naively(path):
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            yield Row(values=json.loads(line), source=Source(path=str(path), line=number))


def read_replacing(path):
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                yield Row(values=dict(json.loads(line)), source=Source(path=str(path), line=number))
            except ValueError:
                yield finding(Source(path=str(path), line=number))


def read_with_a_copy(path):
    Path(f"{path}.cache").write_bytes(path.read_bytes())
    yield from read_lines(path)


LEFT_OPEN = []


def read_without_closing(path):
    LEFT_OPEN.append(path.open())
    yield from read_lines(path)


def read_forgiving(path):
    if path.exists():
        yield from read_lines(path)


def make_tiring():
    """Make a reader whose second pass has a row less."""
    passes = []

    def read(path):
        passes.append(path)
        yield from list(read_lines(path))[len(passes) % 2 :]

    return read


WRONG_READERS = {
    "it raises on invalid JSON": (read_naively, "truncated"),
    "it replaces what isn't UTF-8": (read_replacing, "not_text"),
    "all rows have one source": (changed(source=lambda row: Source(path="x", line=1)), "rows"),
    "lines count from 0": (changed(source=lambda row: Source(path="x", line=row.source.line - 1)), "rows"),
    "the source's path is a Path": (changed(source=lambda row: Source(path=Path("x"), line=1)), "rows"),
    "the source is a text": (changed(source=lambda row: "x:1"), "rows"),
    "values are a list": (changed(values=lambda row: list(row.values)), "rows"),
    "a value is a Path": (changed(values=lambda row: {"prompt": Path("x")}), "rows"),
    "a value within a list is NaN": (changed(values=lambda row: {"scores": [1.0, math.nan]}), "rows"),
    "a column is a number": (changed(values=lambda row: {0: "x"}), "rows"),
    "it yields tuples": (lambda path: iter([("a", "b")]), "rows"),
    "the second pass differs": (make_tiring(), "repeatable"),
    "it writes beside the data": (read_with_a_copy, "untouched"),
    "it leaves files open": (read_without_closing, "closes"),
    "a missing file has no rows": (read_forgiving, "missing"),
    "an empty file has a row": (
        lambda path: (
            read_lines(path) if path.stat().st_size else iter([Row(values={}, source=Source(path=str(path), line=1))])
        ),
        "empty",
    ),
}


@pytest.fixture
def sample(tmp_path):
    """`sample("csv")`: the rows in a file of that suffix."""

    def write(suffix):
        path = tmp_path / f"pairs.{suffix}"
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        elif suffix in ("csv", "tsv"):
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ROWS[0], delimiter="," if suffix == "csv" else "\t")
                writer.writeheader()
                writer.writerows(ROWS)
        else:
            lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
            path.write_text(f"[{','.join(lines)}]" if suffix == "json" else "\n".join(lines) + "\n")
        return path

    yield write
    while LEFT_OPEN:
        LEFT_OPEN.pop().close()


@pytest.mark.parametrize("case", WRONG_READERS)
def test_a_wrong_reader_breaks_its_rule(sample, case):
    read, rule = WRONG_READERS[case]
    assert rule in broken(Reader(name="odd", summary="", read=read), sample=sample("odd"))


def test_a_sound_reader_breaks_no_rule(sample):
    results = check_plugin(Reader(name="sound", summary="", read=read_lines), sample=sample("sound"))
    assert [(result.rule, result.status) for result in results] == [(rule, "passed") for rule in READER_RULES]


def test_without_a_sample_the_rules_that_need_one_are_skipped():
    results = check_plugin(Reader(name="sound", summary="", read=read_lines))
    assert [result.rule for result in results if result.status == "passed"] == ["record", "empty", "missing"]
    assert {result.message for result in results if result.status == "skipped"} == {"needs a sample of its data"}


@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_built_in_reader_breaks_no_rule(sample, name):
    assert_conforms(HOST.load(READER, name).record, sample=sample(name))


# Sinks.


class Quiet:
    """Keeps lines until it is closed: one that fails leaves no file open."""

    mode = "a"

    def __init__(self, options, context):
        self.path, self.lines = context.make_folder() / "rows.txt", []

    def write(self, row):
        self.lines.append(f"{row.step} {dict(row.values)}\n")

    def close(self):
        with self.path.open(self.mode) as file:
            file.writelines(self.lines)
        self.lines = []


class Rounding(Quiet):
    def write(self, row):
        self.lines.append(f"{round(row.values.get('loss', 0))}\n")


class Starting(Quiet):
    mode = "w"


class Straying(Quiet):
    def __init__(self, options, context):
        self.path, self.lines = context.run_folder / "rows.txt", []


class Loud(Quiet):
    def write(self, row):
        print(f"step {row.step}")


class ClosesOnce(Quiet):
    def close(self):
        self.lines.append("the end\n")
        super().close()
        self.lines = None


class WantsRows(Quiet):
    last = None

    def write(self, row):
        self.last = row

    def close(self):
        self.lines.append(f"{self.last.step}\n")


class OneTable(Quiet):
    """Takes the metrics of its first row for those of all."""

    names = None

    def write(self, row):
        self.names = self.names or list(row.values)
        self.lines.append(f"{[row.values[name] for name in self.names]}\n")


class Busy(Quiet):
    def write(self, row):
        sum(range(300_000))


WRONG_SINKS = {
    "it rounds NaN": (Rounding, "undefined"),
    "a resumed run begins the file": (Starting, "resumed"),
    "it writes into the run folder": (Straying, "folder"),
    "it prints under --quiet": (Loud, "printing"),
    "a second close raises": (ClosesOnce, "closed_twice"),
    "it needs a row": (WantsRows, "no_row"),
    "it expects the same metrics in every row": (OneTable, "run"),
    "it computes": (Busy, "speed"),
    "it has no close": (lambda options, context: print, "run"),
}


@pytest.mark.parametrize("case", WRONG_SINKS)
def test_a_wrong_sink_breaks_its_rule(case):
    opened, rule = WRONG_SINKS[case]
    assert rule in broken(MetricSink(name="odd", summary="", options=Options, open=opened))


def test_a_sound_sink_breaks_no_rule():
    results = check_plugin(MetricSink(name="sound", summary="", options=Options, open=Quiet))
    assert [(result.rule, result.status) for result in results] == [(rule, "passed") for rule in SINK_RULES]


@pytest.mark.parametrize("name", ["console", "tensorboard"])
def test_a_built_in_sink_breaks_no_rule(name):
    assert_conforms(HOST.load(SINK, name).record)


# Rewards.


def scored(function):
    return Reward(name="odd", summary="", options=Options, build=lambda options: function)


WRONG_REWARDS = {
    "a score depends on the others": (lambda responses: [float(len(responses))] * len(responses), "alone"),
    "ranks within a call": (lambda responses: [float(number) for number, _ in enumerate(responses)], "alone"),
    "one score for all": (lambda responses: [1.0], "scores"),
    "a mean of no words": (lambda responses: [1 / len(one.text.split()) for one in responses], "scores"),
    "a score that is NaN": (lambda responses: [math.nan for _ in responses], "scores"),
    "a score that is a text": (lambda responses: ["good" for _ in responses], "scores"),
}


@pytest.mark.parametrize("case", WRONG_REWARDS)
def test_a_wrong_reward_breaks_its_rule(case):
    function, rule = WRONG_REWARDS[case]
    assert rule in broken(scored(function))


def test_a_sound_reward_breaks_no_rule():
    results = check_plugin(scored(lambda responses: [float(len(one.text)) for one in responses]))
    assert [(result.rule, result.status) for result in results] == [(rule, "passed") for rule in REWARD_RULES]


# Records and options of any kind.


class Limit(Options):
    limit: int = Field(ge=1)


RECORDS = {
    "options of another base": Validator(name="odd", summary="", options=BaseModel, start=Sound),
    "no options": Validator(name="odd", summary="", options=None, start=Sound),
    "a summary that is no text": Validator(name="odd", summary=None, options=Options, start=Sound),
    "a flag that is no bool": Validator(name="odd", summary="", options=Options, start=Sound, skips_refused="yes"),
    "a start without options": Validator(name="odd", summary="", options=Options, start=lambda: Sound(None)),
    "a read with a context but no options": Reader(name="odd", summary="", read=lambda path, context: iter(())),
    "a read with options but no context": Reader(name="odd", summary="", read=read_lines, options=Options),
    "a reader that takes what there isn't": Reader(name="odd", summary="", read=read_lines, takes="url"),
    "an open without a context": MetricSink(name="odd", summary="", options=Options, open=lambda options: None),
    "no time to close": MetricSink(name="odd", summary="", options=Options, open=Quiet, close_seconds=0),
    "one requirement as a text": MetricSink(name="odd", summary="", options=Options, open=Quiet, requires="acme>=2"),
    "no requirement": MetricSink(name="odd", summary="", options=Options, open=Quiet, requires=("acme >> 2",)),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_with_a_wrong_field_breaks_the_record(case):
    assert broken(RECORDS[case]) == ["record"]


@pytest.mark.parametrize(("options", "rules"), [({}, ["options"]), ({"limit": 0}, ["options"]), ({"limit": 2}, [])])
def test_a_plugin_is_checked_with_the_options_that_it_needs(options, rules):
    record = Validator(name="sound", summary="", options=Limit, start=Sound)
    assert broken(record, options=options) == rules


def test_a_broken_rule_is_named_with_its_plugin():
    record = Validator(name="odd", summary="", options=Options, start=Wordless)
    with pytest.raises(AssertionError, match="validator 'odd' breaks its contract\n  findings") as caught:
        assert_conforms(record)
    assert "look at heldout.jsonl:1 returned None, not findings" in str(caught.value)
