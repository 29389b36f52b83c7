"""Recipe + plugins -> Plan: every name resolved and every option parsed, before data is read or a weight loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from qpref.errors import PluginError, RecipeError
from qpref.hooks import manager
from qpref.hooks.manager import Kind, Loaded, PluginHost
from qpref.hooks.types import PairedLoss, UnpairedLoss
from qpref.recipe import Problem, Recipe, check_document, problems_of, read_document, with_overrides
from qpref.schedule import Schedule, Scheduled, can_be_scheduled

DEFAULT_VALIDATOR = "pairs"
"""Its options stand in `[checks]` itself; those of any other validator in `[checks.NAME]`."""

FREE_TO_CHANGE = {
    # Where things lie; their contents have fingerprints of their own.
    *(("model", key) for key in ("base", "sha256", "tokenizer", "device", "memory")),
    *(("data", key) for key in ("train", "heldout", "reader", "skip_bad")),
    ("adapter", "start"),
    # How it is computed and how often it is told or saved.
    *(("train", key) for key in ("tokens_per_microbatch", "gradient_checkpointing", "keep")),
    *(("train", key) for key in ("log_every", "eval_every", "save_every")),
}
"""Settings that may differ between a run and its resumption: (table, key)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A plugin that the recipe chose, with its parsed options."""

    plugin: Loaded
    options: Any


@dataclass(frozen=True, slots=True)
class LossChoice:
    """A loss that the recipe chose, its options, which may change over the run, and its share of the sum."""

    plugin: Loaded
    options: Scheduled
    weight: float = 1.0

    def at(self, progress: float) -> Choice:
        """The choice at `progress` of the run, 0 to 1."""
        return Choice(self.plugin, self.options.at(progress))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a run needs to know before it starts.

    Attributes:
        document: the recipe with overrides, as TOML data, defaults included and paths absolute.
        output: the run folder.
        losses: one, or several that are added; all of pairs or all of single completions.
    """

    recipe: Recipe
    document: dict[str, Any]
    losses: tuple[LossChoice, ...]
    validators: tuple[Choice, ...]
    sinks: tuple[Choice, ...]
    train_reader: Loaded
    heldout_reader: Loaded | None
    output: Path

    @property
    def plugins(self) -> list[Loaded]:
        readers = [self.train_reader] + ([self.heldout_reader] if self.heldout_reader else [])
        chosen = [choice.plugin for choice in (*self.validators, *self.sinks)]
        return [loss.plugin for loss in self.losses] + chosen + readers

    @property
    def is_paired(self) -> bool:
        """Whether the losses are of pairs."""
        return isinstance(self.losses[0].plugin.record, PairedLoss)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings that decide what is computed, beyond rounding: what a resumed run must not change."""
        return fingerprint_of(self.document)


def fingerprint_of(document: Mapping[str, Any]) -> str:
    """The fingerprint of a resolved recipe, such as a run's recipe.lock.toml."""
    decisive = {
        table: {key: value for key, value in document[table].items() if (table, key) not in FREE_TO_CHANGE}
        for table in ("model", "adapter", "data", "train")
    } | {"loss": document["loss"]}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _table(loss: LossChoice) -> dict[str, Any]:
    weight = {} if loss.weight == 1.0 else {"weight": loss.weight}
    return {"name": loss.plugin.record.name} | weight | loss.options.document()


def make_plan(recipe: Path | Mapping[str, Any], overrides: Sequence[str] = (), output: Path | None = None) -> Plan:
    """Resolve a recipe.

    Args:
        recipe: a TOML file, or its content as nested dicts.
        overrides: `table.key=value` each.
        output: the run folder; by default `runs/<the recipe's file name without .toml>`.

    Raises:
        RecipeError: mistakes in the recipe, all of them in one message.
        PluginError: a plugin that it names is broken, or offered twice.
    """
    if isinstance(recipe, Path):
        origin, folder = str(recipe), recipe.absolute().parent
        document, output = read_document(recipe), output or Path("runs") / recipe.stem
    else:
        origin, folder, document = "recipe", Path.cwd(), dict(recipe)
    document = with_overrides(document, overrides)
    return _Resolution(origin, folder, output or Path("runs/run")).resolve(document)


