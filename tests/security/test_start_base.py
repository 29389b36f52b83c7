"""A start adapter that names another base than the recipe's is said, and one of the same base isn't."""

import json
import shutil
from pathlib import Path

import pytest

from qpref.policy.source import BaseFolder, resolve_base
from qpref.policy.start_base import warn_of_other_base
from qpref.recipe.sections import ModelSection


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
