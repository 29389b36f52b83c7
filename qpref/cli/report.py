"""`qpref report`"""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH)
@click.option("--output", type=PATH, help="The file to write; of one run: report.html in its folder.")
@click.option("--merged", multiple=True, type=PATH, help="A folder that qpref merge wrote, for its verdict.")
@click.option("--eval", "evaluations", multiple=True, type=PATH, help="A file that qpref eval --json wrote.")
@click.option("--samples", multiple=True, type=PATH, help="A file that qpref generate --json wrote.")
def command(
    runs: tuple[Path, ...],
    output: Path | None,
    merged: tuple[Path, ...],
    evaluations: tuple[Path, ...],
    samples: tuple[Path, ...],
) -> None:
    """Write one HTML page of one or several runs, finished or not.

    The page is a single file and loads nothing.
    """
    from qpref.report.write import Extras, write_report

    extras = Extras(merged=merged, evaluations=evaluations, samples=samples)
    click.echo(f"report: {write_report(runs, output, extras)}")