class _Resolution:
    """Collects the problems of one recipe while its parts are resolved."""

    def __init__(self, origin: str, folder: Path, output: Path) -> None:
        self._origin = origin
        self._folder = folder
        self._output = output
        self._host = PluginHost()
        self._problems: list[Problem] = []

    def resolve(self, document: dict[str, Any]) -> Plan:
        checked = check_document(document)
        if isinstance(checked, list):
            self._problems += checked
        losses = self._losses(document.get("loss"))
        validators = self._validators(document.get("checks"))
        sinks = self._sinks(document.get("sinks"))
        train_reader = self._reader(document.get("data"), "train")
        heldout_reader = self._reader(document.get("data"), "heldout")
        if self._problems or isinstance(checked, list) or not losses or train_reader is None:
            raise self._error()
        recipe = self._with_absolute_paths(checked)
        full = recipe.model_dump(mode="json", exclude_none=True)
        tables = [_table(loss) for loss in losses]
        full["loss"] = tables[0] if isinstance(document["loss"], dict) else tables
        full["checks"] = {}
        for check in validators:
            name, options = check.plugin.record.name, check.options.model_dump(mode="json", exclude_none=True)
            full["checks"] |= options if name == DEFAULT_VALIDATOR else {name: options}
        full["sinks"] = [
            {"name": sink.plugin.record.name} | sink.options.model_dump(mode="json", exclude_none=True)
            for sink in sinks
        ]
        return Plan(
            recipe=recipe,
            document=full,
            losses=tuple(losses),
            validators=tuple(validators),
            sinks=tuple(sinks),
            train_reader=train_reader,
            heldout_reader=heldout_reader,
            output=self._output,
        )

    def _losses(self, tables: Any) -> list[LossChoice]:
        places = {"loss": tables} if isinstance(tables, dict) else {}
        if isinstance(tables, list):
            places = {f"loss.{place}": table for place, table in enumerate(tables)}
        choices = [self._loss(table, where) for where, table in places.items()]
        losses = [choice for choice in choices if choice]
        if len({isinstance(loss.plugin.record, PairedLoss) for loss in losses}) > 1:
            names = " and ".join(f"'{loss.plugin.record.name}'" for loss in losses)
            self._problems.append(Problem("loss", "", f"{names}: one is of pairs, another of single completions"))
        return losses

    def _loss(self, table: Any, where: str) -> LossChoice | None:
        """A loss with its options, each number of which may be a table `{ start, end, schedule }`."""
        if not isinstance(table, dict):
            return None
        values, schedules = dict(table), {}
        weight = values.pop("weight", 1.0)
        name = values.get("name")
        plugin = self._load(manager.LOSS, name, where, "name") if isinstance(name, str) else None
        if plugin is None:
            return None
        self._refuse_odd_loss(plugin)
        for key, value in table.items():
            if isinstance(value, dict) and can_be_scheduled(plugin.record.options, key):
                try:
                    schedules[key] = Schedule.model_validate(value)
                except ValidationError as error:
                    self._problems += problems_of(error, Schedule, f"{where}.{key}")
                    return None
        first = self._choose_named(manager.LOSS, values | {key: value.start for key, value in schedules.items()}, where)
        noted = len(self._problems)
        last = self._choose_named(manager.LOSS, values | {key: value.end for key, value in schedules.items()}, where)
        if first is not None:
            ends = [replace(problem, message=f"{problem.message} (its end)") for problem in self._problems[noted:]]
            self._problems[noted:] = ends
        if first is None or last is None or isinstance(weight, bool) or not isinstance(weight, int | float):
            return None
        return LossChoice(plugin, Scheduled(first.options, schedules), float(weight))

    def _refuse_odd_loss(self, plugin: Loaded) -> None:
        if not isinstance(plugin.record, PairedLoss | UnpairedLoss):
            raise PluginError(
                f"{plugin.offer}: a {type(plugin.record).__name__}, neither a PairedLoss nor an UnpairedLoss",
                "report it to its author",
            )
        taken = {"name", "weight"} & set(getattr(plugin.record.options, "model_fields", ()))
        if taken:
            raise PluginError(f"{plugin.offer}: its option {min(taken)} is the recipe's own", "report it to its author")

    def _validators(self, table: Any) -> list[Choice]:
        table = table if isinstance(table, dict) else {}
        own = {key: value for key, value in table.items() if not isinstance(value, dict)}
        tables = {name: value for name, value in table.items() if isinstance(value, dict)}
        tables = {DEFAULT_VALIDATOR: own | tables.pop(DEFAULT_VALIDATOR, {})} | tables
        choices = []
        for name, options in tables.items():
            where = "checks" if name == DEFAULT_VALIDATOR else f"checks.{name}"
            choices.append(self._choose(manager.CHECK, name, options, where))
        return [choice for choice in choices if choice]

    def _sinks(self, tables: Any) -> list[Choice]:
        tables = tables if isinstance(tables, list) else [{"name": "console"}]
        choices = [self._choose_named(manager.SINK, table, f"sinks.{place}") for place, table in enumerate(tables)]
        return [choice for choice in choices if choice]

    def _reader(self, table: Any, key: str) -> Loaded | None:
        """The reader that the recipe names, or the one whose name is the file's suffix (the longest such)."""
        if not isinstance(table, dict) or not isinstance(table.get(key), str):
            return None
        named, file = table.get("reader"), Path(table[key]).name.lower()
        known = [offer.name for offer in self._host.offers if offer.kind == manager.READER.prefix]
        fitting = sorted((name for name in known if file.endswith(f".{name}")), key=len)
        name = named if isinstance(named, str) else fitting[-1] if fitting else None
        if name is None:
            readers = ", ".join(f".{reader}" for reader in sorted(set(known)))
            self._problems.append(Problem("data", key, f"no reader for '{file}'; installed: {readers}"))
            return None
        return self._load(manager.READER, name, "data", "reader" if named else key)

    def _choose_named(self, kind: Kind, table: Any, where: str) -> Choice | None:
        """The plugin that the table's `name` names, with the other keys as its options."""
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            return None  # the recipe's own check has noted it
        options = {key: value for key, value in table.items() if key != "name"}
        return self._choose(kind, table["name"], options, where)

    def _choose(self, kind: Kind, name: str, options: dict[str, Any], where: str) -> Choice | None:
        """A plugin with its options parsed; None where that is a problem, which is noted."""
        plugin = self._load(kind, name, where, "name")
        if plugin is None:
            return None
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
                self._problems.append(Problem(problem.table, problem.key, message))
            return None

    def _load(self, kind: Kind, name: str, table: str, key: str) -> Loaded | None:
        try:
            return self._host.load(kind, name)
        except RecipeError as error:
            self._problems.append(Problem(table, key, error.what))
            return None

    def _error(self) -> RecipeError:
        problems = sorted(set(self._problems))
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return RecipeError("\n".join([f"{self._origin}: {count}", *(f"  {problem}" for problem in problems)]))

    def _with_absolute_paths(self, recipe: Recipe) -> Recipe:
        """Relative paths start at the recipe's folder. A base or tokenizer that is no path there is a hub id."""

        def absolute(path: str | None) -> str | None:
            return None if path is None else str((self._folder / Path(path).expanduser()).resolve())

        def if_local(base: str | None) -> str | None:
            if base is None or base.startswith("pypi:"):
                return base
            looks_local = base.startswith((".", "/", "~")) or base.endswith(".gguf")
            return absolute(base) if looks_local or (self._folder / base).exists() else base

        model, data, adapter = recipe.model, recipe.data, recipe.adapter
        return recipe.model_copy(
            update={
                "model": model.model_copy(
                    update={"base": if_local(model.base), "tokenizer": if_local(model.tokenizer)}
                ),
                "data": data.model_copy(update={"train": absolute(data.train), "heldout": absolute(data.heldout)}),
                "adapter": adapter.model_copy(update={"start": absolute(adapter.start)}),
            }
        )
