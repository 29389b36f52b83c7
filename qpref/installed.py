"""Versions of packages, and messages for one that is missing or doesn't import.

`packaging` is imported where requirements are parsed: every command imports this module, and few of them parse one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from qpref.errors import InstallError

if TYPE_CHECKING:
    from packaging.requirements import Requirement


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


def missing(requirements: Iterable[str]) -> list[str]:
    """Return those of the requirements, such as "wandb>=0.19", that no installed version meets."""
    from packaging.requirements import Requirement

    return [line for line in requirements if not _is_met(Requirement(line))]


def _is_met(requirement: Requirement) -> bool:
    version = version_of(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def install_command(distribution: str, needed: Sequence[str]) -> str:
    """Return the command that installs the requirements: by the distribution's smallest extra that has all of them, or
    else by their names."""
    from packaging.requirements import Requirement

    names = {_normalized(Requirement(line).name) for line in needed}
    try:
        required = [Requirement(line) for line in metadata.requires(distribution) or []]
    except metadata.PackageNotFoundError:
        required = []
    extras = metadata.metadata(distribution).get_all("Provides-Extra") or [] if required else []
    by_extra = {extra: _names_of(extra, required) for extra in extras}
    fitting = [extra for extra, those in by_extra.items() if names <= those]
    if fitting:
        return f'pip install "{distribution}[{min(fitting, key=lambda extra: len(by_extra[extra]))}]"'
    return "pip install " + " ".join(f'"{line}"' for line in needed)


def _names_of(extra: str, required: Iterable[Requirement]) -> set[str]:
    marked = [one for one in required if one.marker and one.marker.evaluate({"extra": extra})]
    return {_normalized(one.name) for one in marked}


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
