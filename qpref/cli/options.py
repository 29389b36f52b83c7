"""Options that several commands share, each defined once."""

from __future__ import annotations

import click

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Change one value of the recipe; repeatable."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
base_option = click.option("--base", metavar="FOLDER|ID", help="Base of an adapter, instead of the one that it names.")
quantization_option = click.option(
    "--quantization",
    type=click.Choice(["nf4", "none"]),
    default="none",
    show_default=True,
    help="Quantization of a plain model, or of an adapter's base; a run keeps its own.",
)
