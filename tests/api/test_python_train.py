"""`qpref.train` from a program: the run that it returns, metrics as they come, rows in memory, and Python's words."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys

import pytest
import tomli_w
import torch
from conftest import preference_rows, rows_of

import qpref
from qpref.api.rows import store_rows
from qpref.errors import CheckpointError, DataError, RecipeError

STEP = {"train.max_steps": 1, "train.log_every": 1}


def test_a_run_is_a_path_with_metrics_result_and_adapter(make_recipe, tmp_path, capfd):
    recipe = tomli_w.dumps(make_recipe())
    capfd.readouterr()  # of making the base
    seen = []
    changes = STEP | {"sinks": [{"name": "console"}]}
    run = qpref.train(recipe, overrides=changes, output=tmp_path / "run", on_metrics=seen.append)
    assert os.fspath(run) == str(run) == str(tmp_path / "run")
    assert run / "run.json" == run.path / "run.json"
    assert run.metrics == seen
    assert [(row.step, row.split) for row in seen] == [(row["step"], row["split"]) for row in rows_of(run.path)]
    assert [row.values.get("loss") for row in seen] == [row.get("loss") for row in rows_of(run.path)]
    assert run.result["verdict"]["sentence"] == run.verdict
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert run == qpref.Run(str(tmp_path / "run"))
    assert capfd.readouterr() == ("", "")


def test_a_function_for_metrics_that_raises_or_draws_numbers_leaves_the_run_as_it_is(make_recipe, tmp_path, caplog):
    logging.getLogger("qpref").propagate = True
    calls = []

    def disturb(row):
        calls.append(row.values.pop("loss", None))
        random.seed(len(calls))
        torch.manual_seed(len(calls))
        torch.set_grad_enabled(False)
        if len(calls) == 2:
            raise SystemExit("a plot failed")

    recipe = make_recipe({"train.max_steps": 3, "train.log_every": 1, "adapter.dropout": 0.1})
    plain = qpref.train(recipe, output=tmp_path / "plain")
    disturbed = qpref.train(recipe, output=tmp_path / "disturbed", on_metrics=disturb)
    assert torch.is_grad_enabled()
    assert len(calls) == 2
    assert "on_metrics raised SystemExit: a plot failed; it isn't called again" in caplog.text
    assert [row.values for row in disturbed.metrics] == [row.values for row in plain.metrics]


def test_rows_in_memory_train_as_the_same_rows_in_a_file_and_only_they_resume(make_recipe, tmp_path):
    rows, heldout = preference_rows(12), preference_rows(4, start=100)
    recipe = make_recipe({"train.max_steps": 2, "train.log_every": 1})
    of_file = qpref.train(recipe, output=tmp_path / "file")
    del recipe["data"]["train"], recipe["data"]["heldout"]
    run = qpref.train(recipe, rows=rows, heldout=heldout, output=tmp_path / "run")
    assert [row.values for row in run.metrics] == [row.values for row in of_file.metrics]
    (stored,) = (tmp_path / "run.rows").glob("train-*.jsonl")
    assert [json.loads(line) for line in stored.read_text().splitlines()] == rows
    (run / "result.json").unlink()
    with pytest.raises(CheckpointError, match="overwrite=True"):
        qpref.train(recipe, rows=rows[:8], heldout=heldout, output=run, resume=True)
    assert qpref.train(recipe, rows=rows, heldout=heldout, output=run, resume=True).result


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "train: no rows"),
        ([{"prompt": "a"}, ["b"]], "train row 2: expected a dict of columns, as a row of a JSON Lines file, got list"),
        ([{"prompt": object()}], "train row 1: not JSON: Object of type object is not JSON serializable"),
        ([{"margin": float("nan")}], "train row 1: not JSON: Out of range float values are not JSON compliant"),
        ([{"prompt": "\ud800"}], "train row 1: not JSON: 'utf-8' codec can't encode character '\\ud800'"),
    ],
)
def test_a_row_that_no_file_could_hold_is_refused_by_its_number(rows, problem, tmp_path):
    with pytest.raises(DataError) as raised:
        store_rows(rows, tmp_path / "rows", "train")
    assert raised.value.what.startswith(problem)
    assert not (tmp_path / "rows").exists()


def test_errors_name_arguments(make_recipe, tmp_path):
    recipe, run = make_recipe(STEP), tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(RecipeError) as raised:
        qpref.train(recipe, output=run)
    assert raised.value.hint == "continue with resume=True, replace it with overwrite=True, or use output="
    with pytest.raises(RecipeError, match=r"^resume=True and overwrite=True exclude each other"):
        qpref.train(recipe, output=run, resume=True, overwrite=True)
    with pytest.raises(RecipeError, match=r'^overrides=\["loss"\]: expected table.key=value'):
        qpref.train(recipe, overrides=["loss"], output=run)


def test_a_text_that_is_no_toml_is_refused_and_overrides_keep_their_types(make_recipe, tmp_path):
    with pytest.raises(RecipeError, match="recipe: not TOML"):
        qpref.train("[model\nbase = 1", output=tmp_path / "run")
    with pytest.raises(RecipeError, match="betaa: unknown option"):
        qpref.train(make_recipe(), overrides={"loss": {"name": "dpo", "betaa": 0.1}}, output=tmp_path / "run")


def test_importing_qpref_imports_no_model_library():
    code = "import qpref, sys; print([name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
