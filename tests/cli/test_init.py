"""`qpref init`: a recipe that runs, by flags or by answers; nothing is replaced unasked."""

from __future__ import annotations

import json
import tomllib

import pytest
from click.testing import CliRunner

from qpref.cli import init, main

QWEN = "Qwen/Qwen2.5-7B-Instruct"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path.name


def pairs(count, words=5):
    return [{"prompt": f"Question {n}?", "chosen": f"Yes {n} " * words, "rejected": f"No {n} " * words}
            for n in range(count)]  # fmt: skip


def run(*arguments, answers=None):
    return CliRunner().invoke(main, ["init", *map(str, arguments)], input=answers, catch_exceptions=False)


def test_the_recipe_has_reasons_and_the_plans_figures_and_passes_a_dry_run(folder):
    data = write_rows(folder / "pairs.jsonl", pairs(400))
    done = run("--model", QWEN, "--data", data, "--card", "RTX 3060 12GB")
    assert (done.exit_code, done.stdout) == (
        0,
        "recipe: recipe.toml\nnext: qpref check recipe.toml, then qpref train recipe.toml\n",
    )
    text = (folder / "recipe.toml").read_text()
    assert "# Planned, not measured: " in text
    assert "of 11.08 GiB (RTX 3060 12GB" in text
    assert "# 400 rows: pairs, 99 % with prompts of at most" in text
    assert tomllib.loads(text) == {
        "model": {"base": QWEN, "quantization": "nf4", "dtype": "bf16"},
        "adapter": {"rank": 16, "alpha": 32, "targets": "all-linear"},
        "data": {"train": "pairs.jsonl", "heldout_share": 0.1, "max_length": 512, "max_prompt_length": 128,
                 "on_overflow": "drop"},
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {"learning_rate": 5e-6, "epochs": 3, "batch_size": 16, "optimizer": "adamw_8bit",
                  "eval_every": "epoch"},
    }  # fmt: skip
    assert CliRunner().invoke(main, ["train", "recipe.toml", "--dry-run"]).exit_code == 0


def test_the_recipe_trains(folder, make_base):
    data = write_rows(folder / "pairs.jsonl", pairs(24))
    assert run("--model", make_base(), "--data", data).exit_code == 0
    done = CliRunner().invoke(main, ["train", "recipe.toml", "--set", "train.max_steps=1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (folder / "runs/recipe/adapter/adapter_model.safetensors").is_file()


def test_single_completions_get_a_loss_for_them(folder):
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}", "label": n % 2 == 0} for n in range(40)]
    assert run("--model", QWEN, "--data", write_rows(folder / "s.jsonl", rows), "--vram", "24GiB").exit_code == 0
    assert tomllib.loads((folder / "recipe.toml").read_text())["loss"] == {"name": "kto", "beta": 0.1}


@pytest.mark.parametrize(
    ("goal", "loss"),
    [
        ("base", {"name": "orpo", "beta": 0.1}),
        ("noisy", {"name": "dpo", "beta": 0.1, "label_smoothing": 0.1}),
        ("short", {"name": "dpo", "beta": 0.1, "ld_alpha": 0.5}),
    ],
)
def test_a_goal_decides_the_loss(folder, goal, loss):
    data = write_rows(folder / "pairs.jsonl", pairs(40))
    assert run("--model", QWEN, "--data", data, "--vram", "24GiB", "--goal", goal).exit_code == 0
    assert tomllib.loads((folder / "recipe.toml").read_text())["loss"] == loss


@pytest.mark.soak
def test_lengths_follow_the_data_and_are_cut_where_the_card_is_too_small(folder):
    data = write_rows(folder / "pairs.jsonl", pairs(40, words=1400))
    lengths = []
    for size in ("80GiB", "8GiB"):
        assert run("--model", QWEN, "--data", data, "--vram", size, "--overwrite").exit_code == 0
        lengths.append(tomllib.loads((folder / "recipe.toml").read_text())["data"]["max_length"])
    assert lengths[0] == 4096
    assert lengths[1] < 4096


def test_an_old_card_gets_fp16(folder):
    data = write_rows(folder / "pairs.jsonl", pairs(40))
    assert run("--model", QWEN, "--data", data, "--card", "T4").exit_code == 0
    assert tomllib.loads((folder / "recipe.toml").read_text())["model"]["dtype"] == "fp16"


def test_refused_rows_are_allowed_for_and_named(folder):
    data = write_rows(folder / "pairs.jsonl", [*pairs(30), {"prompt": "Why?", "chosen": "So."}])
    assert run("--model", QWEN, "--data", data, "--vram", "24GiB").exit_code == 0
    text = (folder / "recipe.toml").read_text()
    assert "# Share of rows that may be refused, as line 31 is.\nskip_bad = 0.05\n" in text


@pytest.mark.soak
def test_a_model_that_does_not_fit_exits_5_and_leaves_nothing(folder):
    data = write_rows(folder / "pairs.jsonl", pairs(40))
    done = run("--model", "Qwen/Qwen2.5-72B-Instruct", "--data", data, "--card", "RTX 3060 12GB")
    assert done.exit_code == 5
    assert "what would help, most first:" in done.stderr
    assert not (folder / "recipe.toml").exists()


def test_a_model_without_a_config_at_hand_is_not_planned(folder):
    data = write_rows(folder / "pairs.jsonl", pairs(40))
    assert run("--model", "org/some-model", "--data", data).exit_code == 0
    assert "# Not planned, since the model's config can't be had: " in (folder / "recipe.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --model and --data: missing, and there is no terminal to ask in\n"),
        (("--data", "x"), "error: --model: missing, and there is no terminal to ask in\n"),
        (("--model", "m", "--data", "d", "--output", "none/r.toml"), "error: none: no such folder\n"),
    ],
)
def test_what_is_missing_is_named_without_a_terminal(folder, arguments, message):
    done = run(*arguments)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", message)


