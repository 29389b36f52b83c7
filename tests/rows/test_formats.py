"""A row becomes records in one of the formats of docs/data.md, or is refused with the reason; nothing is guessed."""

import itertools
import json
import math

import pytest

from qpref.data.singles import singles_of, unpair
from qpref.records import Finding, Message, PreferencePair, Row, Source, UnpairedExample
from qpref.rows.formats import ROW_FORMATS, format_of, records_of_row, with_columns
from qpref.rows.ranked import MAX_RESPONSES

SOURCE = Source(path="pairs.jsonl", line=7)


def turn(role, content, **extra):
    return {"role": role, "content": content} | extra


def message(role, content, **extra):
    return Message(role=role, content=content, extra=extra)


USER, ASSISTANT = turn("user", "Why?"), turn("assistant", "Because.")
TEXTS = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
TURNS = {
    "prompt": [turn("system", "Be kind."), USER, ASSISTANT, turn("user", "And?")],
    "chosen": [ASSISTANT],
    "rejected": [turn("assistant", "No idea.")],
}
WHOLE = {side: [USER, *TURNS[side]] for side in ("chosen", "rejected")}
SINGLE = {"prompt": "Why?", "completion": "Because.", "label": True}
RANKED = {"prompt": "Why?", "responses": ["a", "b", "c"]}
SIDES = list(TEXTS)


def records(values, row_format="auto"):
    """The records that a row becomes."""
    result = records_of_row(Row(values=values, source=SOURCE), row_format)
    assert not isinstance(result, Finding), result
    assert all(record.source == SOURCE for record in result)
    return result


def pair(values, row_format="auto"):
    """The one pair that a row becomes."""
    (result,) = records(values, row_format)
    assert isinstance(result, PreferencePair)
    return result


def refusal(values, row_format="auto"):
    """(code, message) of the finding that a row becomes; asserts that it refuses the row at its place."""
    result = records_of_row(Row(values=values, source=SOURCE), row_format)
    assert isinstance(result, Finding), result
    assert (result.severity, result.source) == ("error", SOURCE)
    return result.code, result.message


# Texts and messages.


def test_texts_are_one_turn_of_the_user_and_one_of_the_assistant():
    assert pair(TEXTS) == PreferencePair(
        prompt=(message("user", "Why?"),),
        chosen=(message("assistant", "Because."),),
        rejected=(message("assistant", "No idea."),),
        source=SOURCE,
    )


def test_messages_keep_their_roles_and_order():
    assert pair(TURNS) == PreferencePair(
        prompt=(
            message("system", "Be kind."),
            message("user", "Why?"),
            message("assistant", "Because."),
            message("user", "And?"),
        ),
        chosen=(message("assistant", "Because."),),
        rejected=(message("assistant", "No idea."),),
        source=SOURCE,
    )


def test_each_side_has_its_own_form():
    assert pair(TEXTS | {"chosen": TURNS["chosen"]}) == pair(TEXTS)
    assert pair(TEXTS | {"chosen": ASSISTANT}) == pair(TEXTS)
    assert pair(TEXTS | {"prompt": [{"from": "human", "value": "Why?"}]}) == pair(TEXTS)


def test_texts_are_left_as_they_are():
    texts = {"prompt": " Why?\n", "chosen": "\tBecause. ", "rejected": "\r\nNo idea.\u2028"}
    result = pair(texts)
    assert {side: getattr(result, side)[0].content for side in texts} == texts


def test_other_columns_are_left_alone():
    assert pair(TEXTS | {"id": 3, "score_chosen": None, "messages": [], "label": None, "bad": "\x00"}) == pair(TEXTS)


@pytest.mark.parametrize(
    "text",
    ["[", "[1]", "[{}]", '[{"a": 1}]', '[{"role": "user"}, 3]', "[{'a': 1}]", "[{'role': 'user'}] is a list", "{}"],
)
def test_a_text_that_is_no_list_of_messages_is_a_text(text):
    assert pair(TEXTS | {"chosen": text}).chosen == (message("assistant", text),)


def test_a_list_of_messages_may_be_json_text():
    assert pair({side: json.dumps(TURNS[side]) for side in SIDES}) == pair(TURNS)
    assert pair({side: json.dumps(WHOLE[side], indent=1) for side in WHOLE}) == pair(WHOLE)


def test_a_list_of_messages_as_python_prints_it_is_refused():
    assert refusal(TEXTS | {"chosen": str(TURNS["chosen"])}) == (
        "not_a_message",
        "chosen: messages in Python notation; write them as JSON (json.dumps)",
    )


@pytest.mark.parametrize("as_null", [False, True], ids=["absent", "null"])
@pytest.mark.parametrize(
    ("absent", "wording"),
    [
        (("prompt",), "no prompt"),
        (("chosen",), "no chosen"),
        (("rejected",), "no rejected"),
        (("chosen", "rejected"), "no chosen and no rejected"),
        (("prompt", "rejected"), "no prompt and no rejected"),
    ],
)
def test_every_missing_side_is_named(absent, wording, as_null):
    values = {side: text for side, text in TEXTS.items() if side not in absent}
    values |= dict.fromkeys(absent) if as_null else {}
    code, message = refusal(values)
    assert (code, message.split("; it has ")[0]) == ("not_a_pair", f"not a preference pair: {wording}")


