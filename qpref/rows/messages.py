"""Turns of a conversation, parsed from every notation that data use, and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qpref.records import Message, Spans
from qpref.rows.masked_text import masked_in
from qpref.rows.tool_calls import tool_calls_of
from qpref.rows.turn_notation import (
    CALLERS,
    CONTENT_KEYS,
    SPEAKER_KEYS,
    by_message,
    content_in,
    is_message,
    join_parts,
    speaker_of,
)
from qpref.rows.values import BadRowError, check_text, check_texts_within, json_value, kind_of

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of a message's reasoning: DeepSeek's and Qwen's, then those of other servers and templates."""
_NOT_TEXT = ("image", "images", "audio", "audios", "video", "videos")
"""Keys of a message whose content a text cannot represent; they refuse the row."""
_PLAIN = {*SPEAKER_KEYS, *CONTENT_KEYS}
_MAY_FOLLOW = {
    None: ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_SPEAKER_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_PYTHON_MESSAGES = re.compile(r"(?:\[\s*)?\{'(?:role|content|from|value|messages)': .*\}\s*\]?\s*", re.DOTALL)


def turns_of(value: object, side: str, role: str) -> tuple[Message, ...]:
    """Parse turns: a text is one turn of `role`; else a message, a list of messages, or such a list as JSON text.

    A message alone may lack its role, which is `role` then.
    """
    if isinstance(value, str):
        listed = _listed(value, side)
        if listed is None:
            check_text(value, side)
            return (Message(role=role, content=value),)
        value = listed
    if isinstance(value, dict):
        value = by_message(value)
    if isinstance(value, dict) and (has_speaker(value) or content_in(value) is not None):
        value = [value if has_speaker(value) else {**value, "role": role}]
    if not isinstance(value, list) or not value:
        raise BadRowError("not_a_message", f"{side}: expected a text or a list of messages, found {kind_of(value)}")
    turns: list[Message] = []
    for number, turn in enumerate(value, start=1):
        message = _message(turn, f"{side}, turn {number}")
        if turns and message.role == turns[-1].role == "assistant" and _is_call(turn):
            turns[-1] = _with_calls(turns[-1], message)
        else:
            turns.append(message)
    return tuple(turns)


def has_speaker(turn: Mapping[str, object]) -> bool:
    """Return whether a turn names its speaker, under whichever key."""
    return turn.get("role") is not None or turn.get("from") is not None


def _is_call(turn: object) -> bool:
    return isinstance(turn, dict) and speaker_of(turn, "") in CALLERS


def _with_calls(before: Message, call: Message) -> Message:
    """Add the calls of a turn of its own, as ShareGPT and ms-swift have them, to the assistant's turn before it."""
    calls = [*_calls_of(before), *_calls_of(call)]
    return replace(before, extra={**before.extra, "tool_calls": calls})


def _calls_of(message: Message) -> list[object]:
    calls = message.extra.get("tool_calls", [])
    return calls if isinstance(calls, list) else []


def _listed(text: str, side: str) -> list[object] | None:
    """Parse a text that is the JSON of a list of messages or of one, as in CSV files; None for any other text."""
    if text[:1] not in ("[", "{") or "{" not in text[:8]:
        return None
    if _PYTHON_MESSAGES.fullmatch(text):
        raise BadRowError("not_a_message", f"{side}: messages in Python notation; write them as JSON (json.dumps)")
    value = json_value(text)
    if isinstance(value, dict):
        return [value] if is_message(value) else None
    if isinstance(value, list) and all(isinstance(turn, dict) and has_speaker(turn) for turn in value):
        return value
    return None


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError("not_a_message", f"{where}: a message has a role and a content, found {kind_of(turn)}")
    speaker, content = speaker_of(turn, where), content_in(turn)
    extra = _extra(turn, where) if turn.keys() - _PLAIN else {}
    if speaker in CALLERS:
        speaker, content, extra = "assistant", "", {**extra, "tool_calls": _calls(content, where)}
    if content is None and "tool_calls" in extra:
        content = ""
    of_parts: Spans = ()
    if isinstance(content, list):
        content, reasoning, of_parts = join_parts(content, where)
        if reasoning and extra.setdefault("reasoning_content", reasoning) != reasoning:
            raise BadRowError("not_a_message", f"{where}: reasoning both in a part and in reasoning_content; keep one")
        check_text(reasoning, where)
    if not isinstance(content, str):
        raise BadRowError("not_a_message", f"{where}: a message's content is a text, found {kind_of(content)}")
    check_text(content, where)
    masked = masked_in(turn, len(content), of_parts, where)
    return Message(role=speaker, content=content, extra=extra, masked=masked)


def _extra(turn: Mapping[str, object], where: str) -> dict[str, object]:
    not_text = [key for key in _NOT_TEXT if turn.get(key)]
    if not_text:
        raise BadRowError("not_a_message", f"{where}: {not_text[0]} cannot be trained on; remove it, or drop the row")
    extra = {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key) not in (None, "")}
    calls = tool_calls_of(turn["tool_calls"], where) if turn.get("tool_calls") else []
    for key in CALLERS:
        calls += [call for call in _calls(turn[key], where) if call not in calls] if turn.get(key) else []
    if calls:
        extra["tool_calls"] = calls
    if reasoning := reasoning_of(turn):
        extra["reasoning_content"] = reasoning
    check_texts_within(extra, where)
    return extra


