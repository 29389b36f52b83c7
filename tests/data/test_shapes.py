"""A row becomes a pair in one of two shapes, or is refused with the reason; nothing is guessed."""

import math

import pytest

from qpref.data.shapes import pair_of_row
from qpref.records import Finding, Message, PreferencePair, Row, Source

SOURCE = Source(path="pairs.jsonl", line=7)
USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
TEXTS = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
TURNS = {
    "prompt": [{"role": "system", "content": "Be kind."}, USER, ASSISTANT, {"role": "user", "content": "And?"}],
    "chosen": [ASSISTANT],
    "rejected": [{"role": "assistant", "content": "No idea."}],
}


def pair(values):
    """The pair that a row becomes."""
    result = pair_of_row(Row(values=values, source=SOURCE))
    assert isinstance(result, PreferencePair), result
    return result


def refusal(values):
    """(code, message) of the finding that a row becomes; asserts that it refuses the row at its place."""
    result = pair_of_row(Row(values=values, source=SOURCE))
    assert isinstance(result, Finding), result
    assert (result.severity, result.source) == ("error", SOURCE)
    return result.code, result.message


def test_texts_are_one_turn_of_the_user_and_one_of_the_assistant():
    assert pair(TEXTS) == PreferencePair(
        prompt=(Message(role="user", content="Why?"),),
        chosen=(Message(role="assistant", content="Because."),),
        rejected=(Message(role="assistant", content="No idea."),),
        source=SOURCE,
    )


def test_messages_keep_their_roles_and_order():
    assert pair(TURNS) == PreferencePair(
        prompt=(
            Message(role="system", content="Be kind."),
            Message(role="user", content="Why?"),
            Message(role="assistant", content="Because."),
            Message(role="user", content="And?"),
        ),
        chosen=(Message(role="assistant", content="Because."),),
        rejected=(Message(role="assistant", content="No idea."),),
        source=SOURCE,
    )


def test_each_side_has_its_own_shape():
    assert pair(TEXTS | {"chosen": TURNS["chosen"]}) == pair(TEXTS)


def test_texts_are_left_as_they_are():
    texts = {"prompt": " Why?\n", "chosen": "\tBecause. ", "rejected": "\r\nNo idea.\u2028"}
    result = pair(texts)
    assert {side: getattr(result, side)[0].content for side in texts} == texts


def test_other_columns_are_left_alone():
    assert pair(TEXTS | {"id": 3, "score_chosen": None, "messages": []}) == pair(TEXTS)


def test_without_columns_the_weight_is_1_and_the_margin_0():
    assert (pair(TEXTS).weight, pair(TEXTS).margin) == (1.0, 0.0)


@pytest.mark.parametrize(("name", "value"), [("weight", 0), ("weight", 2.5), ("margin", -3), ("margin", 0.25)])
def test_weight_and_margin_are_the_rows(name, value):
    read = getattr(pair(TEXTS | {name: value}), name)
    assert (type(read), read) == (float, value)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (("prompt",), "no prompt"),
        (("chosen",), "no chosen"),
        (("rejected",), "no rejected"),
        (("chosen", "rejected"), "no chosen and no rejected"),
        (("prompt", "chosen", "rejected"), "no prompt and no chosen and no rejected"),
    ],
)
@pytest.mark.parametrize("as_null", [False, True], ids=["absent", "null"])
def test_every_missing_side_is_named(absent, message, as_null):
    values = {side: text for side, text in TEXTS.items() if side not in absent}
    values |= dict.fromkeys(absent) if as_null else {}
    assert refusal(values) == ("not_a_pair", f"not a preference pair: {message}")


@pytest.mark.parametrize("side", TEXTS)
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([], "an empty list"),
        ({}, "an object with the keys none"),
        ({"role": "user", "content": "x"}, "an object with the keys role, content"),
        (3, "int"),
        (True, "bool"),
    ],
    ids=str,
)
def test_a_side_is_a_text_or_a_list(side, value, kind):
    assert refusal(TEXTS | {side: value}) == (
        "not_a_pair",
        f"{side}: expected a text or a list of messages, found {kind}",
    )


@pytest.mark.parametrize("side", TEXTS)
@pytest.mark.parametrize(
    ("turn", "kind"),
    [
        ("Why?", "str"),
        (None, "NoneType"),
        ([], "an empty list"),
        ({}, "an object with the keys none"),
        ({"role": "user"}, "an object with the keys role"),
        ({"from": "human", "value": "x"}, "an object with the keys from, value"),
        (USER | {"tool_calls": []}, "an object with the keys role, content, tool_calls"),
    ],
    ids=str,
)
def test_a_message_has_a_role_and_a_content_alone(side, turn, kind):
    assert refusal(TEXTS | {side: [turn]}) == (
        "not_a_pair",
        f"{side}: a message has the keys role and content, found {kind}",
    )


@pytest.mark.parametrize("role", ["human", "User", "tool", "", None, 3, ["user"]], ids=repr)
def test_an_unknown_role_is_refused(role):
    assert refusal(TEXTS | {"prompt": [{"role": role, "content": "x"}]}) == (
        "not_a_pair",
        f"prompt: role {role!r}; known: system, user, assistant",
    )


@pytest.mark.parametrize(
    ("content", "kind"), [(None, "NoneType"), ([{"type": "text", "text": "x"}], "list"), (3, "int")]
)
def test_a_content_that_is_no_text_is_refused(content, kind):
    assert refusal(TEXTS | {"chosen": [{"role": "assistant", "content": content}]}) == (
        "not_a_pair",
        f"chosen: a message's content is a text, found {kind}",
    )


@pytest.mark.parametrize("role", ["assistant", "system"])
def test_a_prompt_that_does_not_end_with_the_user_is_refused(role):
    assert refusal(TEXTS | {"prompt": [USER, {"role": role, "content": "x"}]}) == (
        "not_a_pair",
        f"prompt: the last turn is the {role}'s; it has to be the user's",
    )


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    "turns",
    [[USER], [{"role": "system", "content": "x"}], [USER, ASSISTANT], [ASSISTANT, ASSISTANT], [ASSISTANT, USER]],
    ids=lambda turns: "-".join(turn["role"] for turn in turns),
)
def test_a_response_is_one_turn_of_the_assistant(side, turns):
    assert refusal(TEXTS | {side: turns}) == ("not_a_pair", f"{side}: expected one turn of the assistant's")


@pytest.mark.parametrize("side", TEXTS)
@pytest.mark.parametrize("text", ["", " ", "\n\t\r", "\u00a0\u2003"], ids=repr)
@pytest.mark.parametrize("as_turns", [False, True], ids=["text", "turns"])
def test_an_empty_side_is_refused(side, text, as_turns):
    turns = [{"role": "user" if side == "prompt" else "assistant", "content": text}]
    assert refusal(TEXTS | {side: turns if as_turns else text}) == ("empty", f"{side} is empty")


def test_an_empty_system_turn_is_taken():
    assert pair(TURNS | {"prompt": [{"role": "system", "content": ""}, USER]}).prompt[0].content == ""


@pytest.mark.parametrize("name", ["weight", "margin"])
@pytest.mark.parametrize("value", ["1", True, None, [], math.nan, math.inf, -math.inf], ids=repr)
def test_a_weight_or_margin_that_is_no_finite_number_is_refused(name, value):
    assert refusal(TEXTS | {name: value}) == ("not_a_pair", f"{name}: expected a number, found {value!r}")


def test_a_negative_weight_is_refused():
    assert refusal(TEXTS | {"weight": -0.5}) == ("not_a_pair", "weight: expected a number, found -0.5")
