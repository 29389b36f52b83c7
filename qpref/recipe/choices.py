"""Plugins that a recipe chose, with their parsed options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpref.errors import PluginError
from qpref.hooks.manager import Loaded
from qpref.hooks.reader import Reader, ReaderContext
from qpref.hooks.types import ListLoss, PairedLoss, Split, UnpairedLoss
from qpref.recipe.contest_section import ContestSection
from qpref.recipe.schedule import Schedule, Scheduled
from qpref.records import Finding, Row


@dataclass(frozen=True, slots=True)
class Choice:
    """A plugin with its parsed options."""

    plugin: Loaded
    options: Any

    def table(self) -> dict[str, Any]:
        """The options as the recipe has them."""
        table: dict[str, Any] = self.options.model_dump(mode="json", exclude_none=True)
        return table


def joint_needs(losses: Iterable[Choice]) -> frozenset[str]:
    """Join the losses' needs beside the policy's log-probabilities, names of `qpref.hooks.types.NEEDS`."""
    return frozenset().union(*(loss.plugin.record.needs_of(loss.options) for loss in losses))


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChoice:
    """A source of rows.

    Attributes:
        location: a path, `NAME:...` for a reader that takes names, or `pypi:...`.
        format: row format, a name of `RowFormat`; "auto" recognizes it by the columns of each row.
        columns: qpref's column names -> the source's.
        contest: two responses and who won, in place of a format.
        weight: times that an epoch trains on each row.
        options: the reader's options, parsed; None for a reader without any.
        folder: folder at which the reader's relative paths start.
        read_by_losses: numeric columns that the losses read, by qpref's names.
    """

    location: str
    split: Split
    reader: Loaded
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    contest: ContestSection | None = None
    weight: float = 1.0
    read_by_losses: tuple[str, ...] = ()
    options: Any = None
    folder: Path = Path()

    def read(self, path: Path) -> Iterator[Row | Finding]:
        """Call the reader."""
        record: Reader = self.reader.record
        if record.options is None:
            return record.read(path)
        return record.read(path, ReaderContext(options=self.options, folder=self.folder))

    @property
    def own_columns(self) -> frozenset[str]:
        """The source's columns that the recipe names."""
        sides = () if self.contest is None else (self.contest.first, self.contest.second)
        return frozenset({*self.columns.values(), *sides})


@dataclass(frozen=True, slots=True)
class LossChoice:
    """A loss that the recipe chose, its options, and its factor in the sum; both may follow a schedule."""

    plugin: Loaded
    options: Scheduled
    weight: float | Schedule = 1.0

    @property
    def is_scheduled(self) -> bool:
        """True where an option or the weight follows a schedule."""
        return bool(self.options.schedules) or isinstance(self.weight, Schedule)

    def at(self, progress: float) -> Choice:
        """Return the choice with the options at `progress` of the run, 0 to 1."""
        return Choice(self.plugin, self.options.at(progress))

    def weight_at(self, progress: float) -> float:
        """Return the factor in the sum at `progress` of the run, 0 to 1."""
        return self.weight.at(progress) if isinstance(self.weight, Schedule) else self.weight

    def table(self) -> dict[str, Any]:
        """Return the choice as a table of the recipe."""
        own = self.weight.model_dump(mode="json") if isinstance(self.weight, Schedule) else self.weight
        weight = {} if own == 1.0 else {"weight": own}
        return {"name": self.plugin.record.name} | weight | self.options.document()


def unread_masks(mask: str, losses: Sequence[LossChoice]) -> Iterator[str]:
    """Explain why `[data] mask` can't leave masks to these losses, where it does and none of them reads masks."""
    if mask == "loss" and losses and "tokens" not in joint_needs(loss.at(0.0) for loss in losses):
        names = " and ".join(f"'{loss.plugin.record.name}'" for loss in losses)
        yield f'"loss" leaves masks to the loss, and {names} reads none; "exclude" keeps masked tokens out of it'


@dataclass(frozen=True, slots=True)
class LossFacts:
    """Facts about a run's losses together that decide how rows are read.

    Attributes:
        is_paired: the losses take pairs or lists, not single completions.
        needs: see `qpref.hooks.types.Need`.
        columns: numeric columns of the rows that they read.
        is_listed: the losses take ranked lists.
    """

    is_paired: bool
    needs: frozenset[str]
    columns: tuple[str, ...] = ()
    is_listed: bool = False


def refuse_odd_loss(plugin: Loaded) -> None:
    """Stop where a loss's record can't be used in a recipe.

    Raises:
        PluginError: says why.
    """
    if not isinstance(plugin.record, PairedLoss | ListLoss | UnpairedLoss):
        raise PluginError(
            f"{plugin.offer}: a {type(plugin.record).__name__}, not a PairedLoss, UnpairedLoss or ListLoss",
            "report it to its author",
        )
    taken = {"name", "weight"} & set(getattr(plugin.record.options, "model_fields", ()))
    if taken:
        raise PluginError(f"{plugin.offer}: its option {min(taken)} is the recipe's own", "report it to its author")