@pytest.mark.parametrize(
    ("values", "wording"),
    [
        ({}, "no column"),
        ({"question": 1, "answer": 2}, "question, answer"),
        (dict.fromkeys(SIDES), "prompt (null), chosen (null)"),
    ],
)
def test_a_row_of_unknown_format_names_its_columns(values, wording):
    code, message = refusal(values)
    assert (code, f"it has {wording}" in message) == ("unknown_format", True)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([], "an empty list"),
        ({}, "an empty object"),
        ({"name": "x", "id": 3}, "an object with the keys name, id"),
        (3, "a number"),
        (True, "true or false"),
        (b"x", "bytes"),
    ],
    ids=str,
)
def test_a_side_is_a_text_or_a_list(side, value, kind):
    assert refusal(TEXTS | {side: value}) == (
        "not_a_message",
        f"{side}: expected a text or a list of messages, found {kind}",
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("value", "kind"), [(None, "null"), (True, "true or false"), (3, "a number")], ids=str)
def test_a_message_is_an_object(side, value, kind):
    assert refusal(TEXTS | {side: [value]}) == (
        "not_a_message",
        f"{side}, turn 1: a message has a role and a content, found {kind}",
    )


@pytest.mark.parametrize("key", ["role", "from"])
@pytest.mark.parametrize("speaker", ["narrator", "", 3, "user\x00"], ids=repr)
def test_an_unknown_speaker_is_refused(key, speaker):
    code, wording = refusal(TEXTS | {"prompt": [USER, {key: speaker, "content": "x"}]})
    known = f"prompt, turn 2: {key} {speaker!r}; known: system, developer, user, human"
    assert (code, wording.startswith(known)) == ("not_a_message", True)


@pytest.mark.parametrize("role", [["user"], {"a": 1}, 10**5000], ids=["list", "object", "huge"])
def test_a_role_of_any_type_is_refused(role):
    assert refusal(TEXTS | {"prompt": [{"role": role, "content": "x"}]})[0] == "not_a_message"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (None, "null"),
        (3, "a number"),
        ({"a": "x"}, "an object with the keys a"),
    ],
)
def test_a_content_that_is_no_text_is_refused(content, kind):
    assert refusal(TEXTS | {"chosen": [turn("assistant", content)]}) == (
        "not_a_message",
        f"chosen, turn 1: a message's content is a text, found {kind}",
    )


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "noon."}]
    assert pair(TEXTS | {"chosen": [turn("assistant", parts)]}).chosen == (message("assistant", "It is noon."),)


def test_a_part_that_is_an_image_is_refused():
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    assert refusal(TEXTS | {"prompt": [turn("user", parts)]}) == (
        "not_a_message",
        "prompt, turn 1, part 1: a part of the type 'image'; qpref trains on text alone, so drop the row",
    )


def test_developer_is_taken_for_system():
    assert pair(TEXTS | {"prompt": [turn("developer", "Be kind."), USER]}).prompt[0] == message("system", "Be kind.")


@pytest.mark.parametrize("key", ["name", "tool_call_id", "reasoning_content"])
def test_what_chat_templates_read_is_kept(key):
    assert pair(TEXTS | {"chosen": [ASSISTANT | {key: "x"}]}).chosen[0].extra == {key: "x"}
    for nothing in (None, ""):
        assert pair(TEXTS | {"chosen": [ASSISTANT | {key: nothing}]}).chosen[0].extra == {}


def test_other_keys_of_a_message_are_left_alone():
    assert pair(TEXTS | {"chosen": [ASSISTANT | {"num_tokens": 3, "id": "x"}]}) == pair(TEXTS)


@pytest.mark.parametrize("key", ["images", "audio"])
def test_what_no_text_can_carry_is_refused(key):
    assert refusal(TEXTS | {"prompt": [USER | {key: ["x.png"]}]}) == (
        "not_a_message",
        f"prompt, turn 1: {key} cannot be trained on; remove it, or drop the row",
    )
    assert pair(TEXTS | {"prompt": [USER | {key: None}]}) == pair(TEXTS)


# Tools.

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = turn("assistant", None, tool_calls=[CALL])
TOOL = turn("tool", "", tool_call_id="1")


def test_tool_calls_and_what_tools_say_are_kept():
    result = pair(TEXTS | {"prompt": [USER, CALLING, TOOL, TOOL], "chosen": [CALLING]})
    assert result.prompt[1:] == (message("assistant", "", tool_calls=[CALL]),) + 2 * (
        message("tool", "", tool_call_id="1"),
    )
    assert result.chosen == (message("assistant", "", tool_calls=[CALL]),)


@pytest.mark.parametrize("calls", ["x", {"name": "f"}, [1], [None]], ids=str)
def test_tool_calls_are_a_list_of_objects(calls):
    code, wording = refusal(TEXTS | {"chosen": [turn("assistant", "x", tool_calls=calls)]})
    assert (code, wording.split(",")[1]) == ("not_a_message", " turn 1: tool_calls is a list of objects")


