"""A recipe's TOML as nested dicts, and changes to single values of it."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qpref.errors import RecipeError


def read_document(path: Path) -> dict[str, Any]:
    """The recipe's TOML as nested dicts.

    Raises:
        RecipeError: there is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None


def with_overrides(document: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of the document with each `table.key=value` set.

    A value is read as TOML where it is TOML, else as text: `train.learning_rate=1e-6`, `loss.name=ipo`. A number in the
    path is a place in an array: `sinks.0.name=console`.

    Raises:
        RecipeError: an override has no `=`, or its path leads through something that isn't a table.
    """
    changed = copy.deepcopy(dict(document))
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"--set {override}: expected table.key=value")
        place: Any = changed
        try:
            for key in keys[:-1]:
                place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
            last: Any = int(keys[-1]) if isinstance(place, list) else keys[-1]
            place[last] = _toml_value(text.strip())
        except (TypeError, AttributeError, ValueError, IndexError):
            raise RecipeError(f"--set {override}: '{path.strip()}' is no place in this recipe") from None
    return changed


def _toml_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
