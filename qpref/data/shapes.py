"""Row dict -> record. Each shape that a row may have is written here once, whatever file it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qpref.records import Finding, Message, PreferencePair, Row, UnpairedExample

SIDES = ("prompt", "chosen", "rejected")
ROLES = ("system", "user", "assistant")


class _BadRowError(ValueError):
    """Why a row is no pair; becomes a finding at the row's place."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def is_unpaired(row: Row) -> bool:
    """Whether a row is a single completion with a label, rather than a pair or an attempt at one."""
    return row.values.get("completion") is not None and row.values.get("chosen") is None


def unpaired_of_row(row: Row) -> UnpairedExample | Finding:
    """A single completion, or why the row is none: `prompt` and `completion` as in a pair, `label` true or false."""
    try:
        missing = [side for side in ("prompt", "completion", "label") if row.values.get(side) is None]
        if missing:
            raise _BadRowError("not_an_example", f"not a labelled completion: no {' and no '.join(missing)}")
        label = row.values["label"]
        if label not in (0, 1) or isinstance(label, float):
            raise _BadRowError("not_an_example", f"label: expected true or false, found {repr(label)[:40]}")
        return UnpairedExample(
            prompt=_conversation(row.values["prompt"], "prompt", "user"),
            completion=_conversation(row.values["completion"], "completion", "assistant"),
            label=bool(label),
            weight=_number(row.values, "weight", 1.0, at_least=0.0),
            source=row.source,
        )
    except _BadRowError as error:
        return Finding(code=error.code, severity="error", message=str(error), source=row.source)


def unpair(pair: PreferencePair) -> tuple[UnpairedExample, UnpairedExample]:
    """A pair as two completions, the desirable one first; its margin has no meaning then."""
    good, bad = (
        UnpairedExample(prompt=pair.prompt, completion=completion, label=label, weight=pair.weight, source=pair.source)
        for completion, label in ((pair.chosen, True), (pair.rejected, False))
    )
    return good, bad


def pair_of_row(row: Row) -> PreferencePair | Finding:
    """A preference pair, or why the row is none.

    `prompt`, `chosen` and `rejected` are texts, or lists of messages (`role`, `content`). A text prompt is one user
    turn and a text response one assistant turn. `weight` and `margin` may stand beside them; other columns are left
    alone.
    """
    try:
        missing = [side for side in SIDES if row.values.get(side) is None]
        if missing:
            raise _BadRowError("not_a_pair", f"not a preference pair: no {' and no '.join(missing)}")
        return PreferencePair(
            prompt=_conversation(row.values["prompt"], "prompt", "user"),
            chosen=_conversation(row.values["chosen"], "chosen", "assistant"),
            rejected=_conversation(row.values["rejected"], "rejected", "assistant"),
            weight=_number(row.values, "weight", 1.0, at_least=0.0),
            margin=_number(row.values, "margin", 0.0, at_least=-math.inf),
            source=row.source,
        )
    except _BadRowError as error:
        return Finding(code=error.code, severity="error", message=str(error), source=row.source)


def _conversation(value: object, side: str, role: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        messages: tuple[Message, ...] = (Message(role=role, content=value),)
    elif isinstance(value, list) and value:
        messages = tuple(_message(turn, side) for turn in value)
    else:
        raise _BadRowError("not_a_pair", f"{side}: expected a text or a list of messages, found {_kind(value)}")
    last = messages[-1]
    if side == "prompt" and last.role != "user":
        raise _BadRowError("not_a_pair", f"prompt: the last turn is the {last.role}'s; it has to be the user's")
    if side != "prompt" and (len(messages) > 1 or last.role != "assistant"):
        raise _BadRowError("not_a_pair", f"{side}: expected one turn of the assistant's")
    if not last.content.strip():
        raise _BadRowError("empty", f"{side} is empty")
    return messages


def _message(turn: object, side: str) -> Message:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        raise _BadRowError("not_a_pair", f"{side}: a message has the keys role and content, found {_kind(turn)}")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise _BadRowError("not_a_pair", f"{side}: role {role!r}; known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise _BadRowError("not_a_pair", f"{side}: a message's content is a text, found {_kind(content)}")
    return Message(role=role, content=content)


def _number(values: Mapping[str, object], name: str, default: float, at_least: float) -> float:
    value = values.get(name, default)
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < at_least:
        raise _BadRowError("not_a_pair", f"{name}: expected a number, found {repr(value)[:40]}")
    return number


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(str, value)) or 'none'}"
    return "an empty list" if value == [] else type(value).__name__


def with_columns(row: Row, columns: Mapping[str, str]) -> Row | Finding:
    """The row with our names for its columns."""
    raise NotImplementedError


def records_of_row(row: Row, shape: str) -> Sequence[PreferencePair | UnpairedExample] | Finding:
    """The records that a row holds."""
    record = unpaired_of_row(row) if is_unpaired(row) else pair_of_row(row)
    return record if isinstance(record, Finding) else [record]
