"""Who won is said, never guessed: verdicts of every notation, and sources whose verdicts don't fit."""

import csv
import json
import math

import pyarrow.parquet
import pytest
from checked_rows import check
from pydantic import ValidationError

from qpref.data.check import check_data
from qpref.data.split import HeldOutShare
from qpref.errors import DataError
from qpref.hooks.manager import READER, PluginHost
from qpref.recipe.choices import SourceChoice
from qpref.recipe.contest_section import ContestSection
from qpref.records import Row, Source
from qpref.rows.contest_formats import BY_NAME, CONTESTS
from qpref.rows.formats import records_of_row

LISTS = {"winner": "label", "first_wins": [1], "second_wins": [2], "tie": [0]}


def contest(**keys):
    return ContestSection.model_validate({"first": "a", "second": "b"} | keys)


def row(**values):
    return {"prompt": "Why?", "a": "Answer A.", "b": "Answer B."} | values


def chosen(rows, contest=None, **choice):
    """The chosen response of each kept row, and the codes of the refused ones."""
    checked = check(rows, contest, **choice)
    codes = [finding.code for finding in checked.report.findings if finding.severity == "error"]
    return [pair.chosen[0].content for pair in checked.train.rows()], codes


A, B = "Answer A.", "Answer B."


# Verdicts of one column.


@pytest.mark.parametrize(
    ("listed", "verdicts"),
    [
        ((1, 2), [(1, A), (2, B), (1.0, A), ("1", A), ("2.0", B), (" 2 ", B), ("+1", A), ("2e0", B)]),
        ((0, 1), [(0, A), (1, B), (-0.0, A), ("0", A), ("0.0", A)]),
        (("1", "2"), [(1, A), ("1", A), (2.0, B)]),
        (("A", "B"), [("A", A), ("b", B), (" B", B), ("a ", A)]),
        ((True, False), [(True, A), (False, B), ("true", A), ("False", B), ("TRUE", A)]),
        ((False, True), [(False, A), (True, B), ("True", B)]),
        (("model one", "STRASSE"), [("Model One", A), ("straße", B)]),
        (("left", "right"), [({"selected": "left"}, A), ([{"selected": "right"}], B), ('[{"selected": "right"}]', B)]),
        (({"min": -3, "max": -1}, {"min": 1, "max": 3}), [(-3, A), (-1, A), (1, B), (3, B), ("2", B), (-1.5, A)]),
        (({"below": 0}, {"above": 0}), [(-0.001, A), (1e300, B), ("-7", A)]),
        (({"min": 1, "below": 1.5}, {"above": 1.5, "max": 2}), [(1, A), (1.4999, A), (1.5001, B), (2, B)]),
    ],
    ids=str,
)
def test_a_verdict_picks_its_side_in_any_notation(listed, verdicts):
    section = contest(winner="label", first_wins=[listed[0]], second_wins=[listed[1]])
    assert chosen([row(label=value) for value, _ in verdicts], section) == ([side for _, side in verdicts], [])


@pytest.mark.parametrize(
    ("listed", "value"),
    [
        ((1, 0), True),
        ((1, 0), "true"),
        ((True, False), 1),
        ((True, False), "0"),
        ((0, 1), 2),
        ((0, 1), -1),
        ((1, 2), 0),
        ((1, 2), 1.5),
        ((1, 2), "one"),
        ((1, 2), 10**400),
        ((1, 2), "9" * 400),
        ((1, 2), "1_0"),
        ((1, 2), "\u0661"),
        ((1, 2), [1, 2]),
        ((1, 2), {"value": 1}),
        (("A", "B"), "C"),
        (("A", "B"), "A and B"),
        (({"min": -3, "max": -1}, {"min": 1, "max": 3}), 4),
        (({"below": 0}, {"above": 0}), 0),
        (({"below": 0}, {"above": 0}), "nan"),
    ],
    ids=str,
)
def test_a_verdict_that_no_outcome_has_refuses_every_row(listed, value):
    section = contest(winner="label", first_wins=[listed[0]], second_wins=[listed[1]])
    good = {"min": 1} if isinstance(listed[0], dict) else listed[0]
    fits = -1 if isinstance(good, dict) else good
    checked = check([row(label=fits), row(label=value), row(label=fits)], section)
    report = checked.report
    assert (report.read, report.kept, report.refused) == (3, 0, 3)
    assert [(one.code, one.source.line) for one in report.findings] == [("unlisted_verdict", 2), ("refused_source", 0)]
    assert "1 of 3 verdicts" in report.findings[1].message
    assert "first: 2)" in report.findings[1].message


