"""The import contracts break where they have to."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SEEDS = {
    "a plugin imports another": (
        "plugins/qpref_plugins/loss_ipo/__init__.py",
        "import qpref_plugins.loss_dpo",
        "plugins stand alone",
    ),
    "a plugin writes to disk": (
        "plugins/qpref_plugins/loss_ipo/__init__.py",
        "import qpref.fsio",
        "plugins see the plugin author's interface alone",
    ),
    "the core imports a plugin": (
        "qpref/training/loop.py",
        "import qpref_plugins.loss_dpo",
        "the core knows no plugin package",
    ),
    "a room imports a higher one": ("qpref/policy/load.py", "import qpref.training.loop", "one way through the core"),
    "a circle in a room": ("qpref/policy/head.py", "import qpref.policy.logprobs", "no circles inside a room"),
}


def broken_contracts(tree: Path) -> list[str]:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    command = [sys.executable, "-c", code]
    paths = f"{tree}:{tree / 'plugins'}"
    done = subprocess.run(
        command, cwd=tree, env={"PYTHONPATH": paths, "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    broken = re.compile(r"(.*) BROKEN(?: \(\d+ ignored imports?\))?")
    return [found[1] for line in done.stdout.splitlines() if (found := broken.fullmatch(line))]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("qpref", "plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wrong_import_breaks_its_contract(seed, tree):
    path, line, contract = SEEDS[seed]
    module = tree / path
    module.write_text(f"{module.read_text()}\n{line}\n")
    assert contract in broken_contracts(tree)


def test_every_room_is_named_in_the_plugins_contract():
    """The rooms that a plugin must not import are all but those that its author imports."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (named,) = (each["forbidden_modules"] for each in contracts if each["name"].startswith("plugins see"))
    rooms = {
        path.stem for path in (ROOT / "qpref").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert {f"qpref.{room}" for room in rooms - {"__init__", "hooks", "records", "errors"}} == set(named)


def test_a_plugin_is_named_once():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    named = [line.partition("=")[0].strip() for line in lines if '"qpref_plugins.' in line]
    assert len(named) == len(set(named)) > 30
    for package in (ROOT / "plugins/qpref_plugins").glob("*/__init__.py"):
        assert any(f'"qpref_plugins.{package.parent.name}"' in line for line in lines)
