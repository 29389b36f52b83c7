"""Packages that are missing, or have lost their metadata: one sentence with an exit code, never a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner

from qpref.cli import main
from qpref.data.token_cache import TokenCache
from qpref.data.tokenize import PairTokenizer
from qpref.hooks.manager import NAMELESS, installed_offers
from qpref.installed import as_install_error, is_required
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan

HIDING = """
import sys
sys.modules["{module}"] = None  # as if it weren't there
from qpref.cli import main
main(prog_name="qpref")
"""


def qpref(*arguments, code):
    done = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stderr


@pytest.fixture
def without_metadata(monkeypatch):
    """`without_metadata("trl")`: the package is importable, and nothing says its version."""
    discover = metadata.Distribution.discover

    def hide(*names):
        def others(cls, **asked):
            return (one for one in discover(**asked) if one.name not in names)

        monkeypatch.setattr(metadata.Distribution, "discover", classmethod(others))

    return hide


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("torch", ["losses"]),
        ("pydantic", ["check", "RECIPE"]),
        ("peft", ["merge", "RUN", "out"]),
        ("bitsandbytes", ["eval", "RUN"]),
        ("jinja2", ["report", "RUN"]),
        ("markupsafe", ["report", "RUN"]),
    ],
)
def test_a_package_that_is_missing_is_one_sentence(trained_run, tmp_path, module, arguments):
    run = trained_run()
    paths = {"RUN": run, "RECIPE": run / "recipe.lock.toml"}
    done = subprocess.run(
        [sys.executable, "-c", HIDING.format(module=module), *(paths.get(word, word) for word in arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    spec = next((line for line in metadata.requires("qpref") if line.startswith(module)), None)
    hint = f"pip install '{spec}'" if spec else "reinstall qpref with its dependencies"
    assert done.stderr.endswith(f"error: {module} is not installed, and qpref needs it\nhint: {hint}\n")
    assert (done.returncode, done.stdout) == (12, "")
    assert list(tmp_path.glob("out*")) == []


def test_a_package_of_another_version_is_named_with_it():
    error = ImportError("cannot import name 'new' from 'pluggy'", name="pluggy")
    found = as_install_error(error)
    assert found.what == f"pluggy {metadata.version('pluggy')} can't be used: cannot import name 'new' from 'pluggy'"
    assert found.hint.startswith("pip install 'pluggy<2,>=1.6'")


def test_the_package_behind_anothers_failure_is_named():
    """As transformers says of a class whose module can't be imported."""
    error = ModuleNotFoundError("Could not import module 'AutoTokenizer'")
    error.__cause__ = ModuleNotFoundError("No module named 'safetensors'", name="safetensors")
    assert as_install_error(error).what == "safetensors is not installed, and qpref needs it"


def test_a_package_of_an_extra_is_not_one_that_qpref_requires():
    """A plugin that lacks it is broken, and qpref isn't."""
    extra = next(line for line in metadata.requires("qpref") if "extra ==" in line)
    name = re.split(r"[^\w.-]", extra)[0]
    assert not is_required(ModuleNotFoundError(f"No module named '{name}'", name=name))
    assert is_required(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"))


@pytest.mark.parametrize("name", ["qpref.nothing", "qpref_plugins.loss_dpo.nothing"])
def test_a_broken_import_of_our_own_stays_a_bug(name):
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        as_install_error(ModuleNotFoundError(f"No module named '{name}'", name=name))


def test_a_version_that_nobody_knows_is_recorded_as_null(make_recipe, tmp_path, without_metadata):
    without_metadata("trl")
    run = train_plan(make_plan(make_recipe(), output=tmp_path / "run"))
    versions = json.loads((run / "run.json").read_text())["versions"]
    assert (versions["trl"], versions["torch"]) == (None, metadata.version("torch"))
    qpref("report", run, code=0)


def test_token_ids_are_not_remembered_under_a_version_that_nobody_knows(without_metadata):
    from conftest import make_tokenizer

    made = make_tokenizer()
    tokenizer = PairTokenizer.of(made, "chat", [made.eos_token_id])
    assert TokenCache.open(tokenizer) is not None
    without_metadata("tokenizers")
    assert TokenCache.open(tokenizer) is None


def test_qprefs_own_metadata_are_missed_by_name(trained_run, without_metadata):
    """Without them it has no plugin, and the first that is named would be blamed."""
    run = trained_run()
    without_metadata("qpref")
    message = "error: qpref's package metadata are missing, and with them its plugins\nhint: reinstall qpref\n"
    for command in ("train", "plan", "check"):
        assert qpref(command, run / "recipe.lock.toml", code=12) == message, command
    for command in (["merge", run, "out"], ["eval", run], ["generate", run]):
        assert qpref(*command, code=12) == message, command
    qpref("report", run, code=0)


def test_a_distribution_that_has_lost_its_name_is_listed(tmp_path, monkeypatch):
    info = tmp_path / "acme-2.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[qpref]\nloss-warm = acme_warm\n")
    monkeypatch.syspath_prepend(tmp_path)
    (offer,) = [offer for offer in installed_offers() if offer.name == "warm"]
    assert (offer.distribution, offer.version) == (NAMELESS, "?")
