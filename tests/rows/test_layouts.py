"""Layouts of other tools and vendors become the records of qpref's own, and each is refused where a part is broken."""

import json
import math

import pytest

from qpref.records import Finding, Message, PreferencePair, Row, Source, UnpairedExample
from qpref.rows.formats import format_of, records_of_row

SOURCE = Source(path="pairs.jsonl", line=3)


def turn(role, content, **extra):
    return {"role": role, "content": content} | extra


USER, GOOD, BAD = turn("user", "Why?"), turn("assistant", "Because."), turn("assistant", "No idea.")
TALK = [turn("system", "Be kind."), turn("user", "Hi"), turn("assistant", "Hello."), USER]
TOOL = {"type": "function", "function": {"name": "dice"}}
CALL = {"type": "function", "function": {"name": "dice", "arguments": {"sides": 6}}}


def records(values, row_format="auto"):
    result = records_of_row(Row(values=values, source=SOURCE), row_format)
    assert not isinstance(result, Finding), result
    return list(result)


def refusal(values, row_format="auto"):
    """(code, message) of the finding that a row becomes."""
    result = records_of_row(Row(values=values, source=SOURCE), row_format)
    assert isinstance(result, Finding), result
    assert (result.severity, result.source) == ("error", SOURCE)
    return result.code, result.message


def plain(prompt, chosen="Because.", rejected="No idea.", **columns):
    """The records of a prompt and two texts in qpref's own layout."""
    return records({"prompt": prompt, "chosen": chosen, "rejected": rejected} | columns)


