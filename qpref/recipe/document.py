"""A recipe's TOML as nested dicts: reading it, overriding single values, and its fingerprint."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qpref import opening
from qpref.credentials import keys_with_credentials
from qpref.errors import RecipeError

MAX_BYTES, MAX_DEPTH = 2**20, 16
LONG_KEY = re.compile(rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MAX_DEPTH}}}""", re.ASCII)
ODD_CHARACTERS = re.compile("[\\x00\\ud800-\\udfff]")
Override = str | tuple[str, object]
"""`table.key=value`, or the key and its value."""
SHOWN = 200
"""Most characters of an argument that a message repeats."""
FREE_TO_CHANGE = {
    # Locations; their contents have fingerprints of their own.
    *(("model", key) for key in ("base", "sha256", "tokenizer", "device", "memory")),
    *(("data", key) for key in ("train", "heldout", "heldout_share", "reader", "folder", "format", "columns")),
    *(("data", key) for key in ("contest", "skip_bad", "cache")),
    ("adapter", "start"),
    # Memory and speed, and how often metrics and checkpoints are written.
    *(("train", key) for key in ("tokens_per_microbatch", "gradient_checkpointing", "deterministic", "keep")),
    *(("train", key) for key in ("log_every", "eval_every", "save_every")),
}
"""Settings that may differ between a run and its resumption: (table, key)."""


def read_document(path: Path) -> dict[str, Any]:
    """Read a recipe's TOML as nested dicts.

    Raises:
        RecipeError: there is no such file, or it is not TOML.
    """
    try:
        return _parsed(opening.read_bytes(path, MAX_BYTES, follow=True).decode("utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8") from None
    except ValueError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None


def _parsed(text: str) -> dict[str, Any]:
    """Parse TOML whose keys and values are nested no deeper than a recipe's can be.

    Raises:
        ValueError: it is no TOML, or it is nested too deeply.
    """
    if LONG_KEY.search(text):  # tomllib's time grows with the square of the parts
        raise ValueError(f"a key of more than {MAX_DEPTH} parts")
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if opening.is_nested(document, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return document


def parse_document(text: str) -> dict[str, Any]:
    """Read a recipe from its text.

    Raises:
        RecipeError: it is not TOML, or too long.
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise RecipeError(f"recipe: it is larger than {MAX_BYTES // 2**20} MiB")
    try:
        return _parsed(text)
    except ValueError as error:
        raise RecipeError(f"recipe: not TOML: {error}") from None


def with_overrides(document: Mapping[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """Return a copy of the document with each override set.

    In a text `table.key=value`, a value that is TOML is parsed, any other is a string: `train.learning_rate=1e-6`,
    `loss.name=ipo`. A number in the path is an index into an array of tables: `sinks.0.name=console`.

    Raises:
        RecipeError: an override has no `=`, or its path leads through a value that isn't a table.
    """
    changed = copy.deepcopy(dict(document))
    for override in overrides:
        if isinstance(override, str):
            path, equals, text = override.partition("=")
            value = toml_value(text.strip())
        else:
            (path, value), equals = override, "="
        keys = path.strip().split(".")
        shown = (override if isinstance(override, str) else path)[:SHOWN]
        if not equals or not all(keys) or len(keys) > MAX_DEPTH:
            raise RecipeError(f"--set {shown}: expected table.key=value")
        table: Any = changed
        try:
            for key in keys[:-1]:
                table = table[int(key)] if isinstance(table, list) else table.setdefault(key, {})
            last: Any = int(keys[-1]) if isinstance(table, list) else keys[-1]
            table[last] = value
        except (TypeError, AttributeError, ValueError, IndexError):
            raise RecipeError(f"--set {shown}: '{path.strip()[:SHOWN]}' is not a key of this recipe") from None
    return changed


def refuse_unstorable(document: Mapping[str, Any], origin: str) -> None:
    """Refuse a recipe that cannot be stored with its run, or shouldn't be.

    Raises:
        RecipeError: a value is one that TOML can't hold, or a password or token; the message names the keys.
    """
    if keys := list(_keys_of_odd_values(document)):
        found = "a number of more than 64 bits, or a text with a NUL or bytes that aren't UTF-8"
        raise RecipeError(f"{origin}: {', '.join(keys)}: {found}")
    refuse_credentials(document, origin)


def refuse_credentials(document: Mapping[str, Any], origin: str) -> None:
    """Refuse values that hold a password or token, which a run would store and messages would repeat.

    Raises:
        RecipeError: one does; the message names the keys.
    """
    if keys := list(keys_with_credentials(document)):
        raise RecipeError(
            f"{origin}: {', '.join(keys)}: holds a password or token, which a run would store and share",
            "keep it in the environment, such as HF_TOKEN, or in `hf auth login`",
        )


def _keys_of_odd_values(value: object, key: str = "") -> Iterator[str]:
    if isinstance(value, int):
        if abs(value) >= 2**63:
            yield key
    elif isinstance(value, str):
        if ODD_CHARACTERS.search(value):
            yield key
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            path = f"{key}.{name}" if key else str(name)
            if ODD_CHARACTERS.search(path):
                yield key or "a key"
            else:
                yield from _keys_of_odd_values(inner, path)


def toml_value(text: str) -> object:
    try:
        return _parsed(f"value = {text}")["value"]
    except ValueError:
        return text


def fingerprint_of(document: Mapping[str, Any]) -> str:
    """Hash a resolved recipe (recipe.lock.toml) without the settings that are free to change; SHA-256 in hex."""
    decisive = {
        table: {key: value for key, value in document[table].items() if (table, key) not in FREE_TO_CHANGE}
        for table in ("model", "adapter", "data", "train")
    } | {"loss": document["loss"]}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
