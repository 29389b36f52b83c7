"""Rewriting of a report while its runs are in training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from qpref import locks
from qpref.errors import RunLockedError
from qpref.report.write import Extras, write_report


def watch_report(runs: Sequence[Path], output: Path | None, extras: Extras, seconds: int) -> Path:
    """Write the report every few seconds while a process trains one of the runs, and once more at the end.

    The page reloads itself until the last one, which is written after an exception such as KeyboardInterrupt too.

    Raises:
        RecipeError, DataError: as for `write_report`.
    """
    try:
        while any(map(is_in_training, runs)):
            write_report(runs, output, extras, refresh=seconds)
            time.sleep(seconds)
    finally:
        path = write_report(runs, output, extras)
    return path


def is_in_training(run: Path) -> bool:
    """Return whether a process holds the run's lock."""
    try:
        locks.refuse_held(run)
    except RunLockedError:
        return True
    return False