PART = {"type": "text", "text": "Why?"}
SIDES = {"chosen": GOOD, "rejected": BAD}
SWIFT = {"messages": [*TALK, GOOD], "rejected_response": "No idea."}
GEMINI = {
    "system_instruction": {"parts": [{"text": "Be kind."}]},
    "contents": [
        {"role": "user", "parts": [{"text": "Hi"}]},
        {"role": "model", "parts": [{"text": "Hel"}, {"text": "lo."}]},
        {"role": "user", "parts": [{"text": "Why?"}]},
    ],
    "completions": [
        {"score": 0, "completion": {"role": "model", "parts": [{"text": "No idea."}]}},
        {"score": 1, "completion": {"role": "model", "parts": [{"text": "Because."}]}},
    ],
}
NOVA = {
    "system": [{"text": "Be kind."}],
    "messages": [
        *TALK[1:],
        {
            "role": "assistant",
            "candidates": [
                {"content": [{"text": "No idea."}], "preferenceLabel": "non-preferred"},
                {"content": [{"text": "Because."}], "preferenceLabel": "preferred"},
            ],
        },
    ],
}
TEXT_SIDES = {"chosen": "Because.", "rejected": "No idea."}
WHOLE = {"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]}


@pytest.mark.parametrize(
    "values",
    [
        {"messages": TALK, **SIDES},
        {"messages": TALK, **TEXT_SIDES},
        {"messages": TALK, "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [*TALK, GOOD], **TEXT_SIDES},
        {"messages": json.dumps(TALK), **{side: json.dumps([one]) for side, one in SIDES.items()}},
        {"messages": json.dumps(TALK), **{side: json.dumps(one) for side, one in SIDES.items()}},
        {"messages": TALK[1:], "system": "Be kind.", **TEXT_SIDES},
        SWIFT,
        SWIFT | {"rejected_response": BAD},
        {"messages": [*TALK, GOOD], "rejected_message": BAD},
        {"messages": [*TALK, GOOD], "rejected_messages": [*TALK, BAD]},
        {"messages": [*TALK, GOOD], "rejected": "No idea."},
        {"conversations": [*TALK, GOOD], "rejected": BAD},
        {"messages": [*TALK[1:], GOOD], "system": "Be kind.", "rejected_response": "No idea."},
        {"query": "Why?", "response": "Because.", "rejected_response": "No idea.", "history": [["Hi", "Hello."]],
         "system": "Be kind."},
        {"question": "Why?", "response_chosen": "Because.", "response_rejected": "No idea.",
         "history": [["Hi", "Hello."]], "system": "Be kind."},
        {"prompt": "Why?", "history": [["Hi", "Hello."]], "system": "Be kind.", **TEXT_SIDES},
        {"prompt": "Why?", "history": TALK[:-1], **TEXT_SIDES},
        {"prompt": TALK, "history": [["x", "y"]], **TEXT_SIDES},
        {"messages": [*TALK, GOOD], "rejected": {"messages": [*TALK, BAD]}},
        {"prompt": TALK, "chosen_response": "Because.", "rejected_response": "No idea."},
        {"chosen_conversations": WHOLE["chosen"], "rejected_conversations": WHOLE["rejected"]},
        {side: {"messages": turns} for side, turns in WHOLE.items()},
        {side: {"conversations": turns} for side, turns in WHOLE.items()},
        {side: json.dumps({"messages": turns, "tools": []}) for side, turns in WHOLE.items()},
        {"prompt": {"messages": TALK}, **TEXT_SIDES},
        {"contents": GEMINI["contents"], "systemInstruction": {"role": "system", "parts": ["Be kind."]}, **TEXT_SIDES},
        GEMINI,
        {"context": TALK, "completions": [{"rank": 0, "completion": [GOOD]}, {"rank": 1, "completion": [BAD]}]},
        {"messages": TALK, "generations": ["No idea.", "Because."], "ratings": [1, 4.5]},
        {"system": [{"text": "Be kind."}], "messages": TALK[1:], **TEXT_SIDES},
        NOVA,
        {"input": {"messages": TALK}, "preferred_completion": [GOOD], "non_preferred_completion": [BAD]},
        {"input": TALK, "preferred_output": GOOD, "non_preferred_output": BAD},
        {"prompt": TALK, "chosen": {"answer": "Because.", "rank": 1}, "rejected": {"response": "No idea."}},
        {"prompt": TALK, "chosen": "Because.", "rejected": [{"answer": "No idea.", "rank": 7}]},
        {"input": json.dumps({"messages": TALK}), "preferred_output": "Because.", "non_preferred_output": "No idea."},
    ],
    ids=lambda values: "-".join(values),
)  # fmt: skip
def test_a_documented_layout_is_the_same_pair(values):
    assert records(values) == plain(TALK)


@pytest.mark.parametrize("column", ["contents", "context", "question", "query", "input"])
def test_one_column_of_another_name_is_the_prompt(column):
    assert records({column: "Why?", **TEXT_SIDES}) == plain("Why?")
    single = {column: "Why?", "response": "Because.", "label": True}
    assert records(single) == records({"prompt": "Why?", "completion": "Because.", "label": True})


def test_qprefs_own_names_come_before_those_of_other_tools():
    others = {"chosen_response": "x", "rejected_response": "y", "rejected_message": "z", "prompt_messages": "w"}
    assert records({"prompt": TALK, **TEXT_SIDES, **others}) == plain(TALK)


def test_a_prompt_comes_before_columns_of_other_names():
    assert records({"prompt": "Why?", "context": "x", "question": "y", **TEXT_SIDES}) == plain("Why?")
    assert records(WHOLE | {"context": "about kindness"}) == plain(TALK)


def test_two_columns_that_may_be_the_prompt_refuse_the_row():
    code, message = refusal({"context": "A fact.", "question": "Why?", **TEXT_SIDES})
    assert (code, message) == (
        "not_a_pair",
        'context and question: any of them may be the prompt; name it: columns = { prompt = "context" }',
    )
    assert records({"context": None, "question": "Why?", **TEXT_SIDES}) == plain("Why?")


@pytest.mark.parametrize(
    ("values", "code", "wording"),
    [
        ({"messages": TALK, "chosen": GOOD}, "not_a_pair", "no rejected"),
        ({"messages": TALK, "chosen": GOOD, "rejected": None}, "not_a_pair", "no rejected"),
        ({"messages": [], **SIDES}, "not_a_message", "messages: expected a text or a list of messages, found an empty"),
        ({"messages": 3, **SIDES}, "not_a_message", "messages: expected a text or a list of messages, found a number"),
        ({"messages": TALK[:1], **SIDES}, "role_order", "the last turn is the system's"),
        ({"messages": [*TALK, BAD], **SIDES}, "role_order", "the last turn is the assistant's"),
        ({"messages": TALK, "chosen": "", "rejected": "x"}, "empty", "chosen is empty"),
        ({"messages": TALK, "chosen": USER, "rejected": BAD}, "role_order", "chosen: expected one turn of"),
        (SWIFT | {"messages": TALK}, "not_a_pair", "messages: the last turn is the user's; end with the chosen"),
        (SWIFT | {"messages": [GOOD]}, "not_a_pair", "messages: the last turn is the assistant's; end with"),
        (SWIFT | {"messages": []}, "not_a_message", "messages: expected a text or a list of messages"),
        (SWIFT | {"rejected_response": ""}, "empty", "rejected is empty"),
        (SWIFT | {"rejected_response": 3}, "not_a_message", "rejected: expected a text or a list of messages"),
        (SWIFT | {"rejected_response": [USER, BAD]}, "different_prompts", "share no first turn"),
        ({"query": "Why?", "response": None, "rejected_response": "x"}, "not_a_pair", "no chosen"),
        ({"prompt": "Why?", "history": [["Hi"]], **TEXT_SIDES}, "not_a_message", "history: expected [question"),
        ({"prompt": "Why?", "history": [{"a": 1}], **TEXT_SIDES}, "not_a_message", "turn 1: a message without a role"),
        ({"query": "", "response": "a", "rejected_response": "x"}, "not_a_pair", "no prompt; it has query"),
        ({"chosen_response": "a", "prompt": "Why?"}, "not_a_pair", "no rejected"),
        ({"chosen_conversations": [], "rejected_conversations": []}, "not_a_message", "found an empty list"),
        ({"chosen": {"messages": []}, "rejected": {"messages": []}}, "not_a_message", "chosen: expected a text or"),
        ({"chosen": {"messages": "x"}, **TEXT_SIDES, "prompt": "Why?"} | {"chosen": {"messages": "x"}}, "not_a_message",
         "an object with the keys messages"),
        (GEMINI | {"contents": None}, "not_a_pair", "no prompt; it has system_instruction, contents (null)"),
        (GEMINI | {"contents": [{"role": "user"}]}, "not_a_message", "contents, turn 1: a message's content is a text"),
        (GEMINI | {"contents": [{"role": "user", "parts": []}]}, "empty", "prompt, turn 2 is empty"),
        (GEMINI | {"completions": GEMINI["completions"][:1]}, "not_a_pair", "a list of 2 to 64 responses, found 1"),
        (GEMINI | {"completions": [{"completion": "a"}, {"completion": "b"}]}, "bad_number", "neither a rank nor"),
        (GEMINI | {"system_instruction": 3}, "not_a_message", "system_instruction: expected a text"),
        (GEMINI | {"system_instruction": [turn("system", "a"), turn("system", "b")]}, "not_a_message",
         "system_instruction: expected one text, found 2 messages"),
        ({"input": {"messages": "x"}, "preferred_output": "a", "non_preferred_output": "b"}, "not_a_pair",
         "input: expected an object with messages"),
        ({"input": "Why?", "preferred_output": "a", "non_preferred_output": "b"}, "not_a_pair",
         "input: expected an object with messages, found a text"),
        ({"messages": TALK, "generations": ["a", "b"], "ratings": [1]}, "bad_number", "ratings: expected a number for"),
        ({"messages": TALK, "generations": ["a", "b"], "ratings": [None, 1]}, "bad_number", "ratings: expected a"),
    ],
)  # fmt: skip
def test_a_broken_part_of_a_layout_refuses_the_row(values, code, wording):
    found, message = refusal(values)
    assert (found, wording in message) == (code, True), message


def with_candidates(*candidates):
    return {"messages": [*TALK, {"role": "assistant", "candidates": list(candidates)}]}


def candidate(text, label):
    return {"content": [{"text": text}], "preferenceLabel": label}


def test_every_preferred_candidate_makes_a_pair_with_every_other_one():
    values = with_candidates(*(candidate(text, "preferred" if text in "ab" else "non-preferred") for text in "acbd"))
    pairs = [(one.chosen[0].content, one.rejected[0].content, one.number) for one in records(values)]
    assert pairs == [("a", "c", 0), ("a", "d", 1), ("b", "c", 2), ("b", "d", 3)]


@pytest.mark.parametrize(
    ("candidates", "code", "wording"),
    [
        ([], "not_a_pair", "candidates: 0 preferred and 0 non-preferred"),
        ([candidate("a", "preferred")], "not_a_pair", "candidates: 1 preferred and 0 non-preferred"),
        ([candidate("a", "good")], "bad_label", "candidate 1: preferenceLabel 'good'; known: preferred, non-preferred"),
        ([candidate("a", ["preferred"])], "bad_label", "candidate 1: preferenceLabel a list"),
        (["a"], "bad_label", "candidate 1: preferenceLabel None"),
        ([{"preferenceLabel": "preferred"}], "not_a_message", "candidate 1: expected a text or a list of messages"),
        ([candidate("", "preferred"), candidate("b", "non-preferred")], "empty", "chosen is empty"),
    ],
)
def test_broken_candidates_refuse_the_row(candidates, code, wording):
    found, message = refusal(with_candidates(*candidates))
    assert (found, message[: len(wording)]) == (code, wording)


def test_a_row_named_nova_has_candidates():
    assert refusal({"messages": TALK}, "nova")[0] == "not_a_pair"
    assert refusal({"messages": [{"candidates": NOVA["messages"][-1]["candidates"]}]})[0] == "not_a_message"


def test_whole_conversations_beside_messages_are_read_without_them():
    values = {"messages": WHOLE["chosen"], **WHOLE}
    assert (format_of(values), records(values)) == ("whole", plain(TALK))


# Tools beside a side's messages.


def sides_with(chosen_tools, rejected_tools, **columns):
    tools = {"chosen": chosen_tools, "rejected": rejected_tools}
    return {side: {"messages": WHOLE[side], "tools": tools[side]} for side in WHOLE} | columns


@pytest.mark.parametrize(
    "values",
    [sides_with([TOOL], [TOOL]), sides_with([TOOL], None), sides_with(None, json.dumps([TOOL])),
     sides_with([TOOL], [], tools=[TOOL]), {"prompt": {"messages": TALK, "tools": [TOOL]}, **TEXT_SIDES}],
)  # fmt: skip
def test_the_tools_of_a_side_are_those_of_the_pair(values):
    assert records(values) == plain(TALK, tools=[TOOL])


@pytest.mark.parametrize("values", [sides_with([TOOL], [CALL]), sides_with([TOOL], None, tools=[CALL])])
def test_tools_that_differ_refuse_the_row(values):
    code, message = refusal(values)
    assert (code, "its tools are not those of the row or of the other side" in message) == ("different_prompts", True)


def test_tools_of_a_side_are_a_list():
    assert refusal(sides_with({"name": "dice"}, None))[0] == "not_a_message"


# Several responses of one side.


@pytest.mark.parametrize("row_format", ["auto", "pair"])
def test_every_chosen_response_makes_a_pair_with_every_rejected_one(row_format):
    pairs = records({"prompt": "Why?", "chosen": ["a", "b"], "rejected": ["c", [turn("assistant", "d")]]}, row_format)
    assert [(one.chosen[0].content, one.rejected[0].content, one.number) for one in pairs] == [
        *(("a", "c", 0), ("a", "d", 1), ("b", "c", 2), ("b", "d", 3)),
    ]


def test_a_list_of_one_response_is_that_response():
    assert records({"prompt": "Why?", "chosen": ["Because."], "rejected": [[BAD]]}) == plain("Why?")


def test_several_whole_conversations_may_be_rejected():
    pairs = records({"chosen": WHOLE["chosen"], "rejected": [WHOLE["rejected"], [*TALK, turn("assistant", "x")]]})
    assert [one.rejected[0].content for one in pairs] == ["No idea.", "x"]
    assert pairs[0].prompt == plain(TALK)[0].prompt


def test_several_responses_may_be_rejected_in_a_conversation():
    pairs = records(SWIFT | {"rejected_response": ["No idea.", "x"]})
    assert [(one.rejected[0].content, one.number) for one in pairs] == [("No idea.", 0), ("x", 1)]


@pytest.mark.parametrize(
    ("rejected", "code", "wording"),
    [
        (["x", ""], "empty", "rejected, number 2 is empty"),
        (["x", None], "not_a_message", "rejected, turn 1: a message has a role and a content, found a text"),
        (["x", []], "not_a_message", "rejected, number 2: expected a text or a list of messages, found an empty list"),
        (["x"] * 65, "not_a_pair", "rejected: 65 responses; a row may have 64"),
        ([], "not_a_message", "rejected: expected a text or a list of messages, found an empty list"),
        (["x", [USER, BAD, USER]], "role_order", "rejected: expected one turn of the assistant's"),
    ],
)
def test_a_broken_list_of_responses_is_refused(rejected, code, wording):
    found, message = refusal({"prompt": "Why?", "chosen": "Because.", "rejected": rejected})
    assert (found, message[: len(wording)]) == (code, wording)


# Roles.


@pytest.mark.parametrize(
    ("spelling", "role"),
    [("Human", "user"), ("USER", "user"), (" user ", "user"), ("prompter", "user"), ("Assistant", "assistant"),
     ("AI", "assistant"), ("Chatbot", "assistant"), ("model", "assistant"), ("GPT", "assistant")],
)  # fmt: skip
@pytest.mark.parametrize("key", ["role", "from"])
def test_a_role_is_read_in_every_spelling(key, spelling, role):
    turns = [turn("user", "Hi"), turn("assistant", "Hello."), USER]
    spelled = [{key: spelling if one["role"] == role else one["role"], "value": one["content"]} for one in turns]
    assert records({"prompt": spelled, **TEXT_SIDES}) == plain(turns)


@pytest.mark.parametrize("spelling", ["tool", "Observation", "tool_response", "ipython", "TOOL_RESULT"])
def test_a_tools_turn_is_read_in_every_spelling(spelling):
    called = [USER, turn("assistant", "", tool_calls=[CALL])]
    assert plain([*called, turn(spelling, "4")]) == plain([*called, turn("tool", "4")])


def test_a_function_may_be_a_call_or_its_result():
    code, message = refusal({"prompt": [USER, turn("function", "4")], **TEXT_SIDES})
    assert (code, message) == (
        "not_a_message",
        "prompt, turn 2: role 'function' can be a call or its result; write function_call or tool",
    )


def test_calls_in_turns_of_their_own_join_the_assistants_turn():
    call = turn("tool_call", json.dumps(CALL["function"]))
    result = turn("tool_response", "4")
    for before, content in (([], ""), ([turn("assistant", "Let me see.")], "Let me see.")):
        prompt = plain([USER, *before, call, call, result, result])[0].prompt
        assert prompt[1] == Message(role="assistant", content=content, extra={"tool_calls": [CALL, CALL]})
        assert [message.role for message in prompt] == ["user", "assistant", "tool", "tool"]


@pytest.mark.parametrize("key", ["content", "value", "parts", "text", "message"])
def test_a_content_is_read_under_every_key(key):
    assert plain([{"role": "user", key: "Why?"}]) == plain("Why?")
    assert plain({key: "Why?"}) == plain("Why?")


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "admin", "content": "x"},
        {"role": "user"},
        {"from": "Oslo", "text": "x"},
        {"content": "x"},
        {"user": "x"},
        {},
    ],
    ids=str,
)
def test_an_answer_in_json_that_is_no_message_is_a_text(answer):
    (pair,) = plain("Why?", json.dumps(answer))
    assert pair.chosen[0].content == json.dumps(answer)


