"""A run's recipe resolved again once it is trained, as far as reading its data takes: other plugins may be gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qpref.hooks.manager import Offer
from qpref.hooks.types import NEEDS
from qpref.recipe.choices import LossFacts
from qpref.recipe.resolve import Plan, Resolution


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """A run's resolved recipe, and what its folder says of the plugins that it was trained with.

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
        """Where each plugin came from. An entry that says something else is left out: it only improves messages."""
        names = {field.name for field in fields(Offer)}
        listed = self.facts.get("plugins")
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        return [Offer(**{name: str(entry[name]) for name in names}) for entry in entries if names <= entry.keys()]

    @property
    def losses(self) -> LossFacts | None:
        """What its losses make of rows; None where run.json doesn't say, as one from before that was recorded."""
        recorded = self.facts.get("losses")
        if not isinstance(recorded, dict):
            return None
        is_paired, needs = recorded.get("is_paired"), recorded.get("needs")
        if not isinstance(is_paired, bool) or not isinstance(needs, list) or not set(map(str, needs)) <= NEEDS:
            return None
        return LossFacts(is_paired, frozenset(needs))

    @property
    def has_refused_rows(self) -> bool:
        """Whether training refused rows, or nobody knows."""
        return self.report.get("refused") != 0


def reopen_plan(run: RecordedRun, *, heldout_alone: bool = False, checks: bool = True) -> Plan:
    """Resolve the readers of a run's data, and its checks where they may have decided which rows there are.

    A run that has refused no row needs none of its checks. Nothing else that its recipe names need be installed.

    Args:
        heldout_alone: leave the training data out, where the held-out ones have sources of their own.
        checks: whether the rows that checks refuse are to be left out, as in training.

    Raises:
        RecipeError: a plugin isn't installed; names the distribution that the run had it from.
    """
    resolution = Resolution(str(run.path / "recipe.lock.toml"), run.path, run.path, run.plugins)
    return resolution.reopen(dict(run.document), run.losses, heldout_alone, checks and run.has_refused_rows)