@pytest.mark.parametrize("as_text", [False, True], ids=["list", "JSON text"])
def test_tools_are_kept(as_text):
    assert pair(TEXTS | {"tools": json.dumps([CALL]) if as_text else [CALL]}).tools == (CALL,)


def test_an_empty_turn_without_a_call_is_empty():
    assert refusal(TEXTS | {"chosen": [turn("assistant", "", tool_calls=[])]}) == ("empty", "chosen is empty")


@pytest.mark.parametrize("tools", [None, [], "", "[]"], ids=repr)
def test_no_tools_are_none(tools):
    assert pair(TEXTS | {"tools": tools}) == pair(TEXTS)


@pytest.mark.parametrize("tools", ["x", {"a": 1}, [1], 3, "{}"], ids=repr)
def test_tools_that_are_no_list_of_objects_are_refused(tools):
    code, wording = refusal(TEXTS | {"tools": tools})
    assert (code, wording.startswith("tools: expected a list of JSON schemas, found ")) == ("not_a_message", True)


def test_sharegpt_calls_are_tool_calls():
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    for value in (json.dumps(call), json.dumps([call])):
        conversation = [
            {"from": "human", "value": "Why?"},
            {"from": "function_call", "value": value},
            {"from": "observation", "value": "rain"},
        ]
        prompt = pair(TEXTS | {"prompt": conversation}).prompt
        assert prompt[1:] == (message("assistant", "", tool_calls=[CALL]), message("tool", "rain"))


@pytest.mark.parametrize("value", ["weather", "{}", '{"name": 3}', "[1]", "", None], ids=repr)
def test_a_sharegpt_call_without_a_name_is_refused(value):
    code, wording = refusal(TEXTS | {"chosen": [{"from": "function_call", "value": value}]})
    assert (code, "a function_call is JSON with name and arguments" in wording) == ("not_a_message", True)


# Order and emptiness.

ORDERS = [
    (("assistant",), "prompt: the last turn is the assistant's; it has to be the user's or a tool's"),
    (("user", "user"), "prompt, turn 2: the user's turn after the user's; expected the assistant's"),
    (("user", "system", "user"), "prompt, turn 2: the system's turn after the user's; expected the assistant's"),
    (
        ("system", "system"),
        "prompt, turn 2: the system's turn after the system's; expected the user or the assistant's",
    ),
    (("system", "assistant"), "prompt: the last turn is the assistant's; it has to be the user's or a tool's"),
    (
        ("user", "assistant", "assistant"),
        "prompt, turn 3: the assistant's turn after the assistant's; expected the user or the tool's",
    ),
    (("user", "tool"), "prompt, turn 2: the tool's turn after the user's; expected the assistant's"),
    (("tool", "user"), "prompt, turn 1: the tool's turn first; expected the system or the user or the assistant's"),
    (
        ("user", "assistant", "tool", "user"),
        "prompt, turn 4: the user's turn after the tool's; expected the tool or the assistant's",
    ),
    (("user", "assistant"), "prompt: the last turn is the assistant's; it has to be the user's or a tool's"),
    (("system",), "prompt: the last turn is the system's; it has to be the user's or a tool's"),
]


