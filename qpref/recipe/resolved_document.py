"""The document of a resolved recipe, which recipe.lock.toml holds: every table with its plugins' options in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpref.hooks.plugin_files import PluginFile
from qpref.recipe.choices import Choice, LossChoice, SourceChoice
from qpref.recipe.sections import Recipe

DEFAULT_VALIDATOR = "pairs"
"""Its options are in `[checks]` itself; those of any other validator in `[checks.NAME]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The plugins that a recipe chose, with their options."""

    losses: Sequence[LossChoice]
    validators: Sequence[Choice]
    sinks: Sequence[Choice]
    sources: Sequence[SourceChoice]
    plugin_files: Sequence[PluginFile]
    reward: Choice | None

    def document(self, recipe: Recipe, is_single: bool) -> dict[str, Any]:
        """Return the recipe as TOML data, with defaults and absolute paths.

        Args:
            is_single: the recipe has one table `[loss]`, not a list of them.
        """
        full = recipe.model_dump(mode="json", exclude_none=True)
        tables = [loss.table() for loss in self.losses]
        full["loss"] = tables[0] if is_single else tables
        full["checks"] = {}
        for check in self.validators:
            name = check.plugin.record.name
            full["checks"] |= check.table() if name == DEFAULT_VALIDATOR else {name: check.table()}
        full.pop("plugins")
        if self.plugin_files:
            files = [{"path": str(file.path), "sha256": file.sha256} for file in self.plugin_files]
            full["plugins"] = {"files": files}
        if any(source.reader.record.options is not None for source in self.sources):
            full["data"]["folder"] = str(self.sources[0].folder)
        if self.reward is not None:
            full["rounds"]["reward"] = {"name": self.reward.plugin.record.name} | self.reward.table()
        full["sinks"] = [{"name": sink.plugin.record.name} | sink.table() for sink in self.sinks]
        return full
