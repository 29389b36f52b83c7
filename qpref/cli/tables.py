"""Plain-text tables and option lists for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from qpref.cli.output import echo


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows with aligned columns, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def options_text(options: Mapping[str, object]) -> str:
    """Format options as in a recipe: `beta = 0.3, wpo = true`."""
    return ", ".join(f"{key} = {toml_text(value)}" for key, value in options.items()) or "the defaults"


def toml_text(value: object) -> str:
    """Format a value as TOML would; `none` for None."""
    return "none" if value is None else json.dumps(value, default=str)
