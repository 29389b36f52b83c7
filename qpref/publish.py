"""Folders and large files that appear whole under their final name, and manifests that tell whether they still are.

They are filled under a temporary name beside the final one, and renamed. A lock beside each says that its process
lives; what killed processes left is removed by the next one.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qpref import locks
from qpref.errors import DiskError
from qpref.fsio import (
    LOCK_SUFFIX,
    STAGED,
    STAGING_PREFIX,
    disk_errors,
    fsync_file,
    fsync_folder,
    fsync_tree,
    staging_name,
    write_json,
)
from qpref.opening import open_plain, read_object, real_path

MANIFEST = "MANIFEST.json"


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; without an error it is then fsynced and renamed to `final`.

    `final` must not exist, or be an empty folder; it never exists half-filled.
    """
    with _staging(final) as staging:
        yield staging
        with disk_errors(final, _num_bytes(staging)):
            fsync_tree(staging)
            staging.rename(final)
            fsync_folder(final.parent)


@contextmanager
def shared_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder as `staged_folder` does, for a folder that any process may make.

    If another process has made it first, that one stays and this one is dropped: they have the same content. The
    folder carries a manifest, for `damaged_file`.
    """
    try:
        with staged_folder(final) as staging:
            yield staging
            write_json(staging / MANIFEST, manifest(staging))
    except DiskError as error:
        cause = error.__cause__
        if not (isinstance(cause, OSError) and cause.errno in (errno.ENOTEMPTY, errno.EEXIST) and final.is_dir()):
            raise


def damaged_file(folder: Path) -> str | None:
    """Return the first file of a shared folder that isn't as it was written; None if all are."""
    try:
        written = read_object(folder / MANIFEST)
    except (OSError, ValueError):
        return MANIFEST
    return changed_file(folder, written)


def discard(final: Path) -> None:
    """Remove a shared folder, in one step: other processes, which may do the same, see all of it or nothing."""
    with _staging(final) as staging, disk_errors(final), suppress(FileNotFoundError):
        final.rename(staging / final.name)


def try_folder(final: Path) -> None:
    """Check that `staged_folder(final)` could start; leaves nothing behind.

    Raises:
        DiskError: it could not.
    """
    staging = staging_name(final)
    with disk_errors(final):
        created = [parent for parent in staging.parents if not parent.exists()]
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir(mode=0o700)
            staging.rmdir()
        finally:
            for folder in created:
                if folder.is_dir():
                    folder.rmdir()


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder for another program to write; it is then fsynced and renamed to `final`.

    `final` must not exist at the end either.
    """
    with _staging(final) as staging:
        path = staging / f"staged{final.suffix}"
        yield path
        with disk_errors(final):
            fsync_file(path)
            if final.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            path.rename(final)
            fsync_folder(final.parent)


@contextmanager
def scratch_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `final`, which never comes to be; the folder is removed at the end."""
    with _staging(final) as staging:
        yield staging


@contextmanager
def _staging(final: Path) -> Iterator[Path]:
    """Make a temporary folder beside `final`, whose lock says that it is in use, and remove what is left of it."""
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(final)
        staging, lock, descriptor = _claimed_name(final)
    try:
        with disk_errors(final):
            staging.mkdir(mode=0o700)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _claimed_name(final: Path) -> tuple[Path, Path, int]:
    """Return a temporary name, the path of its lock, and the lock's descriptor."""
    while True:
        staging = staging_name(final)
        lock = staging.with_name(staging.name + LOCK_SUFFIX)
        descriptor = open_plain(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        if locks.take(descriptor) and locks.is_named(lock, descriptor):
            return staging, lock, descriptor
        os.close(descriptor)  # another process took it for abandoned, before it was locked


def _num_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def _remove_abandoned(final: Path) -> None:
    """Remove staging folders for `final` that killed processes left: a merged model is large."""
    for lock in final.parent.glob(f"{STAGING_PREFIX}{glob.escape(final.name)}-*{LOCK_SUFFIX}"):
        match = STAGED.fullmatch(lock.name)
        if match is None or match["final"] != final.name:
            continue
        with suppress(OSError):
            descriptor = open_plain(lock, os.O_RDWR)
            try:
                if locks.take(descriptor) and locks.is_named(lock, descriptor) and locks.excludes(lock):
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                    lock.unlink()
            finally:
                os.close(descriptor)


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Describe every file below a folder: relative name -> its size in bytes and its SHA-256."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix(): _described(path) for path in files}


def changed_file(folder: Path, written: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the first file of a manifest that isn't in the folder as it was written; None if all are.

    A name that leads out of the folder, or through a link, is one that isn't.
    """
    for name, entry in written.items():
        path = folder / name
        try:
            is_inside = real_path(path).is_relative_to(real_path(folder))
            if not is_inside or path.is_symlink() or _described(path) != entry:
                return name
        except (OSError, ValueError):
            return name
    return None


def _described(path: Path) -> dict[str, Any]:
    with os.fdopen(open_plain(path), "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
