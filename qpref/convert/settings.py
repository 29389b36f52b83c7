"""Settings of another tool's file, with the tool's defaults, found by what they are in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qpref.aliases.alias import TOOLS, Tool
from qpref.aliases.lookup import ALIASES

Value = TypeVar("Value")


@dataclass(slots=True)
class Settings:
    """The values of one file.

    Attributes:
        tool: the tool that the file is for.
        given: what the file says.
        defaults: the tool's own values where the file says nothing.
        used: keys that have been read; the others are explained at the end.
        mistakes: values of a wrong type, one message each.
    """

    tool: Tool
    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    used: set[str] = field(default_factory=set)
    mistakes: list[str] = field(default_factory=list)

    def keys_of(self, ours: str) -> list[str]:
        """Return the tool's keys that are `ours` in a recipe, in the table's order."""
        return [key for alias in ALIASES if alias.ours == ours for key in alias.keys(self.tool)]

    def get(self, key: str, kind: Callable[[Any], Value]) -> Value | None:
        """Return the value of a key, or the tool's default; None where there is neither, or the value is wrong."""
        value = self.given[key] if key in self.given else self.defaults.get(key)
        self.used.add(key)
        if value is None:
            return None
        try:
            return kind(value)
        except (TypeError, ValueError):
            self.mistakes.append(f"{key}: expected {NOUNS.get(kind, 'another value')}, got {_shown(value)}")
            return None

    def has(self, key: str) -> bool:
        """Return whether the file itself has the key, with a value that isn't false."""
        return bool(self.given.get(key))

    def first(self, ours: str, kind: Callable[[Any], Value]) -> tuple[Value, str] | None:
        """Return the value of the first of the tool's keys for `ours` that has one, and where it is from."""
        keys = self.keys_of(ours)
        self.used.update(keys)
        for key in sorted(keys, key=lambda key: key not in self.given):
            value = self.get(key, kind)
            if value is not None:
                return value, self.origin(key)
        return None

    def origin(self, *keys: str) -> str:
        """Name where a value is from, for the comment behind it."""
        named = [key for key in keys if key in self.given]
        return ", ".join(named) if named else f"default of {TOOLS[self.tool]}"


def number(value: Any) -> float:
    """Take a number, or the text of one: YAML 1.1 reads 5e-7 as a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    return float(value)


def whole(value: Any) -> int:
    """Take a whole number, 3.0 and the text of one too."""
    found = number(value)
    if found != int(found):
        raise ValueError
    return int(found)


def word(value: Any) -> str:
    """Take a text."""
    if not isinstance(value, str):
        raise TypeError
    return value


def flag(value: Any) -> bool:
    """Take true or false."""
    if not isinstance(value, bool):
        raise TypeError
    return value


def anything(value: Any) -> Any:
    """Take any value."""
    return value


def words(value: Any) -> list[str]:
    """Take a text with commas, or a list of texts."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    raise TypeError


NOUNS: dict[Any, str] = {
    number: "a number",
    whole: "a whole number",
    word: "a text",
    flag: "true or false",
    words: "a text or a list of texts",
}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
