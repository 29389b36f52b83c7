"""`qpref eval --gate`: the real command on a run, its adapter, its checkpoint, its merged model and its base."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from conftest import merge_to, write_jsonl

import qpref
from qpref.cli import main
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan

ROWS = 24


@pytest.fixture(scope="module")
def folder(make_base, tmp_path_factory):
    """A run, its adapter and merged model, and two regression sets: the pairs that it learned, and the same swapped.

    The two answers differ by one byte. The base slightly prefers the one that training rejects, so it can be lost.
    """
    folder = tmp_path_factory.mktemp("gated")
    rows = [
        {"prompt": f"Question {number}: what?", "chosen": "It is red.", "rejected": "It is rad."}
        for number in range(ROWS)
    ]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    write_jsonl(folder / "kept.jsonl", rows)
    write_jsonl(folder / "unlearned.jsonl", swapped)
    recipe = {
        "model": {"base": str(make_base()), "quantization": "nf4", "dtype": "bf16"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(folder / "kept.jsonl"), "max_length": 160, "max_prompt_length": 80},
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {"learning_rate": 0.05, "batch_size": 4, "warmup_ratio": 0.0, "save_every": 3},
        "sinks": [],
    }
    train_plan(make_plan(recipe, output=folder / "run"))
    merge_to(folder / "run", folder / "merged", "float32")
    shutil.copytree(folder / "run/adapter", folder / "adapter")
    return folder


def evaluate(*arguments, code=0):
    done = CliRunner().invoke(main, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def facts(*arguments):
    return json.loads(evaluate(*arguments, "--gate", "--samples", 100, "--json").stdout)


def test_what_a_run_unlearned_is_warned_of_and_strict_exits_14(folder):
    asked = (folder / "run", "--gate", "--gate-items", folder / "unlearned.jsonl", "--samples", 100)
    done = evaluate(*asked)
    assert f"warning: {folder / 'run'} has forgotten: overall -" in done.stderr
    assert "To try: a lower learning_rate, a larger beta" in done.stderr
    (row,) = [line.split() for line in done.stdout.splitlines() if "overall" in line]
    assert str(ROWS) in row
    assert "loss" in row
    strict = evaluate(*asked, "--strict", code=14)
    assert strict.stdout == done.stdout
    assert strict.stderr.endswith(f"error: {folder / 'run'}: a significant loss of what the base knows\n")


def test_what_a_run_learned_is_no_loss(folder):
    done = evaluate(folder / "run", "--gate", "--gate-items", folder / "kept.jsonl", "--strict", "--samples", 100)
    assert "no significant loss" in done.stdout
    assert "has forgotten" not in done.stderr


def test_run_adapter_and_merged_model_change_alike(folder, make_base):
    items = ("--gate-items", folder / "unlearned.jsonl", "--float32", "--base", make_base(), "--quantization", "nf4")
    found = facts(folder / "run", folder / "adapter", folder / "merged", *items)["models"]
    assert [model["kind"] for model in found] == ["run", "adapter", "model"]
    assert [model["base"] for model in found] == [str(folder / name) for name in ("run", "adapter", "run")]
    first, *others = (model["overall"]["difference"]["value"] for model in found)
    assert first < -0.1
    assert others == pytest.approx([first, first], abs=0.02)


def test_a_plain_model_is_compared_with_the_first_one(folder, make_base):
    (found,) = facts(make_base(), folder / "merged", "--gate-items", folder / "unlearned.jsonl")["models"]
    assert (found["model"], found["base"]) == (str(folder / "merged"), str(make_base()))
    assert found["forgets"]


def test_a_plain_model_alone_exits_2(make_base):
    done = evaluate(make_base(), "--gate", code=2)
    assert done.stderr == (
        f"error: {make_base()}: a plain model, with nothing to compare it with\nhint: name its base or its run first\n"
    )


def test_a_checkpoint_answers_the_built_in_items_beside_its_base(folder):
    """Items longer than the run's own max_length are read too; the tiny base knows nothing, and that is said."""
    found = facts(sorted((folder / "run/checkpoints").iterdir())[-1])
    assert (found["items"], found["left_out"]) == ("built-in", 0)
    (model,) = found["models"]
    assert model["kind"] == "checkpoint"
    assert sum(change["items"] for change in model["categories"].values()) == model["overall"]["items"] == found["read"]
    assert model["overall"]["base_at_chance"]
    assert any("no better than chance" in warning for warning in found["warnings"])


def test_the_lost_items_are_in_python_and_in_json(folder):
    report = qpref.gate(folder / "run", items=folder / "unlearned.jsonl", samples=100)
    assert report.forgets
    (model,) = report.models
    assert len(model.lost) == model.changes.overall.lost > ROWS / 4
    assert [item.trained - item.base for item in model.lost] == sorted(item.trained - item.base for item in model.lost)
    listed = report.as_json()["models"][0]["lost"]
    assert listed[0].keys() == {"category", "prompt", "right", "wrong", "base", "trained"}
    assert listed[0]["category"] == "unlearned"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gate", "--data", "x.jsonl", "--beta", "0.1"], "--data, --beta: about pairs, which --gate doesn't read"),
        (["--strict"], "--strict: about the regression set, which only --gate reads"),
        (["--gate-items", "x.jsonl"], "--gate-items: about the regression set, which only --gate reads"),
    ],
)
def test_options_that_would_do_nothing_exit_2(options, message):
    assert message in evaluate("runs/x", *options, code=2).stderr


@pytest.mark.parametrize("content", ['{"prompt": 1}\n', '{"prompt": "a", "chosen"\n', ""])
def test_items_that_are_no_pairs_exit_3(folder, tmp_path, content):
    (tmp_path / "own.jsonl").write_text(content)
    assert "own.jsonl" in evaluate(folder / "run", "--gate", "--gate-items", tmp_path / "own.jsonl", code=3).stderr
