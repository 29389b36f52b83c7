"""An adapter folder in PEFT's format: its settings, its tensors, and a check that it is a plain LoRA delta."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qpref.errors import PolicyError

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


def read_settings(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        PolicyError: it cannot be read, or isn't a JSON object.
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path}: no adapter in PEFT's format: {error}") from error
    if not isinstance(settings, dict):
        raise PolicyError(f"{path}: no adapter in PEFT's format: not a JSON object")
    return settings


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors by PEFT's names.

    Raises:
        PolicyError: they cannot be read, or aren't safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / TENSORS
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"{path}: no adapter in PEFT's format with safetensors: {error}") from error
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
