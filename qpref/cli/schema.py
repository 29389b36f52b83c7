"""`qpref schema`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from qpref.cli.output import echo


@click.command("schema")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="File to write.  [default: print it]",
)
def command(output: Path | None) -> None:
    """Print the JSON Schema of a recipe, with the options of the installed plugins.

    Editors complete and check a recipe whose first line is `#:schema FILE`, a path relative to it.
    """
    from qpref.fsio import write_text
    from qpref.hooks.manager import PluginHost
    from qpref.recipe.schema import recipe_schema

    text = json.dumps(recipe_schema(PluginHost()), indent=2)
    if output is None:
        echo(text)
    else:
        write_text(output, f"{text}\n")
        echo(f"schema: {output}")
