"""What the documents say is so."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner
from matrix import page
from matrix.cases import architectures

from qpref.cli import main
from qpref.hooks.manager import KINDS

ROOT = Path(__file__).parents[1]


def loaded(script):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"docs/{script}.py")
    module = sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_reference_is_up_to_date():
    reference = loaded("make_recipe_reference").reference()
    assert (ROOT / "docs/recipe.md").read_text() == reference, "run python docs/make_recipe_reference.py"


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.prefix)
def test_each_example_of_the_plugin_guide_yields_its_record(kind):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/plugins.md").read_text(), re.DOTALL)
    block = next(block for block in blocks if f"def {kind.hook}" in block)
    module = types.ModuleType("example")
    exec(block, module.__dict__)
    (record,) = getattr(module, kind.hook)()
    assert isinstance(record, kind.record)


def test_the_reliability_page_has_every_mutant():
    assert (ROOT / "docs/reliability.md").read_text() == loaded("make_reliability").page(), (
        "run python docs/make_reliability.py"
    )


def test_the_schema_of_recipes_is_up_to_date():
    assert (ROOT / "recipes/recipe.schema.json").read_text() == loaded("make_schema").text(), (
        "run python docs/make_schema.py"
    )


def test_the_page_about_other_tools_is_up_to_date():
    assert (ROOT / "docs/from-other-tools.md").read_text() == loaded("make_from_other_tools").page(), (
        "run python docs/make_from_other_tools.py"
    )


def test_the_architecture_page_has_every_module():
    assert (ROOT / "docs/architecture.md").read_text() == loaded("make_architecture").page(), (
        "run python docs/make_architecture.py"
    )


def test_the_readmes_table_of_cards_is_what_the_planner_says():
    assert loaded("make_card_table").table() in (ROOT / "README.md").read_text(), "run python docs/make_card_table.py"


FOR_GPUS = sorted(path for path in (ROOT / "recipes").glob("*.toml") if path.stem != "quickstart")


@pytest.mark.parametrize("recipe", FOR_GPUS, ids=lambda recipe: recipe.stem)
def test_a_recipes_planned_figures_are_what_the_planner_says(recipe):
    plans = loaded("make_recipe_plans")
    assert plans.LINE.search(recipe.read_text())
    assert plans.page(recipe) == recipe.read_text(), "run python docs/make_recipe_plans.py"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md"], ids=str
)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_exit_codes_are_those_of_the_code():
    from qpref import errors

    kinds = {errors.QprefError, *errors.QprefError.__subclasses__()} - {errors.StoppedBySignal}
    listed = dict(re.findall(r"^\| (\d+) \|.*\| `(\w+)` \|$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE))
    assert {name: int(code) for code, name in listed.items()} == {kind.__name__: kind.exit_code for kind in kinds}


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


def test_the_models_page_has_a_row_for_each_architecture_of_the_matrix():
    text = (ROOT / "docs/models.md").read_text()
    rows = page.names(text)
    assert len(rows) >= 75
    if f"transformers {version('transformers')}," in text:
        assert rows == architectures(), "run python docs/make_models.py"


def test_the_page_on_methods_is_up_to_date():
    assert (ROOT / "docs/methods.md").read_text() == loaded("make_methods").page(), "run python docs/make_methods.py"
