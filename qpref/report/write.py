"""Write the report of some runs as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref import fsio
from qpref.errors import RecipeError
from qpref.report.frame import write_page
from qpref.report.page import ExtraResults, render
from qpref.report.read import read_json, read_runs
from qpref.training.folder import RunFolder

VERDICT = "merge.json"
SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """Paths of other commands' output: merged model folders, and files of `qpref eval` and `qpref generate`.

    Attributes:
        rounds: the rows of a table on the rounds that the runs are, each a text by column.
    """

    merged: Sequence[Path] = ()
    evaluations: Sequence[Path] = ()
    samples: Sequence[Path] = ()
    rounds: Sequence[Mapping[str, str]] = ()


def write_report(
    runs: Sequence[Path], output: Path | None = None, extras: Extras | None = None, refresh: int | None = None
) -> Path:
    """Write the report of some runs and return its path.

    Args:
        runs: run folders, finished or not.
        output: the file, which is replaced if it exists; by default `report.html` in the folder of a single run.
        refresh: seconds after which the page reloads itself; None for never.

    Raises:
        RecipeError: a folder is no run, or several runs are given without `output`.
        DataError: a file cannot be read.
    """
    extras = extras or Extras()
    path = report_path(runs, output)
    records = read_runs(runs)
    merged = [*extras.merged, *(run for run in runs if (run / VERDICT).is_file())]
    page = render(
        records,
        ExtraResults(
            merged=dict(map(_read_verdict, merged)),
            evaluations=_read(extras.evaluations),
            samples=_read(extras.samples),
            rounds=extras.rounds,
        ),
        refresh,
    )
    fsio.make_folder(path.absolute().parent)
    write_page(path, page)
    return path


def report_path(runs: Sequence[Path], output: Path | None) -> Path:
    """Return the file of a report.

    Raises:
        RecipeError: several runs have no default, or the file's name isn't that of an HTML file.
    """
    if output is None and len(runs) != 1:
        raise RecipeError("a report of several runs has no default path", "name its file with --output")
    path = output if output is not None else RunFolder(runs[0]).report
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise RecipeError(f"--output {path}: expected the name of an .html file")
    return path


def _read(paths: Sequence[Path]) -> dict[str, Any]:
    return {str(path): read_json(path, follow=True) for path in paths}


def _read_verdict(path: Path) -> tuple[str, Any]:
    """Read merge.json of a merged folder, or a file that the user has named."""
    if not path.is_dir():
        return str(path), read_json(path, follow=True)
    return str(path / VERDICT), read_json(path / VERDICT)
