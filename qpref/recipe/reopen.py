"""Reopen a trained run's recipe to read its data; plugins that reading doesn't need may be gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qpref.hooks.manager import Offer
from qpref.hooks.types import NEEDS
from qpref.recipe.choices import LossFacts
from qpref.recipe.plan import Plan
from qpref.recipe.resolve import Resolution


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """A run's resolved recipe, and the plugins and data findings that its folder records.

    Attributes:
        path: the run folder.
        document: recipe.lock.toml.
        facts: run.json.
        report: data.json; empty where there is none.
    """

    path: Path
    document: Mapping[str, Any]
    facts: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def plugins(self) -> list[Offer]:
        """Plugins that the run was trained with. Malformed entries are dropped: the list only improves messages."""
        names = {field.name for field in fields(Offer)}
        listed = self.facts.get("plugins")
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        return [Offer(**{name: str(entry[name]) for name in names}) for entry in entries if names <= entry.keys()]

    @property
    def losses(self) -> LossFacts | None:
        """Facts about the run's losses; None for a run.json without usable ones, such as an older version wrote."""
        recorded = self.facts.get("losses")
        if not isinstance(recorded, dict):
            return None
        is_paired, needs = recorded.get("is_paired"), recorded.get("needs")
        if not isinstance(is_paired, bool) or not isinstance(needs, list) or not set(map(str, needs)) <= NEEDS:
            return None
        columns = recorded.get("columns", [])
        if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
            return None
        return LossFacts(is_paired, frozenset(needs), tuple(columns), recorded.get("is_listed") is True)

    @property
    def has_refused_rows(self) -> bool:
        """True where training refused rows, or where data.json doesn't say."""
        return self.report.get("refused") != 0


def reopen_plan(run: RecordedRun, *, heldout_alone: bool = False, checks: bool = True) -> Plan:
    """Resolve the readers of a run's data, and its checks where they may have removed rows.

    If training refused no row, the checks aren't loaded. No other plugin of the recipe needs to be installed.

    Args:
        heldout_alone: skip the training data where the held-out data have their own sources.
        checks: drop the rows that the checks refuse, as in training.

    Raises:
        RecipeError: a plugin isn't installed; the message names the distribution that the run used.
    """
    resolution = Resolution(str(run.path / "recipe.lock.toml"), run.path, run.path, run.plugins)
    return resolution.reopen(dict(run.document), run.losses, heldout_alone, checks and run.has_refused_rows)
