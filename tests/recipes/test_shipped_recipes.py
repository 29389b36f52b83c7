"""The shipped recipes train as they are, on a hub whose tiny models and data have the public ones' names and layouts.

The quickstart isn't here: it is trained whole, with its own model and data, by .ci/run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import write_jsonl
from hub import Repository, dataset_files, loopback_hub
from public_data import DATA
from tiny_models import TinyModel

from qpref.data.lists import lists_of
from qpref.data.source import DataSource
from qpref.memory.known_shapes import KNOWN_SHAPES, known_shape
from qpref.recipe.resolve import make_data_plan, make_plan
from qpref.records import PreferencePair

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.toml") if path.stem != "quickstart")
ROWS = 64


def base_of(recipe):
    return tomllib.loads(recipe.read_text())["model"]["base"]


def write_base(name, folder):
    """A model of the architecture that the public one of this name has."""
    shape = KNOWN_SHAPES[known_shape(name)]
    return TinyModel(model_type=shape["model_type"], config={"max_position_embeddings": 4096}).write(folder)


@dataclass
class Trained:
    folder: Path
    errors: dict[str, str | None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    home = tmp_path_factory.mktemp("machine")
    with loopback_hub() as hub:
        for name in sorted({base_of(recipe) for recipe in RECIPES}):
            folder = write_base(name, home / "models" / name)
            hub.state.put(Repository.of_folder("models", name, folder))
        for name, data in DATA.items():
            hub.state.put(Repository("datasets", name, dataset_files(data.rows(ROWS), data.config)))
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("train_shipped.py"), home / "runs", *RECIPES],
            cwd=home, env=hub.environment(home), capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Trained(home / "runs", json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_shipped_recipe_trains_two_steps_as_it_is(trained, recipe):
    assert trained.errors[recipe.stem] is None
    run = trained.folder / recipe.stem
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2]
    assert (run / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_row_of_a_shipped_recipes_data_is_read(trained, recipe):
    """Each public layout is recognized; none of these rows is refused, and a ranked one is several pairs."""
    report = json.loads((trained.folder / recipe.stem / "data.json").read_text())
    assert (report["refused"], report["dropped"]) == (0, 0)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_shipped_recipe_prefers_the_better_answers(tmp_path, recipe):
    """In all of these data the better answer starts with `After`."""
    for choice in make_plan(recipe).sources:
        data = DATA[re.search(r"hf:([\w.-]+/[\w.-]+)", choice.location)[1]]
        path = write_jsonl(tmp_path / "rows.jsonl", next(iter(data.rows(8).values())))
        local = replace(choice, location=str(path), reader=make_data_plan(str(path)).sources[0].reader)
        for row in DataSource(local).raw():
            for example in DataSource(local).records(row):
                better = example.chosen if isinstance(example, PreferencePair) else example.completion
                is_better = isinstance(example, PreferencePair) or example.label
                assert better[-1].content.startswith("After") == is_better


def test_the_answers_to_a_prompt_are_one_list_where_the_ranked_recipe_takes_a_loss_on_lists(tmp_path):
    plan = make_plan(ROOT / "recipes/data-ranked.toml", ["loss.name=lipo", "loss.gain=scores"])
    assert plan.is_listed
    (choice,) = plan.sources
    path = write_jsonl(tmp_path / "rows.jsonl", next(iter(DATA["openbmb/UltraFeedback"].rows(8).values())))
    source = DataSource(replace(choice, location=str(path), reader=make_data_plan(str(path)).sources[0].reader))
    for row in source.raw():
        (ranked,) = lists_of(source.records(row))
        assert ranked.responses[0][-1].content.startswith("After")
        assert len(ranked.responses) == len(ranked.scores) > 2
        assert list(ranked.scores) == sorted(ranked.scores, reverse=True)


def test_the_list_of_recipes_has_each():
    listed = set(re.findall(r"\]\(([\w.-]+\.toml)\)", (ROOT / "recipes/README.md").read_text()))
    assert listed == {path.name for path in (ROOT / "recipes").glob("*.toml")}


def test_every_public_data_set_that_is_named_has_its_layout_here():
    named = set(re.findall(r"hf:([\w.-]+/[\w.-]+)", "".join(recipe.read_text() for recipe in RECIPES)))
    assert named - {"org/name"} == set(DATA)
