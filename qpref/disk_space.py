"""Space on a disk: how much is free, and messages that say what a write needs beside it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from qpref.errors import DiskError

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
FULL = (errno.ENOSPC, errno.EDQUOT)
HINT = "free some space; a run continues with --resume"
HINTS = {
    errno.ENOSPC: HINT,
    errno.EDQUOT: HINT,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f); a run continues with --resume",
}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def free_bytes(path: Path) -> int | None:
    """Return the bytes that are free for this user at `path`, which needn't exist; None where they aren't known."""
    try:
        folder = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def refuse_full(path: Path, needed: int) -> None:
    """Refuse a write that doesn't fit.

    Args:
        needed: bytes.

    Raises:
        DiskError: with the bytes needed and free.
    """
    free = free_bytes(path)
    if free is not None and needed > free:
        raise DiskError(f"{path}: needs {shown_bytes(needed)}, and {shown_bytes(free)} are free", HINT)


def refused_write(path: Path, error: Exception, needed: int | None = None) -> DiskError:
    """Explain a write that failed, with the space that it needs and the space that there is where the disk is full.

    Args:
        error: of the operating system, or one of Rust's that holds its number in the message.
        needed: bytes of the whole write; None where they aren't known.
    """
    number = _number(error)
    reason = os.strerror(number) if number else str(error)
    amounts = []
    if number in FULL:
        amounts += [f"{shown_bytes(needed)} needed"] if needed is not None else []
        free = free_bytes(path) if number == errno.ENOSPC else None  # a quota's rest isn't what the disk has free
        amounts += [f"{shown_bytes(free)} free"] if free is not None else []
    space = f" ({', '.join(amounts)})" if amounts else ""
    return DiskError(f"{path}: cannot be written: {reason}{space}", HINTS.get(number or 0))


def full_by(output: str) -> int | None:
    """Return the error number of a full disk, if another program's output says that it met one; else None."""
    return next((number for number in FULL if os.strerror(number) in output), None)


def shown_bytes(count: int) -> str:
    """Format a number of bytes: "1.5 GiB", "812 bytes"."""
    for size, unit in UNITS:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _number(error: Exception) -> int | None:
    """Return the operating system's number of an error, or None."""
    if isinstance(error, OSError):
        # NotPlainError has a sentence of its own in the place of the system's
        return error.errno if error.strerror == os.strerror(error.errno or 0) else None
    found = _RUST_ERROR.search(str(error))
    return int(found[1]) if found else None
