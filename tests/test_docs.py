"""What the documents say is so."""

from __future__ import annotations

import importlib.util
import re
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from qpref.cli import main
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


RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_each_shipped_recipe_resolves_without_its_data_or_model(recipe):
    done = CliRunner().invoke(main, ["train", str(recipe), "--dry-run"], catch_exceptions=False)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"# run folder: runs/{recipe.stem}" in done.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_what_a_shipped_recipe_names_is_in_the_repository_or_public(recipe):
    from qpref.recipe.resolve import make_plan

    plan = make_plan(recipe)
    for location in (plan.recipe.model.base, *(source.location for source in plan.sources)):
        is_public = location.startswith(("pypi:", "hf:")) or re.fullmatch(r"[\w.-]+/[\w.-]+", location)
        assert is_public or Path(location).is_file(), location


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_shipped_recipe_names_itself_in_its_commands(recipe):
    named = re.findall(r"recipes/[\w.-]+\.toml", recipe.read_text())
    assert f"recipes/{recipe.name}" in named
    assert all((ROOT / name).is_file() for name in named)
