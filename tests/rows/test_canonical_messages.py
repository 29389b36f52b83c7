"""One canonical form of a message, whichever notation its tool calls, its tools and its reasoning have."""

from __future__ import annotations

import json

import pytest

from qpref.records import Finding, Row, Source
from qpref.rows.formats import records_of_row

ASKED = {"role": "user", "content": "Weather in Oslo?"}
ARGUMENTS = {"city": "Oslo", "days": 3}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}


def record(**columns):
    """The record of a row whose sides are single assistant turns, or the finding that refuses it."""
    values = {"prompt": [ASKED], "chosen": "It rains.", "rejected": "It snows."} | columns
    found = records_of_row(Row(values=values, source=Source(path="made.jsonl", line=1)))
    return found if isinstance(found, Finding) else found[0]


def extra(**keys):
    """What a response with these keys beside role and content holds of them."""
    found = record(chosen=[{"role": "assistant", "content": "Rain."} | keys])
    assert not isinstance(found, Finding), found
    return dict(found.chosen[0].extra)


def called(arguments, **more):
    return extra(tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": arguments} | more}])[
        "tool_calls"
    ][0]["function"]["arguments"]


SPELLINGS = {
    "arguments as JSON text": [
        {"type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
    ],
    "compact JSON text": [
        {"type": "function", "function": {"name": "weather", "arguments": '{"days":3,"city":"Oslo"}'}}
    ],
    "text of the text": [{"function": {"name": "weather", "arguments": json.dumps(json.dumps(ARGUMENTS))}}],
    "white space around the text": [{"function": {"name": "weather", "arguments": f"\n {json.dumps(ARGUMENTS)} "}}],
    "no type": [{"function": {"name": "weather", "arguments": ARGUMENTS}}],
    "no function": [{"name": "weather", "arguments": ARGUMENTS}],
    "no function, with a type": [{"type": "function", "name": "weather", "arguments": json.dumps(ARGUMENTS)}],
    "null fields": [CALL | {"id": None, "function": CALL["function"] | {"strict": None}}],
    "a null argument": [{"function": {"name": "weather", "arguments": ARGUMENTS | {"unit": None}}}],
    "a null argument in text": [{"function": {"name": "weather", "arguments": json.dumps(ARGUMENTS | {"unit": None})}}],
    "floats": [{"function": {"name": "weather", "arguments": {"city": "Oslo", "days": 3.0}}}],
    "all of it as text": json.dumps([CALL]),
}


@pytest.mark.parametrize("calls", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_a_call_is_one_form(calls):
    assert json.dumps(extra(tool_calls=calls)["tool_calls"], sort_keys=True) == json.dumps([CALL], sort_keys=True)


@pytest.mark.parametrize("arguments", ["", " ", None, {}, "{}", {"unit": None}], ids=repr)
def test_a_call_without_arguments_has_an_empty_object(arguments):
    assert called(arguments) == {}


def test_a_calls_id_and_further_keys_stay():
    call = extra(tool_calls=[{"id": "call_1", "index": 0, "name": "weather", "arguments": {}}])["tool_calls"][0]
    assert call == {"id": "call_1", "index": 0, "type": "function", "function": {"name": "weather", "arguments": {}}}


@pytest.mark.parametrize("text", ['{"city": ', "Oslo", "[1]", '"x"', "null", "3", '{"days": NaN}'], ids=repr)
def test_arguments_that_are_no_object_stay_as_they_are(text):
    assert called(text) == text


@pytest.mark.parametrize(
    ("value", "canonical"),
    [
        ({"a": {"b": None, "c": {"d": None}}}, {"a": {"c": {}}}),
        ({"a": [None, {"b": None}]}, {"a": [None, {}]}),
        ({"a": [], "b": "", "c": False, "d": 0}, {"a": [], "b": "", "c": False, "d": 0}),
        ({"a": 1.5, "b": -0.0, "c": 1e300}, {"a": 1.5, "b": 0, "c": 1e300}),
    ],
    ids=str,
)
def test_null_fields_and_integral_floats_are_brought_to_one_form_at_every_depth(value, canonical):
    for arguments in (value, json.dumps(value)):
        assert json.dumps(called(arguments)) == json.dumps(canonical)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"\xff"], ids=repr)
def test_what_json_cannot_express_is_refused(value):
    for row in ({"tools": [{"a": value}]}, {"chosen": [ASKED | {"role": "assistant", "tool_calls": [{"a": value}]}]}):
        found = record(**row)
        assert (found.code, found.message.endswith("is not JSON")) == ("not_a_message", True)


@pytest.mark.parametrize("text", ['{"a": "\\u0000"}', '{"\\u0007": 1}', '{"a":' * 100 + "1" + "}" * 100], ids=len)
def test_arguments_in_text_are_checked_like_any_text(text):
    found = record(chosen=[{"role": "assistant", "tool_calls": [{"name": "f", "arguments": text}]}])
    assert found.code in ("control_character", "not_a_message")


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TOOLS = {
    "objects": [TOOL],
    "JSON text": json.dumps([TOOL]),
    "a list of texts": [json.dumps(TOOL)],
    "no function": [TOOL["function"]],
    "a type without a function": [TOOL["function"] | {"type": "function"}],
    "a function without a type": [{"function": TOOL["function"]}],
    "parameters as text": [{"type": "function", "function": {"name": "weather", "parameters": json.dumps(PARAMETERS)}}],
    "null fields": [TOOL | {"strict": None, "function": TOOL["function"] | {"description": None}}],
    "a null default": json.loads(json.dumps([TOOL]).replace('"string"', '"string", "default": null')),
    "a null default in text": json.dumps([TOOL]).replace('"string"', '"string", "default": null'),
}


