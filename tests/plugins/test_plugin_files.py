"""Plugins without a distribution: a file that the recipe names, recorded with its SHA-256, and records in Python."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import preference_rows, write_jsonl

import qpref
from qpref.cli import main
from qpref.errors import CheckpointError, PluginError, RecipeError
from qpref.hooks import Options, PairedLoss
from qpref.recipe.resolve import make_plan
from qpref.records import LossOutput

LOSS = """
from dataclasses import dataclass

from torch import relu

from qpref.hooks import Field, Options, PairedLoss, hookimpl, reward_metrics
from qpref.records import LossOutput


class SlopeOptions(Options):
    slope: float = Field(default=1.0, gt=0, description="loss per nat")


@dataclass
class Gap:
    options: SlopeOptions

    def __call__(self, inputs):
        policy, reference = inputs.policy, inputs.reference
        chosen = policy.chosen.total - reference.chosen.total
        rejected = policy.rejected.total - reference.rejected.total
        losses = relu(1 - self.options.slope * (chosen - rejected - inputs.margin))
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))


@hookimpl
def qpref_losses():
    yield PairedLoss(name="gap", summary="relu(1 - h)", options=SlopeOptions, build=Gap)
"""
CANARY = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.fixture
def write_recipe(make_recipe, tmp_path):
    """`write_recipe(plugins={...}, max_steps=2)`: a recipe's file beside `my_loss.py`, which has its loss."""
    (tmp_path / "my_loss.py").write_text(LOSS)

    def write(**train):
        recipe = make_recipe() | {"loss": {"name": "gap", "slope": 0.5}, "plugins": {"files": ["my_loss.py"]}}
        recipe["train"] |= {"max_steps": 2, "save_every": 1} | train
        (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
        return tmp_path / "recipe.toml"

    return write


def cli(*arguments, code=0):
    done = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_beside_the_recipe_offers_its_loss_and_is_recorded_with_its_content(write_recipe, tmp_path):
    folder = qpref.train(write_recipe(), output=tmp_path / "run").path
    file = tmp_path / "my_loss.py"
    lock = tomllib.loads((folder / "recipe.lock.toml").read_text())
    assert lock["plugins"] == {"files": [{"path": str(file), "sha256": sha256_of(file)}]}
    used = [one for one in json.loads((folder / "run.json").read_text())["plugins"] if one["kind"] == "loss"]
    assert used == [
        {
            "kind": "loss",
            "name": "gap",
            "distribution": "my_loss.py",
            "version": sha256_of(file)[:12],
            "module": str(file),
        }
    ]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert next(row["loss"] for row in rows if row["split"] == "train") == 1.0
    assert not list(tmp_path.glob("__pycache__"))


def test_a_recipe_without_files_records_none(make_recipe):
    assert "plugins" not in make_plan(make_recipe()).document


def test_a_run_isnt_resumed_with_a_file_that_has_changed(write_recipe, tmp_path):
    recipe, run, file = write_recipe(), tmp_path / "run", tmp_path / "my_loss.py"
    qpref.train(recipe, output=run)
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()  # as if it had been killed after its last checkpoint
    file.write_text(LOSS.replace("relu(1 -", "relu(2 -", 1))
    with pytest.raises(CheckpointError, match=r"step-000002: was made with another plugin file my_loss\.py"):
        qpref.train(recipe, output=run, resume=True)
    file.write_text(LOSS)
    qpref.train(recipe, output=run, resume=True)
    file.write_text(LOSS + "\n")
    with pytest.raises(CheckpointError, match=r"run: is the run of another plugin file my_loss\.py\n"):
        qpref.train(recipe, output=run, resume=True)
    with pytest.raises(RecipeError, match=r"\[plugins\] files\.0: .*my_loss\.py: has changed: its SHA-256 is"):
        qpref.train(run / "recipe.lock.toml", output=run, resume=True)


def test_commands_that_read_a_run_folder_never_execute_its_files(write_recipe, tmp_path):
    run, marker = tmp_path / "run", tmp_path / "executed"
    qpref.train(write_recipe(), output=run)
    canary = CANARY.format(marker=str(marker))
    (tmp_path / "my_loss.py").write_text(canary)
    cli("eval", run)
    cli("report", run)
    cli("generate", run, "--max-new-tokens", "2")
    cli("merge", run, tmp_path / "merged", "--dtype", "float32")
    assert not marker.exists()
    cli("train", tmp_path / "recipe.toml", "--dry-run", code=6)
    assert marker.exists()


READER = """
import json

from qpref.hooks import Reader, hookimpl
from qpref.records import Row, Source


@hookimpl
def qpref_readers():
    yield Reader(name="lines", summary="", read=read)


def read(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        yield Row(values=json.loads(line), source=Source(path=str(path), line=number))
"""


def test_a_run_whose_reader_was_in_a_file_says_so_where_the_data_are_read_again(make_recipe, tmp_path):
    (tmp_path / "read_lines.py").write_text(READER)
    rows = write_jsonl(tmp_path / "pairs.lines", preference_rows(8))
    recipe = make_recipe({"data.train": str(rows), "train.max_steps": 1, "data.heldout": None})
    del recipe["data"]["heldout"]
    recipe["data"]["heldout_share"] = 0.25
    recipe["plugins"] = {"files": [str(tmp_path / "read_lines.py")]}
    run = qpref.train(recipe, output=tmp_path / "run").path
    said = cli("eval", run, code=2).stderr
    assert "reader 'lines' is not installed; the run had it from read_lines.py " in said
    assert "executed for a recipe alone" in said


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "my_loss.py: no such file"),
        ("x = (", "my_loss.py: executing it raised SyntaxError"),
        ("import module_beside_it", "my_loss.py: executing it raised ModuleNotFoundError"),
        ("def qpref_losses(): ...", "my_loss.py: its qpref_losses lacks the decorator @hookimpl"),
        (
            LOSS.replace("qpref_losses", "qpref_loss"),
            "my_loss.py: unknown hook 'qpref_loss'; did you mean 'qpref_losses'",
        ),
        ("x = 1", "my_loss.py: it has no qpref_losses"),
        (LOSS.replace("yield PairedLoss(", "yield dict("), "my_loss.py: qpref_losses yields dict, not Loss"),
        (LOSS + LOSS.rpartition("def qpref_losses():\n")[2], "my_loss.py: qpref_losses yields the loss 'gap' twice"),
        (LOSS.replace('name="gap"', "name=7"), "my_loss.py: qpref_losses yields a loss whose name is 7"),
        (LOSS.replace("    yield", "    raise KeyError('x')\n    yield"), "my_loss.py: qpref_losses raised KeyError"),
        (LOSS.replace('name="gap"', 'name="dpo"'), "loss 'dpo' is offered by both qpref"),
    ],
)
def test_a_file_that_cant_be_used_is_refused_with_what_is_wrong(write_recipe, tmp_path, source, said):
    recipe = write_recipe()
    (tmp_path / "my_loss.py").unlink() if source is None else (tmp_path / "my_loss.py").write_text(source)
    name = "dpo" if source and '"dpo"' in source else "gap"
    with pytest.raises((PluginError, RecipeError)) as caught:
        make_plan(recipe, [f"loss={{name='{name}'}}"])
    assert said in str(caught.value)


