"""Names of bases that mean the same on every machine: a hub id, a file on PyPI, or a name with a SHA-256."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from qpref import pypi
from qpref.policy.source import BaseFolder, cached_sha256

HASH = "@sha256:"
"""Between a local base's own name and its SHA-256, as in names of container images."""
HUB_FOLDER = re.compile(r"models--(.+)")
"""Name of a model's folder in the hub's cache."""


def public_name(named: str, base: BaseFolder) -> str:
    """Name a base without this machine's folders.

    A local folder's SHA-256 is that of its only safetensors file, or of what `sha256sum *.safetensors` prints.

    Args:
        named: the base as a recipe names it.
    """
    path = Path(named)
    if named.startswith(pypi.PREFIX) or not path.is_absolute():
        return named
    return hub_id(named) or f"{path.name}{HASH}{_digest(path, base)}"


def is_same_base(public: str, named: str, base: BaseFolder) -> bool:
    """Return whether a public name is that of a base, by the SHA-256 alone where it has one."""
    if HASH in public and Path(named).is_absolute():
        return public.partition(HASH)[2] == _digest(Path(named), base)
    return public == public_name(named, base)


def hub_id(path: str) -> str | None:
    """Return the hub id of a folder in the hub's cache; None for other paths."""
    found = (HUB_FOLDER.fullmatch(part) for part in Path(path).parts)
    return next((match[1].replace("--", "/", 1) for match in found if match), None)


def _digest(path: Path, base: BaseFolder) -> str:
    if path.is_file():
        return cached_sha256(path)
    if len(base.weights) == 1:
        return next(iter(base.weights.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(base.weights.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
