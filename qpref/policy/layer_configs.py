"""Settings of a model's layers: most configs have one value for all, some (Gemma 4) another for some of them."""

from __future__ import annotations

from typing import Any


def layer_configs(config: Any) -> list[Any]:
    """List the configs of a model's layers; the model's own, once, where its layers are alike.

    transformers raises where a setting that differs between layers is read from the whole config.
    """
    if not getattr(config, "is_heterogeneous", False):
        return [config]
    return list(config.per_layer_config)


def layer_settings(config: Any, name: str) -> list[Any]:
    """List the values that a setting has in the layers, without None; empty where no layer has it."""
    values = (getattr(layer, name, None) for layer in layer_configs(config))
    return [value for value in values if value is not None]
