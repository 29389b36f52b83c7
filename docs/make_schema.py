"""Write recipes/recipe.schema.json, with the built-in plugins' options alone: `python docs/make_schema.py`."""

from __future__ import annotations

import json
from pathlib import Path

from qpref.hooks.manager import PluginHost
from qpref.recipe.schema import recipe_schema

FILE = Path(__file__).parents[1] / "recipes/recipe.schema.json"


def text() -> str:
    """Return the file's content."""
    return json.dumps(recipe_schema(PluginHost(), "qpref"), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
