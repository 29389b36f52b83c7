"""Anything that a JSON file of another command says, as a page can show it: pairs, tables and lists, within bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.report.read import is_number, number
from qpref.report.text import number_text

MOST_ROWS, MOST_LEVELS = 100, 5


@dataclass(frozen=True, slots=True)
class Facts:
    """Names with their values, each a text, Facts or a Table."""

    pairs: list[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells, each as in Facts; `left_out` more are not shown."""

    header: list[str]
    rows: list[list[Any]]
    left_out: int = 0


def shown(value: Any, levels: int = MOST_LEVELS) -> str | Facts | Table:
    """A JSON value as a text, pairs or a table."""
    if levels == 0 and isinstance(value, dict | list):
        return "..."
    if isinstance(value, dict):
        return Facts([(words(key), shown(part, levels - 1)) for key, part in value.items()])
    if isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        return _table(value, levels - 1)
    if isinstance(value, list):
        more = f" and {len(value) - MOST_ROWS:,} more" if len(value) > MOST_ROWS else ""
        return ", ".join(cell_text(part) for part in value[:MOST_ROWS]) + more
    return cell_text(value)


def _table(values: Sequence[Any], levels: int) -> Table:
    """Objects as rows under the names that any of them has; other things in one column."""
    first = values[:MOST_ROWS]
    left_out = len(values) - len(first)
    if not all(isinstance(value, dict) for value in first):
        return Table([""], [[shown(value, levels)] for value in first], left_out)
    names = list(dict.fromkeys(name for value in first for name in value))
    rows = [[shown(value[name], levels) if name in value else "" for name in names] for value in first]
    return Table([words(name) for name in names], rows, left_out)


def cell_text(value: Any) -> str:
    """A value without parts, in words."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number_text(number(value)) if is_number(value) else str(value)


def words(name: str) -> str:
    return name.replace("_", " ")


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and what was written after it, each answer with who wrote it, the base first; `about` is all else."""

    prompt: str
    answers: list[tuple[str, str]]
    about: list[tuple[str, str]]


def samples_of(value: Any) -> list[Sample]:
    """The samples in what `qpref generate --json` wrote: an array of objects with a prompt, or an object with one."""
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
        value = next((part for part in lists if any(_is_sample(item) for item in part)), [value])
    return [_sample(item) for item in value if _is_sample(item)] if isinstance(value, list) else []


def _is_sample(item: Any) -> bool:
    return isinstance(item, dict) and "prompt" in item


def _sample(item: Mapping[str, Any]) -> Sample:
    answers: list[tuple[str, str]] = []
    about: list[tuple[str, str]] = []
    for name, value in item.items():
        if name == "prompt":
            continue
        if (text := said(value)) is not None:
            answers.append((words(name), text))
        elif isinstance(value, dict):
            answers += [(str(who), text) for who, part in value.items() if (text := _answer(part)) is not None]
        elif isinstance(value, list) and not any(isinstance(part, dict | str) for part in value):
            about.append((words(name), cell_text(shown(value))))
        elif isinstance(value, list):
            answers += [
                (_author(part, f"{words(name)} {place}"), text)
                for place, part in enumerate(value, 1)
                if (text := _answer(part)) is not None
            ]
        else:
            about.append((words(name), cell_text(value)))
    answers.sort(key=lambda answer: answer[0] != "base")
    return Sample(said(item["prompt"]) or cell_text(item["prompt"]), answers, about)


def said(value: Any) -> str | None:
    """A text, or messages as one; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "content" in turn for turn in value):
        if len(value) == 1:
            return cell_text(value[0]["content"])
        return "\n".join(f"{cell_text(turn.get('role'))}: {cell_text(turn['content'])}" for turn in value)
    return None


def _answer(part: Any) -> str | None:
    if not isinstance(part, dict):
        return said(part)
    for name in ("text", "answer", "completion", "response", "content"):
        if (text := said(part.get(name))) is not None:
            return text
    return None


def _author(part: Any, otherwise: str) -> str:
    if isinstance(part, dict):
        for name in ("name", "model", "who", "label"):
            if isinstance(part.get(name), str):
                return str(part[name])
    return otherwise
