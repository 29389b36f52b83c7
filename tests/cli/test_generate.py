"""`qpref generate`: what it prints and what it exits with."""

from __future__ import annotations

import json
import shutil

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


def test_the_log_names_each_model_that_starts_to_answer(run):
    arguments = (run, "--prompt", "Hello?", "--prompt", "Again?", "--max-new-tokens", 3)
    started = [line for line in generate(*arguments).stderr.splitlines() if line.startswith("answering ")]
    assert started == [f"answering 2 prompt(s) with {name}, up to 3 tokens each" for name in (run, "the base")]


def test_prompts_come_from_the_command_line_and_a_file(run, tmp_path):
    file = write_jsonl(tmp_path / "prompts.jsonl", preference_rows(2))
    answers = json.loads(generate(run, "--prompt", "First?", "--prompts", file, "--max-new-tokens", 2, "--json").stdout)
    assert [answer["prompt"] for answer in answers] == ["First?", *(row["prompt"] for row in preference_rows(2))]


SHORT = ("--max-new-tokens", 1, "--json")


def asked(*arguments):
    return [answer["prompt"] for answer in json.loads(generate(*arguments, *SHORT).stdout)]


def test_without_prompts_the_held_out_ones_of_a_run_are_asked(run):
    heldout = [row["prompt"] for row in preference_rows(4, start=100)]
    (saved,) = (run / "checkpoints").iterdir()
    for model in (run, run / "adapter", saved):
        assert asked(model) == heldout, model


def test_the_first_eight_held_out_prompts_are_asked_each_once(run, tmp_path):
    rows = [row for row in preference_rows(12, start=100) for _ in range(2)]
    write_jsonl(tmp_path / "heldout.jsonl", rows)
    assert asked(run) == [row["prompt"] for row in preference_rows(8, start=100)]


def test_without_prompts_a_run_of_single_completions_is_asked_too(make_recipe, tmp_path):
    singles = [{"prompt": f"And {place}?", "completion": "Yes.", "label": bool(place % 2)} for place in range(4)]
    data = str(write_jsonl(tmp_path / "single.jsonl", singles))
    recipe = make_recipe({"loss.name": "kto", "data.heldout": data})
    run = train_plan(make_plan(recipe, output=tmp_path / "run"))
    assert asked(run) == [row["prompt"] for row in singles]


def test_without_prompts_a_share_that_is_held_out_is_asked(make_recipe, tmp_path):
    recipe = make_recipe({"data.heldout_share": 0.4, "train.max_steps": 1})
    del recipe["data"]["heldout"]
    run = train_plan(make_plan(recipe, output=tmp_path / "run"))
    count = json.loads((run / "run.json").read_text())["examples"]["heldout"]
    questions = asked(run)
    assert 0 < len(questions) == count < 8
    assert set(questions) < {row["prompt"] for row in preference_rows(12)}


def test_without_prompts_all_sources_that_are_held_out_are_asked(make_recipe, tmp_path):
    paths = [write_jsonl(tmp_path / f"{start}.jsonl", preference_rows(3, start=start)) for start in (100, 102)]
    recipe = make_recipe({"data.heldout": [{"path": str(path)} for path in paths], "train.max_steps": 1})
    run = train_plan(make_plan(recipe, output=tmp_path / "run"))
    assert asked(run) == [row["prompt"] for row in preference_rows(5, start=100)]


def test_a_run_is_found_however_it_is_spelt(run, monkeypatch):
    (saved,) = (run / "checkpoints").iterdir()
    spelt = ("run", "run/", "./run/adapter/", "run/adapter/..", f"run/checkpoints/{saved.name}/")
    monkeypatch.chdir(run.parent)
    assert [len(asked(name)) for name in spelt] == [4] * len(spelt)
    monkeypatch.chdir(run / "adapter")
    assert [len(asked(name)) for name in (".", "..")] == [4, 4]


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_without_prompts_what_no_run_explains_exits_2(run, make_base, tmp_path, what):
    model = make_base() if what == "base" else shutil.copytree(run / "adapter", tmp_path / "alone")
    assert generate(model, code=2).stderr.endswith(
        f"Error: {model}: not a run, so it has no held-out prompts; name prompts with --prompt or --prompts\n"
    )


def test_without_prompts_a_run_that_holds_nothing_out_exits_2(make_recipe, tmp_path):
    recipe = make_recipe()
    del recipe["data"]["heldout"]
    run = train_plan(make_plan(recipe, output=tmp_path / "run"))
    assert generate(run, code=2).stderr == (
        f"error: {run}: this run has no held-out data\nhint: name prompts with --prompt or --prompts\n"
    )


def test_without_prompts_held_out_data_that_are_gone_exit_3(run, tmp_path):
    (tmp_path / "heldout.jsonl").unlink()
    assert generate(run, code=3).stderr == f"error: {tmp_path / 'heldout.jsonl'}: no such file\n"


def test_what_is_no_model_exits_2(tmp_path):
    done = generate(tmp_path, "--prompt", "Hi", code=2)
    assert done.stderr.startswith(f"error: {tmp_path}: neither a run nor an adapter nor a model")


def test_a_name_of_nothing_says_what_was_looked_for_and_offers_a_run_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    looked_for = "error: mine: no such folder or file here, and no hub id (OWNER/NAME) or pypi: location\n"
    assert generate("mine", code=2).stderr == (
        f"{looked_for}hint: name a run, an adapter or a model folder; qpref runs lists the runs\n"
    )
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/run.json").write_text("{}")
    assert generate("mine", code=2).stderr == f"{looked_for}hint: did you mean runs/mine?\n"
