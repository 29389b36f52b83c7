"""Finds plugins without importing them, loads the requested ones, and refuses name clashes.

This replaces pluggy's `load_setuptools_entrypoints`, which imports everything, fails for all plugins on the ImportError
of one, silently drops the second of two entry points of the same name, and never reports a misspelt hook.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from types import ModuleType
from typing import Any

import pluggy

from qpref.errors import InstallError, PluginError, RecipeError
from qpref.hooks import border, mistakes, spec
from qpref.hooks.reader import Reader
from qpref.hooks.reward import Reward
from qpref.hooks.types import Loss, MetricSink, Validator
from qpref.installed import as_install_error, is_required, version_of

GROUP = "qpref"
NAMELESS = "an unknown distribution"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of plugin: its prefix in entry points, its noun in messages, its hook and its record type."""

    prefix: str
    noun: str
    hook: str
    record: type


LOSS = Kind("loss", "loss", "qpref_losses", Loss)
CHECK = Kind("check", "validator", "qpref_validators", Validator)
SINK = Kind("sink", "metric sink", "qpref_metric_sinks", MetricSink)
READER = Kind("read", "reader", "qpref_readers", Reader)
REWARD = Kind("reward", "reward", "qpref_rewards", Reward)
KINDS = {kind.prefix: kind for kind in (LOSS, CHECK, SINK, READER, REWARD)}
HOOKS = frozenset(kind.hook for kind in KINDS.values())


@dataclass(frozen=True, slots=True, order=True)
class Offer:
    """A line of an installed distribution's `[project.entry-points.qpref]` table, or a plugin without a distribution.

    Attributes:
        distribution: a plugin file's name where it comes from one.
        version: of a plugin file the first digits of its SHA-256; empty for a record handed over in Python.
        module: of a plugin file its absolute path.
    """

    kind: str
    name: str
    distribution: str
    version: str
    module: str

    @property
    def entry_point(self) -> str:
        return f"{self.kind}-{self.name}"

    @property
    def is_installed(self) -> bool:
        """False for one of a plugin file, and for a record handed over in Python."""
        return bool(self.module) and not self.module.startswith("/")

    def __str__(self) -> str:
        return " ".join(filter(None, (self.distribution, self.version, f"[{self.entry_point}]")))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plugin's record and where it came from."""

    record: Any
    offer: Offer


def installed_offers() -> list[Offer]:
    """List the group's entry points, sorted, without those in QPREF_DISABLE. Imports no plugin.

    QPREF_DISABLE is a comma-separated list of `<kind>-<name>` or `<distribution>:<kind>-<name>`.
    """
    disabled = {name.strip() for name in os.environ.get("QPREF_DISABLE", "").split(",")}
    return [
        offer
        for offer in _every_offer()
        if not disabled & {offer.entry_point, f"{offer.distribution}:{offer.entry_point}"}
    ]


def _every_offer() -> list[Offer]:
    offers = set()
    for point in metadata.entry_points(group=GROUP):
        kind, _, name = point.name.partition("-")
        # A partly removed distribution may have lost its name.
        distribution = (point.dist and point.dist.name) or NAMELESS
        version = (point.dist and point.dist.version) or "?"
        offers.add(Offer(kind, name, distribution, version, point.value))
    return sorted(offers)


