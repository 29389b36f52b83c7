"""Paths of a recipe: relative ones start at its folder; hub ids, `NAME:...` and `pypi:...` stay as they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref import pypi
from qpref.hooks.signatures import signature_of_file
from qpref.opening import real_path
from qpref.recipe.data_section import SourceSection
from qpref.recipe.sections import Recipe

HUB_DATASET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?(:[\w.-]+)?")
"""`org/name/config@revision:split`, of which the last three may be left out."""
FILE_SUFFIX = re.compile(r"\.[A-Za-z]+$")


@dataclass(frozen=True, slots=True)
class Locations:
    """Resolve the paths of one recipe.

    Attributes:
        folder: folder of the recipe.
        names_reader: function that tells whether a location such as `hf:org/name` starts with an installed reader.
    """

    folder: Path
    names_reader: Callable[[str], bool]

    def path(self, path: str) -> str:
        return str(real_path(self.folder / Path(path).expanduser()))

    def hub_dataset(self, location: str) -> str | None:
        """Return the hub dataset `org/name` that a path to no file or folder may have meant, else None."""
        path = Path(location)
        if path.exists() or not path.is_relative_to(real_path(self.folder)):
            return None
        name = path.relative_to(real_path(self.folder)).as_posix()
        return name if HUB_DATASET.fullmatch(name) and not FILE_SUFFIX.search(name) else None

    def base(self, base: str) -> str:
        """Resolve a base or a tokenizer: a path if it looks like one or exists, else a hub id."""
        if base.startswith(pypi.PREFIX):
            return base
        looks_local = base.startswith((".", "/", "~")) or base.endswith(".gguf")
        return self.path(base) if looks_local or (self.folder / base).exists() else base

    def source(self, location: str) -> str:
        """Resolve the location of a data source."""
        name, _, rest = location.partition(":")
        if self.names_reader(location) and (self.folder / rest).exists():
            return f"{name}:{self.path(rest)}"
        return location if location.startswith(pypi.PREFIX) or self.names_reader(location) else self.path(location)

    def sources(self, listed: str | list[SourceSection] | None) -> str | list[SourceSection] | None:
        if listed is None or isinstance(listed, str):
            return listed and self.source(listed)
        return [source.model_copy(update={"path": self.source(source.path)}) for source in listed]

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe with every path absolute."""
        model, data, start = recipe.model, recipe.data, recipe.adapter.start
        changes: dict[str, dict[str, Any]] = {
            "model": {"base": self.base(model.base), "tokenizer": model.tokenizer and self.base(model.tokenizer)},
            "data": {
                "train": self.sources(data.train),
                "heldout": self.sources(data.heldout),
                "folder": data.folder and self.path(data.folder),
            },
            "adapter": {"start": start and self.path(start)},
        }
        if recipe.rounds is not None:
            changes["rounds"] = {key: self.source(getattr(recipe.rounds, key)) for key in ("prompts", "heldout")}
        sections = {name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
        return recipe.model_copy(update=sections)


def advice_on_reader(path: Path, known: Iterable[str]) -> str:
    """Say what a file without a reader is, or list the readers."""
    signature = signature_of_file(path) if path.is_file() else None
    return f"it is {signature}" if signature else f"installed: {', '.join(f'.{reader}' for reader in sorted(known))}"
