"""Repeated, contradictory and cyclic rows are reported once each, by place, and rankings are left in peace."""

import random
import tracemalloc
from itertools import combinations
from unicodedata import normalize

import pytest
from pydantic import ValidationError

from qpref.records import Message, PreferencePair, Source
from qpref_plugins import check_duplicates
from qpref_plugins.check_duplicates import FEWEST_ROWS, CheckDuplicates, DuplicateChecks
from qpref_plugins.check_duplicates.table import strong_parts
from tests.plugins.check_cases import findings, lines, pair, reported, severities, single, words

CODES = ["duplicate", "contradictory", "cyclic", "few_prompts"]


def test_a_repeated_row_names_the_first_one():
    rows = [pair("p", "a", "b", 1), pair("p", "a", "c", 2), pair("p", "a", "b", 3), pair("p", "a", "b", 4)]
    assert reported(check_duplicates, rows) == [
        ("duplicate", 3, "the same pair as pairs.jsonl:1"),
        ("duplicate", 4, "the same pair as pairs.jsonl:1"),
    ]


def test_another_unicode_form_is_the_same_row():
    row = pair("Où ?", "Crème", "brûlée", 1)
    again = pair(*(normalize("NFD", text) for text in ("Où ?", "Crème", "brûlée")), 2)
    assert [code for code, _, _ in reported(check_duplicates, [row, again])] == ["duplicate"]


@pytest.mark.parametrize("other", [("q", "a", "b"), ("p", "a ", "b"), ("p", "a", "B")], ids=str)
def test_a_row_that_differs_at_all_is_no_duplicate(other):
    assert reported(check_duplicates, [pair("p", "a", "b", 1), pair(*other, 2)]) == []


def test_the_same_line_of_another_file_is_another_row():
    rows = [pair("p", "a", "b", 7, "one.jsonl"), pair("p", "a", "b", 7, "two.jsonl")]
    assert reported(check_duplicates, rows) == [("duplicate", 7, "the same pair as one.jsonl:7")]


def test_other_tools_make_another_prompt():
    plain, other = pair("p", "a", "b", 1), pair("p", "a", "b", 2)
    other = PreferencePair(
        prompt=other.prompt, chosen=other.chosen, rejected=other.rejected, tools=({"name": "f"},), source=other.source
    )
    assert reported(check_duplicates, [plain, other]) == []


def test_tool_calls_tell_answers_apart():
    def call(name, line):
        message = Message(role="assistant", content="", extra={"tool_calls": [{"name": name}]})
        base = pair("p", "x", "b", line)
        return PreferencePair(prompt=base.prompt, chosen=(message,), rejected=base.rejected, source=base.source)

    assert lines(check_duplicates, "duplicate", [call("f", 1), call("g", 2), call("f", 3)]) == [3]


def test_splits_are_looked_at_by_themselves():
    assert reported(check_duplicates, [pair("p", "a", "b", 2)], [pair("p", "a", "b", 1), pair("p", "b", "a", 1)]) == [
        ("contradictory", 1, "the same two responses have the preference reversed at the same row")
    ]


def test_both_rows_of_a_contradiction_are_reported():
    rows = [pair("p", "a", "b", 1), pair("p", "c", "d", 2), pair("p", "b", "a", 3)]
    message = "the same two responses have the preference reversed at pairs.jsonl:{}"
    assert reported(check_duplicates, rows) == [
        ("contradictory", 1, message.format(3)),
        ("contradictory", 3, message.format(1)),
    ]


def test_the_same_answers_to_another_prompt_are_no_contradiction():
    assert reported(check_duplicates, [pair("p", "a", "b", 1), pair("q", "b", "a", 2)]) == []


def test_an_answer_that_wins_and_loses_is_no_contradiction():
    assert reported(check_duplicates, [pair("p", "a", "b", 1), pair("p", "b", "c", 2), pair("p", "a", "c", 3)]) == []


def test_a_circle_of_rows_is_reported_on_each_of_them():
    rows = [pair("p", "a", "b", 1), pair("p", "b", "c", 2), pair("p", "c", "a", 3), pair("p", "c", "d", 4)]
    assert lines(check_duplicates, "cyclic", rows) == [1, 2, 3]


def test_rows_between_two_circles_are_on_none():
    first = [pair("p", better, worse, line) for line, (better, worse) in enumerate(["ab", "bc", "ca"], start=1)]
    second = [pair("p", better, worse, line) for line, (better, worse) in enumerate(["xy", "yz", "zx"], start=11)]
    assert lines(check_duplicates, "cyclic", [*first, pair("p", "a", "x", 9), *second]) == [1, 2, 3, 11, 12, 13]


@pytest.mark.parametrize("num_edges", [3, 12, 40])
def test_parts_are_those_of_reachability(num_edges):
    rng = random.Random(num_edges)
    for _ in range(50):
        edges = [(rng.randrange(12), rng.randrange(12)) for _ in range(num_edges)]
        nodes = {node for edge in edges for node in edge}
        reach = {node: {node} for node in nodes}
        for _ in nodes:
            for tail, head in edges:
                reach[tail] |= reach[head]
        part = strong_parts(edges)
        for one in nodes:
            for other in nodes:
                assert (part[one] == part[other]) == (other in reach[one] and one in reach[other])


