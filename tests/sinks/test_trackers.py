"""A run that is killed and resumed without a network, read back from each tracker."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from conftest import preference_rows, write_jsonl

HERE = Path(__file__).parent
COMMON = {"run_name": "first try", "tags": ["tiny", "dpo"], "samples": 3}
SINKS = {
    "tensorboard": {},
    "wandb": COMMON | {"mode": "offline", "group": "tests"},
    "mlflow": COMMON,
    "trackio": COMMON | {"group": "tests"},
    "swanlab": COMMON | {"mode": "offline", "group": "tests"},
    "comet": COMMON | {"mode": "offline"},
}
WITH_ID = [name for name in SINKS if name != "tensorboard"]
WITH_TABLES = ["wandb", "mlflow", "trackio", "comet"]
KILLED_AFTER, LAST_STEP = 3, 6
PATIENCE = 300
"""Seconds for a process, on a busy machine."""


def recipe_of(base: Path, folder: Path, sinks: dict[str, dict[str, object]]) -> Path:
    """Two epochs of 3 steps, with a checkpoint and a held-out row every 2."""
    recipe = {
        "model": {"base": str(base), "quantization": "none", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", preference_rows(12))),
            "heldout": str(write_jsonl(folder / "heldout.jsonl", preference_rows(5, start=100))),
        },
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo", "beta": 0.25},
        "train": {
            "learning_rate": 1e-2, "batch_size": 4, "epochs": 2, "save_every": 2, "eval_every": 2,
            "gradient_checkpointing": False,
        },
        "sinks": [{"name": name} | options for name, options in sinks.items()],
    }  # fmt: skip
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    return path


def started(folder: Path, script: str, *arguments: object, trackers: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "TRACKIO_DIR": str(folder / "trackio"),
        "HOME": str(folder),
        "WANDB_MODE": "offline",
        "TRACKERS": json.dumps([name for name in trackers if name != "tensorboard"]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", HERE / script, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=folder, timeout=PATIENCE
    )


def train_and_read(base: Path, folder: Path, sinks: dict[str, dict[str, object]]) -> dict[str, Any]:
    """Kill a run, resume it, and read it back."""
    recipe, run, names = recipe_of(base, folder, sinks), folder / "run", list(sinks)
    killed = started(folder, "tracked_run.py", recipe, run, "--die-after", KILLED_AFTER, trackers=names)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    ids = {name: json.loads((run / "sinks" / f"{name}.json").read_text()) for name in names if name != "tensorboard"}
    resumed = started(folder, "tracked_run.py", recipe, run, "--resume", trackers=names)
    assert resumed.returncode == 0, resumed.stderr
    read = started(folder, "tracker_readers.py", run, *names, trackers=names)
    assert read.returncode == 0, read.stderr
    attempts = folder / "attempts.txt"
    return {
        "run": run,
        "said": killed.stderr + resumed.stderr,
        "stdout": killed.stdout + resumed.stdout,
        "ids": {name: record["run_id"] for name, record in ids.items()},
        "attempts": attempts.read_text() if attempts.exists() else "",
        "read": json.loads(read.stdout),
        "rows": [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "result": json.loads((run / "result.json").read_text()),
    }


@pytest.fixture(scope="module")
def tracked(make_base, tmp_path_factory):
    return train_and_read(make_base(), tmp_path_factory.mktemp("tracked"), SINKS)


def metrics_of(rows: list[dict[str, object]]) -> dict[str, list[list[float]]]:
    """name -> [[step, value], ...] of metrics.jsonl; seconds are left out, which each start measures."""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        leave_out = {"step", "split", "seconds"} | ({"tokens"} if row["split"] == "eval" else set())
        for name, value in row.items():
            if name not in leave_out and value is not None:
                found.setdefault(name, []).append([row["step"], value])
    return found


def check_metrics(tracked, name: str) -> None:
    wanted = metrics_of(tracked["rows"])
    found = {key: tracked["read"][name]["metrics"].get(key) for key in wanted}
    if name == "tensorboard":  # it has no tokens, and float32 values
        wanted.pop("tokens")
        found.pop("tokens")
    for key, history in wanted.items():
        assert [step for step, _ in found[key]] == [step for step, _ in history], key
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in history], rel=1e-6), key


@pytest.mark.parametrize("name", SINKS)
def test_each_step_is_there_once_in_order(tracked, name):
    check_metrics(tracked, name)


@pytest.mark.parametrize("name", WITH_ID)
def test_the_resumed_run_is_the_run_that_was_killed(tracked, name):
    assert len(tracked["read"][name]["ids"]) == 1
    if name != "trackio":  # its record has the run's name, by which trackio resumes
        assert tracked["read"][name]["ids"] == [tracked["ids"][name]]


@pytest.mark.parametrize("name", SINKS)
def test_the_recipe_is_the_runs_config(tracked, name):
    config = tracked["read"][name]["config"]
    beta = config["loss"]["beta"] if "loss" in config else config["loss.beta"]
    assert float(beta) == 0.25


@pytest.mark.parametrize("name", [name for name in SINKS if name != "swanlab"])
def test_the_result_is_the_runs_summary(tracked, name):
    summary = tracked["read"][name]["summary"]
    assert int(summary["steps"]) == LAST_STEP
    assert summary["verdict.sentence"] == tracked["result"]["verdict"]["sentence"]


@pytest.mark.parametrize("name", WITH_TABLES)
def test_held_out_rows_are_a_table(tracked, name):
    table = tracked["read"][name]["heldout"]
    rows = [row for row in tracked["rows"] if row["split"] == "eval"]
    assert [int(row[table["columns"].index("step")]) for row in table["rows"]] == [0, 2, 4, 6]
    losses = [float(row[table["columns"].index("eval_loss")]) for row in table["rows"]]
    assert losses == pytest.approx([row["eval_loss"] for row in rows])


@pytest.mark.parametrize("name", WITH_TABLES)
def test_held_out_samples_are_a_table(tracked, name):
    table = tracked["read"][name]["samples"]
    assert table["columns"] == ["prompt", "chosen", "rejected"]
    assert len(table["rows"]) == 3
    assert "what comes after 100?" in table["rows"][0][0]
    assert table["rows"][0][1].startswith("After 100 comes 101.")
    assert table["rows"][0][2].startswith("WHO KNOWS WHAT 100 IS!!")


def test_swanlab_has_both_tables(tracked):
    assert tracked["read"]["swanlab"]["charts"] == ["tables/heldout", "tables/samples"]


def test_the_runs_name_and_tags_are_the_recipes(tracked):
    read = tracked["read"]
    assert {read[name]["name"] for name in ("wandb", "mlflow", "swanlab")} == {"first try"}
    assert read["trackio"]["name"].startswith("first try-")
    assert {tuple(sorted(read[name]["tags"])) for name in ("wandb", "mlflow", "swanlab")} == {("dpo", "tiny")}


def test_mlflow_shows_the_verdict_and_that_the_run_has_finished(tracked):
    mlflow = tracked["read"]["mlflow"]
    assert (mlflow["status"], mlflow["note"]) == ("FINISHED", tracked["result"]["verdict"]["sentence"])


def test_no_tracker_is_dropped_and_none_changes_the_process(tracked):
    assert "metric sink" not in tracked["said"]


def test_no_tracker_asks_for_the_network(tracked):
    assert tracked["attempts"] == ""


def test_trackers_leave_nothing_outside_of_their_folders(tracked):
    folder = tracked["run"].parent
    kept = {"train.jsonl", "heldout.jsonl", "recipe.toml", "run", "trackio"}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} <= kept


def test_the_page_shows_a_recipe_of_each_tracker():  # test_manual_commands.py checks their keys
    page = (HERE.parents[1] / "docs" / "trackers.md").read_text()
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)]
    assert {sink["name"] for block in blocks for sink in block["sinks"]} == {"console", *SINKS}
