"""`qpref report`"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click

from qpref.cli.output import echo

PATH = click.Path(path_type=Path)


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH)
@click.option("--output", type=PATH, help="HTML file to write.  [default for one run: report.html in its folder]")
@click.option(
    "--merged", multiple=True, type=PATH, help="Merged model of qpref merge, to show its verdict; repeatable."
)
@click.option(
    "--eval",
    "evaluations",
    multiple=True,
    type=PATH,
    help="Output of qpref eval --json, to show its tables; repeatable.",
)
@click.option(
    "--samples", multiple=True, type=PATH, help="Output of qpref generate --json, to show its answers; repeatable."
)
@click.option("--watch", is_flag=True, help="Rewrite the report while a run is in training; the page reloads itself.")
@click.option(
    "--every", type=click.IntRange(min=1), default=10, show_default=True, help="Seconds between two reports of --watch."
)
def command(
    runs: tuple[Path, ...],
    output: Path | None,
    merged: tuple[Path, ...],
    evaluations: tuple[Path, ...],
    samples: tuple[Path, ...],
    watch: bool,
    every: int,
) -> None:
    """Write an HTML report of one or several runs, finished or not.

    The report is a single file that loads nothing from elsewhere.
    """
    from qpref.report.write import Extras, report_path, write_report

    extras = Extras(merged=merged, evaluations=evaluations, samples=samples)
    if watch:
        from qpref.report.watch import watch_report

        echo(f"report: {report_path(runs, output)}, rewritten every {every} s while a run is in training")
        with suppress(KeyboardInterrupt):  # the usual end of a watch
            watch_report(runs, output, extras, every)
        return
    echo(f"report: {write_report(runs, output, extras)}")
