"""The files of a recipe's `[plugins]`, loaded before any other table names what they offer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qpref.errors import RecipeError
from qpref.hooks.plugin_files import PluginFile, load_plugin_file
from qpref.recipe.paths import Locations
from qpref.recipe.plugins_section import PluginsSection
from qpref.recipe.problems import Problem


def load_files(table: Any, locations: Locations) -> tuple[list[PluginFile], list[Problem]]:
    """Load the files that a recipe's table `plugins` names; a table of another form is a problem noted elsewhere.

    Raises:
        PluginError: a file's code raises, or offers no plugin.
    """
    try:
        named = PluginsSection.model_validate({} if table is None else table).tables()
    except ValidationError:
        return [], []
    files: list[PluginFile] = []
    problems: list[Problem] = []
    for index, each in enumerate(named):
        path = Path(locations.path(each.path))
        if path.name in [file.path.name for file in files]:
            problems.append(Problem("plugins", f"files.{index}", f"a second file named {path.name}"))
            continue
        try:
            files.append(load_plugin_file(path, each.sha256))
        except RecipeError as error:
            problems.append(Problem("plugins", f"files.{index}", error.what))
    return files, problems
