"""Validation errors of a recipe, named by its tables and keys; keys of other tools are explained before any guess."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from qpref.aliases import lookup

MAX_SHOWN = 100
"""Most characters of a value that a message repeats."""
WIDTH = 80
TABLE_ARM = "{...}"
"""Tag of the arm of a union that is a table, where other arms are single values."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """A mistake of the recipe: table, key and message.

    Attributes:
        known: the keys of the table, where the key is unknown and like none of them.
    """

    table: str
    key: str
    message: str
    known: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"[{self.table}] {self.key + ': ' if self.key else ''}{self.message}"


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """Return the problems in order, a line each, then the keys of each table with an unknown one, once and wrapped."""
    found = sorted(set(problems))
    known = {problem.table if problem.key else "": problem.known for problem in found if problem.known}
    lists = []
    for table, keys in known.items():
        head = f"  keys of [{table}]: " if table else "  tables: "
        lists += textwrap.wrap(", ".join(keys), WIDTH, initial_indent=head, subsequent_indent="    ")
    return [*(f"  {problem}" for problem in found), *lists]


def problems_of(error: ValidationError, model: type[BaseModel], table: str = "") -> list[Problem]:
    """Convert pydantic's errors to problems, one per key: for a union, pydantic reports every arm.

    Args:
        table: dotted name of the recipe's table that `model` checks; empty for the whole recipe.
    """
    problems: dict[tuple[str, str], Problem] = {}
    for detail in error.errors():
        keys, owner = _known_keys(detail["loc"], model)
        known: tuple[str, ...] = ()
        if detail["type"] == "extra_forbidden":
            message, known = _unknown_key(str(detail["loc"][-1]), [table, *keys] if table else keys, owner, model)
            keys.append(str(detail["loc"][-1]))
        else:
            message = _message(detail, [table, *keys] if table else keys)
        path = ([table] if table else []) + keys
        names, key = (path[:-1], path[-1]) if len(path) > 1 or table else (path or ["recipe"], "")
        if not names:
            names, key = [key], ""
        problem = Problem(".".join(names), key, message, known)
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


def _unknown_key(
    key: str, path: Sequence[str], owner: type[BaseModel], root: type[BaseModel]
) -> tuple[str, tuple[str, ...]]:
    """Explain an unknown key: refused here, a key of another table, another tool's, misspelt, or none of these.

    Returns:
        The message, and in the last case the keys of the table.
    """
    refused: Mapping[str, str] = getattr(owner, "refused", {})
    if key in refused:
        return refused[key], ()
    if explanation := _explanation(key, path, owner):
        return f"unknown key; {explanation}", ()
    for table, info in root.model_fields.items():
        inner = _inner_model(info.annotation)
        if path and inner is not None and inner is not owner and key in inner.model_fields:
            return f"unknown key; it belongs into [{table}]", ()
    known = tuple(owner.model_fields)
    near = difflib.get_close_matches(key, known, n=1)
    return (f"unknown key; did you mean '{near[0]}'?", ()) if near else ("unknown key", known)


def _explanation(key: str, path: Sequence[str], owner: type[BaseModel]) -> str | None:
    """Return what a key of another tool is here; None for no such key, and where this table's plugin hasn't it."""
    alias = lookup.find(key)
    if alias is None:
        return None
    table, _, ours = (alias.ours or "").partition(".")
    lacks_it = bool(path) and path[0] == table and ours not in owner.model_fields
    return None if lacks_it else alias.explanation()


def _message(detail: Any, keys: Sequence[str]) -> str:
    kind = detail["type"]
    if kind == "missing":
        return "missing" if len(keys) > 1 else "missing; every recipe has it"
    if keys == ["loss"] and kind in ("list_type", "too_short"):
        return f"expected a table, got {_shown(detail['input'])}"
    if kind == "list_type" and isinstance(detail["input"], dict) and len(keys) == 1:
        return f"expected a list of tables, [[{keys[0]}]] with a name in each, got {_shown(detail['input'])}"
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
