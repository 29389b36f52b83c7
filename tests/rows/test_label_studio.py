"""Label Studio's exports: the raw one reads as the flat one, and nothing that annotators dispute is decided."""

from __future__ import annotations

import json

import pytest

from qpref.data.source import DataSource
from qpref.hooks.manager import READER, PluginHost
from qpref.recipe.choices import SourceChoice
from qpref.recipe.contest_section import ContestSection
from qpref.records import Finding, PreferencePair, Row, Source
from qpref.rows.label_studio import flattened

SOURCE = Source(path="export.json", line=1)
DATA = {"prompt": "1 + 1?", "answer1": "21", "answer2": "2"}


def annotation(selected, name="comparison", **more):
    result = {"from_name": name, "to_name": "answer1,answer2", "type": "pairwise", "value": {"selected": selected}}
    return {"id": 1, "result": [result]} | more


def task(*annotations, data=DATA):
    return {"id": 7, "data": data, "annotations": list(annotations), "predictions": []}


def read(values, **choice):
    source = DataSource(
        SourceChoice(location="export.json", split="train", reader=PluginHost().load(READER, "json"), **choice)
    )
    return source.records(Row(values=values, source=SOURCE))


def sides(records):
    (pair,) = records
    assert isinstance(pair, PreferencePair)
    return pair.prompt[-1].content, pair.chosen[0].content, pair.rejected[0].content


@pytest.mark.parametrize(
    "values",
    [
        task(annotation("right")),
        task(annotation("right"), annotation("right", id=2)),
        task(annotation("left", was_cancelled=True), annotation("right")),
        DATA | {"comparison": [{"selected": "right"}], "annotator": 1, "lead_time": 2.5},
        {name: str(value) for name, value in DATA.items()} | {"comparison": json.dumps([{"selected": "right"}])},
    ],
    ids=["raw", "two who agree", "one who cancelled", "JSON-MIN", "CSV"],
)
def test_every_export_of_a_comparison_is_one_pair(values):
    assert sides(read(values)) == ("1 + 1?", "2", "21")


def test_annotators_who_disagree_decide_nothing():
    found = read(task(annotation("left"), annotation("right")))
    assert isinstance(found, Finding)
    assert (found.code, found.source) == ("bad_label", SOURCE)
    assert "comparison: the annotators disagree, found 'left' and 'right'" in found.message


def test_parts_of_a_task_are_columns_for_the_recipe():
    data = {"question": "1 + 1?", "a": "21", "b": "2"}
    better = {"from_name": "better", "to_name": "a", "type": "choices", "value": {"choices": ["B"]}}
    rated = {"from_name": "sure", "to_name": "a", "type": "rating", "value": {"rating": 4}}
    contest = ContestSection(first="a", second="b", winner="better", first_wins=["A"], second_wins=["B"])
    values = task({"result": [better, rated]}, data=data)
    assert flattened(Row(values=values, source=SOURCE)).values == data | {"better": "B", "sure": 4}
    assert sides(read(values, columns={"prompt": "question"}, contest=contest)) == ("1 + 1?", "2", "21")


@pytest.mark.parametrize(
    "values",
    [
        task(),
        task(annotation("right", was_cancelled=True)),
        task({"result": []}),
        task({"result": ["right", {"from_name": 1, "value": 2}, {"from_name": "comparison"}]}),
    ],
    ids=["no annotation", "cancelled", "no result", "odd results"],
)
def test_a_task_without_a_verdict_is_refused(values):
    found = read(values)
    assert isinstance(found, Finding)
    assert found.severity == "error"


@pytest.mark.parametrize(
    "more",
    [{"data": "x", "annotations": []}, {"data": {}, "annotations": "x"}, {"data": {}, "annotations": [{"labels": []}]}],
    ids=str,
)
def test_a_row_with_columns_of_these_names_alone_stays_as_it_is(more):
    row = Row(values={"prompt": "Why?", "chosen": "So.", "rejected": "No."} | more, source=SOURCE)
    assert flattened(row) is row


def test_several_parts_of_a_value_stay_together():
    values = task({"result": [{"from_name": "tags", "type": "choices", "value": {"choices": ["x", "y"]}}]})
    assert flattened(Row(values=values, source=SOURCE)).values["tags"] == ["x", "y"]