@pytest.mark.parametrize(("roles", "wording"), ORDERS, ids=["-".join(roles) for roles, _ in ORDERS])
def test_a_prompt_out_of_order_is_refused(roles, wording):
    assert refusal(TEXTS | {"prompt": [turn(role, "x") for role in roles]}) == ("role_order", wording)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    "roles",
    [("user",), ("system",), ("tool",), ("assistant", "assistant"), ("assistant", "user"), ("assistant", "tool")],
    ids="-".join,
)
def test_a_response_is_one_turn_of_the_assistant(side, roles):
    way_out = "; a list of lists holds several responses" if roles == ("assistant", "assistant") else ""
    assert refusal(TEXTS | {side: [turn(role, "x") for role in roles]}) == (
        "role_order",
        f"{side}: expected one turn of the assistant's, found: {', '.join(roles)}{way_out}",
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", ["", " ", "\n\t\r", "\u00a0\u2003"], ids=repr)
@pytest.mark.parametrize("as_turns", [False, True], ids=["text", "turns"])
def test_an_empty_side_is_refused(side, text, as_turns):
    turns = [turn("user" if side == "prompt" else "assistant", text)]
    assert refusal(TEXTS | {side: turns if as_turns else text}) == ("empty", f"{side} is empty")


@pytest.mark.parametrize("place", [0, 1])
def test_an_empty_turn_within_a_prompt_is_refused(place):
    prompt = [USER, ASSISTANT, turn("user", "And?")]
    prompt[place] = prompt[place] | {"content": " "}
    assert refusal(TEXTS | {"prompt": prompt}) == ("empty", f"prompt, turn {place + 1} is empty")


def test_an_empty_system_turn_is_taken():
    assert pair(TURNS | {"prompt": [turn("system", ""), USER]}).prompt[0].content == ""


# What no text holds.

CONTROL = [chr(code) for code in [*range(0x20), 0x7F] if chr(code) not in "\t\n\r"]


@pytest.mark.parametrize("character", CONTROL, ids=ascii)
def test_a_control_character_is_refused_with_its_place(character):
    wording = f"the control character U+{ord(character):04X} at character 4; remove it"
    for side in SIDES:
        assert refusal(TEXTS | {side: f"ü😀x{character}y"}) == ("control_character", f"{side}: {wording}")


def test_half_a_surrogate_pair_is_refused_with_its_place():
    assert refusal(TEXTS | {"chosen": "ab\ud800c"}) == (
        "control_character",
        "chosen: half of a surrogate pair at character 3, which isn't valid Unicode",
    )


@pytest.mark.parametrize(
    "values",
    [
        TEXTS | {"prompt": [turn("system", "\x00"), USER]},
        TEXTS | {"chosen": [ASSISTANT | {"name": "\x00"}]},
        TEXTS | {"chosen": [turn("assistant", "", tool_calls=[{"a": {"b": ["\x00"]}}])]},
        TEXTS | {"chosen": [turn("assistant", "", tool_calls=[{"\x00": 1}])]},
        TEXTS | {"tools": [{"a": "\x00"}]},
        TEXTS | {"tools": '[{"a": "\\u0000"}]'},
        TEXTS | {"system": "\x00"},
        {"chosen": "\n\nHuman: x\x00\n\nAssistant: y", "rejected": "\n\nHuman: x\x00\n\nAssistant: z"},
        RANKED | {"responses": ["a", "\x00"], "ranks": [1, 2]},
        SINGLE | {"completion": "\x00"},
        {"instruction": "x", "input": "\x00", "output": ["a", "b"]},
    ],
    ids=lambda values: ascii(values)[:80],
)
def test_every_text_of_a_row_is_checked(values):
    assert refusal(values)[0] == "control_character"


@pytest.mark.parametrize(
    "text", ["\t\n\r", "\x85\u2028", "\u200f\u200b", "e\u0301" * 50, "👨‍👩‍👧", "\ufeff", "\uffff"], ids=ascii
)
def test_other_characters_are_text(text):
    assert pair(TEXTS | {"chosen": f"x{text}"}).chosen[0].content == f"x{text}"


def test_calls_nested_without_end_are_refused():
    nested: object = 1
    for _ in range(500):
        nested = [nested]
    code, wording = refusal(TEXTS | {"chosen": [turn("assistant", "", tool_calls=[{"a": nested}])]})
    assert (code, wording) == ("not_a_message", "chosen, turn 1: nested deeper than 64 levels")


# Numbers beside.


def test_without_columns_the_weight_is_1_and_the_margin_0():
    assert (pair(TEXTS).weight, pair(TEXTS).margin) == (1.0, 0.0)
    assert pair(TEXTS | {"weight": None, "margin": ""}) == pair(TEXTS)


@pytest.mark.parametrize(
    ("name", "value"), [("weight", 0), ("weight", 2.5), ("weight", "2.5"), ("margin", -3), ("margin", "-3")]
)
def test_weight_and_margin_are_the_rows(name, value):
    read = getattr(pair(TEXTS | {name: value}), name)
    assert (type(read), read) == (float, float(value))


@pytest.mark.parametrize("name", ["weight", "margin"])
@pytest.mark.parametrize("value", ["x", True, math.nan, "nan"], ids=repr)
def test_a_weight_or_margin_that_is_no_finite_number_is_refused(name, value):
    assert refusal(TEXTS | {name: value}) == ("bad_number", f"{name}: expected a number, found {value!r}")


@pytest.mark.parametrize("value", [[], {}, 10**400, 10**5000], ids=["list", "object", "huge", "endless"])
def test_a_weight_of_any_type_is_refused(value):
    assert refusal(TEXTS | {"weight": value})[0] == "bad_number"


def test_a_negative_weight_is_refused():
    assert refusal(TEXTS | {"weight": -0.5}) == ("bad_number", "weight: -0.5 is below 0")


# The system column.


@pytest.mark.parametrize(
    "values",
    [TEXTS, WHOLE, SINGLE, RANKED | {"ranks": [1, 2, 2]}, {"instruction": "Why?", "output": ["a", "b"]}],
    ids=["pair", "whole", "unpaired", "ranked", "alpaca"],
)
def test_the_system_column_is_the_first_turn(values):
    for record, plain in zip(records(values | {"system": "Be kind."}), records(values), strict=True):
        assert record.prompt == (message("system", "Be kind."), *plain.prompt)
    assert records(values | {"system": ""}) == records(values)


def test_the_system_column_may_repeat_the_first_turn_and_not_gainsay_it():
    assert pair(TURNS | {"system": "Be kind."}) == pair(TURNS)
    assert refusal(TURNS | {"system": "Be rude."})[0] == "role_order"


# Whole conversations.


def test_the_shared_turns_are_the_prompt():
    assert pair(WHOLE) == pair(TEXTS)


def test_conversations_are_compared_by_turns_and_not_by_characters():
    chosen = [USER, turn("assistant", "Yes, of course.")]
    rejected = [USER, turn("assistant", "Yes, no.")]
    assert pair({"chosen": chosen, "rejected": rejected}).chosen[0].content == "Yes, of course."


def test_equal_conversations_part_at_their_last_turn():
    result = pair({"chosen": WHOLE["chosen"], "rejected": WHOLE["chosen"]})
    assert (result.prompt, result.chosen) == ((message("user", "Why?"),), result.rejected)


def test_turns_that_differ_in_a_call_alone_are_not_shared():
    other = turn("assistant", "", tool_calls=[{"name": "f"}])
    chosen, rejected = [USER, CALLING, TOOL, ASSISTANT], [USER, other, TOOL, turn("assistant", "x")]
    assert refusal({"chosen": chosen, "rejected": rejected}) == (
        "role_order",
        "chosen: expected one turn of the assistant's, found: assistant, tool, assistant",
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "wording"),
    [
        ([USER, ASSISTANT], [turn("user", "How?"), ASSISTANT], "share no first turn"),
        ([ASSISTANT], [turn("assistant", "x")], "are no whole conversations, and there is no prompt"),
        (
            [USER, ASSISTANT, turn("user", "a"), ASSISTANT],
            [USER, ASSISTANT, turn("user", "b"), ASSISTANT],
            "part at turn 3, before the assistant's turn; the prompt has to be the same",
        ),
    ],
    ids=["another question", "no question", "another later question"],
)
def test_conversations_of_different_prompts_are_refused(chosen, rejected, wording):
    assert refusal({"chosen": chosen, "rejected": rejected}) == ("different_prompts", f"chosen and rejected {wording}")


