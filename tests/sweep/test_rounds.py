"""`qpref rounds`: each round starts from the adapter of the one before, which is its reference, and rounds resume."""

from __future__ import annotations

import json

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import outcome

from qpref.cli import main
from qpref.recipe.resolve import make_plan
from qpref.training.loop import Trainer
from qpref.training.run import train_plan


@pytest.fixture
def recipe(make_recipe, tmp_path, monkeypatch):
    """A recipe of two steps, with a cache of its own."""
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(make_recipe({"train.max_steps": 2, "train.save_every": 1})))
    return path


def rounds(recipe, count, *arguments, code=0):
    output = recipe.parent / "rounds"
    command = ["rounds", str(recipe), "--rounds", str(count), "--output", str(output), *arguments]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def test_a_round_is_a_run_from_the_adapter_of_the_one_before(recipe, tmp_path, monkeypatch):
    done = rounds(recipe, 2)
    first, second = (recipe.parent / "rounds" / f"round-{number}" for number in (1, 2))
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "another"))
    alone = train_plan(make_plan(recipe, output=tmp_path / "alone"))
    assert outcome(first) == outcome(alone)
    start = [f"adapter.start={json.dumps(str(alone / 'adapter'))}"]
    assert outcome(second) == outcome(train_plan(make_plan(recipe, start, tmp_path / "next")))
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval_rewards/margins"] == 0.0  # the reference has moved on
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("round-")] == ["round-1", "round-2"]
    page = (recipe.parent / "rounds" / "report.html").read_text()
    assert all(f"round-{number}" in page for number in (1, 2))


def test_killed_rounds_resume_and_more_are_added(recipe, tmp_path, monkeypatch):
    step, taken = Trainer.step, []

    def killed(trainer):
        taken.append(1)
        if len(taken) == 4:  # the last step of the second round
            raise SystemExit(137)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        rounds(recipe, 2, code=137)
    changed = rounds(recipe, 2, "--set", "train.learning_rate=0.5", "--resume", code=4)
    assert "round-1: is the run of another recipe" in changed.stderr
    done = rounds(recipe, 3, "--resume")
    assert "resuming after step 1" in done.stderr
    folder = recipe.parent / "rounds"
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "another"))
    start = [f"adapter.start={json.dumps(str(folder / 'round-1' / 'adapter'))}"]
    assert outcome(folder / "round-2") == outcome(train_plan(make_plan(recipe, start, tmp_path / "whole")))
    assert (folder / "round-3" / "adapter").is_dir()
    train_plan(make_plan(recipe, output=folder / "round-2"), overwrite=True)  # from the base, not from the first round
    refused = rounds(recipe, 3, "--resume", code=4)
    assert "round-2: was trained from another adapter than " in refused.stderr


def test_rounds_of_a_loss_without_a_reference_are_refused(recipe):
    done = rounds(recipe, 2, "--set", "loss.name=orpo", code=2)
    assert done.stderr.startswith("error: rounds move the reference on, and the recipe's losses need none\n")
    assert not (recipe.parent / "rounds").exists()
