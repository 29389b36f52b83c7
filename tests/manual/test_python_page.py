"""docs/python.md and the notebook own_loss.ipynb run as they are, in their order, with a tiny base."""

from __future__ import annotations

import json
import re

import pytest
from manual_commands import ROOT
from manual_workspace import workspace  # noqa: F401 - a fixture

PAGE, NOTEBOOK = ROOT / "docs/python.md", ROOT / "docs/own_loss.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
MOST_LINES = 47


def run_blocks(blocks: list[str], name: str) -> dict[str, object]:
    defined: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), defined)
    return defined


@pytest.mark.usefixtures("workspace")
def test_the_page_runs_in_its_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    defined = run_blocks(blocks, PAGE.name)
    (commented,) = re.findall(r"print\(error\.hint\)  # (.*)", PAGE.read_text())
    assert commented in capsys.readouterr().out.splitlines()
    assert len(defined["losses"]) == len(defined["qpref"].Run("runs/memory").metrics)


@pytest.mark.usefixtures("workspace")
def test_the_notebook_runs_with_its_own_loss(capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    sources = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
    blocks = [source for source in sources if not source.startswith("!git clone")]
    assert sum(bool(line.strip()) for block in blocks for line in block.splitlines()) <= MOST_LINES
    defined = run_blocks(blocks, NOTEBOOK.name)
    assert "nats" in capsys.readouterr().out
    assert [row.split for row in defined["curve"]].count("train") == 6
    assert defined["run"].metrics == defined["curve"]


def test_the_notebook_is_stored_without_outputs_and_with_names_of_its_cells():
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")] == []
