"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

set_option: Decorator = click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Change one value of the recipe; repeatable."
)
json_object_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
json_array_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
