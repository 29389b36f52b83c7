"""A stranger's distribution, built and installed as a stranger does, is listed and trains like a built-in."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tomli_w

FOREIGN = Path(__file__).with_name("qpref-hinge")
MAY_IMPORT = {"__future__", "collections.abc", "torch", "qpref.hooks", "qpref.records"}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of a fresh environment that sees this one's packages and has qpref-hinge installed beside them."""
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copytree(FOREIGN, folder / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # addsitedir reads the .pth files of that folder too, such as that of an editable qpref; a bare path would not.
    borrowed = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    lines = [f"import site; site.addsitedir({path!r})\n" for path in borrowed]
    (Path(site) / "borrowed.pth").write_text("".join(lines))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *options, folder / "source"], check=True)
    return python


def qpref(python, *arguments, **environment):
    return subprocess.run(
        [python, "-c", "from qpref.cli import main; main(prog_name='qpref')", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def its_lines(listing):
    return [line.split() for line in listing.splitlines() if "squared_hinge" in line]


def test_it_imports_what_a_plugin_may_import_and_nothing_else():
    imported = set()
    for path in (FOREIGN / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    assert imported <= MAY_IMPORT


def test_it_is_listed_with_its_distribution(python):
    done = qpref(python, "plugins")
    assert (done.returncode, done.stderr) == (0, "")
    assert its_lines(done.stdout) == [["loss", "squared_hinge", "qpref-hinge", "0.1.0", "loss-squared_hinge"]]


def test_it_is_not_listed_where_it_is_disabled(python):
    assert its_lines(qpref(python, "plugins", QPREF_DISABLE="qpref-hinge:loss-squared_hinge").stdout) == []


@pytest.fixture(scope="module")
def trained(python, tmp_path_factory, make_base):
    """The run folder of two steps with it, both on the same four pairs."""
    folder = tmp_path_factory.mktemp("squared_hinge")
    pairs = [
        {
            "prompt": f"What comes after {number}?",
            "chosen": f"After {number} comes {number + 1}.",
            "rejected": "WHO KNOWS!",
        }
        for number in range(4)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = {
        "model": {"base": str(make_base()), "quantization": "none", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": "pairs.jsonl"},
        "loss": {"name": "dpo", "beta": 0.5},
        "train": {"learning_rate": 1e-2, "warmup_ratio": 0.0, "batch_size": 4, "epochs": 3},
        "sinks": [],
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    overrides = ["--set", "loss.name=squared_hinge", "--set", "train.max_steps=2"]
    done = qpref(python, "train", folder / "recipe.toml", "--output", folder / "run", *overrides)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def training_rows(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


def test_its_training_starts_at_exactly_1(trained):
    # Policy and reference are the same before the first step: relu(1 - beta * 0)^2.
    assert training_rows(trained)[0]["loss"] == 1.0


def test_its_training_lowers_its_loss(trained):
    first, second = training_rows(trained)
    assert second["loss"] < first["loss"]


def test_its_adapter_is_written(trained):
    assert (trained / "adapter" / "adapter_model.safetensors").is_file()


def test_the_run_says_where_the_loss_came_from(trained):
    used = json.loads((trained / "run.json").read_text())["plugins"]
    assert [(plugin["distribution"], plugin["version"]) for plugin in used if plugin["kind"] == "loss"] == [
        ("qpref-hinge", "0.1.0")
    ]