@pytest.mark.parametrize("value", [GOOD, [GOOD], [USER, GOOD], {"messages": [USER, GOOD]}], ids=str)
def test_messages_as_python_prints_them_are_refused(value):
    code, message = refusal({"prompt": "Why?", **TEXT_SIDES, "chosen": str(value)})
    assert (code, message) == ("not_a_message", "chosen: messages in Python notation; write them as JSON (json.dumps)")
    assert plain("Why?", "{'colour': 'blue'}")[0].chosen[0].content == "{'colour': 'blue'}"


# Parts.

PARTS = [
    [PART],
    ["Why?"],
    [{"text": "Why?"}],
    [{"type": "input_text", "text": "Wh"}, {"type": "output_text", "text": "y?", "annotations": []}],
    [{"type": "text", "text": "Why?", "image_url": None}],
    [{"type": "refusal", "refusal": "Why?"}],
]


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_parts_of_text_are_joined(side, parts):
    texts = {"prompt": "Why?", **TEXT_SIDES}
    role = "user" if side == "prompt" else "assistant"
    assert records(texts | {side: [turn(role, parts)]}) == records(texts | {side: "Why?"})


@pytest.mark.parametrize(
    "part",
    [{"type": "thinking", "thinking": "hm"}, {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
     {"type": "reasoning", "text": "hm"}, {"text": "hm", "thought": True}],
    ids=str,
)  # fmt: skip
def test_parts_of_reasoning_are_the_messages_reasoning(part):
    chosen = turn("assistant", [part, {"text": "Because."}])
    assert plain("Why?", chosen) == plain("Why?", GOOD | {"reasoning_content": "hm"})
    code, message = refusal({"prompt": "Why?", "chosen": chosen | {"reasoning_content": "ah"}, "rejected": "x"})
    assert (code, "reasoning both in a part and in reasoning_content" in message) == ("not_a_message", True)


@pytest.mark.parametrize(
    ("part", "wording"),
    [
        ({"type": "image_url", "image_url": {"url": "x.png"}}, "a part of the type 'image_url'; qpref trains on text"),
        ({"type": "input_audio", "input_audio": {}}, "a part of the type 'input_audio'; qpref trains on text"),
        ({"inlineData": {"mimeType": "image/png"}}, "a part with inlineData; qpref trains on text"),
        ({"type": "tool_use", "name": "dice"}, "a call of a tool; write it under the message's key tool_calls"),
        ({"functionCall": {"name": "dice"}}, "a call of a tool; write it under the message's key tool_calls"),
        ({"type": "text"}, "a part without a text; remove it"),
        ({"type": "text", "text": None}, "a part without a text; remove it"),
        ({}, "a part without a text; remove it"),
        ({"type": "thinking"}, "reasoning without a text"),
        ({"type": ["text"], "text": "x"}, "a part of the type a list"),
        (3, "expected an object with a text, found a number"),
        ([], "expected an object with a text, found an empty list"),
    ],
    ids=str,
)
def test_a_part_that_is_no_text_is_refused_with_its_number(part, wording):
    code, message = refusal({"prompt": [turn("user", [PART, part])], **TEXT_SIDES})
    assert (code, message.startswith(f"prompt, turn 1, part 2: {wording}")) == ("not_a_message", True), message


# The assistant's greeting.

GREETED = [turn("assistant", "What can I do for you?"), USER]


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": GREETED, **TEXT_SIDES},
        {"input": {"messages": GREETED}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"chosen": [*GREETED, GOOD], "rejected": [*GREETED, BAD]},
        {"prompt": "Why?", "chosen": [*GREETED, GOOD], "rejected": [*GREETED, BAD]},
        {"messages": [*GREETED, GOOD], "rejected_response": "No idea."},
        {
            side: f"\n\nAssistant: What can I do for you?\n\nHuman: Why?\n\nAssistant: {text}"
            for side, text in TEXT_SIDES.items()
        },
        {"prompt": "\n\nAssistant: What can I do for you?\n\nHuman: Why?\n\nAssistant:", **TEXT_SIDES},
    ],
    ids=lambda values: "-".join(values),
)
def test_a_greeting_by_the_assistant_is_kept(values):
    (pair,) = records(values)
    assert isinstance(pair, PreferencePair)
    assert [(one.role, one.content) for one in pair.prompt] == [
        *(("assistant", "What can I do for you?"), ("user", "Why?")),
    ]