@pytest.mark.parametrize("value", [None, math.nan, "", " "], ids=repr)
def test_a_row_without_a_verdict_is_refused_alone(value):
    assert chosen([row(label=1), row(label=value), row(label=2)], contest(**LISTS)) == ([A, B], ["not_a_pair"])


def test_an_empty_text_may_be_a_verdict():
    section = contest(**LISTS | {"tie": [""]})
    assert chosen([row(label=""), row(label=1), row(label=None)], section) == ([A], ["tied", "not_a_pair"])


def test_a_tie_is_refused_alone():
    assert chosen([row(label=1), row(label=0), row(label="0")], contest(**LISTS)) == ([A], ["tied", "tied"])


@pytest.mark.parametrize("absent", ["a", "b", "label"])
def test_a_row_without_a_column_of_the_contest_is_refused_and_says_what_it_has(absent):
    full = {"prompt": "Why?", "a": A, "b": B, "label": 1}
    checked = check([{name: value for name, value in full.items() if name != absent}], contest(**LISTS))
    (finding,) = checked.report.findings
    assert finding.code == "missing_column"
    assert f"no column '{absent}'" in finding.message
    assert "it has prompt" in finding.message


@pytest.mark.parametrize(("values", "code"), [({"a": None}, "not_a_pair"), ({"a": ""}, "empty"), ({"b": A}, None)])
def test_a_response_that_is_null_or_empty_is_refused(values, code):
    assert chosen([row(label=1, **values)], contest(**LISTS))[1] == ([code] if code else [])


def test_a_missing_prompt_is_named_without_asking_who_won_again():
    rows = [{"ask": "Why?", "output_1": A, "output_2": B, "label": 1}]
    section = ContestSection.model_validate({"first": "output_1", "second": "output_2"} | LISTS)
    (finding,) = check(rows, section).report.findings
    assert finding.code == "not_a_pair"
    assert "no prompt" in finding.message
    assert "contest" not in finding.message


# Flags and scores.

FLAGS = {"first": "a_won", "second": "b_won", "tie": "neither"}


@pytest.mark.parametrize(
    ("flags", "outcome"),
    [
        ((1, 0, 0), [A]),
        ((0, 1, 0), [B]),
        (("1", "0", "0"), [A]),
        ((False, True, False), [B]),
        (("False", "True", ""), [B]),
        ((None, 1.0, None), [B]),
        ((0, 0, 1), ["tied"]),
        ((1, 1, 0), ["unlisted_verdict", "refused_source"]),
        ((0, 0, 0), ["unlisted_verdict", "refused_source"]),
        ((1, 0, 1), ["unlisted_verdict", "refused_source"]),
        ((2, 0, 0), ["unlisted_verdict", "refused_source"]),
        (("yes", 0, 0), ["unlisted_verdict", "refused_source"]),
        ((None, None, None), ["not_a_pair"]),
    ],
    ids=str,
)
def test_one_flag_is_set(flags, outcome):
    rows = [row(a_won=flags[0], b_won=flags[1], neither=flags[2])]
    assert chosen(rows, contest(winner=FLAGS)) in ((outcome, []), ([], outcome))


def test_no_flag_is_a_tie_where_ties_have_none():
    section = contest(winner={"first": "a_won", "second": "b_won"})
    assert chosen([row(a_won=1, b_won=0), row(a_won=0, b_won=0)], section) == ([A], ["tied"])


@pytest.mark.parametrize(
    ("scores", "higher", "lower"),
    [
        ((1, 2), [B], [A]),
        ((2, 1.5), [A], [B]),
        (("10", "9"), [A], [B]),
        ((-1, 0), [B], [A]),
        ((3, 3.0), ["tied"], ["tied"]),
        (("x", 1), ["bad_number"], ["bad_number"]),
        ((True, 1), ["bad_number"], ["bad_number"]),
        ((None, 1), ["bad_number"], ["bad_number"]),
        ((None, None), ["not_a_pair"], ["not_a_pair"]),
    ],
    ids=str,
)
def test_the_better_score_wins(scores, higher, lower):
    rows = [row(score_a=scores[0], score_b=scores[1])]
    for better, outcome in (("higher", higher), ("lower", lower)):
        section = contest(scores={"first": "score_a", "second": "score_b", "better": better})
        assert chosen(rows, section) in ((outcome, []), ([], outcome))


# Columns.


