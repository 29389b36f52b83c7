"""The JSON Schema takes and refuses what a dry run does, as far as a schema can say it."""

from __future__ import annotations

import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from qpref.errors import RecipeError
from qpref.hooks.manager import PluginHost
from qpref.recipe.resolve import make_plan
from qpref.recipe.schema import recipe_schema

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
BASE = {"model": {"base": "org/base"}, "data": {"train": "pairs.jsonl"}, "loss": {"name": "dpo"}}
RAMP = {"start": 0.1, "end": 0.3, "schedule": "linear"}
TAKEN = [
    {},
    {"loss": {"name": "dpo", "beta": RAMP}},
    {"loss": {"name": "dpo", "beta": 1}},
    {"loss": [{"name": "dpo", "weight": 0.8}, {"name": "sft", "weight": 0.2}]},
    {"loss": [{"name": "dpo"}, {"name": "sft", "weight": RAMP}]},
    {"loss": {"name": "kto", "desirable_weight": 1.0}},
    {"train": {"eval_every": "epoch", "save_every": 10, "tokens_per_microbatch": 512}, "data": {"train": "a.jsonl"}},
    {"adapter": {"targets": ["q_proj"], "rank": 4}},
    {"checks": {"identical": "warn", "duplicates": {}}},
    {"sinks": [{"name": "console"}, {"name": "tensorboard"}]},
    {"data": {"train": [{"path": "a.jsonl", "weight": 2.0}, {"path": "b.jsonl"}]}},
    {"data": {"train": "a.csv", "contest": {"first": "a", "second": "b", "winner": "w", "first_wins": ["a", {"min": 1}],
                                             "second_wins": [0]}}},
]  # fmt: skip
REFUSED = [
    {"model": {"base": "org/base", "bsae": "x"}},
    {"model": {}},
    {"zzz": {}},
    {"loss": {"name": "dop"}},
    {"loss": {}},
    {"loss": []},
    {"loss": {"name": "dpo", "betaa": 0.1}},
    {"loss": {"name": "dpo", "beta": "hot"}},
    {"loss": {"name": "dpo", "beta": 0}},
    {"loss": {"name": "dpo", "wpo": RAMP}},
    {"loss": {"name": "dpo", "beta": {"start": 0.1}}},
    {"loss": [{"name": "dpo", "weight": 0}]},
    {"loss": [{"name": "dpo", "weight": {"start": 0.1}}]},
    {"train": {"learning_rate": "hot"}},
    {"train": {"eval_every": "daily"}},
    {"train": {"eval_every": 0}},
    {"train": {"epochs": 1.5}},
    {"adapter": {"targets": []}},
    {"checks": {"identicl": "warn"}},
    {"checks": {"identical": "loud"}},
    {"sinks": [{"name": "conosle"}]},
    {"sinks": {"name": "console"}},
    {"data": {"train": [{"path": "a.jsonl", "wait": 1}]}},
]


@pytest.fixture(scope="module")
def validator():
    schema = recipe_schema(PluginHost())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("tables", TAKEN, ids=str)
def test_what_a_dry_run_takes_is_valid(validator, tables):
    make_plan(BASE | tables)
    assert [error.message for error in validator.iter_errors(BASE | tables)] == []


@pytest.mark.parametrize("tables", REFUSED, ids=str)
def test_what_a_dry_run_refuses_by_name_type_or_range_is_invalid(validator, tables):
    with pytest.raises(RecipeError):
        make_plan(BASE | tables)
    assert not validator.is_valid(BASE | tables)


def test_a_resolved_recipe_with_all_defaults_is_valid(validator):
    assert [error.message for error in validator.iter_errors(make_plan(BASE).document)] == []


def test_options_of_third_party_plugins_are_in_it(validator, tmp_path, monkeypatch):
    info = tmp_path / "acme-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[qpref]\ncheck-no-urls = acme_no_urls\ncheck-broken = acme_gone\n")
    (tmp_path / "acme_no_urls.py").write_text(
        "from qpref.hooks import Options, Validator, hookimpl\n"
        "class UrlOptions(Options):\n    allowed: int = 0\n"
        "@hookimpl\ndef qpref_validators():\n"
        "    yield Validator(name='no-urls', summary='', options=UrlOptions, start=lambda options: None)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = BASE | {"checks": {"no-urls": {"allowed": 3}}}
    assert Draft202012Validator(recipe_schema(PluginHost())).is_valid(recipe)
    assert not Draft202012Validator(recipe_schema(PluginHost(), "qpref")).is_valid(recipe)
    assert not validator.is_valid(recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_shipped_recipe_names_its_schema_and_keeps_to_it(validator, recipe):
    text = recipe.read_text()
    assert text.startswith("#:schema recipe.schema.json\n")
    assert [error.message for error in validator.iter_errors(tomllib.loads(text))] == []


def test_taplo_checks_the_recipes_by_the_schema_that_they_name(tmp_path):
    for file in (*RECIPES, ROOT / "recipes/recipe.schema.json"):
        (tmp_path / file.name).write_text(file.read_text())

    distribution = metadata.distribution("taplo")
    (taplo,) = (distribution.locate_file(file) for file in distribution.files if file.name == "taplo")

    def lint():
        return subprocess.run([taplo, "lint", *tmp_path.glob("*.toml")], cwd=tmp_path, capture_output=True, text=True)

    assert lint().returncode == 0
    (tmp_path / "bad.toml").write_text(RECIPES[0].read_text().replace("[train]", "[train]\nepcohs = 2"))
    done = lint()
    assert done.returncode == 1
    assert "epcohs" in done.stderr
