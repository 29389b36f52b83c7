"""Runs in a folder and the folders below it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qpref.errors import QprefError, RecipeError
from qpref.report.cells import cell_text
from qpref.report.read import RunRecord, read_run
from qpref.training.folder import RunFolder

MAX_LEVELS = 4
"""Levels of folders that are searched; a sweep's runs are on the second."""


def list_runs(folder: Path) -> tuple[list[RunRecord], list[str]]:
    """Read the runs in a folder, or the one that it is, the newest last.

    Links inside the folder are not followed.

    Returns:
        The runs, and the reason for each run that cannot be read.

    Raises:
        RecipeError: there is no such folder.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder", "qpref train makes runs in runs/ unless --output names another")
    runs, unreadable = [], []
    for path in sorted(_run_folders(folder, MAX_LEVELS)):
        try:
            runs.append(read_run(path, path.name))
        except QprefError as error:
            unreadable.append(error.what)
    return sorted(runs, key=lambda run: cell_text(run.facts.get("created"))), unreadable


def _run_folders(folder: Path, levels: int) -> Iterator[Path]:
    if RunFolder(folder).run_json.is_file():
        yield folder
        return
    try:
        entries = list(os.scandir(folder)) if levels else []
    except OSError:
        return  # another user's
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _run_folders(folder / entry.name, levels - 1)
