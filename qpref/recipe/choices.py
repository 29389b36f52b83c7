"""Plugins that a recipe chose, with their parsed options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qpref.hooks.manager import Loaded
from qpref.hooks.types import Split
from qpref.recipe.schedule import Scheduled


@dataclass(frozen=True, slots=True)
class Choice:
    """A plugin with its parsed options."""

    plugin: Loaded
    options: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChoice:
    """A source of rows.

    Attributes:
        location: a path, `NAME:...` for a reader that takes names, or `pypi:...`.
        format: row format, a name of `RowFormat`; "auto" recognizes it by the columns of each row.
        columns: qpref's column names -> the source's.
        weight: times that an epoch trains on each row.
    """

    location: str
    split: Split
    reader: Loaded
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LossChoice:
    """A loss that the recipe chose, its options, which may follow a schedule, and its factor in the sum."""

    plugin: Loaded
    options: Scheduled
    weight: float = 1.0

    def at(self, progress: float) -> Choice:
        """Return the choice with the options at `progress` of the run, 0 to 1."""
        return Choice(self.plugin, self.options.at(progress))

    def table(self) -> dict[str, Any]:
        """Return the choice as a table of the recipe."""
        weight = {} if self.weight == 1.0 else {"weight": self.weight}
        return {"name": self.plugin.record.name} | weight | self.options.document()