def test_data_without_a_usable_row_exit_3_with_the_first_reason(folder):
    data = write_rows(folder / "pairs.jsonl", [{"a": 1}])
    done = run("--model", QWEN, "--data", data)
    assert done.exit_code == 3
    assert "none of its first 1 rows can be used" in done.stderr
    assert "pairs.jsonl:1: " in done.stderr


def test_a_recipe_that_is_there_is_kept(folder):
    (folder / "recipe.toml").write_text("mine")
    done = run("--model", QWEN, "--data", write_rows(folder / "pairs.jsonl", pairs(4)))
    assert (done.exit_code, (folder / "recipe.toml").read_text()) == (2, "mine")


def test_a_path_starts_at_the_recipes_folder(folder):
    (folder / "recipes").mkdir()
    (folder / "recipes/recipe.schema.json").write_text("{}")
    data = write_rows(folder / "pairs.jsonl", pairs(40))
    assert run("--model", QWEN, "--data", data, "--vram", "24GiB", "--output", "recipes/my.toml").exit_code == 0
    text = (folder / "recipes/my.toml").read_text()
    assert text.startswith("#:schema recipe.schema.json\n")
    assert tomllib.loads(text)["data"]["train"] == "../pairs.jsonl"


def test_a_terminal_is_asked_for_what_is_missing(folder, monkeypatch):
    monkeypatch.setattr(init, "can_ask", lambda: True)
    data = write_rows(folder / "pairs.jsonl", pairs(40))
    (folder / "my.toml").write_text("mine")
    done = run(answers=f"{data}\n{QWEN}\nRTX 4090\nshort\nmy.toml\ny\n")
    assert done.exit_code == 0, done.output
    recipe = tomllib.loads((folder / "my.toml").read_text())
    assert (recipe["model"]["base"], recipe["loss"]["ld_alpha"]) == (QWEN, 0.5)
    refused = run("--model", QWEN, "--data", data, "--vram", "24GiB", "--goal", "align", answers="my.toml\nn\n")
    assert refused.exit_code == 2
    assert "my.toml exists" in refused.stderr


def test_the_commands_goals_are_those_that_have_a_loss():
    from qpref.first_recipe.goals import GOALS

    assert tuple(GOALS) == init.GOALS
