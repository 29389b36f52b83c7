"""Values of single columns of a row: the prompt under each of its names, tools, numbers and the label."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from qpref.data.messages import dialogue_of, turns_of
from qpref.data.row_values import BadRowError, check_texts_within, json_value, kind_of, shown
from qpref.records import Message

Turns = tuple[Message, ...]

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"


def need(values: Mapping[str, object], *names: str) -> None:
    """Refuse a row in which one of these columns is missing or null."""
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise BadRowError("not_a_pair", f"not a preference pair: no {' and no '.join(missing)}")


def text_in(values: Mapping[str, object], name: str) -> str:
    """Return a column that has to be a text."""
    value = values[name]
    if not isinstance(value, str):
        raise BadRowError("not_a_pair", f"{name}: expected a text, found {kind_of(value)}")
    return value


def any_prompt(values: Mapping[str, object]) -> Turns:
    """Return the prompt from the first column that has one: prompt, conversations, messages or instruction."""
    if values.get("prompt") is not None:
        return prompt_column(values)
    for name in ("conversations", "messages"):
        if values.get(name) is not None:
            return with_system(values, turns_of(values[name], name, "user"))
    return instruction(values)


def prompt_column(values: Mapping[str, object]) -> Turns:
    """Return the turns of the column `prompt`: a text, messages, or a dialogue of Human and Assistant marks."""
    prompt = values["prompt"]
    if isinstance(prompt, str) and prompt.startswith(HUMAN) and prompt.rstrip().endswith(ASSISTANT):
        return with_system(values, dialogue_of(prompt, "prompt")[:-1])
    return with_system(values, turns_of(prompt, "prompt", "user"))


def instruction(values: Mapping[str, object]) -> Turns:
    """Return Alpaca's prompt: the turns of `history`, then instruction and input, joined by a newline."""
    if values.get("instruction") is None:
        raise BadRowError("not_a_pair", "no prompt: none of prompt, conversations, messages, instruction")
    parts = [text_in(values, "instruction")]
    if values.get("input") is not None and text_in(values, "input").strip():
        parts.append(text_in(values, "input"))
    turns = []
    for turn in _history(values):
        turns += [*turns_of(turn[0], "history", "user"), *turns_of(turn[1], "history", "assistant")]
    return with_system(values, (*turns, *turns_of("\n".join(parts), "instruction", "user")))


def _history(values: Mapping[str, object]) -> Iterator[list[str]]:
    history = values.get("history") or []
    history = json_value(history) if isinstance(history, str) else history
    if not isinstance(history, list):
        raise BadRowError("not_a_message", f"history: expected a list of [question, answer], found {kind_of(history)}")
    for turn in history:
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            raise BadRowError("not_a_message", f"history: expected [question, answer], found {kind_of(turn)}")
        yield turn


def with_system(values: Mapping[str, object], prompt: Turns) -> Turns:
    """Prepend the column `system` as a system turn, if the row has one."""
    if values.get("system") in (None, ""):
        return prompt
    (system,) = turns_of(text_in(values, "system"), "system", "system")
    if prompt[:1] == (system,):
        return prompt
    return (system, *prompt)


def label_in(values: Mapping[str, object]) -> bool:
    """Return the label of a single completion: true or false, 1 or 0, or one of these as a text."""
    label = next((values[name] for name in ("label", "kto_tag") if values.get(name) is not None), None)
    if label is None:
        raise BadRowError("not_an_example", "not a labelled completion: no label")
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(label, bool | int) and label in (0, 1):
        return bool(label)
    if isinstance(label, str) and label.lower() in known:
        return known[label.lower()]
    raise BadRowError("bad_label", f"label: expected true or false, found {shown(label)}")


def tools_in(values: Mapping[str, object]) -> tuple[Mapping[str, object], ...]:
    """Return the JSON schemas of the column `tools`, a list or its JSON text."""
    tools = values.get("tools") or []
    found = json_value(tools) if isinstance(tools, str) else tools
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadRowError("not_a_message", f"tools: expected a list of JSON schemas, found {kind_of(tools)}")
    check_texts_within(found, "tools")
    return tuple(found)


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
    except (OverflowError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRowError("bad_number", f"{name}: expected a number, found {shown(value)}")
    return number
