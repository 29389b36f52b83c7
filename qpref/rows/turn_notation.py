"""Role and content of a turn, in each notation that data use.

OpenAI, Mistral: `role` and `content`. ShareGPT: `from` and `value`. Gemini: `role` and `parts`. OASST: `role` and
`text`. Cohere: `role` and `message`. A content may be a list of parts, as in multimodal data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qpref.records import Spans
from qpref.rows.masked_text import is_trained
from qpref.rows.values import BadRowError, kind_of, named, shown

_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "chatbot", "ai", "model"),
    "tool": ("tool", "observation", "function_response", "tool_response", "tool_result", "ipython"),
}
ROLE_OF = {name: role for role, names in _NAMES.items() for name in names}
"""Name of a speaker, in lower case -> role."""
CALLERS = ("function_call", "tool_call")
"""Names for a turn of the assistant's whose content is the JSON of its calls."""
SPEAKER_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "parts", "text", "message", "refusal")
_TEXT_PARTS = (None, "text", "input_text", "output_text", "refusal")
_REASONING_PARTS = ("thinking", "reasoning")
_CALL_PARTS = ("tool_use", "tool_call", "functionCall", "function_call")


def speaker_of(turn: Mapping[str, object], where: str) -> str:
    """Return the role of a turn, or one of CALLERS; capitals and spaces around a name don't count."""
    key = "from" if turn.get("role") is None and turn.get("from") is not None else "role"
    speaker = turn.get(key)
    name = speaker.strip().lower() if isinstance(speaker, str) else ""
    if name in CALLERS:
        return name
    if name == "function" and isinstance(turn.get("name"), str):
        return "tool"  # OpenAI's result of a function, by the function's name
    if name == "function":
        message = f"{where}: {key} {shown(speaker)} can be a call or its result; write function_call or tool"
        raise BadRowError("not_a_message", message)
    if speaker is None:
        raise BadRowError("not_a_message", f"{where}: a message without a role; it has {named(turn) or 'no key'}")
    if name not in ROLE_OF:
        known = ", ".join((*ROLE_OF, *CALLERS))
        raise BadRowError("not_a_message", f"{where}: {key} {shown(speaker)}; known: {known}")
    return ROLE_OF[name]


def is_assistant(turn: Mapping[str, object]) -> bool:
    """Return whether a turn that may be malformed is the assistant's."""
    names = (turn.get(key) for key in SPEAKER_KEYS)
    speaker = next((name for name in names if isinstance(name, str)), "").strip().lower()
    return ROLE_OF.get(speaker) == "assistant" or speaker in CALLERS


def is_message(values: Mapping[str, object]) -> bool:
    """Return whether an object has a known speaker beside a content under the key that belongs to it."""
    for speaker_key, content_key in (("role", "content"), ("from", "value")):
        speaker = values.get(speaker_key)
        if isinstance(speaker, str) and speaker.lower() in (*ROLE_OF, *CALLERS) and content_key in values:
            return True
    return False


def by_message(values: dict[str, object]) -> dict[str, object] | list[dict[str, object]]:
    """Turn an object of lists, as older `datasets` store a Sequence of messages, into the list of messages."""
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    speakers = next((lists[key] for key in SPEAKER_KEYS if key in lists), None)
    if speakers is None or any(len(value) != len(speakers) for value in lists.values()):
        return values
    return [{key: value[index] for key, value in lists.items()} for index in range(len(speakers))]


def content_in(turn: Mapping[str, object]) -> object:
    """Return the content of a turn under the first key that has one; None where no key has."""
    for key in CONTENT_KEYS:
        if (content := turn.get(key)) is not None:
            return content
    return None


def join_parts(parts: Sequence[object], where: str) -> tuple[str, str, Spans]:
    """Join the parts of a content to its text and its reasoning; chat templates put nothing between parts.

    Returns:
        Text, reasoning, and the spans of the text whose parts have `train` false.

    Raises:
        BadRowError: a part is neither a text nor reasoning; names its number.
    """
    texts, reasoning, masked, length = [], [], [], 0
    for number, part in enumerate(parts, start=1):
        at = f"{where}, part {number}"
        values = {"text": part} if isinstance(part, str) else part
        if not isinstance(values, dict):
            raise BadRowError("not_a_message", f"{at}: expected an object with a text, found {kind_of(part)}")
        kind, counts = values.get("type"), is_trained(values, at)
        if kind in _REASONING_PARTS or (kind in _TEXT_PARTS and values.get("thought") is True):
            if not counts:
                raise BadRowError("bad_mask", f"{at}: reasoning is masked by [data] mask_patterns, not by train")
            reasoning.append(_reasoning(values, at))
        elif kind in _TEXT_PARTS and isinstance(text := values.get("refusal" if kind == "refusal" else "text"), str):
            texts.append(text)
            length += len(text)
            if text and not counts:
                masked.append((length - len(text), length))
        else:
            raise BadRowError("not_a_message", f"{at}: {_no_text(values)}")
    return "".join(texts), "".join(reasoning), tuple(masked)


def _reasoning(part: Mapping[str, object], where: str) -> str:
    """Return the text of a part that holds reasoning; Mistral's is a list of text parts."""
    text = next((part[key] for key in ("thinking", "reasoning", "text") if part.get(key) is not None), None)
    if isinstance(text, list):
        text = join_parts(text, where)[0]
    if not isinstance(text, str):
        raise BadRowError("not_a_message", f"{where}: reasoning without a text, found {kind_of(text)}")
    return text


def _no_text(part: Mapping[str, object]) -> str:
    """Describe a part that is no text, and what to do."""
    kind = part.get("type")
    other = [key for key, value in part.items() if key not in ("type", "text") and value not in (None, "", [], {})]
    if kind in _CALL_PARTS or set(other) & set(_CALL_PARTS):
        return "a call of a tool; write it under the message's key tool_calls"
    if kind in _TEXT_PARTS and not other:
        return "a part without a text; remove it, or drop the row"
    found = f"a part of the type {shown(kind)}" if kind is not None else f"a part with {named(other)}"
    return f"{found}; qpref trains on text alone, so drop the row"
