"""Mistakes of plugin authors, each in a sentence, recognized from the module, its metadata and the exception."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING

from qpref.installed import install_command, missing, version_of

if TYPE_CHECKING:
    from packaging.requirements import Requirement

CORE = "qpref"
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Mistake:
    """A mistake and its fix; the caller names the plugin."""

    what: str
    fix: str


def in_entry_point(module: str, entry_point: str) -> Mistake | None:
    """Recognize an entry point that names an object within a module, as console scripts do."""
    name, colon, thing = module.partition(":")
    if not colon:
        return None
    what = f"its entry point names {thing or 'nothing'} within {name}, and has to name the module alone"
    return Mistake(what, f'write {entry_point} = "{name}" in pyproject.toml, and pip install again')


def in_requirement(distribution: str) -> Mistake | None:
    """Recognize a plugin that is made for another qpref, as its metadata say."""
    ours = version_of(CORE)
    for requirement in _requirements(distribution):
        is_met = ours is not None and requirement.specifier.contains(ours, prereleases=True)
        if requirement.name == CORE and not is_met:
            command = f"pip install --upgrade {distribution} '{requirement}'"
            return Mistake(f"it is made for {requirement}, and this is qpref {ours}", command)
    return None


def in_import(distribution: str, module: str, error: BaseException) -> Mistake | None:
    """Recognize a failed import: a missing package, a missing module of the plugin's own, a name that qpref lacks."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ImportError) or not package:
        return None
    if package == CORE:
        what = f"{error.msg.partition(' (')[0]}: qpref {version_of(CORE)} has no such name"
        return Mistake(what, f"correct it, or install the qpref that {distribution} is made for")
    if not isinstance(error, ModuleNotFoundError):
        return None
    if package == module.partition(".")[0]:
        return Mistake(f"there is no module {error.name}", f"reinstall {distribution}")
    return _missing_package(distribution, package)


def _missing_package(distribution: str, package: str) -> Mistake:
    from packaging.requirements import Requirement

    lacking = missing(str(requirement) for requirement in _requirements(distribution))
    named = [line for line in lacking if _plain(Requirement(line).name) == _plain(package)] or lacking
    if not named and not _DISTRIBUTION.fullmatch(package):  # a compiled module, whose package has another name
        return Mistake(f"it needs the module {package}, which isn't installed", f"reinstall {distribution}")
    fix = install_command(distribution, named or [package])
    return Mistake(f"it needs the package {package}, which isn't installed", fix)


def _requirements(distribution: str) -> list[Requirement]:
    """Return the requirements that hold here, without those of extras."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            found.append(requirement)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def in_hooks(module: ModuleType, hook: str, hooks: Iterable[str]) -> Mistake | None:
    """Recognize a module that implements nothing under `hook`: without `@hookimpl`, or under another name."""
    own = _functions(module)
    if hook in own:
        if _hook_of(hook, own[hook]):
            return None
        return Mistake(f"its {hook} lacks the decorator @hookimpl", "add it: from qpref.hooks import hookimpl")
    others = sorted(set(hooks) & {_hook_of(name, function) for name, function in own.items()})
    if others:
        return Mistake(f"it implements {', '.join(others)}, and not {hook}", "compare the kind in its entry point")
    if near := difflib.get_close_matches(hook, own, n=1):
        return Mistake(f"it has no {hook}, but a {near[0]}", f"rename it to {hook}, under @hookimpl")
    return Mistake(f"it has no {hook}", f"write a function {hook} under @hookimpl, which yields the records")


def in_implementations(module: ModuleType, hooks: Iterable[str]) -> Mistake | None:
    """Recognize a function under `@hookimpl` that is no hook, or has parameters."""
    known = sorted(hooks)
    for name, function in _functions(module).items():
        hook = _hook_of(name, function)
        if hook and hook not in known:
            near = difflib.get_close_matches(hook, known, n=1)
            guess = f"; did you mean '{near[0]}'?" if near else f"; the hooks are {', '.join(known)}"
            return Mistake(f"unknown hook '{hook}'{guess}", "rename it")
        if hook and inspect.signature(function).parameters:
            return Mistake(f"its hook '{hook}' has parameters, and a hook takes none", "remove them")
    return None


def _functions(module: ModuleType) -> dict[str, Callable[..., object]]:
    """Return the functions of a plugin's module that its own package defines."""
    package = module.__name__.partition(".")[0]
    return {
        name: thing
        for name, thing in vars(module).items()
        if inspect.isfunction(thing) and thing.__module__.partition(".")[0] == package
    }


def _hook_of(name: str, function: Callable[..., object]) -> str | None:
    """Return the hook that a function under `@hookimpl` implements; None for one that isn't under it."""
    options = getattr(function, f"{CORE}_impl", None)
    return None if options is None else options.get("specname") or name


def guessed_kind(kind: str, kinds: Mapping[str, str]) -> str | None:
    """Guess the kind that an entry point such as `losses-warm` means.

    Args:
        kinds: prefix of each kind -> its noun in messages.
    """
    words = {word: prefix for prefix, noun in kinds.items() for word in (prefix, *noun.split())}
    near = difflib.get_close_matches(kind.lower(), words, n=1)
    return words[near[0]] if near else None