def test_a_clash_with_a_file_isnt_ended_by_switching_the_built_in_off(write_recipe, tmp_path):
    recipe = write_recipe()
    (tmp_path / "my_loss.py").write_text(LOSS.replace('name="gap"', 'name="dpo"'))
    with pytest.raises(PluginError) as caught:
        make_plan(recipe, ["loss={name='dpo'}"])
    assert caught.value.hint == "give the one that has no distribution another name"


def test_a_recipe_may_name_the_sha256_that_it_expects(write_recipe, tmp_path):
    recipe, file = write_recipe(), tmp_path / "my_loss.py"
    for digest, refused in ((sha256_of(file), False), ("0" * 64, True)):
        override = f"plugins.files=[{{path='my_loss.py', sha256='{digest}'}}]"
        if refused:
            with pytest.raises(RecipeError, match=f"and {digest} is expected"):
                make_plan(recipe, [override])
        else:
            assert make_plan(recipe, [override]).losses[0].plugin.record.name == "gap"


def test_every_mistake_of_the_table_is_named_at_once(write_recipe):
    with pytest.raises(RecipeError) as caught:
        make_plan(write_recipe(), ["plugins.files=['my_loss.py', './my_loss.py', 'none.py', 7]", "plugins.file=1"])
    assert "[plugins] file: unknown key; did you mean 'files'?" in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        make_plan(write_recipe(), ["plugins.files=['my_loss.py', './my_loss.py', 'none.py']"])
    assert "[plugins] files.1: a second file named my_loss.py" in str(caught.value)
    assert "none.py: no such file" in str(caught.value)


