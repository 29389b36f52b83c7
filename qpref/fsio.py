"""The only module of the core that writes to disk.

Every file appears whole or not at all: written under a temporary name, fsynced, renamed, and the folder fsynced.
Folders that must appear as one (a checkpoint, an adapter, a merged model) are built beside their place and renamed
into it.
"""

from __future__ import annotations

import errno
import fcntl
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

if TYPE_CHECKING:
    from torch import Tensor

STAGING_PREFIX = ".tmp-"


def cache_folder() -> Path:
    """Where converted base models and downloads are kept: $QPREF_CACHE, else the user's cache folder."""
    named = os.environ.get("QPREF_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qpref"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a refusal of the disk into a DiskError that names `path`."""
    try:
        yield
    except SafetensorError as error:
        raise DiskError(f"{path}: cannot be written: {error}") from error
    except OSError as error:
        hint = "free some space and go on with --resume" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}", hint) from error


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Bring every file and folder below `folder`, written by whomever, to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def make_folder(folder: Path, mode: int = 0o700) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=mode)


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """A temporary name to write; on leaving without an error what stands there is fsynced and named `path`."""
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
    with _published(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(source, file, 2**20)


def write_bytes(path: Path, data: bytes) -> None:
    write_stream(path, io.BytesIO(data))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file line by line; nothing is kept in memory."""
    with _published(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Tensors are made contiguous; none may share memory with another."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _published(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)


def copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        write_stream(target, file)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` to fill; on leaving without an error it is fsynced and takes the name `final`.

    `final` must not exist, or be an empty folder; it is never seen half-filled.
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
    """Stop where `staged_folder(final)` could not begin, and leave nothing behind.

    Raises:
        DiskError: says why.
    """
    staging = final.with_name(f"{STAGING_PREFIX}{final.name}-{os.getpid()}")
    with disk_errors(final):
        made = [parent for parent in staging.parents if not parent.exists()]
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir(mode=0o700)
            staging.rmdir()
        finally:
            for folder in made:
                if folder.is_dir():
                    folder.rmdir()


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """A path, alone in a folder beside `final`, for another program to write; on leaving without an error it is
    fsynced and takes the name `final`, which must not exist then either."""
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
    """Remove what killed processes of this machine have left half-filled for `final`: a merged model is large."""
    for path in final.parent.glob(f"{STAGING_PREFIX}{glob.escape(final.name)}-*"):
        number = path.name.rpartition("-")[2]
        if path.name != f"{STAGING_PREFIX}{final.name}-{number}" or not number.isdecimal():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (PermissionError, OverflowError):
            continue  # somebody else's process


def make_readable(top: Path) -> None:
    """Give a file or folder that is meant for others, and all in it, the modes that the user's umask asks for."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (top, *top.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def remove_tree(path: Path) -> None:
    with disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_staging(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`."""
    for path in folder.glob(f"{STAGING_PREFIX}*"):
        remove_tree(path)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class AppendLog:
    """A file that only grows.

    Args:
        path: the file; made where it isn't there.
        keep: bytes to keep of what it holds, the rest is cut off; None keeps all.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self._path = path
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            # Unbuffered, so that nothing is left to write when a full disk has refused a line.
            self._file = os.fdopen(descriptor, "ab", buffering=0)
            try:
                if keep is not None:
                    self._file.truncate(keep)
                os.fsync(descriptor)
            except OSError:
                self._file.close()
                raise

    def append(self, data: bytes, durable: bool = True) -> None:
        """Write at the end; where `durable`, all that was written so far is on the disk on return."""
        with disk_errors(self._path):
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
            if durable:
                os.fsync(self._file.fileno())

    def append_line(self, line: str) -> None:
        self.append(line.encode() + b"\n")

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def touch(path: Path) -> None:
    """Note that a file of the cache was used just now."""
    with disk_errors(path):
        os.utime(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`'s LOCK file; the kernel frees it when the process ends, however it ends.

    Raises:
        RunLockedError: another process holds it; its pid and host are named.
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
