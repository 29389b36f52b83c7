"""JSON records that tell damage by themselves: each has the SHA-256 of the rest of its values.

For the records that nothing else vouches for: a run's run.json and result.json, which then hold the hashes of its other
files. A seal tells a flipped bit and an edit; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpref import fsio, opening

SEAL = "sha256"
"""Key of the hash of all other values."""


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write values, whose keys are strings, with the hash of them; NaN is an error."""
    assert SEAL not in values
    fsio.write_json(path, {**values, SEAL: _digest(values)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read the values of `write_sealed`.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is no JSON object, or not as it was written.
    """
    values = opening.read_object(path)
    if not is_sealed(values):
        raise ValueError("it is not as it was written: a disk or a copy damaged it, or it was edited")
    return {name: value for name, value in values.items() if name != SEAL}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Return whether the values of a JSON object have the hash that they hold."""
    try:
        return values.get(SEAL) == _digest({name: value for name, value in values.items() if name != SEAL})
    except (ValueError, RecursionError):  # NaN, which JSON has no number for
        return False


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()
