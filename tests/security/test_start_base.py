"""A start adapter that names another base than the recipe's is said, and one of the same base isn't."""

import json
import shutil
from pathlib import Path

import pytest

from qpref.data.load import load_rows
from qpref.policy.source import BaseFolder, resolve_base
from qpref.policy.start_base import warn_of_other_base
from qpref.recipe.resolve import make_plan
from qpref.recipe.sections import ModelSection
from qpref.training.prepare import prepare


@pytest.fixture
def adapter(tmp_path):
    """`adapter(base)`: a folder whose settings name the base."""

    def make(base):
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        return folder

    return make


def test_another_name_is_said(adapter, said, tmp_path):
    folder = adapter("org/Model-7B-Instruct")
    warn_of_other_base(folder, BaseFolder(path=tmp_path, weights={}), "org/Model-7B")
    (line,) = said
    assert line.startswith(f"{folder} was trained on org/Model-7B-Instruct")
    assert "is put on org/Model-7B:" in line


@pytest.mark.parametrize(
    "named",
    [None, "", "org/Model-7B", "mirror/model-7b", "/gone/model-7b/", "/cache/models--org--Model-7B/snapshots/0a1b"],
)
def test_the_same_name_is_not_said(adapter, said, tmp_path, named):
    warn_of_other_base(adapter(named), BaseFolder(path=tmp_path, weights={}), "org/Model-7B")
    assert not said


def test_weights_count_more_than_names(adapter, said, make_base, tmp_path):
    base = resolve_base(ModelSection(base=str(make_base())))
    copy = Path(shutil.copytree(base.path, tmp_path / "another name"))
    folder = adapter(str(copy))
    warn_of_other_base(folder, base, str(base.path))
    assert not said

    changed = Path(shutil.copytree(make_base("qwen"), tmp_path / "moved" / base.path.name))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(changed)}))
    warn_of_other_base(folder, base, str(base.path))
    assert len(said) == 1


def test_training_says_it(make_recipe, said, trained_run, tmp_path):
    from qpref.policy.load import load_policy
    from qpref.recipe.sections import Recipe

    start = Path(shutil.copytree(trained_run() / "adapter", tmp_path / "start"))
    path = start / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/other"}))
    recipe = Recipe.model_validate(make_recipe({"adapter.start": str(start)}))
    load_policy(recipe, resolve_base(recipe.model))
    assert [line for line in said if "was trained on org/other" in line]


def edit_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text("{# edited #}" + path.read_text())


def swap_ids(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(values))


def damage(folder):
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("edit", "part"), [(edit_template, "chat template"), (swap_ids, "tokenizer"), (damage, None), (None, None)]
)
def test_training_says_that_a_start_adapter_has_another_tokenizer(make_recipe, said, trained_run, tmp_path, edit, part):
    start = Path(shutil.copytree(trained_run() / "adapter", tmp_path / "start"))
    if edit is not None:
        edit(start)
    plan = make_plan(make_recipe({"adapter.start": str(start)}), output=tmp_path / "run")
    said.clear()
    prepare(plan, load_rows(plan))
    hint = "to train with the adapter's, set [model] tokenizer to its folder"
    assert said == ([f"{start}: its {part} differs from the run's; {hint}"] if part else [])
    said.clear()
    if part:
        plan = make_plan(make_recipe({"adapter.start": str(start), "model.tokenizer": str(start)}), output=plan.output)
        prepare(plan, load_rows(plan))
        assert said == []