def test_a_greeting_alone_is_no_prompt():
    assert refusal({"prompt": GREETED[:1], **TEXT_SIDES})[0] == "role_order"
    assert refusal({"prompt": [*GREETED[:1], *GREETED], **TEXT_SIDES})[0] == "role_order"


# Numbers.

TOO_LARGE = {"401 digits": 10**400, "5,000 digits": -(10**5000), "1e999": "1e999", "a text": "9" * 400, "inf": math.inf}


@pytest.mark.parametrize("value", TOO_LARGE.values(), ids=TOO_LARGE)
@pytest.mark.parametrize("column", ["margin", "weight"])
def test_a_number_too_large_for_a_float_is_called_that(column, value):
    assert refusal({"prompt": "Why?", **TEXT_SIDES, column: value}) == (
        "bad_number",
        f"{column}: infinite, or a number too large for 64 bits (at most 1.8e308)",
    )


# Advice.


@pytest.mark.parametrize(
    ("values", "mapping"),
    [
        ({"prompt": "p", "accepted": "a", "rejected": "b"}, 'chosen = "accepted"'),
        ({"post": "p", "good": "a", "bad": "b"}, 'prompt = "post", chosen = "good", rejected = "bad"'),
        ({"Prompt": "p", "Chosen": "a", "Rejected": "b"},
         'prompt = "Prompt", chosen = "Chosen", rejected = "Rejected"'),
        ({"problem": "p", "Chosen Answer": "a", "Rejected Answer": "b"},
         'prompt = "problem", chosen = "Chosen Answer", rejected = "Rejected Answer"'),
        ({"prompt": "p", "preferredText": "a", "nonPreferredText": "b"},
         'chosen = "preferredText", rejected = "nonPreferredText"'),
        ({"prompt": "p", "y_w": "a", "y_l": "b", "score_w": "7", "w_model": "m"}, 'chosen = "y_w", rejected = "y_l"'),
    ],
)  # fmt: skip
def test_columns_whose_names_say_enough_are_suggested_and_not_read(values, mapping):
    code, message = refusal(values)
    assert code in ("not_a_pair", "unknown_format")
    assert message.endswith(f"; [data] columns = {{ {mapping} }} would fit")


