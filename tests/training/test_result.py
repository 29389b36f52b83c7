"""What a run writes down of its plan and of itself, for `qpref report` to hold one against the other."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tomli_w
import torch
from click.testing import CliRunner
from conftest import rows_of

import qpref
from qpref.cli import main
from qpref.training import checkpoint
from qpref.training import result as training_result


@pytest.fixture
def on_cpu(make_recipe):
    return make_recipe({"train.max_steps": 2, "model.device": "cpu"})


def test_run_json_holds_what_qpref_plan_says_of_the_same_recipe(on_cpu, tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tomli_w.dumps(on_cpu))
    planned = json.loads(CliRunner().invoke(main, ["plan", str(recipe), "--json"], catch_exceptions=False).stdout)
    run = json.loads((qpref.train(recipe, output=tmp_path / "run") / "run.json").read_text())
    assert run["forecast"]["memory"] == planned["memory"]
    assert run["forecast"]["tokens_per_step"] == planned["tokens_per_step"]
    assert run["forecast"]["flops_per_step"] == pytest.approx(planned["flops_per_step"])
    assert run["steps"] == planned["steps"] == 2


def test_run_json_names_the_options_that_the_recipe_sets(make_recipe, tmp_path):
    beta = {"start": 0.1, "end": 0.2, "schedule": "linear"}
    recipe = make_recipe({"train.max_steps": 1, "model.device": "cpu"}) | {
        "loss": {"name": "dpo", "beta": beta, "label_smoothing": 0.1}
    }
    facts = json.loads((qpref.train(recipe, output=tmp_path / "run") / "run.json").read_text())
    assert facts["losses"]["given"] == [["beta", "label_smoothing"]]


def test_result_json_agrees_with_the_last_row(on_cpu, tmp_path):
    folder = qpref.train(on_cpu, output=tmp_path / "run").path
    result = json.loads((folder / "result.json").read_text())
    last = rows_of(folder)[-1]
    assert (result["steps"], result["tokens"], result["first_step"]) == (last["step"], last["tokens"], 0)
    assert result["adapter_step"] == last["step"]
    assert result["seconds"] > 0
    assert list(result["peak_bytes"]) == ["resident"]
    assert result["peak_bytes"]["resident"] > 50e6


def test_result_json_names_the_step_that_the_adapter_is_of(make_recipe, tmp_path):
    """The highest loss is asked for here, which is the first step's."""
    best = {"train.best_by": "eval_loss", "train.best_direction": "max", "train.eval_every": 1}
    folder = qpref.train(
        make_recipe({"train.max_steps": 3, "model.device": "cpu"} | best), output=tmp_path / "run"
    ).path
    losses = {row["step"]: row["eval_loss"] for row in rows_of(folder) if row["split"] == "eval" and row["step"] > 0}
    assert json.loads((folder / "result.json").read_text())["adapter_step"] == max(losses, key=losses.get) < 3


def test_resumed_run_says_from_where_its_memory_was_measured(on_cpu, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real = checkpoint.save_checkpoint

    def save(*arguments):
        real(*arguments)
        raise Killed

    recipe = on_cpu | {"train": on_cpu["train"] | {"save_every": 1}}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(Killed):
            qpref.train(recipe, output=tmp_path / "run")
    assert not (tmp_path / "run/result.json").exists()
    qpref.train(recipe, output=tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run/result.json").read_text())["first_step"] == 1


def test_peak_of_training_is_without_what_loading_held():
    program = """
import torch
from qpref.training.result import peak_bytes, reset_peak
device = torch.device("cpu")
held = bytearray(b"x") * 2**29
del held
before = peak_bytes(device)["resident"]
reset_peak(device)
print(before - peak_bytes(device)["resident"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(2**29, rel=0.1)


def test_a_system_that_keeps_the_peak_changes_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(training_result, "RESET_PEAK", tmp_path / "none/clear_refs")
    training_result.reset_peak(torch.device("cpu"))


def test_peak_is_the_most_that_the_process_ever_held():
    program = """
import torch
from qpref.training.result import peak_bytes
before = peak_bytes(torch.device("cpu"))["resident"]
held = bytearray(b"x") * 2**29
del held
print(peak_bytes(torch.device("cpu"))["resident"] - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(2**29, rel=0.05)
