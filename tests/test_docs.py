"""What the documents say is so."""

from __future__ import annotations

import importlib.util
import re
import types
from pathlib import Path

import pytest

from qpref.hooks.manager import CHECK, LOSS, READER, SINK

ROOT = Path(__file__).parents[1]


def test_the_recipe_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_recipe_reference", ROOT / "docs/make_recipe_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/recipe.md").read_text() == module.reference(), "run python docs/make_recipe_reference.py"


@pytest.mark.parametrize("kind", [LOSS, CHECK, SINK, READER], ids=lambda kind: kind.prefix)
def test_each_example_of_the_plugin_guide_yields_its_record(kind):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/plugins.md").read_text(), re.DOTALL)
    block = next(block for block in blocks if f"def {kind.hook}" in block)
    module = types.ModuleType("example")
    exec(block, module.__dict__)
    (record,) = getattr(module, kind.hook)()
    assert isinstance(record, kind.record)


def test_the_readme_tree_names_every_module():
    readme = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "qpref").rglob("*.py")):
        if path.name != "__init__.py":
            assert path.name in readme, f"{path.relative_to(ROOT)} is not in the README's tree"


def test_each_shipped_recipe_resolves_without_its_data_or_model(capsys):
    from qpref.recipe.resolve import make_plan

    for recipe in sorted((ROOT / "recipes").glob("*.toml")):
        assert make_plan(recipe).losses[0].plugin.record.name == "dpo"
