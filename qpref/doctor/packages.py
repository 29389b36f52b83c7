"""Python, and the packages that qpref requires: installed, and within the ranges that its tests have run with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qpref.doctor.finding import Finding

TOPIC = "packages"


def examine_packages() -> Iterator[Finding]:
    """Compare the installed versions with qpref's own metadata."""
    try:
        required, python = metadata.requires("qpref") or [], metadata.metadata("qpref")["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield Finding(
            TOPIC, "problem", "qpref's package metadata are missing, and with them its plugins", "reinstall qpref"
        )
        return
    yield of_python(platform.python_version(), python or "")
    for line in required:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield of_package(requirement, _version(requirement.name))


def of_python(version: str, declared: str) -> Finding:
    if SpecifierSet(declared).contains(version, prereleases=True):
        return Finding(TOPIC, "ok", f"Python {version} ({sys.executable})")
    fix = "make a new environment with it: python3.12 -m venv .venv"
    return Finding(TOPIC, "problem", f"Python {version}, and qpref needs {declared}", fix)


def of_package(requirement: Requirement, version: str | None) -> Finding:
    """Judge one package by its version; None where it isn't installed."""
    wanted = f"{requirement.name}{requirement.specifier}"
    fix = f"pip install '{wanted}'"
    if version is None:
        return Finding(TOPIC, "problem", f"{requirement.name} is not installed", fix)
    declared = f" ({requirement.specifier})" if requirement.specifier else ""
    if not requirement.specifier.contains(version, prereleases=True):
        message = f"{requirement.name} {version} is outside of the range that qpref is tested with{declared}"
        return Finding(TOPIC, "problem", message, fix)
    return Finding(TOPIC, "ok", f"{requirement.name} {version}{declared}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