def test_prompts_have_their_usual_columns_and_others_are_mapped():
    turns = [{"role": "user", "content": "Why?"}]
    rows = [{"a": A, "b": B, "label": 1}]
    for more in ({"instruction": "Why?"}, {"prompt": turns}, {"conversations": turns}):
        assert chosen([rows[0] | more], contest(**LISTS)) == ([A], [])
    assert chosen([rows[0] | {"question": "Why?"}], contest(**LISTS), columns={"prompt": "question"}) == ([A], [])


def test_columns_named_chosen_and_rejected_may_be_the_first_and_the_second():
    section = ContestSection.model_validate({"first": "chosen", "second": "rejected"} | LISTS)
    rows = [{"prompt": "Why?", "chosen": A, "rejected": B, "label": label} for label in (1, 2)]
    assert chosen(rows, section) == ([A, B], [])


def test_paths_reach_into_lists_and_objects_unless_a_column_has_their_name():
    section = ContestSection.model_validate({"first": "both.0.text", "second": "both.1.text"} | LISTS)
    both = [{"text": A}, {"text": B}]
    assert chosen([{"prompt": "Why?", "both": both, "label": 2}], section) == ([B], [])
    literal = {"prompt": "Why?", "both": both, "both.1.text": "Literal.", "label": 2}
    assert chosen([literal], section) == (["Literal."], [])
    for broken in (both[:1], [], {"0": {"text": A}}, "text", None):
        assert chosen([{"prompt": "Why?", "both": broken, "label": 2}], section)[1] == ["not_a_pair"]


def test_a_verdict_in_a_column_that_qpref_reads_means_nothing_else():
    ranges = {"first_wins": [{"above": 0}], "second_wins": [{"below": 0}]}
    for name in ("margin", "weight"):
        (pair,) = check([row(**{name: -2})], contest(winner=name, **ranges)).train.rows()
        assert (pair.chosen[0].content, pair.margin, pair.weight) == (B, 0.0, 1.0)


def test_whole_conversations_can_compete():
    sides = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": side}] for side in (A, B)]
    assert chosen([{"a": sides[0], "b": sides[1], "label": 2}], contest(**LISTS)) == ([B], [])


# The whole source.


def test_verdicts_of_a_renamed_file_that_counts_from_1_refuse_the_source():
    rows = [{"prompt": "Why?", "one": A, "two": B, "label": label} for label in (1, 2, 1, 1, 2)]
    columns = {"response_0": "one", "response_1": "two", "better_response_id": "label"}
    report = check(rows, columns=columns).report
    assert (report.kept, report.refused) == (0, 5)
    (whole,) = [one for one in report.findings if one.code == "refused_source"]
    assert "2 of 5 verdicts fit no outcome: better_response_id = 2 (2 rows, first: 2)" in whole.message
    assert "0 (response_0 is better), 1 (response_1 is better)" in whole.message


def test_renamed_verdicts_that_fit_say_how_they_are_read():
    rows = [{"history": "Why?", "one": A, "two": B, "better": better} for better in (0, 1)]
    columns = {"human_ref_A": "one", "human_ref_B": "two", "labels": "better"}
    report = check(rows, columns=columns).report
    (warning,) = report.findings
    assert (report.kept, warning.code, warning.severity) == (2, "assumed_verdict", "warning")
    assert "better as labels" in warning.message
    assert "1 (human_ref_A is better)" in warning.message
    own = [{"question": "Why?", "human_ref_A": A, "human_ref_B": B, "labels": 1}]
    assert check(own, columns={"history": "question"}).report.findings == []


def test_twenty_verdicts_for_one_side_are_warned_of_and_fewer_are_not():
    rows = [row(label=1, prompt=f"Why {number}?") for number in range(20)]
    (warning,) = check(rows, contest(**LISTS)).report.findings
    assert (warning.code, warning.severity, warning.source.line) == ("one_sided_verdicts", "warning", 0)
    assert "all 20 verdicts are for a" in warning.message
    assert check(rows[1:], contest(**LISTS)).report.findings == []
    assert check([*rows, row(label=2)], contest(**LISTS)).report.findings == []


def test_a_refused_source_stops_a_run_whatever_share_may_be_bad():
    rows = [row(label=1) for _ in range(99)] + [row(label=7)]
    report = check(rows, contest(**LISTS)).report
    for line in range(1, 1001):
        report.note_read(Source(path="other.x", line=line))
    with pytest.raises(DataError, match=r"^pairs\.x: 1 of 100 verdicts fit no outcome: label = 7") as stopped:
        report.stop_on_errors(0.9)
    assert "first_wins" in str(stopped.value)


