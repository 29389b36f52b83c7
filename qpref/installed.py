"""Versions of the packages that qpref depends on, and an error message for one that is missing or doesn't import."""

from __future__ import annotations

import re
from importlib import metadata

from qpref.errors import InstallError


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution; None where it isn't installed or has no metadata."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_required(error: ImportError) -> bool:
    """Return whether the package that an import lacks is a requirement of qpref itself."""
    return _normalized((error.name or "").partition(".")[0]) in _requirements()


def as_install_error(error: ImportError) -> InstallError:
    """Turn a failed import into an error that names the package and how to install it.

    Raises:
        ImportError: the failing module is qpref's own, which is a bug of ours.
    """
    cause = _innermost(error)
    package = (cause.name or "").partition(".")[0]
    if package == "qpref" or package.startswith("qpref_"):
        raise error
    needed = _requirements().get(_normalized(package))
    hint = f"pip install '{needed}'" if needed else "reinstall qpref with its dependencies"
    if isinstance(cause, ModuleNotFoundError) and package:
        return InstallError(f"{package} is not installed, and qpref needs it", hint)
    version = version_of(package) if package else None
    return InstallError(f"{f'{package} {version}' if version else 'a package'} can't be used: {cause}", hint)


def _innermost(error: ImportError) -> ImportError:
    """Find the failure that names a package; transformers wraps it in others that don't."""
    below = error.__cause__ or error.__context__
    return _innermost(below) if not error.name and isinstance(below, ImportError) else error


def _requirements() -> dict[str, str]:
    """Map each required package's normalized name to its requirement, such as `trl<2,>=1.16`."""
    try:
        required = metadata.requires("qpref") or []
    except metadata.PackageNotFoundError:
        return {}
    specs = [line.partition(";")[0].strip() for line in required if "extra ==" not in line]
    return {_normalized(re.split(r"[^\w.-]", spec, maxsplit=1)[0]): spec for spec in specs}


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
