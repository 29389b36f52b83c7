"""`qpref eval`: the real command on a run, its merged model, its adapter and its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import merge_to, preference_rows, write_jsonl
from edited_runs import reseal

from qpref.cli import main
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan


@pytest.fixture(scope="module")
def folder(make_base, tmp_path_factory):
    """A finished run on an NF4 base that computes in bf16, its base, its merged model and its data."""
    folder = tmp_path_factory.mktemp("evaluated")
    heldout = preference_rows(4, start=100) + preference_rows(2)  # two prompts of the training data
    heldout[5]["prompt"] = heldout[5]["prompt"].upper()
    recipe = {
        "model": {"base": str(make_base()), "quantization": "nf4", "dtype": "bf16"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", preference_rows(12))),
            "heldout": str(write_jsonl(folder / "heldout.jsonl", heldout)),
            "max_length": 256,
            "max_prompt_length": 128,
        },
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {"learning_rate": 0.02, "batch_size": 4, "warmup_ratio": 0.0},
        "sinks": [],
    }
    train_plan(make_plan(recipe, output=folder / "run"))
    merge_to(folder / "run", folder / "merged", "float32")
    return folder


def evaluate(*arguments, code=0):
    done = CliRunner().invoke(main, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def facts(*arguments):
    return json.loads(evaluate(*arguments, "--samples", 200, "--json").stdout)


def values(model):
    return {name: estimate["value"] for name, estimate in model["metrics"].items()}


def test_a_run_and_its_merged_model_agree(folder):
    """The merged folder has no reference of its own; the run's serves it. Both compute in float32."""
    found = facts(folder / "run", folder / "merged")
    assert found["dtype"] == "float32"
    run, merged = found["models"]
    assert [model["kind"] for model in (run, merged)] == ["run", "model"]
    assert run["reference"] == merged["reference"] == str(folder / "run")
    assert values(run).keys() == values(merged).keys()
    for name, value in values(run).items():
        assert values(merged)[name] == pytest.approx(value, abs=1e-3), name
    assert values(run)["rewards/margins"] > 1
    assert merged["difference_from_first"]["rewards/margins"]["high"] < 1e-3
    assert run["difference_from_first"] == {}


def test_the_reference_is_found_whatever_the_order(folder):
    first, second = facts(folder / "merged", folder / "run")["models"]
    assert (first["kind"], first["reference"]) == ("model", str(folder / "run"))
    assert values(first)["rewards/margins"] == pytest.approx(values(second)["rewards/margins"], abs=1e-3)