def test_a_conversation_that_goes_on_after_the_response_is_refused():
    longer = [*WHOLE["rejected"], turn("user", "And?"), ASSISTANT]
    assert refusal(WHOLE | {"rejected": longer}) == (
        "role_order",
        "rejected: expected one turn of the assistant's, found: assistant, user, assistant",
    )


TALK = [turn("system", "Be kind."), USER, ASSISTANT, turn("user", "And?")]


@pytest.mark.parametrize(
    "prompt", ["Why?", " And?\n", TALK, TALK[:2], [USER]], ids=["first", "last", "all", "a part", "the first question"]
)
def test_a_prompt_beside_whole_conversations_is_how_they_begin(prompt):
    values = {side: [*TALK, *TURNS[side]] for side in ("chosen", "rejected")}
    assert pair(values | {"prompt": prompt}) == pair(values)


@pytest.mark.parametrize("prompt", ["Because.", "Wh", [turn("user", "How?")], [*TALK, ASSISTANT, USER]], ids=str)
def test_another_prompt_beside_whole_conversations_is_refused(prompt):
    values = {side: [*TALK, *TURNS[side]] for side in ("chosen", "rejected")}
    assert refusal(values | {"prompt": prompt}) == (
        "different_prompts",
        "chosen and rejected are conversations that don't start with the prompt",
    )


# HH-RLHF.


def hh(*texts):
    return "".join(f"\n\n{('Human', 'Assistant')[place % 2]}: {text}" for place, text in enumerate(texts))


def test_a_dialogue_is_taken_apart_and_trimmed():
    result = pair({"chosen": hh("Why?", "So.\n", "And?", " x: Human: y"), "rejected": hh("Why?", "So.", "And?", "z")})
    assert result.prompt == (message("user", "Why?"), message("assistant", "So."), message("user", "And?"))
    assert result.chosen == (message("assistant", "x: Human: y"),)


def test_dialogues_that_part_at_the_humans_turn_are_refused():
    code, _ = refusal({"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "b", "x", "d")})
    assert code == "different_prompts"


def test_a_dialogue_beside_its_prompt_has_to_begin_with_it():
    values = {"chosen": hh("a", "b"), "rejected": hh("a", "c")}
    assert pair(values | {"prompt": hh("a", "")}) == pair(values | {"prompt": "a"}) == pair(values)
    assert refusal(values | {"prompt": "x"})[0] == "different_prompts"


def test_a_dialogue_as_the_prompt_of_texts_is_taken_apart():
    result = pair(TEXTS | {"prompt": hh("a", "b", "c", "")})
    assert [turn.content for turn in result.prompt] == ["a", "b", "c"]


@pytest.mark.parametrize("prompt", ["Human: a", "\n\nHuman: a", "x\n\nHuman: a\n\nAssistant:"])
def test_a_prompt_that_is_no_dialogue_is_a_text(prompt):
    assert pair(TEXTS | {"prompt": prompt}).prompt == (message("user", prompt),)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (hh("a"), "different_prompts"),
        (hh("a", ""), "empty"),
        (hh("", "b"), "empty"),
        ("\n\nHuman:", "different_prompts"),
    ],
)
def test_a_broken_dialogue_is_refused(text, code):
    assert refusal({"chosen": text, "rejected": text})[0] == code


def test_a_text_named_a_dialogue_has_to_be_one():
    assert refusal(TEXTS, "hh") == ("not_a_message", "chosen: expected \\n\\nHuman: at the start of the dialogue")


