"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from qpref.cli import completion

set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Change one value of the recipe; repeatable.",
    shell_complete=completion.settings,
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


def sampling_options(max_new_tokens: int, temperature: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the decorator that adds the options of generation, with these defaults."""
    options: tuple[Callable[[Any], Any], ...] = (
        click.option("--max-new-tokens", type=click.IntRange(min=1), default=max_new_tokens, show_default=True,
                     help="Most tokens of an answer."),
        click.option("--temperature", type=click.FloatRange(min=0), default=temperature, show_default=True,
                     help="Sampling temperature; 0 is greedy."),
        click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True,
                     help="Nucleus sampling: sample from the most probable tokens up to this total probability."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed for sampling."),
    )  # fmt: skip

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _columns(context: click.Context, parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    """Parse `NAME=COLUMN`, of which there may be several, to a mapping."""
    columns: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (equals and name and column):
            raise click.BadParameter(f"{pair!r} is not NAME=COLUMN, such as prompt=question", context, parameter)
        if name in columns:
            raise click.BadParameter(f"{name!r} is mapped twice", context, parameter)
        columns[name] = column
    return columns


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how one source of data is read, each a key of `[data]`."""
    options: tuple[Callable[[Any], Any], ...] = (
        click.option("--reader", metavar="NAME", shell_complete=completion.readers,
                     help="Reader of a bare data file; default: by its suffix."),
        click.option("--format", "--shape", "format", metavar="NAME", shell_complete=completion.row_formats,
                     help="Row format of a bare data file; default: by its columns."),
        click.option("--columns", multiple=True, metavar="NAME=COLUMN", callback=_columns,
                     help="Read a bare data file's COLUMN as qpref's NAME (prompt=question); repeatable."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command
