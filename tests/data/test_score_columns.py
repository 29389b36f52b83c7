"""Columns that testify about the label: scores, ranks, differences and verdicts that say otherwise are warned of."""

import pytest
from checked_rows import check

from qpref.recipe.contest_section import ContestSection

GOOD, BAD = "A good answer.", "A bad answer."
PAIR = {"prompt": "Why?", "chosen": GOOD, "rejected": BAD}
DUEL = {"prompt": "Why?", "response_a": GOOD, "response_b": BAD, "verdict": "a"}


def duel(**keys):
    lists = {"winner": "verdict", "first_wins": ["a"], "second_wins": ["b"]}
    return ContestSection.model_validate({"first": "response_a", "second": "response_b"} | lists | keys)


def warnings(rows, contest=None, **choice):
    """The messages of `swapped_score`; nothing else may be found."""
    report = check(rows, contest, **choice).report
    assert {(one.code, one.severity, one.source.line) for one in report.findings} <= {("swapped_score", "warning", 0)}
    assert report.kept == len(rows)
    return [one.message for one in report.findings]


NAMES = [
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosenScore", "rejectedScore"),
    ("Chosen Score", "Rejected Score"),
    ("reward_chosen", "reward_rejected"),
    ("chosen_rm_score", "rejected_rm_score"),
    ("chosen_overall_score", "rejected_overall_score"),
    ("chosen_response_score", "rejected_response_score"),
]


@pytest.mark.parametrize(("high", "low"), NAMES, ids=[name for name, _ in NAMES])
def test_a_chosen_response_with_the_lower_score_is_warned_of_with_its_line(high, low):
    rows = [PAIR | {high: 9, low: 1}, PAIR | {high: 1, low: 9}, PAIR | {high: 5, low: 5}, PAIR | {high: None, low: 1}]
    assert warnings(rows) == [f"the label contradicts {high} and {low} in 1 of 3 rows (line 2)"]
    assert warnings(rows[:1] * 20) == []


def test_a_source_that_contradicts_its_scores_mostly_looks_swapped():
    rows = [PAIR | {"score_chosen": 1, "score_rejected": 9}] * 12
    (message,) = warnings(rows)
    assert "in 12 of 12 rows (lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...)" in message
    assert message.endswith("are the two sides swapped?")


@pytest.mark.parametrize(
    ("one", "other", "contradicts"),
    [
        ("1", "9.5", True),
        (-2, -1.5, True),
        ({"overall": 3}, {"overall": 4}, True),
        ({"score": "3"}, {"score": "4"}, True),
        (1, 1.0, False),
        (True, 2, False),
        ("good", "bad", False),
        ({"style": 1}, {"style": 2}, False),
        ([1], [2], False),
        (10**400, 1, False),
        (float("nan"), 1, False),
    ],
    ids=str,
)
def test_scores_are_numbers_their_texts_or_objects_that_hold_one(one, other, contradicts):
    assert bool(warnings([PAIR | {"score_chosen": one, "score_rejected": other}])) is contradicts


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("safety_score_chosen", "safety_score_rejected"),
        ("chosen_toxicity_score", "rejected_toxicity_score"),
        ("chosen_length", "rejected_length"),
        ("chosen_logps", "rejected_logps"),
        ("chosen_score_tokens", "rejected_score_tokens"),
        ("chosen_score", "rejected_rating"),
        ("chosen_score", "score"),
        ("score_a", "score_b"),
    ],
)
def test_columns_about_something_else_are_not_heard(one, other):
    assert warnings([PAIR | {one: 1, other: 9}] * 3) == []


def test_of_ranks_the_lower_is_better():
    assert warnings([PAIR | {"chosen_rank": 1, "rejected_rank": 2}]) == []
    (message,) = warnings([PAIR | {"rank_chosen": 2, "rank_rejected": 1}])
    assert message.startswith("the label contradicts rank_chosen and rank_rejected in 1 of 1 rows")


def test_columns_mapped_the_wrong_way_round_are_noticed_by_their_own_scores():
    rows = [PAIR | {"score_chosen": 9, "score_rejected": 1}] * 3
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    (message,) = warnings(rows, columns=swapped)
    assert "in 3 of 3 rows" in message
    assert warnings(rows) == []


