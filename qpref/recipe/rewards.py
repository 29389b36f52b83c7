"""A reward and its options, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpref.recipe.choices import Choice
from qpref.recipe.resolve import Resolution


def choose_reward(name: str, options: Mapping[str, Any]) -> Choice:
    """Resolve a reward and its options.

    Raises:
        RecipeError: none of that name is installed, or an option has an invalid value.
        PluginError: it is broken, or offered twice.
    """
    return Resolution(f"the reward '{name}'", Path.cwd(), Path()).resolve_reward(name, options)
