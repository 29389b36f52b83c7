"""An adapter folder in PEFT's format: its settings, its tensors, and a check that it is a plain LoRA delta."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qpref import opening
from qpref.errors import PolicyError
from qpref.patterns import why_slow
from qpref.policy.foreign_files import check_types, read_by_library, read_object

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"

PLAIN_SETTINGS = (
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
)
"""Settings that a plain LoRA delta is made of."""
OTHER_METHODS = (
    "use_dora",
    "modules_to_save",
    "layers_to_transform",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
"""Settings by which an adapter is more than, or other than, a plain LoRA delta."""
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT writes one of these only where the adapter was saved without its conversion to a delta on the plain base."""

MAX_RANK = 2**16


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63 and math.isfinite(value)
    )


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_table(accepts: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(accepts, value.values()))


_NAMES = ("a text or a list of texts", lambda value: isinstance(value, str) or _is_list_of_texts(value))
EXPECTED: dict[str, tuple[str, Callable[[object], bool]]] = {
    "peft_type": ("a text", lambda value: isinstance(value, str)),
    "base_model_name_or_path": ("a text", lambda value: isinstance(value, str)),
    "r": (f"a whole number from 1 to {MAX_RANK}", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "target_parameters": ("a list of texts", _is_list_of_texts),
    "rank_pattern": (f"an object of whole numbers from 1 to {MAX_RANK}", _is_table(_is_rank)),
    "alpha_pattern": ("an object of numbers", _is_table(_is_number)),
}
"""Settings that qpref reads: what each should be, in words and as a check."""


def read_settings(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        PolicyError: it cannot be read, isn't a JSON object, or a setting has a value that PEFT never writes.
    """
    path = folder / SETTINGS
    settings = read_object(path, "no adapter in PEFT's format")
    check_types(path, settings, EXPECTED)
    for pattern in _patterns(settings):
        if reason := why_slow(pattern):
            raise PolicyError(f"{path}: the pattern {pattern[:60]!r} is refused: {reason}")
    return settings


def _patterns(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the regular expressions among the settings: names of layers in a list are none."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(key), str):
            yield settings[key]
    for key in ("rank_pattern", "alpha_pattern"):
        yield from settings.get(key) or {}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors by PEFT's names.

    Raises:
        PolicyError: they cannot be read, or aren't safetensors.
    """
    from safetensors.torch import load_file

    path = folder / TENSORS
    if not path.exists():
        raise PolicyError(f"{path}: no adapter in PEFT's format with safetensors: no such file")
    if kind := opening.kind_of(path, follow=True):
        raise PolicyError(f"{path}: it is {kind}, not a regular file")
    with read_by_library(path, "no adapter in PEFT's format with safetensors"):
        tensors: dict[str, Tensor] = load_file(path)
    return tensors


def lora_config(settings: Mapping[str, Any], **others: Any) -> Any:
    """Make PEFT's config from the plain settings and from `others`, leaving out the rest of the file."""
    from peft import LoraConfig

    plain = {name: settings[name] for name in PLAIN_SETTINGS if settings.get(name) is not None}
    return LoraConfig(**plain, **others)


def unsupported_setting(settings: Mapping[str, Any]) -> str | None:
    """Name the first setting by which the adapter isn't a plain LoRA delta on its base; None for a plain one."""
    if used := [name for name in OTHER_METHODS if settings.get(name)]:
        return used[0]
    if settings.get("bias", "none") != "none":
        return "bias"
    if str(settings.get("init_lora_weights")).lower().startswith(INITS_THAT_CHANGE_THE_BASE):
        return "init_lora_weights"
    return None
