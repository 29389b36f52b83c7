"""What the report counts, keeps and tells."""

import json

import pytest

from qpref.data.data_report import NUM_KEPT, DataReport, Histogram
from qpref.records import Finding, Source


def finding(line, severity="error", code="bad", message="is bad"):
    return Finding(code=code, severity=severity, message=message, source=Source(path="pairs.x", line=line))


def test_findings_beyond_the_first_of_a_code_are_counted_and_their_rows_refused():
    report = DataReport(("pairs.x",), read=2 * NUM_KEPT)
    report.add(finding(line) for line in range(1, NUM_KEPT + 11))
    report.add([finding(5, code="worse")])
    assert len(report.findings) == NUM_KEPT + 1
    assert report.refused == NUM_KEPT + 10
    assert report.leaves_out(Source(path="pairs.x", line=NUM_KEPT + 10))
    facts = report.facts()
    assert facts["findings_not_listed"] == {"bad": 10}
    assert {entry["code"]: entry["count"] for entry in facts["counts"]} == {"bad": NUM_KEPT + 10, "worse": 1}


def test_each_file_has_its_own_first_findings():
    report = DataReport(("pairs.x", "other.x"), read=2 * NUM_KEPT)
    report.add(finding(line) for line in range(1, NUM_KEPT + 11))
    other = Finding(code="bad", severity="error", message="is bad", source=Source(path="other.x", line=1))
    report.add([other])
    assert report.findings[-1] is other
    assert report.facts()["findings_not_listed"] == {"bad": 10}


def test_a_row_is_refused_once_and_a_refused_row_is_not_dropped_too():
    report = DataReport(("pairs.x",), read=5)
    report.add([finding(1), finding(1, code="worse"), finding(2, "warning")])
    report.drop(Source(path="pairs.x", line=1))
    report.drop(Source(path="pairs.x", line=3))
    assert (report.read, report.refused, report.dropped, report.kept) == (5, 1, 1, 3)


def test_a_line_of_one_file_is_not_that_of_another():
    report = DataReport(("pairs.x", "other.x"), read=5)
    report.add([finding(1)])
    assert not report.leaves_out(Source(path="other.x", line=1))


def test_reasons_are_the_messages_as_far_as_they_are_kept():
    report = DataReport(("pairs.x",), read=3 * NUM_KEPT)
    report.add([finding(1, message="no prompt"), finding(1, code="worse", message="too odd"), finding(2, "warning")])
    report.add(finding(line) for line in range(3, NUM_KEPT + 10))
    report.drop(Source(path="pairs.x", line=2 * NUM_KEPT))
    reasons = report.reasons()
    assert reasons(Source(path="pairs.x", line=1)) == ["no prompt", "too odd"]
    assert reasons(Source(path="pairs.x", line=NUM_KEPT + 9)) == ["bad"]
    assert reasons(Source(path="pairs.x", line=2 * NUM_KEPT)) == ["over the recipe's maximum lengths"]


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([], []),
        ([0], [(0, 0, 1)]),
        ([1, 2, 3, 4], [(1, 1, 1), (2, 3, 2), (4, 7, 1)]),
        ([1, 9], [(1, 1, 1), (2, 3, 0), (4, 7, 0), (8, 15, 1)]),
        ([-3, -1, 0], [(-3, -2, 1), (-1, -1, 1), (0, 0, 1)]),
    ],
)
def test_bars_hold_the_values_of_their_range(values, bars):
    histogram = Histogram()
    for value in values:
        histogram.note(value)
    assert histogram.bars() == bars


def test_every_value_lies_within_its_bar():
    for value in range(-300, 301):
        histogram = Histogram()
        histogram.note(value)
        ((low, high, count),) = histogram.bars()
        assert low <= value <= high
        assert count == 1


def test_the_facts_are_json_with_the_counts_at_the_top():
    report = DataReport(("pairs.x",), read=3)
    report.add([finding(2), finding(0, "warning", "length_bias", "longer answers are chosen")])
    report.note_lengths({"prompt": 3, "chosen": 9, "rejected": 4}, "tokens")
    facts = json.loads(json.dumps(report.facts(), allow_nan=False))
    assert [facts[key] for key in ("read", "kept", "refused", "dropped")] == [3, 2, 1, 0]
    assert facts["findings"][0] == {
        "code": "bad",
        "severity": "error",
        "path": "pairs.x",
        "line": 2,
        "message": "is bad",
    }
    assert facts["lengths"]["chosen - rejected tokens"] == [{"from": 4, "to": 7, "count": 1}]
