"""config.json of a base: read here alone, and checked before a library builds a model of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qpref.errors import PolicyError
from qpref.policy.foreign_files import check_types, read_object
from qpref.policy.quantized import is_prequantized

CONFIG = "config.json"
CODE_KEYS = ("auto_map", "custom_pipelines", "model_file")
MAX_LAYERS = 512
LARGEST = 2**63 - 1
"""Largest number that torch takes."""
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
WIDTH_KEYS = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "head_dim"),
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "moe_intermediate_size"),
)
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
MAX_WIDTH, MAX_VOCABULARY, MAX_EXPERTS = 2**20, 2**24, 2**14


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read a base's config.json.

    Raises:
        PolicyError: it is missing or malformed, names code of its own or another quantization than bitsandbytes', or
            has a size that no model has.
    """
    path = folder / CONFIG
    if not path.exists():
        raise PolicyError(f"{folder}: no config.json, so no model folder")
    values = read_object(path)
    if found := [key for key in CODE_KEYS if key in values]:
        raise PolicyError(f"{path}: '{found[0]}' names code of the model's own, which qpref doesn't run")
    for part in _parts(values):
        check_types(path, part, EXPECTED)
    _refuse_large_numbers(path, values)
    is_prequantized(values, folder)
    return values


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the config and the configs of its parts, such as its text model's."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            yield from _parts(value)


def _is_size(least: int, most: int) -> Any:
    """Return a check of a size, or of a list of them, one a layer."""

    def is_size(value: object) -> bool:
        if isinstance(value, list):
            return all(each is None or is_size(each) for each in value)
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return is_size


def _sizes(keys: tuple[str, ...], least: int, most: int) -> dict[str, tuple[str, Any]]:
    return dict.fromkeys(keys, (f"a whole number from {least} to {most}", _is_size(least, most)))


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


EXPECTED: dict[str, tuple[str, Any]] = {
    **_sizes(LAYER_KEYS, 1, MAX_LAYERS),
    **_sizes(WIDTH_KEYS, 1, MAX_WIDTH),
    **_sizes(COUNT_KEYS, 0, MAX_EXPERTS),
    **_sizes(("vocab_size",), 1, MAX_VOCABULARY),
    "model_type": ("a text", lambda value: isinstance(value, str)),
    "architectures": ("a list of texts", _is_list_of_texts),
    "layer_types": ("a list of texts", _is_list_of_texts),
}


def _refuse_large_numbers(path: Path, value: object, key: str = "") -> None:
    """Refuse a whole number of more than 64 bits anywhere; the depth is bounded by `read_object`."""
    if isinstance(value, int) and abs(value) > LARGEST:
        raise PolicyError(f"{path}: {key}: a number of more than 64 bits")
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_large_numbers(path, inner, f"{key}.{name}" if key else str(name))