def test_the_numbers_are_those_of_the_runs_last_held_out_row(folder):
    """In the run's own type and by its own beta, on its held-out file, which is the default."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "eval"][-1]
    found = facts(folder / "run")
    assert (found["data"], found["pairs"], found["dtype"]) == (str(folder / "heldout.jsonl"), 6, None)
    assert found["beta"] == {"value": 0.1, "from": str(folder / "run")}
    shared = ("rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    for name in shared:
        assert values(found["models"][0])[name] == pytest.approx(last[f"eval_{name}"], rel=0.02, abs=0.05), name
    assert values(found["models"][0])["rewards/accuracies"] == last["eval_rewards/accuracies"]


def test_the_base_hasnt_moved_from_itself(folder, make_base):
    """An NF4 base is the reference: no reward, no KL, no drift."""
    found = facts(folder / "run", make_base(), "--quantization", "nf4", "--float32")["models"][1]
    assert found["kind"] == "model"
    assert values(found)["rewards/margins"] == pytest.approx(0, abs=0.05)
    assert values(found)["kl"] == pytest.approx(0, abs=1e-3)


def test_a_base_alone_has_accuracy_by_log_probability_alone(folder, make_base):
    found = facts(make_base(), "--data", folder / "heldout.jsonl")
    (model,) = found["models"]
    assert model["reference"] is None
    assert found["beta"]["value"] == 0.1
    assert found["beta"]["from"] == "default, since no run names one"
    assert "logps/accuracies" in values(model)
    assert not [name for name in values(model) if name.startswith(("rewards/", "drift/", "kl", "saturated"))]


def test_a_base_alone_needs_data(make_base):
    done = evaluate(make_base(), code=2)
    assert done.stderr == ("error: none of the models is a run with held-out data\nhint: name pairs with --data\n")


def test_prompts_that_were_trained_on_are_counted_and_said(folder):
    found = facts(folder / "run")
    assert found["models"][0]["prompts_in_training_data"] == {"exact": 1, "normalized": 2}
    assert any(
        "2 of 6 prompts are in its training data (1 of them up to case and white space)" in warning
        for warning in found["warnings"]
    )


def test_prompts_that_were_trained_on_can_be_left_out(folder):
    found = facts(folder / "run", "--without-overlap")
    assert (found["pairs"], found["left_out"]["overlapping"]) == (4, 2)
    assert any("they are left out" in warning for warning in found["warnings"])
    nothing = evaluate(folder / "run", "--data", folder / "train.jsonl", "--without-overlap", code=3)
    assert "every prompt is in the training data" in nothing.stderr


def test_training_data_that_are_gone_are_said(folder, tmp_path):
    copy = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    lock = (copy / "recipe.lock.toml").read_text()
    (copy / "recipe.lock.toml").write_text(lock.replace("train.jsonl", "gone.jsonl"))
    reseal(copy)
    done = evaluate(copy, "--samples", 10, "--data", folder / "heldout.jsonl")
    assert "can't check the overlap with its training data: " in done.stderr
    assert "gone.jsonl: no such file" in done.stderr


def test_what_is_held_out_is_evaluated_without_the_training_data(folder, tmp_path):
    copy = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    lock = (copy / "recipe.lock.toml").read_text()
    (copy / "recipe.lock.toml").write_text(lock.replace("train.jsonl", "gone.jsonl"))
    reseal(copy)
    done = evaluate(copy, "--samples", 10)
    assert "can't check the overlap with its training data: " in done.stderr


def test_held_out_data_that_have_changed_since_training_are_said(folder, tmp_path):
    assert facts(folder / "run")["data_changed"] is False
    assert facts(folder / "run", "--max-length", 200)["data_changed"] is False
    copy = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    lock = (copy / "recipe.lock.toml").read_text()
    other = write_jsonl(tmp_path / "other.jsonl", preference_rows(4, start=200))
    (copy / "recipe.lock.toml").write_text(lock.replace(str(folder / "heldout.jsonl"), str(other)))
    reseal(copy)
    found = facts(copy)
    assert found["data_changed"] is True
    assert f"{other}: changed since training; these aren't the pairs that the run held out" in found["warnings"]
    assert facts(copy, "--data", other)["data_changed"] is None


def test_a_merged_folder_alone_is_said_to_hide_what_it_was_trained_on(folder):
    words = f"{folder / 'merged'}: its training data are unknown, so overlap isn't checked; name its run too"
    assert words in evaluate(folder / "merged", "--samples", 10, "--data", folder / "train.jsonl").stderr
    beside = evaluate(folder / "merged", folder / "run", "--samples", 10, "--data", folder / "train.jsonl")
    assert "unknown" not in beside.stderr
    assert "in its training data" in beside.stderr + beside.stdout


def test_single_completions_exit_3(folder, tmp_path):
    path = write_jsonl(tmp_path / "single.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    done = evaluate(folder / "run", "--data", path, code=3)
    assert done.stderr == (
        f"error: {path}:1: a single completion with a label (1 such rows of 1); accuracy and margins compare a chosen "
        "with a rejected response\nhint: evaluate on pairs: rows of prompt, chosen, rejected\n"
    )


def test_a_folder_that_is_no_model_exits_2(folder, tmp_path):
    done = evaluate(tmp_path, "--data", folder / "heldout.jsonl", code=2)
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {tmp_path}: neither a run nor an adapter nor a model: it has no run.json, adapter_config.json or "
        "config.json\n"
    )


def test_an_adapter_for_another_base_exits_10(folder, make_base, tmp_path):
    adapter = shutil.copytree(folder / "run/adapter", tmp_path / "alone")
    other = make_base(num_hidden_layers=1)
    done = evaluate(adapter, "--base", other, "--data", folder / "heldout.jsonl", code=10)
    assert "not an adapter for this base: it has " in done.stderr


def test_the_same_seed_gives_the_same_report(folder):
    first, again = (evaluate(folder / "run", "--samples", 50, "--seed", 3, "--json").stdout for _ in range(2))
    assert first == again
    other = evaluate(folder / "run", "--samples", 50, "--seed", 4, "--json").stdout
    assert other != first


def test_a_sample_of_the_pairs_is_taken(folder):
    assert facts(folder / "run", "--max-pairs", 3)["pairs"] == 3


def test_pairs_that_are_too_long_are_left_out_and_said(folder, tmp_path):
    rows = preference_rows(3, start=100)
    rows[1]["chosen"] = "It is so. " * 40
    found = facts(folder / "run", "--data", write_jsonl(tmp_path / "long.jsonl", rows))
    assert (found["pairs"], found["left_out"]["not_comparable"]) == (2, 1)
    assert any("1 of 3 pairs are left out for all models" in warning for warning in found["warnings"])
    assert facts(folder / "run", "--data", tmp_path / "long.jsonl", "--max-length", 500)["pairs"] == 3


def test_buckets_hold_all_pairs_by_length_and_by_file(folder):
    by = facts(folder / "run")["models"][0]["by"]
    assert set(by) == {"response tokens", "length of chosen beside rejected"}
    for buckets in by.values():
        assert sum(bucket["rewards/accuracies"]["pairs"] for bucket in buckets.values()) == 6


def test_beta_scales_rewards_and_nothing_else(folder):
    small, large = (values(facts(folder / "run", "--beta", beta)["models"][0]) for beta in (0.1, 0.2))
    assert large["rewards/margins"] == pytest.approx(2 * small["rewards/margins"], rel=1e-9)
    assert large["logps/chosen"] == small["logps/chosen"]


def test_the_table_names_models_metrics_and_differences(folder):
    done = evaluate(folder / "run", folder / "merged", "--samples", 100)
    assert "accuracy by reward margin at equal length" in done.stdout
    lead, _, rest = done.stdout.partition("all metrics")
    rows = [line.split("│")[1].strip() for line in lead.splitlines() if line.startswith("│")]
    assert rows == ["accuracy by reward margin", "change of logps/chosen since the start (nats)",
                    "KL from the reference (nats per token)"]  # fmt: skip
    assert "reward margin" in rest
    assert "right on" not in lead  # too few pairs
    assert f"difference from {folder}/run, pair by pair" in done.stdout
    assert "warning: only 6 pairs" in done.stderr
    margin = next(line for line in done.stdout.splitlines() if line.startswith("│ reward margin"))
    shown = [cell.strip() for cell in margin.strip("│").split("│")][1:]
    expected = facts(folder / "run", folder / "merged")["models"]
    for cell, model in zip(shown, expected, strict=True):
        assert cell.split()[0] == f"{values(model)['rewards/margins']:.3f}"


def test_names_too_long_for_a_column_are_folded_and_not_cut(capsys):
    from rich.console import Console

    from qpref.cli.output import numbers_table

    names = ["runs/quickstart-sweep/beta=0.03", "runs/quickstart-sweep/beta=0.3"]
    Console(width=60).print(numbers_table("held-out pairs", names))
    header = [line.strip("┃").split("┃")[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("┃")]
    assert ["".join(part.strip() for part in column) for column in zip(*header, strict=True)] == names


def test_json_has_no_number_that_json_lacks(folder):
    def refuse(name):
        raise AssertionError(name)

    json.loads(evaluate(folder / "run", "--samples", 10, "--json").stdout, parse_constant=refuse)


def test_log_probabilities_and_accuracies_fit_each_other(folder):
    """Accuracy by reward margin is the share of pairs with a positive margin, so the means have to be possible."""
    found = values(facts(folder / "run")["models"][0])
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])
    assert found["rewards/chosen"] == pytest.approx(0.1 * found["drift/chosen"])
    assert found["rewards/rejected"] == pytest.approx(0.1 * found["drift/rejected"])
    assert np.isfinite(found["kl"])
