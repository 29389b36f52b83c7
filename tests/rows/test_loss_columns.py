"""Numbers of a row that a loss reads: by row, by side and by ranked response, and the rows that are refused."""

from __future__ import annotations

import json

import pytest

from qpref.data.source import DataSource
from qpref.errors import RecipeError
from qpref.hooks import Reader
from qpref.hooks.manager import Loaded, Offer
from qpref.recipe.choices import SourceChoice
from qpref.recipe.contest_section import ContestSection
from qpref.records import Finding, Row, Source

SCORES = ("score_chosen", "score_rejected")
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
SINGLE = {"prompt": "p", "completion": "good", "label": True}


def read(values: dict, names: tuple[str, ...], **choice: object) -> list[dict[str, float]] | Finding:
    """The columns of each record of a row."""
    reader = Loaded(Reader(name="x", summary="", read=lambda path: iter(()), takes="name"),
                    Offer("read", "x", "acme", "2.0", "acme_x"))  # fmt: skip
    source = DataSource(
        SourceChoice(location="rows.x", split="train", reader=reader, read_by_losses=names, **choice)  # type: ignore[arg-type]
    )
    records = source.records(Row(values=values, source=Source(path="rows.x", line=7)))
    return records if isinstance(records, Finding) else [dict(record.columns) for record in records]


def refusal(values: dict, names: tuple[str, ...], **choice: object) -> str:
    found = read(values, names, **choice)
    assert isinstance(found, Finding)
    assert (found.severity, str(found.source)) == ("error", "rows.x:7")
    return f"{found.code}: {found.message}"


@pytest.mark.parametrize(("given", "number"), [(7.5, 7.5), (3, 3.0), ("0.25", 0.25), (-1e30, -1e30)])
def test_a_number_of_the_row_belongs_to_its_pair_and_to_its_completion(given, number):
    assert read(PAIR | {"strength": given}, ("strength",)) == [{"strength": number}]
    assert read(SINGLE | {"strength": given}, ("strength",)) == [{"strength": number}]


def test_a_record_has_the_columns_that_losses_read_and_no_others():
    assert read(PAIR | {"strength": 1, "length": 2}, ("strength",)) == [{"strength": 1.0}]
    assert read(PAIR | {"strength": 1}, ()) == [{}]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "missing_column: no column 'strength', which a loss reads; it has prompt, chosen, rejected"),
        ({"strength": None}, "bad_number: strength: expected a number, found None"),
        ({"strength": ""}, "bad_number: strength: expected a number, found ''"),
        ({"strength": "high"}, "bad_number: strength: expected a number, found 'high'"),
        ({"strength": True}, "bad_number: strength: expected a number, found True"),
        ({"strength": [1.0]}, "bad_number: strength: expected a number, found a list"),
        ({"strength": float("nan")}, "bad_number: strength: expected a number, found nan"),
        ({"strength": 1e39}, "bad_number: strength: 1e+39 is too large for a loss (at most 3.4e38)"),
        ({"strength": "1e400"}, "bad_number: strength: infinite, or a number too large for 64 bits (at most 1.8e308)"),
    ],
)
def test_a_row_without_a_finite_number_is_refused(given, problem):
    assert refusal(PAIR | given, ("strength",)) == problem


def test_each_pair_of_ranked_responses_has_the_numbers_of_its_own_two():
    """The best response comes first in no pair's order but its own."""
    row = {"prompt": "p", "responses": ["worst", "best", "middle"], "scores": [1, 9, 4]}
    expected = [(9.0, 4.0), (9.0, 1.0), (4.0, 1.0)]
    for given in ({}, {"scores": json.dumps(row["scores"])}, {"score": [1, 9, 4]}):
        assert read(row | given, SCORES) == [dict(zip(SCORES, pair, strict=True)) for pair in expected]
    inside = [{"response": text, "score": score} for text, score in zip(row["responses"], row["scores"], strict=True)]
    found = read({"prompt": "p", "responses": inside}, SCORES)
    assert found == [dict(zip(SCORES, pair, strict=True)) for pair in expected]


def test_ranked_responses_may_have_several_numbers_each_and_one_of_the_row():
    row = {"prompt": "p", "ranked": ["best", "worst"], "helpful": [5, 2], "honest": [3, 4], "hour": 12}
    assert read(row, ("chosen_helpful", "rejected_honest", "hour")) == [
        {"chosen_helpful": 5.0, "rejected_honest": 4.0, "hour": 12.0}
    ]


def test_ranked_responses_without_a_number_for_each_are_refused():
    row = {"prompt": "p", "ranked": ["best", "worst"]}
    assert refusal(row, SCORES).startswith("missing_column: no column 'score_chosen', which a loss reads: of ranked")
    assert refusal(row | {"score": [1]}, SCORES) == (
        "bad_number: score (for score_chosen): expected a number for each of 2 responses, found 1 of them"
    )
    assert refusal(row | {"score": [1, "x"]}, ("rejected_score",)) == (
        "bad_number: rejected_score: expected a number, found 'x'"
    )


def test_lists_of_responses_have_lists_of_numbers():
    row = PAIR | {"chosen": ["good", "better"], "score_chosen": [5, 6], "score_rejected": 1}
    assert read(row, SCORES) == [
        {"score_chosen": 5.0, "score_rejected": 1.0},
        {"score_chosen": 6.0, "score_rejected": 1.0},
    ]
    assert refusal(row | {"score_chosen": [5]}, SCORES) == (
        "bad_number: score_chosen: expected a number for each of 2 responses, found 1 of them"
    )


def test_a_recipe_maps_the_columns_of_losses_too():
    names = {"score_chosen": "rating_a", "score_rejected": "rating_b"}
    row = PAIR | {"rating_a": 3, "rating_b": 2}
    assert read(row, SCORES, columns=names) == [{"score_chosen": 3.0, "score_rejected": 2.0}]
    with pytest.raises(RecipeError, match="no row format has a column 'score_chosen'"):
        read(row, (), columns=names)


def test_a_contest_leaves_the_numbers_that_it_judges_by():
    section = ContestSection.model_validate(
        {"first": "a", "second": "b", "scores": {"first": "score_a", "second": "score_b", "better": "higher"}}
    )
    row = {"prompt": "p", "a": "bad", "b": "good", "score_a": 1, "score_b": 8}
    assert read(row, ("score_b",), contest=section) == [{"score_b": 8.0}]
