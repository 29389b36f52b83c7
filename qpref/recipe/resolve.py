"""Recipe + plugins -> Plan: every name resolved and every option parsed, before data is read or a weight loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from qpref.aliases.loss_names import LOSS_NAMES
from qpref.errors import PluginError, RecipeError
from qpref.hooks import manager
from qpref.hooks.manager import Kind, Loaded, Offer, PluginHost
from qpref.hooks.plugin_files import given_plugins
from qpref.hooks.types import Split
from qpref.recipe.choices import Choice, LossChoice, LossFacts, SourceChoice, refuse_odd_loss, unread_masks
from qpref.recipe.data_section import DataSection, SourceSection, sources_alone
from qpref.recipe.document import Override, read_document, refuse_credentials, refuse_unstorable, with_overrides
from qpref.recipe.loss_columns import joint_columns
from qpref.recipe.loss_tables import joint_problems, schedules_of, weight_of
from qpref.recipe.paths import Locations, advice_on_reader
from qpref.recipe.plan import DataPlan, Plan
from qpref.recipe.plugin_tables import load_files
from qpref.recipe.problems import Problem, problem_lines, problems_of
from qpref.recipe.resolved_document import DEFAULT_VALIDATOR, Parts
from qpref.recipe.rounds_section import RoundsSection
from qpref.recipe.schedule import Scheduled
from qpref.recipe.sections import ModelSection, check_document
from qpref.recipe.trl_losses import find_loss

SPLITS: tuple[Split, ...] = ("heldout", "train")
"""Splits in the order in which checks read them."""
FOLDER_READER = "datasets"
"""Reader of a folder, unless the recipe names one."""
DEFAULT_VALIDATORS = ("duplicates", "leakage", "bias", "text")
"""Validators that run on all data too, where they are installed."""


def make_plan(
    recipe: Path | Mapping[str, Any],
    overrides: Iterable[Override] = (),
    output: Path | None = None,
    plugins: Iterable[object] = (),
) -> Plan:
    """Resolve a recipe: every name, option and path.

    Args:
        recipe: a TOML file, or its content as nested dicts.
        overrides: `table.key=value` each, or pairs of key and value.
        output: the run folder; by default `runs/<the recipe's file name without .toml>`.
        plugins: records of losses, checks, readers and sinks that the recipe may name beside the installed ones.

    Raises:
        RecipeError: the recipe has mistakes; all of them are in the message.
        PluginError: a plugin that the recipe names is broken, or offered twice.
    """
    if isinstance(recipe, Path):
        origin, folder = str(recipe), recipe.absolute().parent
        document = read_document(recipe)
    else:
        origin, folder, document = "recipe", Path.cwd(), dict(recipe)
    document = with_overrides(document, overrides)
    refuse_unstorable(document, origin)
    return Resolution(origin, folder, run_folder_of(recipe, output), plugins=plugins).resolve(document)


def run_folder_of(recipe: Path | Mapping[str, Any], output: Path | None) -> Path:
    """Return the folder of a recipe's run, which `output` names, or else the recipe's file."""
    return output or Path("runs") / (recipe.stem if isinstance(recipe, Path) else "run")


def make_data_plan(location: str, base: str | None = None, options: Mapping[str, Any] | None = None) -> DataPlan:
    """Plan the check of one source with the defaults of a recipe.

    Args:
        location: as `[data] train`; a relative path starts at the current folder.
        base: as `[model] base`, or None.
        options: other keys of `[data]`: `reader`, `format`, `columns`.

    Raises:
        RecipeError: no reader is known for the source, or an option has an invalid value.
    """
    refuse_credentials({"location": location, "base": base, **(options or {})}, "the source or its options")
    return Resolution(location, Path.cwd(), Path()).resolve_data(location, base, options or {})


class Resolution:
    """Collects the problems of one recipe while its parts are resolved."""

    def __init__(
        self, origin: str, folder: Path, output: Path, recorded: Sequence[Offer] = (), plugins: Iterable[object] = ()
    ) -> None:
        self._origin = origin
        self._output = output
        self._folder = folder
        self._host = PluginHost(recorded, given_plugins(plugins))
        self._locations = Locations(folder, lambda location: self._named_reader(location) is not None)
        self._problems: list[Problem] = []

    def resolve(self, document: dict[str, Any]) -> Plan:
        checked = check_document(document)
        if isinstance(checked, list):
            self._problems += checked
        files, mistakes = load_files(document.get("plugins"), self._locations)
        self._problems += mistakes
        self._host.add(plugin for file in files for plugin in file.plugins)
        losses = self._losses(document.get("loss"))
        validators = self._validators(document.get("checks"))
        sinks = self._sinks(document.get("sinks"))
        reward = None if isinstance(checked, list) or checked.rounds is None else self._reward(checked.rounds)
        recipe = None if isinstance(checked, list) else self._locations.recipe(checked)
        data = recipe.data if recipe else sources_alone(document)
        sources = self._sources(data, columns=joint_columns(loss.at(0.0) for loss in losses))
        self._problems += [Problem("data", "mask", why) for why in unread_masks(data.mask if data else "", losses)]
        if self._problems or recipe is None or not losses:
            raise self._error()
        parts = Parts(
            losses=losses, validators=validators, sinks=sinks, sources=sources, plugin_files=files, reward=reward
        )
        return Plan(
            recipe=recipe,
            document=parts.document(recipe, is_single=isinstance(document["loss"], dict)),
            losses=tuple(losses),
            validators=tuple(validators),
            sinks=tuple(sinks),
            sources=tuple(sources),
            output=self._output,
            reward=reward,
        )

    def reopen(
        self, document: dict[str, Any], losses: LossFacts | None, heldout_alone: bool, with_checks: bool
    ) -> Plan:
        """Resolve a run's data alone: no sinks, and its losses only where their facts weren't recorded."""
        checked = check_document(document)
        if isinstance(checked, list):
            self._problems += checked
            raise self._error()
        recipe = self._locations.recipe(checked)
        splits = ("heldout",) if heldout_alone and recipe.data.heldout else SPLITS
        loaded = () if losses else tuple(self._losses(document["loss"]))
        columns = losses.columns if losses else joint_columns(loss.at(0.0) for loss in loaded)
        plan = Plan(
            recipe=recipe,
            document=document,
            losses=loaded,
            validators=tuple(self._validators(document.get("checks"), by_default=())) if with_checks else (),
            sinks=(),
            sources=tuple(self._sources(recipe.data, splits, columns)),
            output=self._output,
            recorded=losses,
        )
        if self._problems:
            raise self._error()
        return plan

    def resolve_data(self, location: str, base: str | None, options: Mapping[str, Any]) -> DataPlan:
        try:
            data = DataSection.model_validate({"train": self._locations.source(location)} | dict(options))
        except ValidationError as error:
            self._problems += problems_of(error, DataSection, "data")
            raise self._error() from None
        sources, validators = self._sources(data), self._validators(None)
        if self._problems:
            raise self._error()
        model = None if base is None else ModelSection(base=self._locations.base(base))
        return DataPlan(tuple(sources), tuple(validators), data, model)

    def resolve_reward(self, name: str, options: Mapping[str, Any], of_file: Iterable[Loaded] = ()) -> Choice:
        self._host.add(of_file)
        choice = self._choose(manager.REWARD, name, dict(options), "reward")
        if self._problems or choice is None:
            raise self._error()
        return choice

    def _reward(self, rounds: RoundsSection) -> Choice | None:
        table = dict(rounds.reward_table)
        return self._choose(manager.REWARD, table.pop("name"), table, "rounds.reward")

    def _losses(self, tables: Any) -> list[LossChoice]:
        tables_by_name = {"loss": tables} if isinstance(tables, dict) else {}
        if isinstance(tables, list):
            tables_by_name = {f"loss.{index}": table for index, table in enumerate(tables)}
        choices = [self._loss(table, where) for where, table in tables_by_name.items()]
        losses = [choice for choice in choices if choice]
        self._problems += joint_problems(losses)
        return losses

    def _loss(self, table: Any, where: str) -> LossChoice | None:
        """Resolve a loss with its options; a numeric option may be a table `{ start, end, schedule }`."""
        if not isinstance(table, dict):
            return None
        values = {key: value for key, value in table.items() if key != "weight"}
        name = values.get("name")
        plugin = self._load(manager.LOSS, name, where, "name") if isinstance(name, str) else None
        if plugin is None:
            return None
        refuse_odd_loss(plugin)
        schedules = schedules_of(values, plugin.record.options, where)
        if isinstance(schedules, list):
            self._problems += schedules
            return None
        first = self._choose_named(manager.LOSS, values | {key: value.start for key, value in schedules.items()}, where)
        noted = len(self._problems)
        last = self._choose_named(manager.LOSS, values | {key: value.end for key, value in schedules.items()}, where)
        if first is not None:
            self._problems[noted:] = [
                replace(one, message=f"{one.message} (end of the schedule)") for one in self._problems[noted:]
            ]
        weight = weight_of(table)
        if first is None or last is None or weight is None:
            return None
        return LossChoice(plugin, Scheduled(first.options, schedules), weight)

    def _validators(self, table: Any, by_default: Sequence[str] = DEFAULT_VALIDATORS) -> list[Choice]:
        table = table if isinstance(table, dict) else {}
        own = {key: value for key, value in table.items() if not isinstance(value, dict)}
        tables = {name: value for name, value in table.items() if isinstance(value, dict)}
        installed = self._host.names(manager.CHECK)
        defaults = {name: tables.pop(name, {}) for name in by_default if name in installed or name in tables}
        tables = {DEFAULT_VALIDATOR: own | tables.pop(DEFAULT_VALIDATOR, {})} | defaults | tables
        choices = []
        for name, options in tables.items():
            where = "checks" if name == DEFAULT_VALIDATOR else f"checks.{name}"
            choices.append(self._choose(manager.CHECK, name, options, where))
        return [choice for choice in choices if choice]

    def _sinks(self, tables: Any) -> list[Choice]:
        tables = tables if isinstance(tables, list) else [{"name": "console"}]
        choices = [self._choose_named(manager.SINK, table, f"sinks.{index}") for index, table in enumerate(tables)]
        return [choice for choice in choices if choice]

    def _sources(
        self, data: DataSection | None, splits: Sequence[Split] = SPLITS, columns: tuple[str, ...] = ()
    ) -> list[SourceChoice]:
        found: list[SourceChoice] = []
        if data is None:
            return found
        for split in splits:
            several = not isinstance(getattr(data, split), str)
            for index, source in enumerate(data.sources(split)):
                table, key = (f"data.{split}.{index}", "path") if several else ("data", split)
                if source.path in [one.location for one in found]:
                    message = f"{source.path} is named twice; a source's weight says how often its rows are trained on"
                    self._problems.append(Problem(table, key, message))
                elif choice := self._source(source, split, table, key):
                    found.append(replace(choice, folder=Path(data.folder or self._folder), read_by_losses=columns))
        return found

    def _source(self, source: SourceSection, split: Split, table: str, key: str) -> SourceChoice | None:
        """Resolve a source's reader and its options; on a problem, note it and return None."""
        reader = self._reader(source, table, key)
        if reader is None:
            return None
        options = None
        if reader.record.options is not None:
            choice = self._parsed(reader, source.reader_options, f"{table}.reader", manager.READER)
            if choice is None:
                return None
            options = choice.options
        elif unknown := sorted(source.reader_options):
            message = f"reader '{reader.offer.name}' ({reader.offer}) has no options"
            self._problems += [Problem(f"{table}.reader", option, message) for option in unknown]
            return None
        return SourceChoice(
            location=source.path,
            split=split,
            reader=reader,
            format=source.format or "auto",
            columns=source.columns or {},
            contest=source.contest,
            weight=source.weight,
            options=options,
        )

    def _reader(self, source: SourceSection, table: str, key: str) -> Loaded | None:
        """Find the reader: named by the recipe, else by the location, else by the file's longest known suffix."""
        name = source.reader_name or self._named_reader(source.path)
        if name is None and Path(source.path).is_dir():
            name = FOLDER_READER
        if name is None:
            file = Path(source.path).name
            known = self._host.names(manager.READER)
            fitting = sorted((name for name in known if file.lower().endswith(f".{name}")), key=len)
            if not fitting:
                if named := self._locations.hub_dataset(source.path):
                    self._problems.append(Problem(table, key, f"no such path; a dataset of the hub is 'hf:{named}'"))
                    return None
                self._problems.append(
                    Problem(table, key, f"no reader for '{file}'; {advice_on_reader(Path(source.path), known)}")
                )
                return None
            name = fitting[-1]
        return self._load(manager.READER, name, table, "reader" if source.reader_name else key)

    def _named_reader(self, location: str) -> str | None:
        """Return the installed reader that a location such as `hf:org/name` starts with, or None."""
        name, colon, _ = location.partition(":")
        return name if colon and name in self._host.names(manager.READER) else None

    def _choose_named(self, kind: Kind, table: Any, where: str) -> Choice | None:
        """Resolve the plugin of the table's `name`, with the other keys as its options."""
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            return None  # already a problem of the recipe
        options = {key: value for key, value in table.items() if key != "name"}
        return self._choose(kind, table["name"], options, where)

    def _choose(self, kind: Kind, name: str, options: dict[str, Any], where: str) -> Choice | None:
        """Load a plugin and parse its options; on a problem, note it and return None."""
        plugin = self._load(kind, name, where, "name")
        return None if plugin is None else self._parsed(plugin, options, where, kind)

    def _parsed(self, plugin: Loaded, options: dict[str, Any], where: str, kind: Kind) -> Choice | None:
        """Parse a plugin's options; on a problem, note it and return None."""
        model = plugin.record.options
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise PluginError(f"{plugin.offer}: its options are no qpref.hooks.Options", "report it to its author")
        try:
            return Choice(plugin, model.model_validate(options))
        except ValidationError as error:
            for problem in problems_of(error, model, where):
                message = problem.message.replace(
                    "unknown key", f"unknown option of {kind.noun} '{plugin.record.name}' ({plugin.offer})"
                )
                self._problems.append(replace(problem, message=message))
            return None

    def _load(self, kind: Kind, name: str, table: str, key: str) -> Loaded | None:
        try:
            return self._host.load(kind, name)
        except RecipeError as error:
            same = find_loss(self._host, LOSS_NAMES[name]) if kind is manager.LOSS and name in LOSS_NAMES else None
            message = f"no loss '{name}' is installed; here it is '{same.offer.name}'" if same else error.what
            self._problems.append(Problem(table, key, message))
            return None

    def _error(self) -> RecipeError:
        number = len(set(self._problems))
        count = "1 problem" if number == 1 else f"{number} problems"
        return RecipeError("\n".join([f"{self._origin}: {count}", *problem_lines(self._problems)]))
