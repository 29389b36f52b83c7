"""A recipe in any of the forms that a program has it in"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

if TYPE_CHECKING:
    from qpref.recipe.document import Override
    from qpref.recipe.sections import Recipe

RecipeLike: TypeAlias = "str | PathLike[str] | Mapping[str, Any] | Recipe"
"""A TOML file, the text of one (of several lines), its content as nested dicts, or a checked `Recipe`."""
Overrides = Mapping[str, Any] | Iterable[str]
"""`{"table.key": value}`, or strings `table.key=value`."""


def is_recipe(what: RecipeLike | Iterable[Mapping[str, Any]]) -> TypeGuard[RecipeLike]:
    """Return False for the name of a source of data, which doesn't end in .toml, and for rows."""
    from qpref.recipe.sections import Recipe

    if isinstance(what, str | PathLike):
        return "\n" in fspath(what) or Path(what).suffix == ".toml"
    return isinstance(what, Mapping | Recipe)


def source_of(recipe: RecipeLike) -> Path | Mapping[str, Any]:
    """Return the recipe as a path or as nested dicts.

    Raises:
        RecipeError: it is a text, and not TOML.
    """
    if isinstance(recipe, Mapping):
        return recipe
    if isinstance(recipe, str | PathLike):
        text = fspath(recipe)
        if "\n" not in text:
            return Path(text)
        from qpref.recipe.document import parse_document

        return parse_document(text)
    return recipe.model_dump(mode="json", exclude_none=True)


def listed(overrides: Overrides) -> list[Override]:
    """Return overrides one by one; paths among the values as texts."""
    if isinstance(overrides, Mapping):
        return [(key, fspath(value) if isinstance(value, PathLike) else value) for key, value in overrides.items()]
    return list(overrides)
