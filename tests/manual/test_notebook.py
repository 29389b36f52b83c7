"""The notebook's cells run in their order: with a tiny base here, and with the real one in a soak test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from manual_commands import NEXT, NOTEBOOK, ROOT
from manual_workspace import run, workspace  # noqa: F401 - a fixture

CELLS = json.loads(NOTEBOOK.read_text())["cells"]
INSTALL = "!git clone"
"""How the cell begins that fetches and installs the repository, which the tests have already."""


def run_cells(run_command: Callable[[str], None]) -> dict[str, object]:
    """Run the code cells in the current folder, and return what they have defined."""
    defined: dict[str, object] = {}
    for cell in CELLS:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith(INSTALL):
            continue
        if source.startswith("!"):
            for line in source.splitlines():
                for command in NEXT.split(line.removeprefix("!")):
                    run_command(command)
        else:
            exec(compile(source, NOTEBOOK.name, "exec"), defined)
    return defined


@pytest.mark.usefixtures("workspace")
def test_the_cells_run_in_their_order(capsys):
    assert run_cells(run)["rows"]
    assert "chosen -" in capsys.readouterr().out


def test_the_notebook_is_stored_without_outputs_and_with_names_of_its_cells():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.soak
def test_the_cells_run_with_the_real_model(tmp_path, monkeypatch):
    """Needs a network, or the model in the cache of the user."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("QPREF_CACHE", raising=False)
    rows = run_cells(lambda command: subprocess.run(["bash", "-c", command], check=True) and None)["rows"]
    held_out = [row for row in rows if row["split"] == "eval"]
    assert held_out[-1]["eval_rewards/accuracies"] > 0.8
    assert held_out[-1]["eval_rewards/margins"] > 0.5
    assert (tmp_path / "out/model.safetensors").is_file()
    assert (tmp_path / "report.html").is_file()
