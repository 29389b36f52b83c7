"""Plain-text tables and option lists for the terminal."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence

from qpref.cli.output import echo

NARROWEST = 20
"""Characters that a wrapped last column has at least."""


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows with aligned columns, two spaces apart.

    On a terminal the last column is wrapped to its width; elsewhere each row is a line.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last = max(1, widths[-1])  # no text at all in the last column is a width that textwrap refuses
    if sys.stdout.isatty():
        last = max(NARROWEST, shutil.get_terminal_size().columns - sum(widths[:-1]) - 2 * (len(widths) - 1))
    for *cells, text in rows:
        first, *others = textwrap.wrap(text, last) or [""]
        echo("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)), first]).rstrip())
        for line in others:
            echo(" " * (sum(widths[:-1]) + 2 * (len(widths) - 1)) + line)


def options_text(options: Mapping[str, object]) -> str:
    """Format options as in a recipe: `beta = 0.3, wpo = true`."""
    return ", ".join(f"{key} = {toml_text(value)}" for key, value in options.items()) or "the defaults"


def toml_text(value: object) -> str:
    """Format a value as TOML would; `none` for None."""
    return "none" if value is None else json.dumps(value, default=str)
