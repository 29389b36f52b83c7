"""Atomic and durable writes; no other module of the core writes to disk.

Every file appears whole or not at all: written under a temporary name, fsynced, renamed, and its folder fsynced.
Folders that must appear as one (a checkpoint, an adapter, a merged model) are `qpref.publish`'s.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from safetensors import SafetensorError

from qpref.disk_space import refused_write
from qpref.errors import DiskError
from qpref.opening import open_plain

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("qpref")

STAGING_PREFIX = ".tmp-"
LOCK_SUFFIX = ".lock"
STAGED = re.compile(rf"{re.escape(STAGING_PREFIX)}(?P<final>.+)-[0-9a-f]{{16}}({re.escape(LOCK_SUFFIX)})?")
"""Names under which files and folders are written, and those of the locks that writers of folders hold."""
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_read_only: set[Path] = set()
"""Cache folders that this process has warned of."""


def cache_folder() -> Path:
    """Return the folder of converted bases, downloads and caches: $QPREF_CACHE, else qpref in the user's cache."""
    named = os.environ.get("QPREF_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qpref"


@contextmanager
def disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Convert errors of the operating system to a DiskError that names `path`, and a full disk's free space.

    Args:
        needed: bytes that are written inside, for the message.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise refused_write(path, error, needed) from error


@contextmanager
def needing_cache() -> Iterator[None]:
    """Name the way out where the cache can't be written with a file that there is no going on without."""
    try:
        yield
    except DiskError as error:
        raise DiskError(error.what, "free some space, or set QPREF_CACHE to a folder on another disk") from error


def warn_unwritable(consequence: str, error: DiskError) -> None:
    """Warn that a file of the cache can't be written, and the work continues without it.

    A cache that may only be read is warned of once, since every write to it fails.
    """
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in READ_ONLY:
        if (folder := cache_folder()) in _read_only:
            return
        _read_only.add(folder)
    log.warning("%s: %s", consequence, error.what)


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
            fsync_file(path)
    fsync_folder(folder)


def make_folder(folder: Path, mode: int = 0o700) -> None:
    """Create a folder and its parents, unless they exist."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=mode)


def make_entry(folder: Path) -> None:
    """Create a folder of a shared cache, whose entries are folders: a link would lead another user's files elsewhere.

    Raises:
        DiskError: it cannot be made, or is a link.
    """
    if folder.is_symlink():
        raise DiskError(f"{folder}: is a symbolic link, and no entry of the cache is one", "remove it")
    make_folder(folder)


def staging_name(final: Path) -> Path:
    """Return a name beside `final` that nobody has and nobody can guess: process ids are the same in two containers."""
    return final.with_name(f"{STAGING_PREFIX}{final.name}-{secrets.token_hex(8)}")


def fsync_file(path: Path) -> None:
    descriptor = open_plain(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _published(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary path to write; without an error that file is then fsynced and renamed to `path`."""
    temporary = staging_name(path)
    with disk_errors(path, needed):
        try:
            yield temporary
            fsync_file(temporary)
            temporary.rename(path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_stream(path: Path, source: IO[bytes], needed: int | None = None) -> None:
    """Write all bytes of an open file, 1 MiB at a time.

    Args:
        needed: their number, for the message of a full disk.
    """
    with _published(path, needed) as temporary:
        descriptor = open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(source, file, 2**20)


def write_bytes(path: Path, data: bytes) -> None:
    write_stream(path, io.BytesIO(data), len(data))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file line by line; only one line is in memory."""
    with _published(path) as temporary:
        descriptor = open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON with sorted keys; NaN is an error."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Tensors are made contiguous; no two may share memory."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    num_bytes = sum(tensor.nbytes for tensor in contiguous.values())
    with _published(path, num_bytes) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)


def copy_file(source: Path, target: Path) -> None:
    with os.fdopen(open_plain(source, follow=True), "rb") as file:
        write_stream(target, file, os.fstat(file.fileno()).st_size)


def make_readable(top: Path) -> None:
    """Set the modes of a file, or of a folder and its contents, to those of the user's umask, so others can read it."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (top, *top.rglob("*")):
        with disk_errors(path):
            # Not by its name, under which another user may have put a link to somebody's file since.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
                os.fchmod(descriptor, (0o777 if is_folder else 0o666) & ~umask)
            finally:
                os.close(descriptor)


def rename(path: Path, new: Path) -> None:
    """Give a file or folder another name in its folder."""
    with disk_errors(path):
        path.rename(new)


def remove_tree(path: Path) -> None:
    """Remove a file, a link, or a folder with its contents; a missing path is fine."""
    with disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def staged_name(name: str) -> str | None:
    """Return the final name of what a killed process left half-written under this name; None for other names."""
    match = STAGED.fullmatch(name)
    return match and match["final"]


def sha256_file(path: Path, *, follow: bool = True) -> str:
    """Hash a regular file, which may be reached by a link unless `follow` is False; SHA-256 in hex."""
    with os.fdopen(open_plain(path, follow=follow), "rb") as file:
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
            descriptor = open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            # Unbuffered, so that nothing stays in a buffer when a full disk has refused a line.
            self._file = os.fdopen(descriptor, "ab", buffering=0)
            try:
                if keep is not None:
                    self._file.truncate(keep)
                os.fsync(descriptor)
            except BaseException:
                self._file.close()
                raise

    def append(self, data: bytes, durable: bool = True) -> None:
        """Append bytes; `durable` also flushes everything appended so far to the disk.

        A disk that is full may take some of the bytes; `cut` takes them back.
        """
        with disk_errors(self._path, len(data)):
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            if durable:
                os.fsync(self._file.fileno())

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes."""
        if self.size != size:
            with disk_errors(self._path):
                self._file.truncate(size)

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
