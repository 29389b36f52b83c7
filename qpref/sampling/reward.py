"""Rewards by name: found, given their options, and held to their contract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qpref.errors import InstallError, PluginError
from qpref.hooks import border
from qpref.hooks.manager import Offer
from qpref.installed import install_command, missing
from qpref.recipe.choices import Choice
from qpref.recipe.rewards import choose_reward
from qpref.records import SampledResponse


class Scorer:
    """A reward as a function of responses, with the settings that identify it.

    Args:
        name: of an installed reward, or a .py file with one.
        options: by name, as they stand in a recipe.

    Raises:
        RecipeError: none is installed, or an option has an invalid value.
        InstallError: a package that it needs isn't installed.
        PluginError: it is broken, or can't be built.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._build(choose_reward(name, options))

    @classmethod
    def of(cls, choice: Choice) -> Scorer:
        """Build a reward that a recipe has chosen.

        Raises:
            InstallError: a package that it needs isn't installed.
            PluginError: it can't be built.
        """
        scorer = cls.__new__(cls)
        scorer._build(choice)
        return scorer

    def _build(self, choice: Choice) -> None:
        record, self._offer = choice.plugin.record, choice.plugin.offer
        if lacking := missing(record.requires):
            command = install_command(self._offer.distribution, lacking)
            raise InstallError(f"reward '{record.name}' needs {' and '.join(lacking)}", command)
        self.settings = {"name": record.name, "version": self._offer.version, "options": choice.table()}
        with _guarded(self._offer, "build"):
            self._function = record.build(choice.options)

    def __call__(self, responses: Sequence[SampledResponse]) -> list[float]:
        """Score responses.

        Raises:
            PluginError: the reward raised, or doesn't return a finite number for each.
        """
        with _guarded(self._offer, "its function"):
            scores = [float(score) for score in self._function(responses)]
        if len(scores) != len(responses):
            raise PluginError(f"{self._offer}: returned {len(scores)} numbers for {len(responses)} responses", REPORT)
        wrong = next((index for index, score in enumerate(scores) if not math.isfinite(score)), None)
        if wrong is not None:
            raise PluginError(f"{self._offer}: scored {responses[wrong].text[:80]!r} with {scores[wrong]}", REPORT)
        return scores


REPORT = "report it to the reward's author"


def _guarded(offer: Offer, what: str) -> Any:
    return border.guarded(
        f"{offer}: {what}",
        lambda error: PluginError(f"{offer}: {what} raised {error}", REPORT),
        lambda change: PluginError(f"{offer}: {what} {change}", REPORT),
    )
