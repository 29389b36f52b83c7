"""File locks: one writer per run folder, one process per staged folder, and one process after the other.

The kernel releases a lock when its process ends, even if it is killed, and it holds between containers, whose
processes have the same ids.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qpref.disk_space import refused_write
from qpref.errors import DiskError, RunLockedError
from qpref.linux import fcntl
from qpref.opening import open_folder, open_plain

log = logging.getLogger("qpref")

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of a file system that has no locks."""
NAME = "LOCK"
PATIENCE_SECONDS, PAUSE_SECONDS = 0.2, 0.02
"""Time to try to lock a run, and between two tries: another start may look at the lock, or its holder be about to write
its name."""


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock of a run's folder, which is created if it isn't there.

    Yields:
        A descriptor of the folder.

    Raises:
        RunLockedError: another process holds it; the message has its pid and host.
        DiskError: the lock's file cannot be opened or written, or is a link; or the folder is another user's link.
    """
    path = folder / NAME
    try:
        opened, descriptor = _newest_locked(path)
    except OSError as error:
        raise DiskError(f"{path}: cannot be locked: {error.strerror or error}") from error
    holder = f"pid {os.getpid()} on {socket.gethostname()}\n".encode()
    try:
        try:
            if not excludes(path, opened):
                log.warning("%s: locks don't hold on this file system; start no second process in this folder", folder)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder, 0)
        except OSError as error:
            raise refused_write(path, error, len(holder)) from error
        yield opened
    finally:
        os.close(descriptor)
        os.close(opened)


def refuse_held(folder: Path) -> None:
    """Refuse a run's folder that another process writes, without taking its lock.

    Raises:
        RunLockedError: another process holds it.
    """
    path, patience_ends = folder / NAME, time.monotonic() + PATIENCE_SECONDS
    while (held := _held_by_another(path)) is not None:
        if time.monotonic() > patience_ends:
            raise held
        time.sleep(PAUSE_SECONDS)


def _held_by_another(path: Path) -> RunLockedError | None:
    try:
        descriptor = open_plain(path)
    except OSError:
        return None  # there is none, or `locked` tells what is wrong with it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _refusal(path, descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _refusal(path: Path, descriptor: int) -> RunLockedError:
    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    return RunLockedError(f"{path.parent}: another process is writing this run ({holder})")


@contextmanager
def in_turn(path: Path, work: str, *, removed: bool = False) -> Iterator[None]:
    """Hold a lock that other processes of this machine wait for: what the first one caches, the others read.

    Nobody waits where the disk refuses the lock's file, or has no locks.

    Args:
        work: of the process that holds the lock, for a message to those that wait.
        removed: the lock's file is deleted at the end.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = _waited_for(path, work)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        if removed:
            with suppress(OSError):
                path.unlink()  # while it is locked: those that wait for it then see that it has lost its name
        os.close(descriptor)


def _waited_for(path: Path, work: str) -> int:
    """Open and lock the file that has this name at the moment when the lock is taken."""
    while True:
        descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
        try:
            if not take(descriptor):
                log.info("waiting for another process, which %s", work)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_named(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def take(descriptor: int) -> bool:
    """Take the lock of an open file, without waiting; False where another process holds it.

    On a file system without locks it counts as taken.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def is_named(path: Path, descriptor: int) -> bool:
    """Return whether an open file still has this name: another process may have removed or replaced it."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _newest_locked(path: Path) -> tuple[int, int]:
    """Open and lock the file that has this name at the moment when the lock is taken; returns its folder's descriptor
    and its own."""
    patience_ends = time.monotonic() + PATIENCE_SECONDS
    while True:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with ExitStack() as opened:
            try:
                folder = _closed_by(opened, open_folder(path.parent))
                descriptor = _closed_by(opened, open_plain(Path(path.name), os.O_RDWR | os.O_CREAT, folder=folder))
            except FileNotFoundError:
                continue  # its holder has removed the folder in between
            if take(descriptor):
                if is_named(path, descriptor):
                    opened.pop_all()
                    return folder, descriptor
                continue
            held = _refusal(path, descriptor)
        if time.monotonic() > patience_ends:
            raise held
        time.sleep(PAUSE_SECONDS)


def _closed_by(stack: ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def excludes(path: Path, folder: int | None = None) -> bool:
    """Return whether a lock that this process holds keeps out a second opening of the file.

    Args:
        folder: descriptor of its folder, if there is one.
    """
    if folder is not None:
        path = Path(path.name)
    # NFS takes an exclusive lock on a file open for writing alone.
    second = open_plain(path, os.O_RDWR, folder=folder)
    try:
        return not take(second)
    finally:
        os.close(second)
