"""Shared tools for checks: severities, the text of turns, sources as integers."""

import numpy as np
import pytest

from qpref.hooks import Places, report, text_of
from qpref.records import Finding, Message, Source

PLACE = Source(path="a.jsonl", line=3)


@pytest.mark.parametrize(("severity", "shown"), [("error", "error"), ("warn", "warning")])
def test_a_finding_has_the_severity_that_the_recipe_gives(severity, shown):
    assert report(severity, "code", "message", PLACE) == (
        Finding(code="code", severity=shown, message="message", source=PLACE),
    )


def test_a_check_that_is_off_reports_nothing():
    assert report("off", "code", "message", PLACE) == ()


def test_the_text_of_turns_is_one_after_the_other():
    assert text_of([Message(role="user", content="a")]) == "a"
    assert text_of([Message(role="user", content="a"), Message(role="assistant", content="b")]) == "a\nb"
    assert text_of([]) == ""


def test_tool_calls_are_text_whatever_the_order_of_their_keys():
    one, other = (
        text_of([Message(role="assistant", content="", extra={"tool_calls": [call]})])
        for call in ({"name": "f", "arguments": {"é": 1}}, {"arguments": {"é": 1}, "name": "f"})
    )
    assert one == other == '\n{"tool_calls": [{"arguments": {"é": 1}, "name": "f"}]}'


def test_places_come_back():
    places = Places()
    sources = [Source(path=path, line=line) for path in ("a", "b", "c") for line in (0, 1, 2**40 - 1)]
    numbers = [places.number(source) for source in sources]
    assert len(set(numbers)) == len(numbers)
    assert [places.source(number) for number in numbers] == sources
    assert places.number(Source(path="b", line=1)) == numbers[4]


def test_paths_are_known_of_many_places_at_once():
    places = Places()
    numbers = np.array([places.number(Source(path=path, line=7)) for path in ("a", "b", "a")])
    assert [places.paths[number] for number in Places.path_numbers(numbers)] == ["a", "b", "a"]