def reasoning_of(turn: Mapping[str, object]) -> str | None:
    """Return a message's reasoning, under whichever name it has; None where it has none."""
    values = (turn.get(key) for key in REASONING)
    return next((value for value in values if isinstance(value, str) and value.strip()), None)


def _calls(content: object, where: str) -> list[dict[str, object]]:
    """Parse the tool calls of a `function_call` turn or key: one call, a list of them, or the JSON text of these."""
    value = json_value(content) if isinstance(content, str) else content
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict) or not (isinstance(call.get("name"), str) or "function" in call):
            message = f"{where}: a function_call is JSON with name and arguments, found {kind_of(content)}"
            raise BadRowError("not_a_message", message)
    return tool_calls_of(calls, where)


def dialogue_of(text: str, side: str) -> tuple[Message, ...]:
    """Split a text at `\\n\\nHuman:` and `\\n\\nAssistant:` into turns, without white space around them."""
    before, *parts = _SPEAKER_MARK.split(text)
    if before.strip() or not parts:
        raise BadRowError("not_a_message", f"{side}: expected \\n\\nHuman: at the start of the dialogue")
    check_text(text, side)
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(role=roles[speaker], content=content.strip())
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    )


def check_prompt(messages: Sequence[Message]) -> None:
    """Refuse a prompt with turns out of order, an empty turn, or an assistant turn at its end."""
    previous = None
    for number, message in enumerate(messages, start=1):
        role, expected = message.role, _MAY_FOLLOW[previous]
        where = f"prompt, turn {number}" if len(messages) > 1 else "prompt"
        if role not in expected:
            after = f"after the {previous}'s" if previous else "first"
            raise BadRowError(
                "role_order", f"{where}: the {role}'s turn {after}; expected the {' or the '.join(expected)}'s"
            )
        if role in ("user", "assistant") and not message.content.strip() and "tool_calls" not in message.extra:
            raise BadRowError("empty", f"{where} is empty")
        previous = role
    if previous not in ("user", "tool"):
        raise BadRowError(
            "role_order", f"prompt: the last turn is the {previous}'s; it has to be the user's or a tool's"
        )


def check_response(messages: Sequence[Message], side: str) -> None:
    """Refuse a response that isn't exactly one assistant turn with content or tool calls."""
    if len(messages) > 1 or messages[0].role != "assistant":
        found = ", ".join(message.role for message in messages[:4]) + (", ..." if len(messages) > 4 else "")
        several = all(message.role == "assistant" for message in messages)
        way_out = "; a list of lists holds several responses" if several else ""
        raise BadRowError("role_order", f"{side}: expected one turn of the assistant's, found: {found}{way_out}")
    if not messages[0].content.strip() and "tool_calls" not in messages[0].extra:
        raise BadRowError("empty", f"{side} is empty")
