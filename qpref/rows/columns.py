"""Values of single columns of a row: the prompt under each of its names, tools, numbers and the label."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qpref.records import Message
from qpref.rows.column_hints import advice
from qpref.rows.messages import dialogue_of, has_speaker, turns_of
from qpref.rows.tool_calls import tools_of
from qpref.rows.values import BadRowError, json_value, kind_of, shown

Turns = tuple[Message, ...]

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
PROMPT_COLUMNS = ("prompt", "conversations", "messages", "instruction")
"""Columns that hold the prompt, the first of them that a row has."""
QUESTION_COLUMNS = ("contents", "context", "question", "query", "input")
"""Columns that hold the prompt where none of PROMPT_COLUMNS does and no other of these is there."""
SYSTEM_COLUMNS = ("system", "system_prompt", "system_instruction", "systemInstruction")
LABEL_COLUMNS = ("label", "kto_tag")
_LABELS: Mapping[object, bool] = {0: False, 1: True, "0": False, "1": True, "0.0": False, "1.0": True, "false": False,
                                  "true": True}  # fmt: skip


def need(values: Mapping[str, object], *names: str) -> None:
    """Refuse a row in which one of these columns is missing or null."""
    missing = [name for name in names if values.get(name) is None]
    if missing:
        message = f"not a preference pair: no {' and no '.join(missing)}; {advice(values, missing)}"
        raise BadRowError("not_a_pair", message)


def text_in(values: Mapping[str, object], name: str) -> str:
    """Return a column that has to be a text."""
    value = values[name]
    if not isinstance(value, str):
        raise BadRowError("not_a_pair", f"{name}: expected a text, found {kind_of(value)}")
    return value


def any_prompt(values: Mapping[str, object]) -> Turns:
    """Return the prompt from the first of PROMPT_COLUMNS that has one, or from the only one of QUESTION_COLUMNS.

    Raises:
        BadRowError: there is none, or several of QUESTION_COLUMNS, each of which may be a part of the prompt.
    """
    for name in PROMPT_COLUMNS:
        if values.get(name) is not None:
            if name == "instruction":
                return instruction(values)
            is_question = isinstance(values[name], str) and isinstance(values.get("history"), list)
            return (
                _after_history(values, prompt_turns(values[name], name)) if is_question else prompt_column(values, name)
            )
    found = questions_in(values)
    if not found:
        raise BadRowError("not_a_pair", f"no prompt; {advice(values, ['prompt'])}")
    if len(found) > 1:
        message = (
            f'{" and ".join(found)}: any of them may be the prompt; name it: columns = {{ prompt = "{found[0]}" }}'
        )
        raise BadRowError("not_a_pair", message)
    return _after_history(values, prompt_turns(values[found[0]], found[0]))


def has_prompt(values: Mapping[str, object]) -> bool:
    """Return whether some column may hold the prompt."""
    return any(values.get(name) is not None for name in PROMPT_COLUMNS) or bool(questions_in(values))


def questions_in(values: Mapping[str, object]) -> list[str]:
    """List those of QUESTION_COLUMNS that have a text or a list."""
    return [name for name in QUESTION_COLUMNS if isinstance(values.get(name), str | list) and values[name]]


def prompt_column(values: Mapping[str, object], name: str = "prompt") -> Turns:
    """Return the turns of a prompt's column, after those of the column `system`."""
    return with_system(values, prompt_turns(values[name], name))


def prompt_turns(prompt: object, name: str) -> Turns:
    """Parse a prompt: a text, messages, or a dialogue of Human and Assistant marks."""
    if isinstance(prompt, str) and is_dialogue(prompt) and prompt.rstrip().endswith(ASSISTANT):
        return dialogue_of(prompt, name)[:-1]
    return turns_of(prompt, name, "user")


def is_dialogue(text: str) -> bool:
    """Return whether a text starts with a mark of HH-RLHF's speakers; the assistant may greet first."""
    return text.startswith(HUMAN) or (text.startswith(ASSISTANT) and HUMAN in text)


