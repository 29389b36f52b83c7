"""A reward and its options, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpref.errors import RecipeError
from qpref.hooks.plugin_files import load_plugin_file
from qpref.hooks.reward import Reward
from qpref.opening import real_path
from qpref.recipe.choices import Choice
from qpref.recipe.resolve import Resolution


def choose_reward(name: str, options: Mapping[str, Any]) -> Choice:
    """Resolve a reward and its options.

    Args:
        name: of an installed reward; or, ending in .py, a file with one reward, which is executed.

    Raises:
        RecipeError: none of that name is installed, the file has none or several, or an option has an invalid value.
        PluginError: it is broken, or offered twice.
    """
    resolution, rewards = Resolution(f"the reward '{name}'", Path.cwd(), Path()), []
    if name.endswith(".py"):
        plugins = load_plugin_file(real_path(Path(name))).plugins
        rewards = [plugin for plugin in plugins if isinstance(plugin.record, Reward)]
        if len(rewards) != 1:
            found = ", ".join(plugin.record.name for plugin in rewards) or "none"
            raise RecipeError(f"{name}: expected one reward, found {found}", "put each reward in a file of its own")
        name = rewards[0].record.name
    return resolution.resolve_reward(name, options, rewards)
