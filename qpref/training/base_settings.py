"""Settings of a run's base: their hashes in run.json, compared by whatever reads the base again.

The weights have fingerprints of their own. These files say how the weights are computed with (rotary positions,
norms), and at which tokens an answer stops.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpref import fsio

KEYS = {"config.json": "base_config", "generation_config.json": "base_generation_config"}
"""File of the base -> key of its SHA-256 in run.json, which is None where the base has no such file."""


def settings_hashes(base: Path) -> dict[str, str | None]:
    """Hash the settings of a base's folder, by their keys in run.json."""
    return {key: _sha256(base / name) for name, key in KEYS.items()}


def changed_settings(base: Path, facts: Mapping[str, Any]) -> str | None:
    """Explain which of the base's settings isn't as it was in training; None where none is, or isn't known.

    Args:
        facts: run.json.
    """
    for name, key in KEYS.items():
        if key in facts and _sha256(base / name) != facts[key]:
            how = "has come since" if facts[key] is None else "is not the one used in training; its SHA-256 differs"
            return f"{base / name}: {how}"
    return None


def _sha256(path: Path) -> str | None:
    return fsio.sha256_file(path) if path.is_file() else None
