"""Texts of messages under keys that nobody reads: said once for each source, with the keys."""

from __future__ import annotations

import json

import pytest

from qpref.data.check import check_data
from qpref.hooks.manager import READER, PluginHost
from qpref.recipe.choices import SourceChoice
from qpref.records import Row, Source
from qpref.rows.formats import COLUMNS
from qpref.rows.unread_keys import UnreadKeys, unread_keys

USER = {"role": "user", "content": "Why?"}
TURN = {"role": "assistant", "content": "Because."}


def counted(*rows):
    """Messages of the findings about these rows."""
    unread = UnreadKeys(COLUMNS)
    for line, values in enumerate(rows, 1):
        unread.note(Row(values=values, source=Source(path="made.jsonl", line=line)))
    findings = list(unread.findings())
    assert all((one.code, one.severity, one.source.line) == ("unread_key", "warning", 0) for one in findings)
    return [
        one.message.removesuffix("; move what the model has to see into content or reasoning_content")
        for one in findings
    ]


@pytest.mark.parametrize(
    "value", ["because", ["a", "b"], {"steps": ["a"]}, [{"text": "a"}], {"deep": [{"er": "a"}]}], ids=str
)
def test_text_under_an_unknown_key_is_unread(value):
    assert unread_keys(TURN | {"rationale": value}) == {"rationale"}


@pytest.mark.parametrize("value", [None, "", " \n", [], {}, [""], {"a": None}, 3, 0.5, True, [1, 2]], ids=repr)
def test_a_key_without_text_is_not_unread(value):
    assert unread_keys(TURN | {"rationale": value}) == set()


@pytest.mark.parametrize(
    "key", ["id", "message_id", "messageId", "parentID", "uuid", "timestamp", "created_at", "createdAt", "model",
            "language", "hashed_ip", "turn_index", "finish_reason", "type", "role", "name", "tool_call_id"],
)  # fmt: skip
def test_records_of_how_a_message_was_made_may_be_lost(key):
    assert unread_keys(TURN | {key: "x"}) == set()


@pytest.mark.parametrize("key", ["paid", "valid", "format", "idea", "reason", "refusal", "thoughts", "text", "value"])
def test_other_keys_may_not(key):
    assert unread_keys(TURN | {key: "x"}) == {key}


def test_candidates_in_place_of_a_content_are_read():
    candidate = {"content": [{"text": "x"}], "preferenceLabel": "preferred"}
    assert counted({"messages": [USER, {"role": "assistant", "candidates": [candidate]}]}) == []


def test_reasoning_is_read_once_and_another_text_of_it_is_not():
    assert unread_keys(TURN | {"reasoning": "x"}) == unread_keys(TURN | {"thinking": "x", "reasoning": "x"}) == set()
    assert unread_keys(TURN | {"reasoning_content": "x", "thinking": "y"}) == {"thinking"}
    assert unread_keys(TURN | {"reasoning": {"effort": "high"}}) == {"reasoning"}
    assert unread_keys(TURN | {"reasoning": "x", "reasoning_details": [{"type": "summary", "text": "x"}]}) == set()
    assert unread_keys(TURN | {"reasoning": "x", "reasoning_details": [{"text": "y"}]}) == {"reasoning_details"}


@pytest.mark.parametrize("turn", [{"from": "gpt", "value": "x"}, {"role": "model", "parts": [{"text": "x"}]}], ids=str)
def test_the_key_that_the_content_comes_from_is_read_and_another_content_is_not(turn):
    assert unread_keys(turn) == unread_keys(turn | {"message": None}) == set()
    assert unread_keys(turn | {"message": "y"}) == {"message"}


def test_texts_beside_those_of_parts_are_unread():
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "citations": None}
    thought = {"type": "thinking", "thinking": "y", "signature": "Ab3="}
    assert unread_keys(USER | {"content": [part, thought, "z"]}) == set()
    assert unread_keys(USER | {"content": [part, thought | {"notes": ["n"]}]}) == {"notes"}
    assert unread_keys({"role": "model", "parts": [part | {"notes": "n"}]}) == {"notes"}


PLACES = {
    "a list": {"prompt": [USER, TURN | {"note": "x"}]},
    "one message": {"chosen": TURN | {"note": "x"}},
    "JSON text": {"chosen": json.dumps([USER, TURN | {"note": "x"}])},
    "a message without a role": {"chosen": {"content": "x", "note": "y"}},
    "JSON text of one message": {"chosen": json.dumps(TURN | {"note": "x"})},
    "an object of lists": {"prompt": {"role": ["user"], "content": ["Why?"], "note": ["x"]}},
    "OpenAI's input": {"input": {"messages": [USER | {"note": "x"}], "tools": []}},
    "ranked responses": {"responses": [[TURN], [TURN | {"note": "x"}]]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Why?", "note": "x"}]},
}


@pytest.mark.parametrize("values", PLACES.values(), ids=PLACES)
def test_messages_are_found_wherever_a_row_has_them(values):
    assert counted(values) == ["messages of 1 row have texts under keys that aren't read: note"]


def test_what_is_no_message_of_a_row_has_no_such_keys():
    schema = {"type": "object", "properties": {"role": {"type": "string"}, "from": {"type": "string"}}}
    call = {"name": "f", "arguments": {"role": "x", "note": "y"}}
    assert (
        counted(
            {"tools": [{"name": "f", "parameters": schema}], "chosen": [TURN | {"tool_calls": [call]}]},
            {"meta": [TURN | {"note": "x"}], "prompt": '[{"role": "user"', "chosen": "[x] {role}", "rejected": ["x"]},
            {"completions": [{"model": "a", "response": "x", "critique": "y"}]},
        )
        == []
    )


def test_keys_are_named_by_their_number_of_rows_and_each_source_has_one_finding():
    rows = [{"chosen": [TURN | {"a": "x"}]}, {"chosen": [TURN | {"b": "x"}], "prompt": [USER | {"b": "x"}] * 3}]
    assert counted(*rows, rows[1]) == ["messages of 3 rows have texts under keys that aren't read: b, a"]


@pytest.mark.parametrize("share", [False, True], ids=["training alone", "with a held-out file"])
def test_a_check_of_data_says_it_once_for_each_source_and_keeps_the_rows(tmp_path, share):
    row = {"question": [USER | {"note": "x"}], "chosen": [TURN], "rejected": [TURN | {"content": "No.", "id": "x"}]}
    choices = []
    for split in ("train", "heldout")[: 1 + share]:
        path = tmp_path / f"{split}.jsonl"
        path.write_text(f"{json.dumps(row)}\n" * 3)
        reader = PluginHost().load(READER, "jsonl")
        choices.append(SourceChoice(location=str(path), split=split, reader=reader, columns={"prompt": "question"}))
    report = check_data(choices, []).report
    assert (report.kept, report.refused) == (3 * len(choices), 0)
    assert {(one.code, one.source.path, one.source.line) for one in report.findings} == {
        ("unread_key", choice.location, 0) for choice in choices
    }