def test_a_refused_source_leaves_other_sources_alone_and_the_counts_add_up():
    checked = check([row(label=7), row(label=1), row(label=0)], contest(**LISTS))
    report = checked.report
    report.note_read(Source(path="other.x", line=1))
    report.drop(Source(path="pairs.x", line=2))
    assert (report.read, report.kept, report.refused, report.dropped) == (4, 1, 3, 0)
    assert not report.leaves_out(Source(path="other.x", line=1))
    reasons = report.reasons()
    assert [reason[:12] for reason in reasons(Source(path="pairs.x", line=2))] == ["1 of 2 verdi"]
    assert [reason[:11] for reason in reasons(Source(path="pairs.x", line=3))] == ["label: a ti", "1 of 2 verd"]


def test_a_held_out_share_is_refused_with_its_source():
    rows = [row(label=1, prompt=f"Why {number}?") for number in range(30)] + [row(label=7)]
    checked = check(rows, contest(**LISTS), share=HeldOutShare(0.3, seed=0))
    assert checked.heldout.read > 0
    assert [list(split.rows()) for split in (checked.train, checked.heldout)] == [[], []]
    assert checked.report.kept == 0


def test_many_kinds_of_unlisted_verdicts_are_counted_in_bounded_space():
    report = check([row(label=f"kind {number}") for number in range(200)], contest(**LISTS)).report
    (whole,) = [one for one in report.findings if one.code == "refused_source"]
    assert "200 of 200 verdicts" in whole.message
    assert "and 46 more" in whole.message


# The recipe's mistakes.


@pytest.mark.parametrize(
    ("keys", "wording"),
    [
        ({}, "one of the two"),
        ({"winner": "w", "scores": {"first": "x", "second": "y", "better": "higher"}}, "one of the two"),
        ({"winner": "w"}, "first_wins and second_wins"),
        ({"winner": "w", "first_wins": [1]}, "second_wins: list the values of w"),
        ({"winner": "w", "first_wins": [], "second_wins": [1]}, "first_wins: list the values of w"),
        ({"winner": "w", "first_wins": [1], "second_wins": [1]}, "1 in first_wins and 1 in second_wins"),
        ({"winner": "w", "first_wins": [1], "second_wins": ["1"]}, "1 in first_wins and '1' in second_wins"),
        ({"winner": "w", "first_wins": [1], "second_wins": [2], "tie": [2.0]}, "2 in second_wins and 2.0 in tie"),
        ({"winner": "w", "first_wins": ["A"], "second_wins": ["a "]}, "the same verdict"),
        ({"winner": "w", "first_wins": [True], "second_wins": ["TRUE"]}, "true in first_wins"),
        ({"winner": "w", "first_wins": [{"max": 0}], "second_wins": [{"min": 0}]}, "the same verdict"),
        ({"winner": "w", "first_wins": [{"min": -3}], "second_wins": ["2"]}, "the same verdict"),
        ({"winner": "w", "first_wins": [{}], "second_wins": [2]}, "a range has"),
        ({"winner": "w", "first_wins": [{"min": 3, "max": 1}], "second_wins": [0]}, "no number is in this range"),
        ({"winner": "w", "first_wins": [{"above": 1, "below": 1}], "second_wins": [0]}, "no number is in this range"),
        ({"winner": "w", "first_wins": [{"min": 1, "above": 1}], "second_wins": [0]}, "min or above"),
        ({"winner": "a", "first_wins": [1], "second_wins": [2]}, "a is named twice"),
        ({"second": "a", "winner": "w", "first_wins": [1], "second_wins": [2]}, "a is named twice"),
        ({"winner": {"first": "x", "second": "x"}}, "x is named twice"),
        ({"winner": {"first": "x", "second": "y"}, "first_wins": [1]}, "values of one column"),
        ({"scores": {"first": "x", "second": "x", "better": "lower"}}, "x is named twice"),
        ({"scores": {"first": "x", "second": "y"}}, "Field required"),
        ({"winner": "", "first_wins": [1], "second_wins": [2]}, "at least 1 character"),
    ],
    ids=str,
)
def test_a_contest_that_could_be_read_two_ways_is_a_mistake(keys, wording):
    with pytest.raises(ValidationError, match=wording.replace("(", r"\(")):
        contest(**keys)


