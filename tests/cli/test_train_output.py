"""Output of `qpref train`: verdict and next commands, nothing under --quiet, JSON objects under --log-json."""

from __future__ import annotations

import json
import shlex

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import preference_rows, write_jsonl

from qpref.cli import COMMANDS, main
from qpref.cli.tables import print_table


@pytest.fixture
def recipe(make_recipe, tmp_path):
    """Two steps, 24 held-out pairs, the default sink."""
    heldout = str(write_jsonl(tmp_path / "many.jsonl", preference_rows(24, start=100)))
    document = make_recipe({"train.max_steps": 2, "model.device": "cpu", "data.heldout": heldout})
    del document["sinks"]
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(document))
    return path


def train(recipe, folder, *options):
    return CliRunner().invoke(main, ["train", str(recipe), "--output", str(folder), *options])


def test_run_ends_with_its_verdict_and_the_next_commands(recipe, tmp_path):
    done = train(recipe, tmp_path / "a run")
    lines = done.stdout.splitlines()
    [verdict] = [line for line in lines if line.startswith("verdict: ")]
    recorded = json.loads((tmp_path / "a run/result.json").read_text())["verdict"]
    assert verdict == f"verdict: {recorded['sentence']}"
    assert "of 24 pairs by log-probability (95 % interval" in verdict
    after = lines[lines.index("next:") + 1 :]
    assert after
    for line in after:
        program, name, folder, *_ = shlex.split(line, comments=True)
        assert (program, folder) == ("qpref", str(tmp_path / "a run"))
        assert name in COMMANDS
    assert {"eval", "report", "merge"} <= {shlex.split(line)[1] for line in after}


def test_quiet_run_prints_nothing(recipe, tmp_path):
    done = train(recipe, tmp_path / "run", "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    assert (tmp_path / "run/adapter").is_dir()


def test_quiet_run_still_warns(recipe, tmp_path):
    done = train(recipe, tmp_path / "run", "-q", "--set", "train.learning_rate=5e-7")
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("warning: [train] learning_rate = 5e-07 over 2 steps")


def test_json_log_is_one_object_a_line(recipe, tmp_path):
    done = train(recipe, tmp_path / "run", "--log-json", "--set", "train.learning_rate=5e-7")
    assert (done.exit_code, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [event for event in events if event["event"] == "metrics"]
    assert [(row["split"], row["step"]) for row in rows] == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]
    written = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["eval_loss" if row["split"] == "eval" else "loss"] for row in rows] == [
        row["eval_loss" if row["split"] == "eval" else "loss"] for row in written
    ]
    [warning] = [event for event in events if event.get("rule") == "idle_rate"]
    assert (warning["event"], warning["level"]) == ("log", "warning")
    result = events[-1]
    assert (result["event"], result["run_folder"]) == ("result", str(tmp_path / "run"))
    assert result["verdict"] == json.loads((tmp_path / "run/result.json").read_text())["verdict"]


def test_error_of_a_json_log_is_an_object_too(recipe, tmp_path):
    train(recipe, tmp_path / "run", "--quiet")
    done = train(recipe, tmp_path / "run", "--log-json")
    [event] = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.exit_code, done.stderr) == (2, "")
    assert (event["event"], event["exit_code"]) == ("error", 2)
    assert event["message"].endswith("holds a run")
    assert "--resume" in event["hint"]


def test_quiet_and_json_exclude_each_other(recipe, tmp_path):
    done = train(recipe, tmp_path / "run", "--quiet", "--log-json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "exclude each other" in done.stderr


def test_complete_run_that_is_resumed_shows_its_verdict_again(recipe, tmp_path):
    first = train(recipe, tmp_path / "run")
    again = train(recipe, tmp_path / "run", "--resume")
    [verdict] = [line for line in first.stdout.splitlines() if line.startswith("verdict: ")]
    assert verdict in again.stdout.splitlines()


@pytest.mark.parametrize("columns", [80, 60])
def test_table_of_losses_fits_a_terminal_and_has_a_line_each_in_a_pipe(monkeypatch, capsys, columns):
    rows = [("NAME", "SUMMARY"), ("dpo", "word " * 40), ("ipo", "short")]
    print_table(rows)
    piped = capsys.readouterr().out.splitlines()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table(rows)
    shown = capsys.readouterr().out.splitlines()
    assert len(piped) == 3
    assert max(map(len, shown)) <= columns
    assert " ".join(" ".join(shown).split()) == " ".join(" ".join(piped).split())
