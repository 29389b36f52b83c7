"""A recipe's TOML as nested dicts: reading it, overriding single values, and its fingerprint."""

from __future__ import annotations

import copy
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qpref.credentials import keys_with_credentials
from qpref.errors import RecipeError

FREE_TO_CHANGE = {
    # Locations; their contents have fingerprints of their own.
    *(("model", key) for key in ("base", "sha256", "tokenizer", "device", "memory")),
    *(
        ("data", key)
        for key in ("train", "heldout", "heldout_share", "reader", "format", "columns", "contest", "skip_bad", "cache")
    ),
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
    """Return a copy of the document with each `table.key=value` set.

    A value that is TOML is parsed, any other is a string: `train.learning_rate=1e-6`, `loss.name=ipo`. A number in the
    path is an index into an array of tables: `sinks.0.name=console`.

    Raises:
        RecipeError: an override has no `=`, or its path leads through a value that isn't a table.
    """
    changed = copy.deepcopy(dict(document))
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"--set {override}: expected table.key=value")
        table: Any = changed
        try:
            for key in keys[:-1]:
                table = table[int(key)] if isinstance(table, list) else table.setdefault(key, {})
            last: Any = int(keys[-1]) if isinstance(table, list) else keys[-1]
            table[last] = _toml_value(text.strip())
        except (TypeError, AttributeError, ValueError, IndexError):
            raise RecipeError(f"--set {override}: '{path.strip()}' is not a key of this recipe") from None
    return changed


def refuse_credentials(document: Mapping[str, Any], origin: str) -> None:
    """Refuse a recipe that holds a password or token, which would be stored with the run.

    Raises:
        RecipeError: it does; the message names the keys.
    """
    if keys := list(keys_with_credentials(document)):
        raise RecipeError(
            f"{origin}: {', '.join(keys)}: holds a password or token, which a run would store and share",
            "keep it in the environment, such as HF_TOKEN, or in `hf auth login`",
        )


def _toml_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def fingerprint_of(document: Mapping[str, Any]) -> str:
    """Hash a resolved recipe (recipe.lock.toml) without the settings that are free to change; SHA-256 in hex."""
    decisive = {
        table: {key: value for key, value in document[table].items() if (table, key) not in FREE_TO_CHANGE}
        for table in ("model", "adapter", "data", "train")
    } | {"loss": document["loss"]}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
