"""`qpref schema`"""

from __future__ import annotations

import json

from click.testing import CliRunner

from qpref.cli import main
from qpref.hooks.manager import PluginHost
from qpref.recipe.schema import recipe_schema


def test_the_schema_is_printed_or_written(tmp_path):
    printed = CliRunner().invoke(main, ["schema"], catch_exceptions=False)
    assert json.loads(printed.stdout) == recipe_schema(PluginHost())
    file = tmp_path / "recipe.schema.json"
    written = CliRunner().invoke(main, ["schema", "--output", str(file)], catch_exceptions=False)
    assert written.stdout == f"schema: {file}\n"
    assert file.read_text() == printed.stdout