def test_renamed_sides_have_scores_under_their_names():
    rows = [{"prompt": "Why?", "good_answer": GOOD, "bad_answer": BAD, "good_score": 1, "bad_score": 2}]
    columns = {"chosen": "good_answer", "rejected": "bad_answer"}
    assert len(warnings(rows, columns=columns)) == 1
    assert warnings([rows[0] | {"good_score": 3}], columns=columns) == []


@pytest.mark.parametrize("name", ["margin", "score_margin", "score_diff", "rating_difference", "reward-gap"])
def test_a_difference_below_0_is_warned_of(name):
    rows = [PAIR | {name: value} for value in (0.5, -0.25, 0, 3)]
    assert warnings(rows) == [f"{name} is below 0 in 1 of 4 rows (line 2)"]
    assert warnings([PAIR | {"length_diff": -3, "time_margin": -1}]) == []


@pytest.mark.parametrize(
    ("column", "keys"),
    [
        ("scores", ("chosen", "rejected")),
        ("metadata", ("chosen_score", "rejected_score")),
        ("rating", ("Chosen", "Rejected")),
    ],
)
def test_scores_within_an_object_are_heard(column, keys):
    rows = [PAIR | {column: dict(zip(keys, numbers, strict=True))} for numbers in ((9, 1), (1, 9))]
    names = " and ".join(f"{column}.{key}" for key in keys)
    assert warnings(rows) == [f"the label contradicts {names} in 1 of 2 rows (line 2)"]
    many = {f"key {number}": number for number in range(40)}
    assert warnings([PAIR | {column: many | dict(zip(keys, (1, 9), strict=True))}]) == []


def test_scores_within_the_sides_are_heard():
    sides = [{"role": "assistant", "content": text} for text in (GOOD, BAD)]
    rows = [{"prompt": "Why?", "chosen": [sides[0] | {"score": one}], "rejected": [sides[1] | {"score": other}]}
            for one, other in ((1, 2), (2, 1), (None, 1))]  # fmt: skip
    assert warnings(rows) == ["the label contradicts score within the two responses in 1 of 2 rows (line 1)"]
    ranks = [{"prompt": "Why?", "chosen": sides[0] | {"rank": one}, "rejected": sides[1] | {"rank": other}}
             for one, other in ((1, 2), (2, 1))]  # fmt: skip
    assert warnings(ranks) == ["the label contradicts rank within the two responses in 1 of 2 rows (line 2)"]


def test_ratings_of_generations_are_heard_where_both_sides_are_among_them():
    rows = [PAIR | {"generations": [BAD, "Another.", GOOD], "ratings": ratings} for ratings in ([1, 2, 5], [5, 2, 1])]
    assert warnings(rows) == ["the label contradicts ratings in 1 of 2 rows (line 2)"]
    assert warnings([PAIR | {"generations": [BAD, "Another."], "ratings": [5, 1]}]) == []
    assert warnings([PAIR | {"generations": [BAD, GOOD], "ratings": [5]}]) == []
    turns = [[{"role": "assistant", "content": text}] for text in (GOOD, BAD)]
    as_turns = {
        "prompt": "Why?",
        "chosen": turns[0],
        "rejected": turns[1],
        "generations": [BAD, GOOD],
        "ratings": [5, 1],
    }
    assert len(warnings([as_turns])) == 1


# Ranked responses.

RANKED = {"prompt": "Why?", "responses": [GOOD, "A middling answer.", BAD]}


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ({"ranks": [1, 2, 3], "scores": [9, 5, 1]}, None),
        ({"ranks": [1, 2, 3], "scores": [5, 5, 5]}, None),
        ({"ranks": [1, 2, 3], "scores": [1, 5, 9]}, "the order by ranks contradicts scores"),
        ({"ranks": [1, 2, 3], "scores": [9, 1, 5]}, "the order by ranks contradicts scores"),
        ({"scores": [9, 5, 1], "ratings": [1, 2, 3]}, "the order by scores contradicts ratings"),
        ({"ranks": [1, 2, 3], "scores": [9, 5, None]}, None),
        ({"ranks": [1, 2, 3], "scores": [1, 9]}, None),
        ({"ranks": [1, 2, 3], "scores": "[1, 5, 9]"}, "the order by ranks contradicts scores"),
    ],
    ids=str,
)
def test_ranks_and_scores_have_to_agree(orders, message):
    found = warnings([RANKED | orders])
    assert found == ([] if message is None else [f"{message} in 1 of 1 rows (line 1)"])


