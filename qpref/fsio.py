"""Atomic and durable writes; no other module of the core writes to disk.

Every file appears whole or not at all: written under a temporary name, fsynced, renamed, and its folder fsynced.
Folders that must appear as one (a checkpoint, an adapter, a merged model) are filled under a temporary name beside
their final one and renamed.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from safetensors import SafetensorError

from qpref.errors import DiskError, RunLockedError
from qpref.linux import fcntl

if TYPE_CHECKING:
    from torch import Tensor

STAGING_PREFIX = ".tmp-"


def cache_folder() -> Path:
    """Return the folder of converted bases, downloads and caches: $QPREF_CACHE, else qpref in the user's cache."""
    named = os.environ.get("QPREF_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qpref"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert errors of the operating system to a DiskError that names `path`."""
    try:
        yield
    except SafetensorError as error:
        raise DiskError(f"{path}: cannot be written: {error}") from error
    except OSError as error:
        hint = "free some space and continue with --resume" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}", hint) from error


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries (names of files, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk, whichever library wrote it."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def make_folder(folder: Path, mode: int = 0o700) -> None:
    """Create a folder and its parents, unless they exist."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=mode)


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; without an error that file is then fsynced and renamed to `path`."""
    temporary = path.with_name(f"{STAGING_PREFIX}{path.name}-{os.getpid()}")
    with disk_errors(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.rename(path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_stream(path: Path, source: IO[bytes]) -> None:
    """Write all bytes of an open file, 1 MiB at a time."""
    with _published(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(source, file, 2**20)


def write_bytes(path: Path, data: bytes) -> None:
    write_stream(path, io.BytesIO(data))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file line by line; only one line is in memory."""
    with _published(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON with sorted keys; NaN is an error."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Tensors are made contiguous; no two may share memory."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _published(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)


def copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        write_stream(target, file)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; without an error it is then fsynced and renamed to `final`.

    `final` must not exist, or be an empty folder; it never exists half-filled.
    """
    staging = final.with_name(f"{STAGING_PREFIX}{final.name}-{os.getpid()}")
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        _remove_abandoned(final)
        staging.mkdir(mode=0o700)
    try:
        yield staging
        with disk_errors(final):
            fsync_tree(staging)
            staging.rename(final)
            fsync_folder(final.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def try_folder(final: Path) -> None:
    """Check that `staged_folder(final)` could start; leaves nothing behind.

    Raises:
        DiskError: it could not.
    """
    staging = final.with_name(f"{STAGING_PREFIX}{final.name}-{os.getpid()}")
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
    staging = final.with_name(f"{STAGING_PREFIX}{final.name}-{os.getpid()}")
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        _remove_abandoned(final)
        staging.mkdir(mode=0o700)
    try:
        path = staging / f"staged{final.suffix}"
        yield path
        with disk_errors(final):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            if final.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            path.rename(final)
            fsync_folder(final.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_abandoned(final: Path) -> None:
    """Remove staging folders for `final` that killed processes of this machine left: a merged model is large."""
    for path in final.parent.glob(f"{STAGING_PREFIX}{glob.escape(final.name)}-*"):
        number = path.name.rpartition("-")[2]
        if path.name != f"{STAGING_PREFIX}{final.name}-{number}" or not number.isdecimal():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (PermissionError, OverflowError):
            continue  # alive, owned by another user


def make_readable(top: Path) -> None:
    """Set the modes of a file, or of a folder and its contents, to those of the user's umask, so others can read it."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (top, *top.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def remove_tree(path: Path) -> None:
    """Remove a file, a link, or a folder with its contents; a missing path is fine."""
    with disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_staging(folder: Path) -> None:
    """Remove half-written files and folders that a killed process left in `folder`."""
    for path in folder.glob(f"{STAGING_PREFIX}*"):
        remove_tree(path)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class AppendLog:
    """An append-only file.

    Args:
        path: the file, created if missing.
        keep: bytes to keep at its start, the rest is cut off; None keeps all.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self._path = path
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            # Unbuffered, so that nothing stays in a buffer when a full disk has refused a line.
            self._file = os.fdopen(descriptor, "ab", buffering=0)
            try:
                if keep is not None:
                    self._file.truncate(keep)
                os.fsync(descriptor)
            except OSError:
                self._file.close()
                raise

    def append(self, data: bytes, durable: bool = True) -> None:
        """Append bytes; `durable` also flushes everything appended so far to the disk."""
        with disk_errors(self._path):
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            if durable:
                os.fsync(self._file.fileno())

    def append_line(self, line: str) -> None:
        self.append(line.encode() + b"\n")

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def touch(path: Path) -> None:
    """Set a cache file's modification time to now, which marks it as used."""
    with disk_errors(path):
        os.utime(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`'s LOCK file; the kernel releases it when the process ends, even if it is killed.

    Raises:
        RunLockedError: another process holds it; the message has its pid and host.
    """
    path = folder / "LOCK"
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            raise RunLockedError(f"{folder}: another process is writing this run ({holder})") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
