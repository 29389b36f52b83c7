"""`qpref init-plugin`"""

from __future__ import annotations

from pathlib import Path

import click

from qpref.cli.output import echo

KINDS = ("loss", "check", "read", "sink", "reward")


@click.command("init-plugin")
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("name")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Folder of the new distribution.  [default: qpref-NAME]",
)
def command(kind: str, name: str, output: Path | None) -> None:
    """Write a new plugin's distribution: pyproject.toml, a package that works, and tests that pass.

    KIND is loss, check (a validator), read (a reader), sink or reward. NAME is the plugin's name in a recipe, or that
    of the reward for `qpref sample`.
    """
    from qpref.new_plugin.write import write_plugin

    files = write_plugin(kind, name, output)
    root = files[0].parent
    for file in files:
        echo(f"written: {file}")
    echo(f'next: cd {root} && pip install -e ".[dev]" && pytest && qpref plugins check {kind}-{name}')
