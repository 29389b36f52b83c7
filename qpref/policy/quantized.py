"""Quantized bases: bitsandbytes' 4-bit weights are trained as they are, others are refused by their config alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qpref.errors import PolicyError

KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of a config under which its quantization is described: transformers' own, its older one, and MLX's."""
METHOD_IN_NAME = re.compile(r"(?i)[-_.](awq|gptq|fp8|mxfp4|mxfp8|nvfp4|w4a16|w8a8|w8a16|int4|int8|hqq|aqlm|mlx)\b")
"""A method in a hub id, such as Qwen3-8B-AWQ."""
HINT = "name the original model with 16-bit weights, or a copy dequantized to bf16; qpref itself quantizes it to 4 bits"
MXFP4_HINT = (
    "name a copy dequantized to bf16, which qpref quantizes itself: transformers writes one by "
    "from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True)) and save_pretrained"
)


def is_prequantized(config: Mapping[str, Any], origin: object) -> bool:
    """Return whether a base holds bitsandbytes' 4-bit weights, by its config.json.

    Args:
        origin: of the config, for the message.

    Raises:
        PolicyError: it is quantized by another method; the hint says what to use.
    """
    settings = _settings(config)
    if settings is None:
        return False
    if settings.get("quant_method") != "bitsandbytes" or not settings.get("load_in_4bit"):
        bits = " in 8 bits" if settings.get("load_in_8bit") else ""
        _refuse(f"{settings.get('quant_method', 'an unknown method')}{bits}", origin)
    return True


def refuse_quantized_name(name: str) -> None:
    """Refuse a hub id that names a method, for a base whose config isn't at hand.

    Raises:
        PolicyError: as for `is_prequantized`.
    """
    if found := METHOD_IN_NAME.search(name):
        _refuse(f"{found[1]}, by its name", name)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Find the settings of a config, or of a part of it such as its text model."""
    parts = [config, *(part for key, part in config.items() if key.endswith("_config") and isinstance(part, Mapping))]
    found = (part.get(key) for part in parts for key in KEYS)
    return next((settings for settings in found if isinstance(settings, Mapping) and settings), None)


def _refuse(method: str, origin: object) -> None:
    raise PolicyError(
        f"{origin}: quantized by {method}; only bitsandbytes' 4-bit bases can be trained",
        MXFP4_HINT if "mxfp4" in method.lower() else HINT,
    )
