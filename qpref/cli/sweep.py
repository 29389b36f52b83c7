"""`qpref sweep`"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qpref import locks
from qpref.cli import completion
from qpref.cli.options import json_option, set_option
from qpref.cli.output import echo
from qpref.cli.tables import print_table
from qpref.errors import RecipeError

if TYPE_CHECKING:
    from qpref.sweep.points import Point
    from qpref.sweep.training import Result

ONE_PROCESS = "qpref sweep trains on one GPU, one run after the other"


@click.command("sweep")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--over",
    "axes",
    multiple=True,
    metavar="TABLE.KEY=VALUE,VALUE",
    help="Train with each of these values; repeatable, for every combination.",
    shell_complete=completion.settings,
)
@set_option
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the runs.  [default: runs/<recipe>-sweep]")
@click.option("--resume", is_flag=True, help="Continue: keep finished runs, resume and train the others.")
@click.option("--overwrite", is_flag=True, help="Replace the runs in their folders.")
@click.option("--dry-run", is_flag=True, help="Check the recipe at every point and list the runs, without training.")
@click.option("--gpus", type=int, hidden=True)
@click.option("--quiet", "-q", is_flag=True, help="Print warnings, errors and the table alone.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    recipe: Path,
    axes: tuple[str, ...],
    overrides: tuple[str, ...],
    output: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    gpus: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train RECIPE at several values of its settings, over one base in memory.

    Each run has a folder of its own and equals what `qpref train --set` gives. A run that fails doesn't stop the
    others; the exit code is then that of the first failure.
    """
    from qpref.sweep.points import make_points, parse_axes

    if gpus is not None and gpus != 1:
        raise RecipeError(f"--gpus {gpus}: {ONE_PROCESS}", "start a sweep of its own on each GPU, with other values")
    folder = output or Path("runs") / f"{recipe.stem}-sweep"
    if not dry_run:
        locks.refuse_held(folder)  # in a moment: plugins and the trainer import torch
    points = make_points(recipe, parse_axes(axes), overrides, folder)
    if dry_run:
        _print_points(points, folder, as_json)
    for point in points:
        if point.refusal is not None:
            echo(f"error: {point.name}: {point.refusal}", err=True)
    if dry_run:
        context.exit(next((point.refusal.exit_code for point in points if point.refusal is not None), 0))
    if quiet:
        logging.getLogger("qpref").setLevel(logging.WARNING)
    if quiet or as_json:
        points = [without_metrics(point) for point in points]
    results = _train(points, folder, resume, overwrite)
    if as_json:
        echo(json.dumps([result_as_json(result, folder) for result in results], indent=2))
    else:
        print_results(results, folder)
    context.exit(next((result.exit_code for result in results if result.exit_code), 0))


def _train(points: Sequence[Point], folder: Path, resume: bool, overwrite: bool) -> list[Result]:
    """Train the points, print failures as they come, and write the report of the finished runs.

    Returns:
        The results of all points, in their order.
    """
    from qpref.cli import quiet_transformers
    from qpref.report.write import write_report
    from qpref.sweep.training import REPORT, claimed_sweep, refused, train_points

    quiet_transformers()
    results = {point.name: refused(point) for point in points if point.refusal is not None}
    with claimed_sweep(folder, points, resume, overwrite):
        for result in train_points(points, resume=resume, overwrite=overwrite):
            results[result.point.name] = result
            if result.error is not None:
                echo(f"error: {result.point.name}: {result.error}", err=True)
            if finished := [folder / point.name for point in points if _is_finished(results.get(point.name))]:
                write_report(finished, folder / REPORT)
    return [results[point.name] for point in points]


def without_metrics(point: Point) -> Point:
    """Let a point's run print no metrics."""
    return point if point.plan is None else replace(point, plan=replace(point.plan, printing="nothing"))


def _is_finished(result: Result | None) -> bool:
    return result is not None and result.error is None


def _print_points(points: Sequence[Point], folder: Path, as_json: bool) -> None:
    if as_json:
        described = [
            {
                "run": str(folder / point.name),
                "set": list(point.overrides),
                "error": None if point.refusal is None else str(point.refusal),
            }
            for point in points
        ]
        echo(json.dumps(described, indent=2))
        return
    print_table([("RUN", "STATE"), *((point.name, "refused" if point.refusal else "ready") for point in points)])
    echo(f"\n# sweep folder: {folder}")


def result_as_json(result: Result, folder: Path) -> dict[str, Any]:
    """Describe a run of a folder of runs, with its held-out numbers where it is finished."""
    from qpref.report.outcome import as_json
    from qpref.report.read import read_run

    name = result.point.name
    outcome = as_json(read_run(folder / name, name)) if result.error is None else {"run": str(folder / name)}
    return outcome | {"set": list(result.point.overrides), "error": result.error, "exit_code": result.exit_code}


def print_results(results: Sequence[Result], folder: Path) -> None:
    """Print a table of the runs in a folder, and where their report is."""
    from qpref.report.outcome import accuracy_column, heldout_value, tokens_and_seconds
    from qpref.report.read import read_run
    from qpref.report.text import number_text, time_text
    from qpref.sweep.training import REPORT

    finished = {name: read_run(folder / name, name) for name in (each.point.name for each in results if not each.error)}
    measure, accuracies = accuracy_column(list(finished.values())) if finished else ("", [])
    shares = dict(zip(finished, accuracies, strict=True))
    rows = [("RUN", " ".join(["ACCURACY", *measure.upper().split(), "(95 %)"]), "MARGIN", "LOSS", "TIME")]
    for result in results:
        name = result.point.name
        if name not in finished:
            rows.append((name, f"failed, exit code {result.exit_code}", "", "", ""))
            continue
        run = finished[name]
        margin, loss = (number_text(heldout_value(run, metric)) for metric in ("rewards/margins", "loss"))
        rows.append((name, shares[name], margin, loss, time_text(tokens_and_seconds(run)[1])))
    print_table(rows)
    if finished:
        echo(f"report: {folder / REPORT}")
