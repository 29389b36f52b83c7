"""The packages that qpref runs with: their versions, and a sentence where one is missing or doesn't fit."""

from __future__ import annotations

import re
from importlib import metadata

from qpref.errors import InstallError


def version_of(distribution: str) -> str | None:
    """The installed version; None where there is none, or where nothing on this machine says it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_required(error: ImportError) -> bool:
    """Whether a package that an import lacks is one that qpref itself requires."""
    return _normalized((error.name or "").partition(".")[0]) in _requirements()


def as_install_error(error: ImportError) -> InstallError:
    """Say which package an import has failed for, and how to install it.

    Raises:
        ImportError: it is of qpref itself, which is a bug of ours.
    """
    cause = _innermost(error)
    package = (cause.name or "").partition(".")[0]
    if package == "qpref" or package.startswith("qpref_"):
        raise error
    needed = _requirements().get(_normalized(package))
    hint = f"pip install '{needed}'" if needed else "install qpref again, with what it depends on"
    if isinstance(cause, ModuleNotFoundError) and package:
        return InstallError(f"{package} is not installed, and qpref needs it", hint)
    version = version_of(package) if package else None
    return InstallError(f"{f'{package} {version}' if version else 'a package'} can't be used: {cause}", hint)


def _innermost(error: ImportError) -> ImportError:
    """The failure that names a package: transformers raises others on top that don't."""
    below = error.__cause__ or error.__context__
    return _innermost(below) if not error.name and isinstance(below, ImportError) else error


def _requirements() -> dict[str, str]:
    """What qpref requires of each package, such as `trl<2,>=1.16`, by the package's normalized name."""
    try:
        required = metadata.requires("qpref") or []
    except metadata.PackageNotFoundError:
        return {}
    specs = [line.partition(";")[0].strip() for line in required if "extra ==" not in line]
    return {_normalized(re.split(r"[^\w.-]", spec, maxsplit=1)[0]): spec for spec in specs}


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