def test_a_rank_and_a_score_within_each_response_have_to_agree():
    within = [{"text": text, "rank": rank, "score": rank} for rank, text in ((1, GOOD), (2, BAD))]
    (message,) = warnings([{"prompt": "Why?", "responses": within}])
    assert message.startswith("the order by rank of each response contradicts score of each response")


def test_scores_of_a_sorted_list_have_to_fall():
    rows = [{"prompt": "Why?", "ranked": [GOOD, BAD], "scores": scores} for scores in ([2, 1], [1, 2])]
    (message,) = warnings(rows)
    assert message.startswith("the order by ranked contradicts scores in 1 of 2 rows (line 2)")


def test_ranked_columns_may_be_renamed():
    rows = [{"prompt": "Why?", "outs": [GOOD, BAD], "order": [1, 2], "scores": [1, 9]}]
    assert len(warnings(rows, columns={"responses": "outs", "ranks": "order"})) == 1


# Comparisons.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("score_a", "score_b"),
        ("rating_a", "rating_b"),
        ("response_a_score", "response_b_score"),
        ("A score", "B score"),
    ],
)
def test_the_winner_of_a_comparison_has_the_better_score(one, other):
    rows = [DUEL | {"verdict": verdict, one: 9, other: 1} for verdict in ("a", "b", "a")]
    assert warnings(rows, duel()) == [f"the label contradicts {one} and {other} in 1 of 3 rows (line 2)"]


def test_the_scores_of_shp_are_heard_and_those_that_are_the_verdict_are_not():
    shp = {"history": "Why?", "human_ref_A": GOOD, "human_ref_B": BAD, "score_A": 3, "score_B": 40}
    assert len(warnings([shp | {"labels": 1}])) == 1
    assert warnings([shp | {"labels": 0}]) == []
    keys = {"winner": None, "first_wins": [], "second_wins": []}
    lower = duel(scores={"first": "score_a", "second": "score_b", "better": "lower"}, **keys)
    assert warnings([DUEL | {"score_a": 1, "score_b": 2}], lower) == []


def test_a_safer_response_may_be_the_worse_one():
    row = {"prompt": "Why?", "response_0": GOOD, "response_1": BAD, "better_response_id": 0, "safer_response_id": 1}
    assert warnings([row | {"response_0_severity_level": 3, "response_1_severity_level": 0}]) == []


def test_a_difference_of_a_comparison_has_no_known_sign():
    assert warnings([DUEL | {"score_diff": -3}], duel()) == []


def test_a_verdict_beside_chosen_and_rejected_is_heard():
    both = {"response1": GOOD, "response2": BAD}
    rows = [PAIR | both | {"overall_preference": strength} for strength in (-2, 3, 0)]
    (message,) = warnings(rows)
    assert message.startswith("the label contradicts overall_preference in 1 of 2 rows (line 2)")
    assert warnings([PAIR | {"response1": "x", "response2": "y", "overall_preference": 1}]) == []


@pytest.mark.parametrize("name", ["winner", "preference", "better"])
def test_a_column_that_names_the_rejected_side_is_heard(name):
    rows = [PAIR | {name: value} for value in ("chosen", " Rejected", "a", 1)]
    assert warnings(rows) == [f"the label contradicts {name} in 1 of 2 rows (line 2)"]
    assert warnings([PAIR | {"status": "rejected"}]) == []


# Labels of single completions.


@pytest.mark.parametrize(
    ("label", "tag", "code"),
    [
        (True, True, None),
        (1, "true", None),
        ("0", False, None),
        (True, None, None),
        (True, False, "bad_label"),
        ("1", 0, "bad_label"),
        (0.0, "True", "bad_label"),
        (True, "yes", "bad_label"),
    ],
)
def test_two_labels_of_a_completion_have_to_agree(label, tag, code):
    row = {"prompt": "Why?", "completion": GOOD, "label": label, "kto_tag": tag}
    report = check([row], pairs_only=False).report
    assert [one.code for one in report.findings] == ([code] if code else [])
    if code and tag != "yes":
        assert "label is" in report.findings[0].message
        assert "kto_tag is" in report.findings[0].message