# Alpaca and OpenAI.


@pytest.mark.parametrize("output", ["x", [], ["a"], ["a", "b", "c"], None], ids=repr)
def test_an_alpaca_output_is_two_responses(output):
    assert refusal({"instruction": "x", "output": output}, "alpaca")[0] == "not_a_pair"


@pytest.mark.parametrize("history", ["x", [["a"]], [["a", 1]], [3], {"a": 1}], ids=repr)
def test_an_alpaca_history_is_a_list_of_two_texts(history):
    assert refusal({"instruction": "x", "output": ["a", "b"], "history": history})[0] == "not_a_message"


@pytest.mark.parametrize("asked", ["x", [], {}, {"messages": []}], ids=repr)
def test_an_openai_input_holds_messages(asked):
    code, _ = refusal({"input": asked, "preferred_output": [ASSISTANT], "non_preferred_output": [ASSISTANT]})
    assert code in ("not_a_pair", "not_a_message")


def test_openais_tools_are_kept():
    values = {"preferred_output": [ASSISTANT], "non_preferred_output": [ASSISTANT]}
    assert pair(values | {"input": {"messages": [USER], "tools": [CALL]}}).tools == (CALL,)


# Ranked responses.


def order(values):
    """(chosen, rejected) of each pair, in order; asserts that their numbers count them."""
    result = records(values)
    assert [record.number for record in result] == list(range(len(result)))
    return [(record.chosen[0].content, record.rejected[0].content) for record in result]


@pytest.mark.parametrize("num_responses", [2, 3, 4, 7])
def test_k_responses_make_k_times_k_less_1_over_2_pairs(num_responses):
    responses = [str(number) for number in range(num_responses)]
    assert order({"prompt": "Why?", "ranked": responses}) == list(itertools.combinations(responses, 2))


@pytest.mark.parametrize(
    ("column", "values", "pairs"),
    [
        ("ranks", [2, 1, 3], [("b", "a"), ("b", "c"), ("a", "c")]),
        ("scores", [2, 1, 3], [("c", "a"), ("c", "b"), ("a", "b")]),
        ("scores", [0.5, -1.5, 0.5], [("a", "b"), ("c", "b")]),
        ("ranks", [1, 1, 2], [("a", "c"), ("b", "c")]),
        ("scores", "[2, 1, 3]", [("c", "a"), ("c", "b"), ("a", "b")]),
    ],
)
def test_ranks_count_from_the_best_and_scores_up_to_it(column, values, pairs):
    assert order(RANKED | {column: values}) == pairs


def test_ranks_come_before_scores():
    assert order(RANKED | {"ranks": [1, 2, 2], "scores": [0, 1, 1]}) == [("a", "b"), ("a", "c")]


@pytest.mark.parametrize("key", ["response", "answer", "text", "completion", "output", "content"])
@pytest.mark.parametrize(("score", "sign"), [("rank", -1), ("overall_score", 1), ("score", 1), ("rating", 1)])
def test_responses_may_be_objects_with_their_score(key, score, sign):
    responses = [{key: text, score: sign * worth, "model": "m"} for text, worth in (("a", 1), ("b", 3))]
    assert order({"prompt": "Why?", "completions": responses}) == [("b", "a")]


def test_responses_may_be_messages():
    responses = [[ASSISTANT], turn("assistant", "x"), "y"]
    assert order({"messages": [USER], "responses": responses, "ranks": [3, 2, 1]})[0] == ("y", "x")


def test_weight_margin_and_tools_stand_for_each_pair():
    for record in records(RANKED | {"ranks": [1, 2, 3], "weight": 2, "margin": 0.5, "tools": [CALL]}):
        assert (record.weight, record.margin, record.tools) == (2.0, 0.5, (CALL,))


def test_responses_of_one_worth_are_refused():
    assert refusal(RANKED | {"scores": [1, 1.0, 1]}) == (
        "tied",
        "all 3 responses have the same score, so none is preferred",
    )


@pytest.mark.parametrize(
    "responses", [[], ["a"], ["a"] * (MAX_RESPONSES + 1), "a", {"a": 1}], ids=lambda value: str(value)[:9]
)
def test_too_few_or_too_many_responses_are_refused(responses):
    code, wording = refusal(RANKED | {"responses": responses, "scores": [1]})
    assert (code, f"expected a list of 2 to {MAX_RESPONSES} responses" in wording) == ("not_a_pair", True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ranks": [1, 2]},
        {"ranks": [1, 2, None]},
        {"ranks": [1, 2, "x"]},
        {"scores": [1, 2, math.nan]},
        {"scores": 3},
        {"scores": "x"},
        {"responses": [{"text": "a", "score": 1}, {"text": "b"}]},
        {"responses": [{"text": "a", "score": None}, {"text": "b", "score": 1}]},
    ],
    ids=str,
)
def test_responses_without_a_number_each_are_refused(changes):
    assert refusal(RANKED | changes)[0] == "bad_number"


def test_a_ranked_row_without_a_prompt_is_refused():
    code, wording = refusal({"responses": ["a", "b"], "ranks": [1, 2]})
    assert (code, wording.startswith("no prompt; it has responses, ranks; ")) == ("not_a_pair", True)


