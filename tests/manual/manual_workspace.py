"""A folder in which the manual's commands run, with the repository's files under their names and a tiny base."""

from __future__ import annotations

import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import preference_rows, write_jsonl
from manual_commands import ROOT

from qpref.cli import main

NUM_TRAINED, NUM_HELD_OUT = 8, 8
"""Pairs in the place of the quickstart's data, short ones: a tiny base reads bytes."""
AXOLOTL = """base_model: my-base
rl: dpo
datasets:
  - path: pairs.jsonl
    type: chat_template.default
learning_rate: 5.0e-6
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
adapter: qlora
load_in_4bit: true
"""


LEAVES_A_VERDICT = {0, 11}
"""Exit codes of a merge: a tiny random model's verdict may be that rounding loses too much."""


@pytest.fixture
def workspace(tmp_path: Path, make_base, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the manual's commands name."""
    make_workspace(tmp_path, make_base())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_workspace(folder: Path, base: Path) -> None:
    """Fill a folder with recipes/quickstart.toml, my.toml, pairs.jsonl and what else the manual names."""
    quickstart = tomllib.loads((ROOT / "recipes/quickstart.toml").read_text())
    quickstart["model"] |= {"base": str(base)}
    del quickstart["model"]["sha256"]
    data = folder / "recipes/quickstart"
    data.mkdir(parents=True)
    write_jsonl(data / "train.jsonl", preference_rows(NUM_TRAINED))
    write_jsonl(data / "heldout.jsonl", preference_rows(NUM_HELD_OUT, start=100))
    (folder / "recipes/quickstart.toml").write_text(tomli_w.dumps(quickstart))
    shutil.copytree(base, folder / "my-base")
    pairs = [
        row | {"post": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in preference_rows(24)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    shutil.copy(folder / "pairs.jsonl", folder / "pairs.txt")
    mine = {
        "model": {"base": "my-base"},
        "data": {"train": "pairs.jsonl", "heldout_share": 0.2},
        "loss": {"name": "dpo"},
        "train": {"batch_size": 8, "tokens_per_microbatch": 1024, "gradient_checkpointing": False},
    }
    (folder / "my.toml").write_text(tomli_w.dumps(mine))
    (folder / "axolotl.yml").write_text(AXOLOTL)


def run(command: str) -> None:
    """Run one command of ours in the current folder."""
    program, *arguments = shlex.split(command)
    assert program == "qpref", f"{command!r}: run it here, or say in NOT_RUN_HERE what it needs"
    if arguments[0] == "convert":
        Path("my.toml").unlink()
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    expected = LEAVES_A_VERDICT if arguments[0] == "merge" else {0}
    assert done.exit_code in expected, f"{command}\n{done.output}"