class PluginHost:
    """Loads plugins by kind and name.

    Args:
        recorded: plugins of a run that is reopened; messages about a missing one name its distribution.
        given: loaded plugins without a distribution, see `qpref.hooks.plugin_files`.
    """

    def __init__(self, recorded: Sequence[Offer] = (), given: Iterable[Loaded] = ()) -> None:
        self._manager = pluggy.PluginManager("qpref")
        self._manager.add_hookspecs(spec)
        self._recorded = recorded
        self._given = list(given)

    def add(self, plugins: Iterable[Loaded]) -> None:
        """Offer loaded plugins without a distribution too."""
        self._given += plugins

    @property
    def offers(self) -> list[Offer]:
        return [*self._installed, *(plugin.offer for plugin in self._given)]

    @cached_property
    def _installed(self) -> list[Offer]:
        if version_of("qpref") is None:
            raise InstallError("qpref's package metadata are missing, and with them its plugins", "reinstall qpref")
        return installed_offers()

    def names(self, kind: Kind) -> set[str]:
        """Return the installed names and those that the run recorded, so that its files don't go to another reader."""
        return {offer.name for offer in (*self.offers, *self._recorded) if offer.kind == kind.prefix}

    def find(self, kind: Kind, name: str) -> Offer:
        """Find the only installed plugin of that name.

        Raises:
            RecipeError: none is installed; the message names the distribution that the run used, or the nearest names.
            PluginError: more than one distribution offers it; built-ins get no priority.
        """
        same_kind = [offer for offer in self.offers if offer.kind == kind.prefix]
        found = [offer for offer in same_kind if offer.name == name]
        if not found:
            for offer in self._recorded:
                if (offer.kind, offer.name) == (kind.prefix, name):
                    raise RecipeError(_gone(kind, offer))
            known = sorted({offer.name for offer in same_kind})
            near = difflib.get_close_matches(name, known, n=1)
            missing = f"no {kind.noun} '{name}' is installed"
            if off := [offer for offer in _every_offer() if (offer.kind, offer.name) == (kind.prefix, name)]:
                raise RecipeError(
                    f"{kind.noun} '{name}' of {off[0]} is disabled by QPREF_DISABLE",
                    f"take {off[0].entry_point} out of this environment variable, or unset it",
                )
            for offer in self.offers:
                if offer.name == name and (problem := kind_problem(offer)):
                    raise RecipeError(f"{missing}; {offer} has an {problem}", _point_of_own(kind, name))
            if near:
                raise RecipeError(f"{missing}; did you mean '{near[0]}'?")
            raise RecipeError(
                f"{missing}; installed: {', '.join(known) or 'none'}",
                _point_of_own(kind, name),
            )
        if len(found) > 1:
            both = f"both {found[0]} and {found[1]}" if len(found) == 2 else ", ".join(map(str, found))
            raise PluginError(f"{kind.noun} '{name}' is offered by {both}", way_out_of_clash(found))
        return found[0]

    def load(self, kind: Kind, name: str) -> Loaded:
        """Import a plugin and return its record.

        Raises:
            PluginError: it fails to import, implements a hook that doesn't exist, or doesn't yield the record that its
                entry point names.
        """
        offer = self.find(kind, name)
        if given := [plugin for plugin in self._given if plugin.offer == offer]:
            return given[0]
        if not self._manager.has_plugin(offer.module):
            self._register(offer)
        module: ModuleType = self._manager.get_plugin(offer.module)  # type: ignore[assignment]
        others = [plugin for plugin in self._manager.get_plugins() if plugin is not module]
        caller = self._manager.subset_hook_caller(kind.hook, others)
        with _guarded(offer, kind.hook):
            records = [record for yielded in caller() for record in yielded]
        if not records and (mistake := mistakes.in_hooks(module, kind.hook, HOOKS)):
            raise _mistaken(offer, mistake)
        return Loaded(_only_record(kind, offer, records), offer)

    def _register(self, offer: Offer) -> None:
        mistake = mistakes.in_entry_point(offer.module, offer.entry_point)
        mistake = mistake or mistakes.in_requirement(offer.distribution)
        if mistake:
            raise _mistaken(offer, mistake)
        module = _imported(offer)
        if mistake := mistakes.in_implementations(module, HOOKS):
            raise _mistaken(offer, mistake)
        try:
            self._manager.register(module, name=offer.module)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            self._manager.unregister(name=offer.module)  # or the next plugin would be blamed for the pending hook
            raise _broken(offer, str(error)) from error


def way_out_of_clash(offers: Sequence[Offer]) -> str:
    """Say what to do about plugins of one name: a third party's is the one to leave out, never qpref's own."""
    if any(not offer.is_installed for offer in offers):
        return "give the one that has no distribution another name"
    strangers = [offer for offer in offers if offer.distribution != GROUP] or offers
    first = strangers[0]
    disable = f"QPREF_DISABLE={first.distribution}:{first.entry_point}"
    if len(strangers) == len(offers):
        return f"uninstall one of the two, or leave one out: {disable}"
    return f"uninstall {first.distribution}, or leave it out: {disable}"


