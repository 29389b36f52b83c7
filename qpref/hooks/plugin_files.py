"""Plugins without a distribution: in a Python file that the user names, or records handed over in Python.

A file is read once. What is executed are the bytes whose SHA-256 is recorded, so a run knows what it was trained with.
It can't import modules beside it: they would be executed without being recorded.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from qpref import opening
from qpref.errors import PluginError, RecipeError
from qpref.hooks import border, mistakes, spec
from qpref.hooks.contract import record_problem
from qpref.hooks.manager import KINDS, Kind, Loaded, Offer

MAX_BYTES = 2**20
SHOWN_DIGITS = 12
"""Digits of a SHA-256 in messages, in the place of a distribution's version."""
IN_PYTHON = "a record of this Python program"
ALONE = "a plugin file is executed alone, without modules beside it; docs/losses/write-your-own.md has a whole one"


@dataclass(frozen=True, slots=True)
class PluginFile:
    """A Python file with plugins.

    Attributes:
        path: absolute.
        sha256: of the bytes that were executed, in hex.
        plugins: the records that its hooks yield.
    """

    path: Path
    sha256: str
    plugins: tuple[Loaded, ...]


def load_plugin_file(path: Path, sha256: str | None = None) -> PluginFile:
    """Execute a file, and call its hooks.

    Args:
        path: absolute.
        sha256: expected one; None for any.

    Raises:
        RecipeError: there is no such file, or it has another SHA-256.
        PluginError: its code raises, it has no hook, or a hook yields something else than its records.
    """
    try:
        content = opening.read_bytes(path, MAX_BYTES, follow=True)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise RecipeError(f"{path}: has changed: its SHA-256 is {found}, and {sha256} is expected")
    return PluginFile(path, found, tuple(_plugins(path, found, _module(path, content, found))))


def given_plugins(records: Iterable[Any]) -> list[Loaded]:
    """Wrap records that a Python program hands over.

    Raises:
        PluginError: one is no record of a plugin.
    """
    plugins = []
    for record in records:
        kind = next((kind for kind in KINDS.values() if isinstance(record, kind.record)), None)
        if kind is None:
            known = ", ".join(kind.record.__name__ for kind in KINDS.values())
            raise PluginError(f"plugins: {type(record).__name__} is no record of a plugin ({known})")
        plugins.append(Loaded(record, Offer(kind.prefix, str(record.name), IN_PYTHON, "", "")))
    return plugins


class _Bytes(importlib.abc.SourceLoader):
    """Loads a module from bytes that have been read already; nothing is cached on disk."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._path, self._content = path, content

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_data(self, path: str | bytes) -> bytes:
        if path != str(self._path):
            raise OSError
        return self._content


def _module(path: Path, content: bytes, sha256: str) -> ModuleType:
    """Execute the file's content as a module; once a process, however often a recipe is resolved."""
    place = hashlib.sha256(str(path).encode(errors="surrogateescape")).hexdigest()[:8]
    name = f"qpref_plugin_file_{place}_{sha256[:SHOWN_DIGITS]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path, loader=_Bytes(path, content))
    assert module_spec is not None
    module = importlib.util.module_from_spec(module_spec)
    border.note_plugin(name)
    sys.modules[name] = module  # dataclasses and pydantic resolve annotations by it
    try:
        with _guarded(path, "executing it"):
            _Bytes(path, content).exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _plugins(path: Path, sha256: str, module: ModuleType) -> Iterator[Loaded]:
    hooks = [kind.hook for kind in KINDS.values()]
    _refuse(path, mistakes.in_implementations(module, hooks))
    manager = pluggy.PluginManager("qpref")
    manager.add_hookspecs(spec)
    manager.register(module)
    if not manager.get_hookcallers(module):
        meant = next((hook for hook in hooks if hasattr(module, hook)), hooks[0])
        _refuse(path, mistakes.in_hooks(module, meant, hooks))
    for kind in KINDS.values():
        with _guarded(path, kind.hook):
            records = [record for yielded in getattr(manager.hook, kind.hook)() for record in yielded]
        _refuse_odd(path, kind, records)
        for record in records:
            offer = Offer(kind.prefix, record.name, path.name, sha256[:SHOWN_DIGITS], str(path))
            yield Loaded(record, offer)


def _refuse(path: Path, mistake: mistakes.Mistake | None) -> None:
    if mistake is not None:
        raise PluginError(f"{path}: {mistake.what}", mistake.fix)


def _refuse_odd(path: Path, kind: Kind, records: Sequence[Any]) -> None:
    if wrong := [record for record in records if not isinstance(record, kind.record)]:
        raise _broken(path, f"{kind.hook} yields {type(wrong[0]).__name__}, not {kind.record.__name__}")
    names = [record.name for record in records]
    if odd := [name for name in names if not isinstance(name, str) or not name]:
        raise _broken(path, f"{kind.hook} yields a {kind.noun} whose name is {odd[0]!r}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise _broken(path, f"{kind.hook} yields the {kind.noun} '{twice[0]}' twice")
    for record in records:
        if problem := record_problem(record):
            raise _broken(path, problem)


def _guarded(path: Path, what: str) -> AbstractContextManager[None]:
    return border.guarded(
        f"{path}: {what}",
        lambda error: _broken(path, f"{what} raised {error}"),
        lambda change: _broken(path, f"{what} {change}"),
    )


def _broken(path: Path, what: str) -> PluginError:
    return PluginError(f"{path}: {what}", ALONE)
