"""`qpref rounds`"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import click

from qpref import locks
from qpref.cli.options import json_option, set_option
from qpref.cli.output import echo
from qpref.cli.sweep import print_results, result_as_json, without_metrics


@click.command("rounds")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--rounds", "count", type=click.IntRange(min=1), required=True, metavar="N", help="Number of rounds.")
@set_option
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the runs.  [default: runs/<recipe>-rounds]")
@click.option("--resume", is_flag=True, help="Continue: keep finished rounds, resume and train the others.")
@click.option("--overwrite", is_flag=True, help="Replace the runs in their folders.")
@click.option("--quiet", "-q", is_flag=True, help="Print warnings, errors and the table alone.")
@json_option
def command(
    recipe: Path,
    count: int,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train RECIPE in rounds: each starts from the adapter of the one before, which is its reference.

    Each round has a folder of its own, and is a run like any other. The first round that fails ends the command.
    """
    folder = output or Path("runs") / f"{recipe.stem}-rounds"
    locks.refuse_held(folder)  # in a moment: plugins and the trainer import torch
    from qpref.cli import quiet_transformers
    from qpref.report.write import write_report
    from qpref.sweep.rounds import make_rounds, train_rounds
    from qpref.sweep.training import REPORT, Result, claimed_sweep

    points = make_rounds(recipe, count, overrides, folder)
    if quiet:
        logging.getLogger("qpref").setLevel(logging.WARNING)
    if quiet or as_json:
        points = [without_metrics(point) for point in points]
    quiet_transformers()
    finished = []
    with claimed_sweep(folder, points, resume, overwrite):
        for point in train_rounds(points, resume=resume, overwrite=overwrite):
            finished.append(folder / point.name)
            write_report(finished, folder / REPORT)
    results = [Result(point=point) for point in points]
    if as_json:
        echo(json.dumps([result_as_json(result, folder) for result in results], indent=2))
    else:
        print_results(results, folder)
