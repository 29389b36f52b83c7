"""`qpref runs`"""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

import click

from qpref.cli.options import json_option
from qpref.cli.output import echo

INDENT = "    "


@click.command("runs")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@json_option
def command(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER and the folders in it, by default in runs, the newest last.

    Each has its state, what was trained, and its verdict. A sweep's runs are among them.
    """
    from qpref.report.listing import list_runs
    from qpref.report.outcome import as_json as outcome_json
    from qpref.report.outcome import state, trained, verdict

    records, unreadable = list_runs(folder)
    for error in unreadable:
        echo(f"warning: {error}", err=True)
    if as_json:
        echo(json.dumps([outcome_json(record) for record in records], indent=2))
        return
    if not records:
        echo(f"{folder}: no runs")
    for record in records:
        echo(f"{record.path}: {state(record)}")
        _print_indented(", ".join(f"{name} {value}" for name, value in trained(record)))
        _print_indented(verdict(record))


def _print_indented(text: str) -> None:
    width = shutil.get_terminal_size().columns
    echo(textwrap.fill(text, max(40, width), initial_indent=INDENT, subsequent_indent=INDENT))