def test_ranges_that_touch_without_a_common_number_are_two_outcomes():
    contest(winner="w", first_wins=[{"max": 0}], second_wins=[{"above": 0}])
    contest(winner="w", first_wins=[{"below": 0}], second_wins=[{"above": 0}], tie=[0])


# Named formats: both verdicts and a tie of each, by the documentation of the data.

EXAMPLES = {
    "shp": ({"history": "Why?"}, "human_ref_A", "human_ref_B", {"labels": 1}, {"labels": 0}, None),
    "saferlhf": (
        {"prompt": "Why?"},
        "response_0",
        "response_1",
        {"better_response_id": 0},
        {"better_response_id": 1},
        None,
    ),
    "lmsys": (
        {"prompt": "Why?"},
        "response_a",
        "response_b",
        {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
    ),
    "helpsteer2": (
        {"prompt": "Why?"},
        "response_1",
        "response_2",
        {"preference_strength": -1},
        {"preference_strength": 3},
        {"preference_strength": 0},
    ),
    "helpsteer3": (
        {"context": [{"role": "user", "content": "Why?"}]},
        "response1",
        "response2",
        {"overall_preference": -3},
        {"overall_preference": 1},
        {"overall_preference": 0},
    ),
    "webgpt": (
        {"question": {"full_text": "Why?"}},
        "answer_0",
        "answer_1",
        {"score_0": 0.25, "score_1": -0.25},
        {"score_0": -1, "score_1": 1},
        {"score_0": 0, "score_1": 0},
    ),
    "alpaca_eval": (
        {"instruction": "Why?"},
        "output_1",
        "output_2",
        {"preference": 1.02},
        {"preference": 2},
        {"preference": 1.5},
    ),
    "label_studio": (
        {"prompt": "Why?"},
        "answer1",
        "answer2",
        {"comparison": "left"},
        {"comparison": {"selected": "right"}},
        None,
    ),
    "llmbar": ({"input": "Why?"}, "output_1", "output_2", {"label": 1}, {"label": 2}, None),
    "autoj": ({"prompt": "Why?"}, "response 1", "response 2", {"label": 0}, {"label": 1}, {"label": 2}),
    "judgebench": (
        {"question": "Why?"},
        "response_A",
        "response_B",
        {"label": "A>B"},
        {"label": "B>A"},
        {"label": "A=B"},
    ),
    "gold_label": (
        {"prompt": "Why?"},
        "response_a",
        "response_b",
        {"gold_label": "A"},
        {"gold_label": "B"},
        {"gold_label": "tie"},
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_named_format_reads_its_verdicts(name):
    prompt, first, second, first_wins, second_wins, tie = EXAMPLES[name]
    rows = [prompt | {first: A, second: B} | verdict for verdict in (first_wins, second_wins)]
    row_format = name if name in BY_NAME else "auto"
    assert chosen(rows, format=row_format) == ([A, B], [])
    if tie is not None:
        assert chosen([prompt | {first: A, second: B} | tie], format=row_format) == ([], ["tied"])


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_columns_that_datasets_share_are_read_only_by_name(name):
    prompt, first, second, verdict, *_ = EXAMPLES[name]
    report = check([prompt | {first: A, second: B} | verdict]).report
    assert report.kept == 0


def test_every_named_format_is_tried_here():
    assert {*EXAMPLES, "arena", "summarize"} == set(CONTESTS)


def test_a_summary_is_chosen_by_its_number():
    row = {"info": {"post": "A story."}, "summaries": [{"text": A}, {"text": B}]}
    assert chosen([row | {"choice": choice} for choice in (0, 1)]) == ([A, B], [])
    article = row | {"info": {"post": None, "article": "News."}, "choice": 0}
    assert chosen([article]) == ([A], [])
    assert chosen([row | {"choice": 1, "info": {}}])[1] == ["not_a_pair"]


def conversation(*answers):
    turns = []
    for number, answer in enumerate(answers):
        turns += [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": answer}]
    return turns


@pytest.mark.parametrize("as_text", [False, True])
def test_an_exchange_that_was_judged_is_the_last_of_its_conversation(as_text):
    sides = conversation(A, "More A."), conversation(B, "More B.")
    both = {name: json.dumps(side) if as_text else side
            for name, side in zip(("conversation_a", "conversation_b"), sides, strict=True)}  # fmt: skip
    assert chosen([both | {"winner": "model_b", "turn": 1}]) == ([B], [])
    assert chosen([both | {"winner": "model_b", "turn": 2}])[1] == ["role_order"]
    assert chosen([both | {"winner": "model_b"}])[1] == ["role_order"]
    for odd in (0, -1, 99, True, "1", None):
        assert chosen([both | {"winner": "model_b", "turn": odd}])[1] == ["role_order"]


def test_lists_of_turns_become_conversations():
    verdict = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    texts = {"prompt": '["Hi", "Why?"]', "response_a": '["Hello", "Answer A."]', "response_b": '["Hello", "Answer B."]'}
    (pair,) = records_of_row(Row(values=texts | verdict, source=Source(path="x", line=1)))
    assert [message.content for message in (*pair.prompt, *pair.chosen)] == ["Hi", "Hello", "Why?", "Answer B."]
    for broken in ({"response_a": '["Hello"]'}, {"response_b": '["Hello", null]'}):
        assert chosen([texts | broken | verdict])[1] == ["not_a_message"]
    plain = {"prompt": "[1, 2]", "response_a": A, "response_b": B}
    assert chosen([plain | verdict]) == ([B], [])


# The rows that are shown.


def test_the_first_three_rows_with_a_winner_are_shown_by_their_winner():
    rows = [
        row(label=label, a="A " * 100, b=[{"role": "assistant", "content": "B\n\u202e]"}]) for label in (0, 2, 1, 1, 1)
    ]
    verdicts = check(rows, contest(**LISTS)).report.facts()["verdicts"]
    assert [(one["line"], one["verdict"], one["winner"]) for one in verdicts] == [
        (2, "label = 2", "b"),
        (3, "label = 1", "a"),
        (4, "label = 1", "a"),
    ]
    assert verdicts[1]["chosen"] == "A " * 29 + "A…"
    assert verdicts[1]["rejected"] == "B \ufffd]"


def test_rows_with_a_label_of_their_own_show_no_winner():
    assert check([{"prompt": "Why?", "chosen": A, "rejected": B}]).report.facts()["verdicts"] == []


# Files.


@pytest.mark.parametrize(
    ("labels", "lists"),
    [
        ([1, 2, None, 0], LISTS),
        ([1.0, 2.0, None, 0.0], LISTS),
        ([True, False, None], {"winner": "label", "first_wins": [True], "second_wins": [False]}),
        (
            ["Left", "right", None, "tie"],
            {"winner": "label", "first_wins": ["left"], "second_wins": ["right"], "tie": ["tie"]},
        ),
        (
            [-3, 2, None, 0],
            {"winner": "label", "first_wins": [{"below": 0}], "second_wins": [{"above": 0}], "tie": [0]},
        ),
    ],
    ids=str,
)
def test_verdicts_are_the_same_from_every_reader(tmp_path, labels, lists):
    rows = [row(label=label) for label in labels]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for suffix in ("jsonl", "parquet", "csv"):
        reader = PluginHost().load(READER, suffix)
        path = str(tmp_path / f"x.{suffix}")
        choice = SourceChoice(location=path, split="train", reader=reader, contest=contest(**lists))
        checked = check_data([choice], [])
        codes = [finding.code for finding in checked.report.findings]
        assert [pair.chosen[0].content for pair in checked.train.rows()] == [A, B], suffix
        assert codes == ["not_a_pair", "tied"][: len(labels) - 2], suffix


def preferences(*values):
    return [{"instruction": "Why?", "output_1": A, "output_2": B, "preference": value} for value in values]


@pytest.mark.parametrize("verdicts", [(0, 1, 1), (1, 0), ("0", "1", "0"), (1.0, 0.0)])
def test_a_format_that_counts_from_1_condemns_a_source_that_counts_from_0(verdicts):
    """A 0 is a tie in AlpacaEval, so a file of 0 and 1 would be read with each second response on the wrong side."""
    kept, codes = chosen(preferences(*verdicts))
    assert kept == []
    assert "refused_source" in codes


@pytest.mark.parametrize(("verdicts", "kept"), [((0, 1, 2), [A, B]), ((1, 1), [A, A]), ((0, 2), [B]), ((1.5, 1), [A])])
def test_ties_among_verdicts_from_1_are_ties(verdicts, kept):
    found, codes = chosen(preferences(*verdicts))
    assert found == kept
    assert "refused_source" not in codes


def test_verdicts_of_0_and_1_are_read_where_the_recipe_says_so():
    rows = [row(label=value) for value in (1, 0, 1)]
    assert chosen(rows, contest(**LISTS)) == ([A, A], ["tied"])
