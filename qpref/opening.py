"""Open files that somebody else may have put there: regular files alone, through no link.

A run folder, a shared cache, a checkpoint or an adapter can come from anybody. A link there leads outside, a FIFO
blocks for ever, a device never ends; `open_plain` refuses all of them before a byte is read or written.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
WRITING = os.O_WRONLY | os.O_RDWR
MAX_LINKS = 40
"""Links on the way to a folder, as the kernel follows them."""
TEXT_BYTES = 64 * 2**20
"""Most bytes of a text file that is read at once: a recipe, run.json, a manifest."""


class NotPlainError(OSError):
    """A path that is no regular file of its own, or a larger one than it may be; `strerror` says what it is."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(errno.EINVAL, problem, str(path))


def open_plain(
    path: Path, flags: int = os.O_RDONLY, mode: int = 0o600, *, follow: bool = False, folder: int | None = None
) -> int:
    """Open a regular file and return its descriptor.

    Args:
        flags: of `os.open`; O_TRUNC would empty the file before it is known to be one.
        follow: follow links, for a file that the user has named.
        folder: descriptor of the folder that a relative path is in; None for the current one.

    Raises:
        NotPlainError: it is a link, a folder, a FIFO, a socket or a device, or a file that is to be changed has a
            second name.
        OSError: it cannot be opened.
    """
    assert not flags & os.O_TRUNC
    if kind := kind_of(path, follow=follow, folder=folder):  # before it is opened, since that can act on a device
        raise NotPlainError(path, f"it is {kind}, not a regular file")
    safely = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags | safely, mode, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # became one since the first look
            raise NotPlainError(path, "it is not a regular file") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotPlainError(path, "it is not a regular file")
        if flags & WRITING and status.st_nlink > 1:
            raise NotPlainError(path, "it has a second name (a hard link), and writing would change both")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_folder(path: Path) -> int:
    """Open a folder and return its descriptor; what is opened in it by that is in this folder, whatever its name leads
    to by then.

    Raises:
        NotPlainError: it is another user's link, which they can lead elsewhere at any time.
        OSError: it cannot be opened, or is no folder.
    """
    for _ in range(MAX_LINKS):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except NotADirectoryError:
            path = _target(path)
    raise NotPlainError(path, "it is a link that leads in a circle")


def _target(path: Path) -> Path:
    """Return what a link leads to."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISLNK(status.st_mode):
            raise NotPlainError(path, "it is not a folder")
        if status.st_uid not in (os.geteuid(), 0):
            raise NotPlainError(path, "it is a link that another user has made")
        return path.parent / os.readlink("", dir_fd=descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: Path, limit: int = TEXT_BYTES, *, follow: bool = False) -> bytes:
    """Read a whole regular file of at most `limit` bytes.

    Raises:
        NotPlainError: as for `open_plain`, or it is larger.
        OSError: it cannot be read.
    """
    with os.fdopen(open_plain(path, follow=follow), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise NotPlainError(path, f"it is larger than {limit // 2**20} MiB")
    return content


def read_text(path: Path, limit: int = TEXT_BYTES, *, follow: bool = False) -> str:
    """Read a whole UTF-8 text, as `read_bytes`.

    Raises:
        NotPlainError, OSError: as for `read_bytes`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, limit, follow=follow).decode()


def read_object(path: Path, limit: int = TEXT_BYTES, *, follow: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        NotPlainError, OSError: as for `read_bytes`.
        ValueError: it is no JSON, or no object.
    """
    try:
        value = json.loads(read_text(path, limit, follow=follow))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def real_path(path: Path) -> Path:
    """Return the absolute path without links; one that leads in a circle stays, and cannot be opened.

    `Path.resolve` raises RuntimeError there before Python 3.13.
    """
    return Path(os.path.realpath(path))


def is_nested(value: object, depth: int) -> bool:
    """Return whether lists and dicts are nested more than `depth` deep; found without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [one for each in inner for one in each if isinstance(one, dict | list)]
        if not level:
            return False
    return True


def kind_of(path: Path, *, follow: bool = False, folder: int | None = None) -> str | None:
    """Name what a path is where it isn't a regular file ("a symbolic link"); None for a file and for nothing."""
    try:
        mode = os.stat(path, dir_fd=folder, follow_symlinks=follow).st_mode
    except FileNotFoundError:
        return None
    return next((kind for is_kind, kind in KINDS if is_kind(mode)), None)