def kind_problem(offer: Offer) -> str | None:
    """Return what is wrong with the kind of an entry point; None for a known kind."""
    if offer.kind in KINDS:
        return None
    guess = mistakes.guessed_kind(offer.kind, {kind.prefix: kind.noun for kind in KINDS.values()})
    advice = f"did you mean {guess}-{offer.name}?" if guess else f"known: {', '.join(KINDS)}"
    return f"unknown kind '{offer.kind}'; {advice}"


def _point_of_own(kind: Kind, name: str) -> str:
    return f"a plugin of your own needs the entry point {kind.prefix}-{name}, and pip install again"


def _imported(offer: Offer) -> ModuleType:
    """Import a plugin's module.

    Raises:
        InstallError: a package that qpref itself requires is missing.
        PluginError: the import fails otherwise.
    """
    border.note_plugin(offer.module)
    try:
        with _guarded(offer, f"importing {offer.module}", passes=_lacks_package):
            return importlib.import_module(offer.module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and is_required(error):
            raise as_install_error(error) from error
        mistake = mistakes.in_import(offer.distribution, offer.module, error)
        raise (_mistaken(offer, mistake) if mistake else _unimportable(offer, error)) from error


def _gone(kind: Kind, recorded: Offer) -> str:
    """Name the distribution that a run had a missing plugin from, and how to install it."""
    what = f"{kind.noun} '{recorded.name}'"
    if not recorded.is_installed:
        return f"{what} is not installed; the run had it from {recorded}, which is executed for a recipe alone"
    if any((offer.kind, offer.name) == (recorded.kind, recorded.name) for offer in _every_offer()):
        return f"{what}, which the run had from {recorded}, is disabled by QPREF_DISABLE"
    command = "" if recorded.distribution == NAMELESS else f": pip install {recorded.distribution}=={recorded.version}"
    return f"{what} is not installed; the run had it from {recorded}{command}"


def _only_record(kind: Kind, offer: Offer, records: Iterable[Any]) -> Any:
    records = list(records)
    wrong = [record for record in records if not isinstance(record, kind.record)]
    if wrong:
        raise _broken(offer, f"{kind.hook} yields {type(wrong[0]).__name__}, not {kind.record.__name__}")
    named = [record for record in records if record.name == offer.name]
    if len(named) != 1:
        yields = ", ".join(f"'{record.name}'" for record in records) or "nothing"
        raise _broken(offer, f"{kind.hook} has to yield one {kind.noun} '{offer.name}', and yields {yields}")
    from qpref.hooks.contract import record_problem  # the list of plugins loads none, and answers at once

    if problem := record_problem(named[0]):
        raise _broken(offer, problem)
    return named[0]


def _guarded(
    offer: Offer, what: str, passes: Callable[[BaseException], bool] = lambda _: False
) -> AbstractContextManager[None]:
    return border.guarded(
        f"{offer}: {what}",
        lambda error: _broken(offer, f"{what} raised {error}"),
        lambda change: _broken(offer, f"{what} {change}"),
        passes=passes,
    )


def _lacks_package(error: BaseException) -> bool:
    """Return whether an import has failed for what isn't there, which `_imported` explains."""
    return isinstance(error, ImportError)


def _unimportable(offer: Offer, error: ImportError) -> PluginError:
    return _broken(offer, f"importing {offer.module} raised {border.described(error)}")


def _mistaken(offer: Offer, mistake: mistakes.Mistake) -> PluginError:
    return PluginError(f"{offer}: {mistake.what}", f"{mistake.fix}; or leave it out: QPREF_DISABLE={offer.entry_point}")


def _broken(offer: Offer, what: str) -> PluginError:
    return PluginError(f"{offer}: {what}", f"fix it, or leave it out: QPREF_DISABLE={offer.entry_point}")