def test_names_that_could_mean_two_columns_are_not_suggested():
    _, message = refusal({"prompt": "p", "good_a1": "a", "best_a2": "b", "bad": "c"})
    assert 'rejected = "bad"' in message
    assert "chosen =" not in message


@pytest.mark.parametrize(
    ("values", "first", "second", "winner"),
    [
        ({"instruction": "p", "output_1": "a", "output_2": "b", "label": 1}, "output_1", "output_2", "label"),
        ({"prompt": "p", "A": "a", "B": "b", "gold_label": "A"}, "A", "B", "gold_label"),
        ({"prompt": "p", "left": "a", "right": "b", "choice": "left"}, "left", "right", "choice"),
        ({"prompt": "p", "Output (a)": "a", "Output (b)": "b", "label": 0}, "Output (a)", "Output (b)", "label"),
        ({"prompt": "p", "answerA": "a", "answerB": "b", "winner": "A"}, "answerA", "answerB", "winner"),
        ({"question": "p", "answer_1": "a", "answer_2": "b", "model_1": "m", "model_2": "n", "preference": 1},
         "answer_1", "answer_2", "preference"),
        ({"question": "p", "answer_1": "a", "answer_2": "b"}, "answer_1", "answer_2", "..."),
    ],
)  # fmt: skip
def test_two_responses_and_a_verdict_are_no_single_completion_and_are_told_of_the_contest(
    values, first, second, winner
):
    code, message = refusal(values)
    assert code in ("unknown_format", "not_a_pair")
    assert "completion" not in message
    assert f'[data.contest] first = "{first}", second = "{second}", winner = "{winner}"' in message