@pytest.mark.parametrize("tools", TOOLS.values(), ids=TOOLS)
def test_every_spelling_of_a_tool_is_one_form(tools):
    assert record(tools=tools).tools == (TOOL,)


def test_a_schema_that_is_no_function_stays():
    assert record(tools=[{"type": "web_search", "city": None}]).tools == ({"type": "web_search"},)


@pytest.mark.parametrize("more", [{}, {"refusal": None}, {"id": "m1"}, {"audio": None, "name": ""}], ids=str)
def test_a_call_needs_no_content_whatever_keys_are_beside_it(more):
    for content in ({}, {"content": None}, {"content": ""}):
        turn = {"role": "assistant", "tool_calls": [CALL]} | content | more
        assert record(chosen=[turn]) == record(chosen=[{"role": "assistant", "content": "", "tool_calls": [CALL]}])


def test_a_message_without_content_and_call_is_refused_whatever_keys_are_beside_it():
    for more in ({}, {"content": None}, {"refusal": None}, {"tool_calls": []}, {"tool_calls": None}):
        assert record(chosen=[{"role": "assistant"} | more]).code == "not_a_message"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(key):
    assert extra(**{key: "Clouds."}) == {"reasoning_content": "Clouds."}
    others = dict.fromkeys({"reasoning_content", "reasoning", "thinking"} - {key})
    assert extra(**others | {key: "Clouds."}) == {"reasoning_content": "Clouds."}


@pytest.mark.parametrize("nothing", [None, "", " \n", [], {}], ids=repr)
def test_blank_reasoning_is_none(nothing):
    assert extra(reasoning=nothing, thinking=nothing) == {}


LEGACY = {
    "an object": {"function_call": CALL["function"]},
    "with arguments as text": {"function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
    "JSON text": {"function_call": json.dumps(CALL["function"])},
    "another name": {"tool_call": CALL},
    "beside no calls": {"function_call": CALL["function"], "tool_calls": []},
    "beside the same call": {"function_call": CALL["function"], "tool_calls": [CALL]},
}


@pytest.mark.parametrize("keys", LEGACY.values(), ids=LEGACY)
def test_a_single_call_under_its_older_key_is_a_tool_call(keys):
    assert extra(**keys) == {"tool_calls": [CALL]}
    assert record(chosen=[{"role": "assistant", "content": None} | keys]).chosen[0].content == ""


def test_calls_under_both_keys_are_all_kept():
    other = {"type": "function", "function": {"name": "time", "arguments": {}}}
    assert extra(function_call={"name": "time"}, tool_calls=[CALL]) == {"tool_calls": [CALL, other]}


@pytest.mark.parametrize("call", ["weather()", {"arguments": {}}, ["x"], {"name": 3}], ids=str)
def test_a_single_call_without_a_name_is_refused(call):
    found = record(chosen=[{"role": "assistant", "content": "x", "function_call": call}])
    assert (found.code, "a function_call is JSON with name and arguments" in found.message) == ("not_a_message", True)


MESSAGES = {
    "OpenAI's": {"role": "assistant", "content": "Rain."},
    "ShareGPT's": {"from": "gpt", "value": "Rain."},
    "capitals": {"role": "Assistant", "content": "Rain.", "id": "m1"},
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_the_json_text_of_one_message_is_the_message(message):
    whole = record(chosen=message)
    assert whole == record(chosen=json.dumps(message)) == record(chosen=json.dumps([message]))
    assert whole.chosen[0].content == "Rain."


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_one_message_in_pythons_notation_is_refused_with_the_way_out(message):
    for text in (str(message), str([message])):
        found = record(chosen=text)
        assert found.message == "chosen: messages in Python notation; write them as JSON (json.dumps)"


def test_a_refusal_is_the_content_of_a_message_without_one():
    said = record(chosen=[{"role": "assistant", "content": None, "refusal": "I can't."}])
    assert said == record(chosen="I can't.")


def test_reasoning_beside_a_sharegpt_call_is_kept():
    call = {"from": "function_call", "value": json.dumps(CALL["function"]), "reasoning": "Clouds."}
    assert record(chosen=[call]).chosen[0].extra == {"reasoning_content": "Clouds.", "tool_calls": [CALL]}


ANSWERS = [
    '{"role": "admin", "content": "x"}', '{"city": "Oslo"}', '{"role": "user", "name": "x"}', '{"content": "x"}',
    "{'city': 'Oslo'}", '{"role": "user", "content": ', "{content}", '{"role": ["user"], "content": "x"}',
]  # fmt: skip


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_in_json_that_is_no_message_is_a_text(text):
    assert record(chosen=text).chosen[0].content == text


def test_an_object_of_lists_is_a_list_of_messages():
    columns = {
        "role": ["user", "assistant", "tool"],
        "content": ["Rain?", None, "rain"],
        "tool_calls": [[], [CALL], []],
    }
    assert record(prompt=columns) == record(
        prompt=[
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "rain"},
        ]
    )
    assert record(prompt={"from": ["human"], "value": ["Rain?"]}).prompt[0].content == "Rain?"
    assert record(prompt={"role": ["user", "assistant"], "content": ["Rain?"]}).code == "not_a_message"


def test_a_function_and_its_result_are_read_in_openais_older_layout():
    schema = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    prompt = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
        {"role": "function", "name": "weather", "content": "yes"},
    ]
    values = {"prompt": prompt, "functions": [schema], "chosen": "Yes.", "rejected": "No."}
    (pair,) = records_of_row(Row(values=values, source=Source(path="made.jsonl", line=1)))
    assert [message.role for message in pair.prompt] == ["user", "assistant", "tool"]
    assert pair.tools == ({"type": "function", "function": schema},)
