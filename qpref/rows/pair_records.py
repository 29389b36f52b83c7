"""Preference pairs from a row's prompt and its two sides; a side is a response or a whole conversation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from qpref.records import PreferencePair, Row
from qpref.rows.columns import Turns, number_in, tools_in, with_system
from qpref.rows.masked_text import marked
from qpref.rows.messages import check_prompt, check_response, has_speaker, turns_of
from qpref.rows.ranked import MAX_RESPONSES
from qpref.rows.values import BadRowError

CONVERSATION_KEYS = ("messages", "conversations")
"""Keys of an object that may hold messages, beside `tools`."""
RESPONSE_KEYS = ("response", "answer", "completion", "output")


def pairs_of_sides(row: Row, prompt: Turns | None) -> list[PreferencePair]:
    """Build a pair of every chosen with every rejected response: each column may hold one response, or a list.

    Args:
        prompt: the prompt that all respond to; None where they are whole conversations, which start with it.
    """
    row = with_shared_tools(row, "chosen", "rejected")
    chosen, rejected = (responses_of(row.values[side], side) for side in ("chosen", "rejected"))
    return numbered(
        replace(pair_of_turns(row, prompt, better, worse), positions=(at, other))
        for at, better in enumerate(chosen)
        for other, worse in enumerate(rejected)
    )


def responses_of(value: object, side: str) -> list[Turns]:
    """Parse the responses of one side: a list of texts, or of lists of messages, holds one response in each.

    A response may be an object that holds its text under one of RESPONSE_KEYS, as Nectar's do.
    """
    value = [_text_within(one) for one in value] if isinstance(value, list) else _text_within(value)
    if not (isinstance(value, list) and value and all(isinstance(one, str | list) for one in value)):
        return [turns_of(value, side, "assistant")]
    if len(value) > MAX_RESPONSES:
        raise BadRowError("not_a_pair", f"{side}: {len(value)} responses; a row may have {MAX_RESPONSES}")
    responses = []
    for number, one in enumerate(value, start=1):
        name = f"{side}, number {number}" if len(value) > 1 else side
        responses.append(turns_of(one, name, "assistant"))
        if not is_whole(responses[-1]):
            check_response(responses[-1], name)
    return responses


def _text_within(response: object) -> object:
    """Return the text of a response that is an object without a speaker; any other response as it is."""
    if isinstance(response, dict) and not has_speaker(response):
        return next((response[key] for key in RESPONSE_KEYS if isinstance(response.get(key), str)), response)
    return response


def numbered(pairs: Iterable[PreferencePair]) -> list[PreferencePair]:
    """Number the pairs of one row."""
    return [replace(pair, number=number) if number else pair for number, pair in enumerate(pairs)]


def pair_of_turns(row: Row, prompt: Turns | None, chosen: Turns, rejected: Turns) -> PreferencePair:
    """Build a pair of two responses to a prompt, or of two whole conversations."""
    if prompt is None or (is_whole(chosen) and is_whole(rejected)):
        return split_conversations(row, chosen, rejected, prompt)
    return build_pair(row, prompt, chosen, rejected)


def is_whole(turns: Turns) -> bool:
    """Return whether turns are a conversation, which the assistant may open, instead of a response."""
    return turns[0].role != "assistant" or any(turn.role == "user" for turn in turns)


def with_shared_tools(row: Row, *names: str) -> Row:
    """Take columns that are objects with messages and tools apart: the column holds the messages, the row the tools.

    Raises:
        BadRowError: the tools of two objects, or of an object and the row, differ.
    """
    inner = {}
    for name in names:
        value = row.values.get(name)
        if not isinstance(value, list) and (conversation := conversation_in(value)) is not None:
            inner[name] = conversation
    if not inner:
        return row
    values, tools = dict(row.values), tools_in(row.values)
    for name, (messages, of_object) in inner.items():
        own = tools_in({"tools": of_object})
        if tools and own and own != tools:
            raise BadRowError("different_prompts", f"{name}: its tools are not those of the row or of the other side")
        values[name], tools = messages, tools or own
    return Row(values=values | {"tools": list(tools)}, source=row.source)


def conversation_in(value: object) -> tuple[list[object], object] | None:
    """Return messages and tools of an object that holds messages; else None."""
    if not isinstance(value, dict) or has_speaker(value):
        return None
    messages = next((value[key] for key in CONVERSATION_KEYS if isinstance(value.get(key), list)), None)
    return None if messages is None else (messages, value.get("tools"))


def split_conversations(row: Row, chosen: Turns, rejected: Turns, prompt_column: Turns | None) -> PreferencePair:
    """Split two whole conversations into the prompt, which is the turns that they share, and one response each.

    Args:
        prompt_column: the row's own prompt, if it has one; the shared turns must contain it.
    """
    shared, most = 0, min(len(chosen), len(rejected)) - 1
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        reason = "share no first turn" if most else "are no whole conversations, and there is no prompt"
        raise BadRowError("different_prompts", f"chosen and rejected {reason}")
    if any(turns[shared].role != "assistant" for turns in (chosen, rejected)):
        message = f"chosen and rejected part at turn {shared + 1}, before the assistant's turn"
        raise BadRowError("different_prompts", f"{message}; the prompt has to be the same")
    prompt = chosen[:shared]
    if prompt_column is not None and not _is_start_or_question(prompt_column, prompt):
        raise BadRowError("different_prompts", "chosen and rejected are conversations that don't start with the prompt")
    prompt = prompt if prompt[0].role == "system" else with_system(row.values, prompt)
    return build_pair(row, prompt, chosen[shared:], rejected[shared:])


def _is_start_or_question(column: Turns, conversation: Turns) -> bool:
    """Return whether a prompt column is the start of the conversation, or its first or last user turn."""
    if column == conversation[: len(column)]:
        return True
    questions = [message.content.strip() for message in conversation if message.role == "user"]
    return bool(questions) and column[-1].content.strip() in (questions[0], questions[-1]) and len(column) <= 2


def build_pair(row: Row, prompt: Turns, chosen: Turns, rejected: Turns) -> PreferencePair:
    """Check the turns of a pair and build its record, with the row's tools, weight and margin."""
    check_prompt(prompt)
    check_response(chosen, "chosen")
    check_response(rejected, "rejected")
    return PreferencePair(
        prompt=prompt,
        chosen=(marked(row.values, chosen[0], "chosen"),),
        rejected=(marked(row.values, rejected[0], "rejected"),),
        tools=tools_in(row.values),
        weight=number_in(row.values, "weight", 1.0, at_least=0.0),
        margin=number_in(row.values, "margin", 0.0, at_least=-math.inf),
        source=row.source,
    )
