"""The base and the tokenizer that a start adapter was trained with, compared with those of a run.

A LoRA delta loads on any base of the same shapes, such as the chat model instead of the plain one, and training then
starts from a policy that nobody meant.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from qpref.errors import PolicyError
from qpref.policy import adapter_folder
from qpref.policy.base_name import HASH, hub_id, is_same_base
from qpref.policy.source import BaseFolder, cached_sha256, shard_files
from qpref.policy.tokenizer import tokenizer_difference

log = logging.getLogger("qpref")


def warn_of_other_base(start: Path, base: BaseFolder, named: str) -> None:
    """Warn where an adapter's settings name another base: by the weights where both are here, else by the names.

    Args:
        start: the adapter's folder.
        named: the base as the recipe names it.

    Raises:
        PolicyError: the adapter's settings cannot be read.
    """
    trained_on = adapter_folder.read_settings(start).get("base_model_name_or_path")
    if not trained_on or trained_on in (named, str(base.path)) or is_same_base(trained_on, named, base):
        return
    if HASH not in trained_on and _is_by_path_or_name(trained_on, base, named):
        return
    log.warning(
        "%s was trained on %s, by its %s, and is put on %s: check that these are the same model",
        start,
        trained_on,
        adapter_folder.SETTINGS,
        named,
    )


def warn_of_other_tokenizer(start: Path, tokenizer: Any) -> None:
    """Warn where the tokenizer beside an adapter isn't the one in use: the adapter knows its ids and its template.

    Args:
        start: the adapter's folder; one without a tokenizer that loads isn't compared.
        tokenizer: the run's.
    """
    if not (start / "tokenizer.json").is_file():
        return
    try:
        difference = tokenizer_difference(tokenizer, start)
    except PolicyError:
        return
    if difference:
        log.warning(
            "%s: its %s differs from the run's; to train with the adapter's, set [model] tokenizer to its folder",
            start,
            difference,
        )


def _is_by_path_or_name(trained_on: str, base: BaseFolder, named: str) -> bool:
    """Return whether it is the same base by its weights, where it is a folder on this machine, else by its name."""
    has_weights = _has_weights(Path(trained_on), base)
    if has_weights is None:
        return _name(trained_on) in (_name(named), _name(str(base.path)))
    return has_weights


def _has_weights(folder: Path, base: BaseFolder) -> bool | None:
    """Return whether a folder holds the base's weights; None where it isn't one with weights on this machine."""
    try:
        if not folder.is_absolute() or not folder.is_dir():
            return None
        return sorted(map(cached_sha256, shard_files(folder))) == sorted(base.weights.values())
    except (PolicyError, OSError, ValueError):
        return None


def _name(named: str) -> str:
    """The model's own name, without owner and folders, in lower case."""
    return (hub_id(named) or named).rstrip("/").split("/")[-1].lower()