def test_losses_check_takes_a_file_and_checks_all_losses_in_it(tmp_path):
    file = tmp_path / "my_loss.py"
    second = LOSS.replace('name="gap"', 'name="cast"').replace("losses=losses", "losses=losses.float().double()")
    file.write_text(LOSS + "\n\n" + second.replace("qpref_losses", "_more").replace("@hookimpl\n", ""))
    file.write_text(file.read_text() + "\n\n@hookimpl\ndef qpref_losses():\n    yield from _more()\n")
    facts = json.loads(cli("losses", "check", file, "--json", code=6).stdout)
    assert [fact["loss"] for fact in facts] == ["cast"]
    file.write_text(LOSS)
    done = cli("losses", "check", file)
    assert done.stdout.startswith(f"gap (my_loss.py {sha256_of(file)[:12]} [loss-gap]): ok, 1 set of options\n")


def test_losses_check_refuses_a_file_without_a_loss(tmp_path):
    (tmp_path / "read_lines.py").write_text(READER)
    done = cli("losses", "check", tmp_path / "read_lines.py", code=2)
    assert done.stderr == f"error: {tmp_path / 'read_lines.py'}: offers no loss\n"


def test_the_hint_for_a_broken_loss_of_a_file_names_no_distribution(tmp_path):
    (tmp_path / "my_loss.py").write_text(LOSS.replace("losses=losses", "losses=losses.mean()"))
    said = cli("losses", "check", tmp_path / "my_loss.py", code=6).stderr
    assert "breaks: one value per example" in said
    assert "QPREF_DISABLE" not in said


def difference(options):
    def loss(inputs):
        return LossOutput(losses=inputs.policy.rejected.mean - inputs.policy.chosen.mean, metrics={})

    return loss


def test_train_takes_records_of_the_program(make_recipe, tmp_path):
    record = PairedLoss(name="difference", summary="r - c", options=Options, build=difference, needs=frozenset())
    recipe = make_recipe({"train.max_steps": 1}) | {"loss": {"name": "difference"}}
    run = qpref.train(recipe, output=tmp_path / "run", plugins=[record]).path
    used = json.loads((run / "run.json").read_text())["plugins"]
    assert [one["distribution"] for one in used if one["kind"] == "loss"] == ["a record of this Python program"]
    cli("eval", run)
    with pytest.raises(RecipeError, match="no loss 'difference' is installed"):
        qpref.train(recipe, output=tmp_path / "other")
    with pytest.raises(PluginError, match="plugins: function is no record of a plugin"):
        qpref.train(recipe, output=tmp_path / "other", plugins=[difference])


def test_a_sweep_trains_with_a_file(write_recipe, tmp_path):
    recipe = write_recipe(max_steps=1)
    done = cli("sweep", recipe, "--over", "loss.slope=0.5,2", "--output", tmp_path / "sweep", "--quiet", "--json")
    assert [one["error"] for one in json.loads(done.stdout)] == [None, None]


@pytest.mark.soak
def test_several_processes_train_with_a_file(write_recipe, tmp_path):
    recipe = write_recipe(max_steps=1)
    command = [sys.executable, "-m", "qpref", "train", recipe, "--processes", "2", "--output", tmp_path / "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
