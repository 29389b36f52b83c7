"""Keys of run.json, a run's description, that every reader relies on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RECORDS = ("recipe.lock.toml", "data.json")
"""Files that run.json has the SHA-256 of."""
REQUIRED: Mapping[str, type] = {
    "base": str,
    "base_path": str,
    "base_weights": dict,
    "created": str,
    "double_quantization": bool,
    "dtype": str,
    "examples": dict,
    "files": dict,
    "fingerprints": dict,
    "quantized_modules": list,
    "versions": dict,
}
"""Keys of run.json that every reader relies on, and the JSON type of each. Only a merge needs `base_config`."""
DTYPE_NAMES = ("bf16", "fp16", "float32")
REQUIRED_WITHIN: Mapping[str, tuple[str, ...]] = {
    "examples": ("train", "heldout"),
    "files": RECORDS,
    "fingerprints": ("recipe", "training data", "held-out data", "start adapter"),
}


def missing_key(facts: Mapping[str, Any]) -> str | None:
    """Find the first required key that is missing, or that no run of this version has such a value of."""
    for name, kind in REQUIRED.items():
        if not isinstance(facts.get(name), kind):
            return name
    if facts["dtype"] not in DTYPE_NAMES:
        return "dtype"
    for name in ("quantized_modules", "quantized_experts"):
        values = facts.get(name, [])
        if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            return name
    for name in ("base_weights", "fingerprints"):
        if not all(isinstance(value, str | None) for value in facts[name].values()):
            return name
    if "\0" in facts["base_path"]:
        return "base_path"
    within = ((name, key) for name, keys in REQUIRED_WITHIN.items() for key in keys if key not in facts[name])
    return next((f"{name}.{key}" for name, key in within), None)
