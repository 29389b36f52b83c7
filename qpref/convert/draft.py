"""A recipe in the making: its values with their origins, and what is to be said about the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Draft:
    """A recipe and remarks.

    Attributes:
        tables: table -> key -> (value, origin), the origin for the comment behind the value.
        losses: one table each, as `tables`' values; more than one make a mixture.
        sources: split -> the tables of `[[data.SPLIT]]` and their origin, where one path isn't enough.
        differs: what is not quite the same here, one sentence each.
        no_equal: key of the other tool -> why the recipe has nothing for it.
        by_itself: keys of what qpref does or chooses without a setting.
        unknown: keys that the tool isn't known to have.
    """

    tables: dict[str, dict[str, tuple[Any, str]]] = field(default_factory=dict)
    losses: list[dict[str, tuple[Any, str]]] = field(default_factory=list)
    sources: dict[str, tuple[list[dict[str, Any]], str]] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    no_equal: dict[str, str] = field(default_factory=dict)
    by_itself: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def put(self, ours: str, value: Any, origin: str) -> None:
        table, _, key = ours.partition(".")
        self.tables.setdefault(table, {})[key] = (value, origin)

    def get(self, ours: str) -> Any:
        """Return a value that has been put, or None."""
        table, _, key = ours.partition(".")
        return self.tables.get(table, {}).get(key, (None, ""))[0]

    def document(self) -> dict[str, Any]:
        """Return the recipe as nested dicts, as TOML would be read."""
        plain = {table: {key: value for key, (value, _) in values.items()} for table, values in self.tables.items()}
        losses = [{key: value for key, (value, _) in loss.items()} for loss in self.losses]
        data = plain.setdefault("data", {})
        data.update({split: tables for split, (tables, _) in self.sources.items()})
        return plain | {"loss": losses[0] if len(losses) == 1 else losses}