def instruction(values: Mapping[str, object]) -> Turns:
    """Return Alpaca's prompt: the turns of `history`, then instruction and input, joined by a newline."""
    if values.get("instruction") is None:
        raise BadRowError("not_a_pair", f"no instruction; {advice(values, ['prompt'])}")
    parts = [text_in(values, name) for name in ("instruction", "input") if values.get(name) is not None]
    parts = [part for part in parts if part.strip()]
    return _after_history(values, turns_of("\n".join(parts), "instruction", "user"))


def _after_history(values: Mapping[str, object], prompt: Turns) -> Turns:
    """Prepend the turns of `history`, and before them those of `system`."""
    return with_system(values, (*_history(values), *prompt))


def _history(values: Mapping[str, object]) -> Turns:
    """Parse the column `history`: a list of [question, answer], or of messages."""
    history = values.get("history") or []
    history = json_value(history) if isinstance(history, str) else history
    if not isinstance(history, list):
        raise BadRowError("not_a_message", f"history: expected a list of [question, answer], found {kind_of(history)}")
    if history and all(isinstance(turn, dict) for turn in history):
        return turns_of(history, "history", "user")
    turns: list[Message] = []
    for turn in history:
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            raise BadRowError("not_a_message", f"history: expected [question, answer], found {kind_of(turn)}")
        turns += [*turns_of(turn[0], "history", "user"), *turns_of(turn[1], "history", "assistant")]
    return tuple(turns)


def with_system(values: Mapping[str, object], prompt: Turns) -> Turns:
    """Prepend the system prompt of the first of SYSTEM_COLUMNS that has one, as a system turn."""
    name = next((name for name in SYSTEM_COLUMNS if values.get(name) not in (None, "", [])), None)
    if name is None:
        return prompt
    value = values[name]
    if isinstance(value, list) and not any(isinstance(part, dict) and has_speaker(part) for part in value):
        value = {"content": value}
    turns = turns_of(value, name, "system")
    if len(turns) != 1:
        raise BadRowError("not_a_message", f"{name}: expected one text, found {len(turns)} messages")
    system = Message(role="system", content=turns[0].content)
    return prompt if prompt[:1] == (system,) else (system, *prompt)


def label_in(values: Mapping[str, object]) -> bool:
    """Return the label of a single completion: true or false, 1 or 0 (also as floats), or one of these as a text."""
    name = next((name for name in LABEL_COLUMNS if values.get(name) is not None), None)
    if name is None:
        raise BadRowError("not_an_example", f"not a labelled completion: no label; {advice(values, ['label'])}")
    labels = {name: _label(values[name], name) for name in LABEL_COLUMNS if values.get(name) is not None}
    if len(set(labels.values())) > 1:
        found = " and ".join(f"{name} is {str(label).lower()}" for name, label in labels.items())
        raise BadRowError("bad_label", f"two labels contradict each other: {found}")
    return labels[name]


def _label(label: object, name: str) -> bool:
    key = label.lower() if isinstance(label, str) else label
    if isinstance(key, str | int | float) and key in _LABELS:
        return _LABELS[key]
    raise BadRowError("bad_label", f"{name}: expected true or false, found {shown(label)}")


def tools_in(values: Mapping[str, object]) -> tuple[Mapping[str, object], ...]:
    """Return the JSON schemas of the column `tools`, or of OpenAI's older `functions`: a list or its JSON text."""
    tools = values.get("tools") or values.get("functions")
    return tuple(tools_of(tools)) if tools else ()


def number_in(values: Mapping[str, object], name: str, default: float, at_least: float) -> float:
    """Return a numeric column; `default` where it is missing, null or empty."""
    if values.get(name) in (None, ""):
        return default
    number = finite(values[name], name)
    if number < at_least:
        raise BadRowError("bad_number", f"{name}: {number:g} is below {at_least:g}")
    return number


def finite(value: object, name: str) -> float:
    """Convert a number, or its text, to a finite float."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except ValueError:
        number = math.nan
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise BadRowError("bad_number", f"{name}: infinite, or a number too large for 64 bits (at most 1.8e308)")
    if math.isnan(number):
        raise BadRowError("bad_number", f"{name}: expected a number, found {shown(value)}")
    return number