# Two responses and a verdict.


@pytest.mark.parametrize(
    ("values", "verdict", "first", "second", "bad"),
    [
        ({"history": "Why?", "human_ref_A": "a", "human_ref_B": "b"}, "labels", 1, 0, 2),
        ({"prompt": "Why?", "response_0": "a", "response_1": "b"}, "better_response_id", 0, 1, True),
        ({"prompt": "Why?", "response_0": "a", "response_1": "b"}, "better_response_id", "0", "1", -1),
        (
            {"conversation_a": [USER, turn("assistant", "a")], "conversation_b": [USER, turn("assistant", "b")]},
            "winner",
            "model_a",
            "model_b",
            "model_c",
        ),
    ],
    ids=["shp", "saferlhf", "saferlhf as text", "arena"],
)
def test_a_verdict_says_which_is_chosen(values, verdict, first, second, bad):
    assert order(values | {verdict: first}) == [("a", "b")]
    assert order(values | {verdict: second}) == [("b", "a")]
    assert refusal(values | {verdict: bad})[0] == "unlisted_verdict"
    assert refusal(values | {verdict: None})[0] == "not_a_pair"


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)"])
def test_a_tie_is_refused(winner):
    values = {"conversation_a": [USER, turn("assistant", "a")], "conversation_b": [USER, turn("assistant", "b")]}
    assert refusal(values | {"winner": winner}) == ("tied", "winner: a tie, so none is preferred")


# Single completions.


@pytest.mark.parametrize(
    ("label", "desirable"),
    [
        *((True, True), (False, False), (1, True), (0, False), (1.0, True), (0.0, False)),
        *(("true", True), ("False", False), ("1", True), ("0", False), ("1.0", True), ("0.0", False)),
    ],
)
def test_a_label_is_true_or_false(label, desirable):
    assert records(SINGLE | {"label": label}) == [
        UnpairedExample(
            prompt=(message("user", "Why?"),),
            completion=(message("assistant", "Because."),),
            label=desirable,
            source=SOURCE,
        )
    ]


@pytest.mark.parametrize("label", ["yes", "", "good", 2, -1, 0.5, math.nan, 10**400, "0.5", [], {}, "true "], ids=repr)
def test_another_label_is_refused(label):
    code, wording = refusal(SINGLE | {"label": label})
    assert (code, wording.startswith("label: expected true or false, found ")) == ("bad_label", True)


@pytest.mark.parametrize(("absent", "wording"), [("label", "no label"), ("completion", "no completion")])
def test_a_missing_part_of_a_labelled_completion_is_named(absent, wording):
    code, message = refusal(SINGLE | {absent: None})
    assert (code, message.split("; it has ")[0]) == ("not_an_example", f"not a labelled completion: {wording}")
    assert f"{absent} (null)" in message


def test_a_labelled_completion_keeps_its_weight_and_tools():
    (record,) = records(SINGLE | {"weight": 3, "tools": [CALL]})
    assert (record.weight, record.tools) == (3.0, (CALL,))


@pytest.mark.parametrize("completion", ["", [USER], [ASSISTANT, USER]], ids=str)
def test_a_completion_is_one_turn_of_the_assistant(completion):
    assert refusal(SINGLE | {"completion": completion})[0] in ("empty", "role_order")


def test_a_conversation_with_a_label_ends_with_the_completion():
    (record,) = records({"messages": [USER, ASSISTANT], "label": 1})
    assert (record.prompt, record.completion) == ((message("user", "Why?"),), (message("assistant", "Because."),))
    for turns in ([USER], [ASSISTANT], [USER, ASSISTANT, USER]):
        assert refusal({"messages": turns, "label": 1})[0] == "not_an_example"


def test_a_pair_as_two_completions_keeps_what_a_completion_has():
    (result,) = records(TEXTS | {"weight": 2, "tools": [CALL]})
    good, bad = unpair(result)
    assert (good.completion, good.label, bad.completion, bad.label) == (result.chosen, True, result.rejected, False)
    for example in (good, bad):
        assert (example.prompt, example.weight, example.tools, example.source) == (result.prompt, 2.0, (CALL,), SOURCE)


# Recognizing the format of a row.


