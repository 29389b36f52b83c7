"""Plans: what a run, or a check of data, needs to know before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref.hooks.manager import Loaded
from qpref.hooks.types import ListLoss, Printing, UnpairedLoss
from qpref.recipe.choices import Choice, LossChoice, LossFacts, SourceChoice, joint_needs
from qpref.recipe.data_section import DataSection
from qpref.recipe.document import fingerprint_of
from qpref.recipe.loss_columns import joint_columns
from qpref.recipe.sections import ModelSection, Recipe
from qpref.records import MetricRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A resolved recipe: every name and option that a run needs before it starts.

    Attributes:
        document: the recipe as TOML data, with overrides, defaults and absolute paths.
        output: the run folder.
        losses: one, or several that are added; all of pairs, all of lists or all of single completions.
        sources: of the held-out data, then of the training data.
        reward: of `[rounds]`; None without one.
        recorded: the losses' facts, for a run that was reopened without its loss plugins.
        printing: the form of a run's standard output, no part of its recipe.
        on_metrics: a program's function for each row of metrics, no part of the recipe either.
    """

    recipe: Recipe
    document: dict[str, Any]
    losses: tuple[LossChoice, ...]
    validators: tuple[Choice, ...]
    sinks: tuple[Choice, ...]
    sources: tuple[SourceChoice, ...]
    output: Path
    reward: Choice | None = None
    recorded: LossFacts | None = None
    printing: Printing = "text"
    on_metrics: Callable[[MetricRow], object] | None = None

    @property
    def plugins(self) -> list[Loaded]:
        readers = [source.reader for source in self.sources]
        chosen = [choice.plugin for choice in (*self.validators, *self.sinks)]
        return [loss.plugin for loss in self.losses] + chosen + readers

    @property
    def is_paired(self) -> bool:
        """True where the losses take pairs, or lists of them, not single completions."""
        if self.recorded:
            return self.recorded.is_paired
        return not isinstance(self.losses[0].plugin.record, UnpairedLoss)

    @property
    def is_listed(self) -> bool:
        """True where the losses take ranked lists."""
        return self.recorded.is_listed if self.recorded else isinstance(self.losses[0].plugin.record, ListLoss)

    @property
    def needs(self) -> frozenset[str]:
        """Inputs that some loss needs, as `joint_needs`; a schedule doesn't change them."""
        if self.recorded:
            return self.recorded.needs
        return joint_needs(loss.at(0.0) for loss in self.losses)

    @property
    def columns(self) -> tuple[str, ...]:
        """Numeric columns of the rows that the losses read; a schedule doesn't change them."""
        if self.recorded:
            return self.recorded.columns
        return joint_columns(loss.at(0.0) for loss in self.losses)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings that change results beyond rounding; a resumed run must keep them."""
        return fingerprint_of(self.document)

    @property
    def file_digests(self) -> dict[str, str]:
        """SHA-256 of each plugin file, by `plugin file NAME`; a resumed run must keep them."""
        files = self.document.get("plugins", {}).get("files", ())
        return {f"plugin file {Path(file['path']).name}": file["sha256"] for file in files}


@dataclass(frozen=True, slots=True)
class DataPlan:
    """A plan for checking data without a recipe: sources, validators, and the model that tokenizes them."""

    sources: tuple[SourceChoice, ...]
    validators: tuple[Choice, ...]
    data: DataSection
    model: ModelSection | None
