"""`qpref generate`: what it prints and what it exits with."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from conftest import preference_rows, write_jsonl

from qpref.cli import main
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan


@pytest.fixture
def run(make_recipe, tmp_path):
    recipe = make_recipe({"train.learning_rate": 0.02, "model.quantization": "nf4"})
    return train_plan(make_plan(recipe, output=tmp_path / "run"))


def generate(*arguments, code=0):
    done = CliRunner().invoke(main, ["generate", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def test_answers_stand_side_by_side(run):
    arguments = (run, "--prompt", "Hello [bold]you[/bold]?", "--max-new-tokens", 6)
    (answer,) = json.loads(generate(*arguments, "--json").stdout)
    assert answer["prompt"] == "Hello [bold]you[/bold]?"
    printed = generate(*arguments).stdout
    assert "Hello [bold]you[/bold]?" in printed
    (heading,) = [line for line in printed.splitlines() if "base" in line]
    assert str(run) in heading


def test_prompts_come_from_the_command_line_and_a_file(run, tmp_path):
    file = write_jsonl(tmp_path / "prompts.jsonl", preference_rows(2))
    answers = json.loads(generate(run, "--prompt", "First?", "--prompts", file, "--max-new-tokens", 2, "--json").stdout)
    assert [answer["prompt"] for answer in answers] == ["First?", *(row["prompt"] for row in preference_rows(2))]


def test_no_prompt_exits_2(run):
    assert "name prompts with --prompt or --prompts" in generate(run, code=2).stderr


def test_what_is_no_model_exits_2(tmp_path):
    done = generate(tmp_path, "--prompt", "Hi", code=2)
    assert done.stderr.startswith(f"error: {tmp_path}: neither a run nor an adapter nor a model")