@pytest.mark.parametrize(
    "names",
    [("output_1", "response_2"), ("a1", "b2"), ("rejected-1", "rejected-2"), ("x", "y"), ("output_2", "output_3")],
)
def test_other_columns_are_no_two_responses(names):
    _, message = refusal({"post": "p", "label": 1} | dict.fromkeys(names, "x"))
    assert "contest" not in message


def test_columns_of_several_responses_are_told_of_the_list_of_them():
    values = {"prompt": "p", "label": 1} | dict.fromkeys(("answer_a", "answer_b", "answer_c"), "x")
    code, message = refusal(values)
    assert (code, "write the 3 responses as one list: responses, with ranks or scores" in message) == (
        "not_a_pair",
        True,
    )


def test_responses_without_a_score_are_told_what_to_add():
    code, message = refusal({"question": "Why?", "answers": ["a", "b"]})
    assert (code, "add them, or name a list from best to worst ranked" in message) == ("bad_number", True)


def test_data_for_supervised_fine_tuning_are_called_that():
    for values in ({"messages": [USER, GOOD]}, {"prompt": "Why?", "completion": "Because."}):
        assert "one response without a label, as for supervised fine-tuning" in refusal(values)[1]


def test_a_text_that_holds_the_prompt_on_both_sides_needs_it_in_a_column():
    code, message = refusal({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert (code, message) == (
        "not_a_pair",
        "not a preference pair: no prompt; it has chosen, rejected; write what both respond to in a column prompt",
    )


def test_advice_stays_short_and_on_one_line():
    names = [f"{'very_long_name_' * 6}{number}" for number in range(40)]
    sides = [f"{side}_{'x' * 300}" for side in ("chosen", "rejected")]
    hostile = ["a\nb", 'c"d', "\x1b[31m", "chosen\n", "rejected\x1b"]
    for values in (dict.fromkeys(names, "x"), dict.fromkeys(sides, "x"), dict.fromkeys(hostile, "x"), {"": "x"}):
        _, message = refusal(values)
        assert len(message) < 400
        assert message.isprintable()


@pytest.mark.parametrize("column", ["completion", "output", "response"])
def test_a_completion_is_read_under_each_name(column):
    (example,) = records({"query": "Why?", column: "Because.", "kto_tag": 1.0})
    assert isinstance(example, UnpairedExample)
    assert (example.completion[0].content, example.label) == ("Because.", True)
