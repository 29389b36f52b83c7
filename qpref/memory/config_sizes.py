"""Sizes of a model that only its config tells: attention heads, rotary tables, windows, stored scales."""

from __future__ import annotations

from typing import Any


def attention_sizes(config: Any) -> tuple[int, int, int, int]:
    """Heads, width of a head, width of all queries and of all keys; of layers that differ, the largest of each."""
    from qpref.policy.layer_configs import layer_configs

    sizes = []
    for layer in layer_configs(config):
        heads = int(getattr(layer, "num_attention_heads", None) or getattr(layer, "num_heads", None) or 1)
        head_dim = int(getattr(layer, "head_dim", None) or layer.hidden_size // heads)
        keys = int(getattr(layer, "num_key_value_heads", None) or heads)
        sizes.append((heads, head_dim, heads * head_dim, keys * head_dim))
    heads, head_dim, query, key = map(max, zip(*sizes, strict=True))
    return heads, head_dim, query, key


def rotary(config: Any, head_dim: int) -> int:
    """Numbers in one token's cosines and sines, summed over the kinds of layers that have tables of their own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return sum(2 * int(head_dim * float(kind.get("partial_rotary_factor") or 1)) for kind in kinds)


def window(config: Any) -> int | None:
    """Tokens that sliding-window attention sees, the most of any layer; None without such layers."""
    from qpref.policy.layer_configs import layer_settings

    kinds = getattr(config, "layer_types", None)
    if (kinds and "sliding_attention" not in kinds) or not getattr(config, "use_sliding_window", True):
        return None
    return max(map(int, layer_settings(config, "sliding_window")), default=None)


def double_quantization(config: Any) -> bool | None:
    """Return whether a base stored in 4 bits has quantized scales; None for other bases."""
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) or not settings.get("load_in_4bit"):
        return None
    return bool(settings.get("bnb_4bit_use_double_quant"))
