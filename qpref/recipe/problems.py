"""Mistakes of a recipe, in the recipe's own words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake: the table in brackets, the key, and what is wrong with it."""

    table: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"[{self.table}] {self.key + ': ' if self.key else ''}{self.message}"


def problems_of(error: ValidationError, model: type[BaseModel], table: str = "") -> list[Problem]:
    """pydantic's errors in the recipe's words; `table` is where `model` stands in the recipe.

    A union reports each of its arms; one problem a key is enough.
    """
    problems: dict[tuple[str, str], Problem] = {}
    for detail in error.errors():
        place, owner = _place(detail["loc"], model)
        message = _in_words(detail, [table, *place] if table else place, owner)
        if detail["type"] == "extra_forbidden":
            place.append(str(detail["loc"][-1]))
        where = ([table] if table else []) + place
        names, key = (where[:-1], where[-1]) if len(where) > 1 or table else (where or ["recipe"], "")
        if not names:
            names, key = [key], ""
        problem = Problem(".".join(names), key, message)
        problems.setdefault((problem.table, problem.key), problem)
    return _deepest(problems.values())


def _deepest(problems: Iterable[Problem]) -> list[Problem]:
    """Without those that only say that a list of tables isn't what a union's other arm wants."""
    found = list(problems)
    inside = [f"{problem.table}." for problem in found]
    return [one for one in found if not any(table.startswith(f"{one.table}.{one.key}.") for table in inside)]


def _place(steps: Sequence[int | str], model: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """The part of pydantic's location that names keys of the recipe, and the innermost model that it reached.

    What follows are names of a union's arms.
    """
    place: list[str] = []
    for step in steps:
        if isinstance(step, int):
            place.append(str(step))
            continue
        if step.startswith("list["):  # a union's arm, through which the location goes on
            continue
        if step not in model.model_fields:
            break
        place.append(step)
        annotation = model.model_fields[step].annotation
        inner = _inner_model(annotation)
        if inner is not None:
            model = inner
        elif get_origin(annotation) is not list:
            break
    return place, model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arm in get_args(annotation) if (found := _inner_model(arm))), None)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}" if known else ""


def _in_words(detail: Any, place: Sequence[str], owner: type[BaseModel]) -> str:
    kind, key = detail["type"], str(detail["loc"][-1])
    if kind == "extra_forbidden":
        refused: Mapping[str, str] = getattr(owner, "refused", {})
        return refused.get(key) or "unknown key" + did_you_mean(key, list(owner.model_fields))
    if kind == "missing":
        return "missing" if len(place) > 1 else "missing; every recipe has it"
    if place == ["loss"] and kind in ("list_type", "too_short"):
        return f"expected a table, got {detail['input']!r}"
    if kind in ("model_type", "dict_type"):
        return f"expected a table, got {detail['input']!r}"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    message = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    if kind == "value_error":
        return message
    message = message.replace("a valid integer", "a whole number").replace("a valid ", "a ")
    return f"expected {message}, got {detail['input']!r}"