@pytest.mark.parametrize(
    ("values", "row_format"),
    [
        (TEXTS | SINGLE, "pair"),
        (TEXTS | {"conversations": [USER], "instruction": "x", "messages": [USER]}, "pair"),
        (TEXTS | RANKED, "pair"),
        (SINGLE | RANKED, "ranked"),
        (WHOLE | {"conversations": [USER]}, "sharegpt"),
        (WHOLE | {"conversations": [USER], "instruction": "x"}, "sharegpt"),
        (WHOLE | {"messages": [USER, ASSISTANT]}, "whole"),
        ({"chosen": hh("a", "b"), "rejected": hh("a", "c"), "prompt": "a"}, "hh"),
        ({"chosen": hh("a", "b"), "rejected": "c", "prompt": "a"}, "pair"),
        ({"instruction": "x", "output": ["a", "b"], "label": True}, "alpaca"),
        ({"instruction": "x", "output": "a", "kto_tag": True}, "unpaired"),
        (TEXTS | {"completion": None, "label": None}, "pair"),
        (SINGLE | dict.fromkeys(("chosen", "rejected", "responses")), "unpaired"),
        ({"prompt": "x"}, "pair"),
    ],
)
def test_the_first_format_whose_columns_a_row_has_is_taken(values, row_format):
    assert format_of(values) == row_format


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_a_named_format_is_read_and_no_other(row_format):
    if row_format == "unpaired":
        assert isinstance(records(TEXTS | SINGLE, row_format)[0], UnpairedExample)
    elif row_format not in ("pair",):
        assert isinstance(records_of_row(Row(values=TEXTS, source=SOURCE), row_format), Finding)


# Columns of other names.


def renamed(values, columns):
    result = with_columns(Row(values=values, source=SOURCE), columns)
    assert result.source == SOURCE
    return result.values if isinstance(result, Row) else (result.code, result.message)


def test_columns_are_renamed():
    values = {"question": "Why?", "chosen": "a", "rejected": "b", "prompt": "old"}
    assert renamed(values, {"prompt": "question"}) == {"prompt": "Why?", "chosen": "a", "rejected": "b"}


def test_columns_can_change_places():
    assert renamed(TEXTS, {"chosen": "rejected", "rejected": "chosen"}) == TEXTS | {
        "chosen": TEXTS["rejected"],
        "rejected": TEXTS["chosen"],
    }


def test_one_column_can_be_two():
    assert renamed({"text": "x"}, {"prompt": "text", "chosen": "text"}) == {"prompt": "x", "chosen": "x"}


def test_a_missing_column_is_named_with_those_there_are():
    assert renamed({"a": 1, "b": 2}, {"prompt": "question", "chosen": "good", "rejected": "a"}) == (
        "missing_column",
        "no column 'question' (for prompt) and no column 'good' (for chosen); it has a, b",
    )


def ranked_pairs(*responses, **columns):
    row = Row(values={"prompt": "Say it.", "ranked": list(responses)} | columns, source=Source(path="x", line=1))
    return records_of_row(row)


def test_of_ranked_responses_those_in_the_middle_are_no_single_completions():
    singles = list(singles_of(ranked_pairs("best", "good", "fair", "worst")))
    assert [(one.completion[0].content, one.label, one.number) for one in singles] == [
        ("best", True, 0),
        ("worst", False, 0),
    ]


def test_tied_best_responses_are_each_given_once():
    row = Row(
        values={"prompt": "Say it.", "responses": ["a", "b", "c"], "ranks": [1, 1, 2]}, source=Source(path="x", line=1)
    )
    singles = list(singles_of(records_of_row(row)))
    assert sorted((one.completion[0].content, one.label) for one in singles) == [("a", True), ("b", True), ("c", False)]


def test_the_one_pair_of_a_row_is_two_single_completions_even_if_they_are_the_same():
    (pair,) = ranked_pairs("same", "same")
    assert [(one.completion, one.label) for one in singles_of([pair])] == [(pair.chosen, True), (pair.rejected, False)]


WHOLE_TURNS = [turn("user", "Why?"), turn("assistant", "Because.")]
BLANKS = {
    "a prompt, beside whole conversations": (
        {"chosen": WHOLE_TURNS, "rejected": [WHOLE_TURNS[0], turn("assistant", "No idea.")]}, ("prompt",)
    ),
    "a prompt, beside a question": ({"question": "Why?", "chosen": "a", "rejected": "b"}, ("prompt", "messages")),
    "the sides, beside a completion": (
        {"prompt": "Why?", "completion": "a", "label": True}, ("chosen", "rejected", "kto_tag")
    ),
    "a label of two": ({"messages": WHOLE_TURNS, "kto_tag": False}, ("label", "completion")),
    "conversations, beside whole ones": (
        {"chosen": WHOLE_TURNS, "rejected": [WHOLE_TURNS[0], turn("assistant", "No.")]}, ("conversations", "input")
    ),
    "the sides, beside ranked ones": ({"prompt": "Why?", "ranked": ["a", "b"]}, ("chosen", "rejected", "responses")),
    "an instruction": ({"input": "Why?", "chosen": "a", "rejected": "b"}, ("instruction",)),
}  # fmt: skip


@pytest.mark.parametrize("blank", [None, "", []], ids=repr)
@pytest.mark.parametrize(("values", "names"), BLANKS.values(), ids=BLANKS)
def test_a_blank_column_is_one_that_the_row_lacks(values, names, blank):
    expected = records_of_row(Row(values=values, source=SOURCE))
    assert not isinstance(expected, Finding), expected
    for lacking in (names, *((name,) for name in names)):
        assert records_of_row(Row(values=dict.fromkeys(lacking, blank) | values, source=SOURCE)) == expected


def test_a_row_that_lacks_something_says_what_is_empty():
    for name in ("prompt", "chosen", "rejected"):
        assert refusal(TEXTS | {name: ""})[0] == "empty"
