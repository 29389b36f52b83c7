"""Variables by which torchrun and its like tell a process of the others; importing this loads no torch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from qpref.errors import RecipeError


def num_processes() -> int:
    """Return the number of processes of this run, as the launcher tells it; 1 where none started this process."""
    return number("WORLD_SIZE", 1)


def is_first() -> bool:
    """Return whether this process is rank 0 of its run, as the launcher tells it, or alone."""
    return number("RANK", 0) == 0 or num_processes() == 1


def is_restart() -> bool:
    """Return whether torchrun started this process again, after the processes of the run had failed."""
    return number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def job_name() -> str | None:
    """Name what torchrun started, the same after each of its restarts; None where it didn't start this process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None or name.lower() != "none":
        return name
    parent = os.getppid()  # torchrun itself: without --rdzv-id its jobs have no name
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {parent} {started}"


def number(name: str, default: int) -> int:
    """Read a launcher's variable.

    Raises:
        RecipeError: it is no number.
    """
    value = os.environ.get(name, "")
    if value and not value.isdecimal():
        raise RecipeError(f"{name} is {value!r}, not a number: start the processes with torchrun")
    return int(value or default)