def test_a_ranking_is_neither_repeated_nor_contradicted_by_its_own_pairs():
    ranking = [pair("p", *two, 5, number=number) for number, two in enumerate(combinations("abcd", 2))]
    assert reported(check_duplicates, ranking) == []


def test_a_row_that_holds_a_pair_twice_repeats_no_other():
    assert reported(check_duplicates, [pair("p", "a", "b", 5, number=number) for number in range(2)]) == []


def test_a_contradiction_that_repeats_is_no_circle():
    rows = [pair("p", *two, line) for line, two in enumerate(["ab", "ba", "ab", "ba"], start=1)]
    assert lines(check_duplicates, "contradictory", rows) == [1, 2, 3, 4]
    assert lines(check_duplicates, "cyclic", rows) == []


def test_a_row_that_repeats_in_many_pairs_is_reported_once():
    rankings = [
        pair("p", *two, line, number=number) for line in (5, 6) for number, two in enumerate(combinations("abcd", 2))
    ]
    assert lines(check_duplicates, "duplicate", rankings) == [6]


def test_one_completion_with_both_labels_is_contradictory():
    rows = [single("p", "a", True, 1), single("p", "b", True, 2), single("p", "a", False, 3), single("p", "b", True, 4)]
    assert reported(check_duplicates, rows) == [
        ("duplicate", 4, "the same completion and label as singles.jsonl:2"),
        ("contradictory", 1, "the same completion has the other label at singles.jsonl:3"),
        ("contradictory", 3, "the same completion has the other label at singles.jsonl:1"),
    ]


@pytest.mark.parametrize(("num_prompts", "count"), [(20, 0), (19, 1)])
def test_few_prompts_are_those_under_the_share(num_prompts, count):
    rows = [pair(f"p{line % num_prompts}", f"a{line}", "b", line) for line in range(1, 81)]
    found = findings(check_duplicates, rows)
    assert [(one.code, one.source) for one in found] == [("few_prompts", Source(path="pairs.jsonl", line=0))] * count
    if count:
        assert found[0].message.startswith("19 distinct prompts in 80 training rows (23.8%): ")


@pytest.mark.parametrize(("num_rows", "count"), [(FEWEST_ROWS - 1, 0), (FEWEST_ROWS, 1)])
def test_a_handful_of_rows_may_share_a_prompt(num_rows, count):
    rows = [pair("p", f"a{line}", "b", line) for line in range(1, num_rows + 1)]
    assert len(findings(check_duplicates, rows)) == count


def test_rankings_count_as_one_row():
    rows = [pair(f"p{line}", *two, line) for line in range(1, 61) for two in combinations(f"abcdef{line}", 2)]
    assert lines(check_duplicates, "few_prompts", rows) == []


CASES = {
    "duplicate": [pair("p", "a", "b", 1), pair("p", "a", "b", 2)],
    "contradictory": [pair("p", "a", "b", 1), pair("p", "b", "a", 1)],
    "cyclic": [pair("p", "a", "b", 1), pair("p", "b", "c", 2), pair("p", "c", "a", 2)],
    "few_prompts": [pair("p", f"a{line}", "b", line) for line in range(1, 61)],
}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("severity", "shown"), [("error", {"error"}), ("warn", {"warning"}), ("off", set())])
def test_every_check_has_the_severity_that_the_recipe_gives(code, severity, shown):
    if code == "few_prompts" and severity == "error":
        with pytest.raises(ValidationError, match="few_prompts"):
            DuplicateChecks(few_prompts="error")
    else:
        assert set(severities(check_duplicates, CASES[code], **{code: severity})) == shown


def test_counts_are_those_of_a_plain_count():
    rng = random.Random(4)
    rows = [pair(rng.choice("pqr"), *rng.sample("abcdefgh", 2), line) for line in range(1, 301)]
    keys = [(row.prompt[0].content, row.chosen[0].content, row.rejected[0].content) for row in rows]
    again = [line for line, key in enumerate(keys, start=1) if key in keys[: line - 1]]
    turned = [line for line, (prompt, good, bad) in enumerate(keys, start=1) if (prompt, bad, good) in keys]
    assert lines(check_duplicates, "duplicate", rows) == again
    assert lines(check_duplicates, "contradictory", rows) == turned


def test_a_row_takes_few_bytes():
    num_rows, rng = 30_000, random.Random(0)
    check = CheckDuplicates(DuplicateChecks())
    answers = [words(rng, 20) for _ in range(50)]
    tracemalloc.start()
    for line in range(num_rows):
        check.look(pair(f"prompt {line}", answers[line % 50], answers[line % 49], line), "train")
    for finding in check.finish():
        del finding
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / num_rows < 200
