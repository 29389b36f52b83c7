"""Validation errors of a recipe, named by its tables and keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

MAX_SHOWN = 100
"""Most characters of a value that a message repeats."""
TABLE_ARM = "{...}"
"""Tag of the arm of a union that is a table, where other arms are single values."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """A mistake of the recipe: table, key and message."""

    table: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"[{self.table}] {self.key + ': ' if self.key else ''}{self.message}"


def problems_of(error: ValidationError, model: type[BaseModel], table: str = "") -> list[Problem]:
    """Convert pydantic's errors to problems, one per key: for a union, pydantic reports every arm.

    Args:
        table: dotted name of the recipe's table that `model` checks; empty for the whole recipe.
    """
    problems: dict[tuple[str, str], Problem] = {}
    for detail in error.errors():
        keys, owner = _known_keys(detail["loc"], model)
        message = _message(detail, [table, *keys] if table else keys, owner)
        if detail["type"] == "extra_forbidden":
            keys.append(str(detail["loc"][-1]))
        path = ([table] if table else []) + keys
        names, key = (path[:-1], path[-1]) if len(path) > 1 or table else (path or ["recipe"], "")
        if not names:
            names, key = [key], ""
        problem = Problem(".".join(names), key, message)
        problems.setdefault((problem.table, problem.key), problem)
    return _deepest(problems.values())


def _deepest(problems: Iterable[Problem]) -> list[Problem]:
    """Drop problems that contain a deeper one: another arm of the union only complains about the type of the list."""
    found = list(problems)
    inside = [f"{problem.table}." for problem in found]
    return [one for one in found if not any(table.startswith(f"{one.table}.{one.key}.") for table in inside)]


def _known_keys(steps: Sequence[int | str], model: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """Return the leading keys of the recipe in pydantic's location, and the innermost model that they reach.

    The rest of the location names arms of a union.
    """
    keys: list[str] = []
    for step in steps:
        if isinstance(step, int):
            keys.append(str(step))
            continue
        if step.startswith("list[") or step == TABLE_ARM:  # an arm of a union; keys follow
            continue
        if step not in model.model_fields:
            break
        keys.append(step)
        annotation = model.model_fields[step].annotation
        inner = _inner_model(annotation)
        if inner is not None:
            model = inner
        elif get_origin(annotation) is not list:
            break
    return keys, model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arm in get_args(annotation) if (found := _inner_model(arm))), None)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Suggest the nearest known word, or list all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}" if known else ""


def _message(detail: Any, keys: Sequence[str], owner: type[BaseModel]) -> str:
    kind, key = detail["type"], str(detail["loc"][-1])
    if kind == "extra_forbidden":
        refused: Mapping[str, str] = getattr(owner, "refused", {})
        return refused.get(key) or "unknown key" + did_you_mean(key, list(owner.model_fields))
    if kind == "missing":
        return "missing" if len(keys) > 1 else "missing; every recipe has it"
    if keys == ["loss"] and kind in ("list_type", "too_short"):
        return f"expected a table, got {_shown(detail['input'])}"
    if kind in ("model_type", "dict_type"):
        return f"expected a table, got {_shown(detail['input'])}"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    message = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    if kind == "value_error":
        return message
    message = message.replace("a valid integer", "a whole number").replace("a valid ", "a ")
    return f"expected {message}, got {_shown(detail['input'])}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
