"""A sink whose packages are missing is refused before a run starts, with the command that installs them."""

from __future__ import annotations

from importlib import metadata

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import preference_rows, write_jsonl

from qpref import installed
from qpref.cli import main
from qpref.hooks import MetricSink, Options
from qpref.hooks.manager import SINK, Loaded, Offer, PluginHost
from qpref.recipe import requirements
from qpref.recipe.choices import Choice

TRACKERS = ["comet", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]


@pytest.fixture
def without(monkeypatch):
    """`without("wandb")`: no version of it is installed."""

    def hide(*names: str) -> None:
        known = installed.version_of
        monkeypatch.setattr(installed, "version_of", lambda name: None if name in names else known(name))

    return hide


def recipe_with(folder, *sinks):
    recipe = {
        "model": {"base": "nowhere/base"},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", preference_rows(4)))},
        "loss": {"name": "dpo"},
        "sinks": [{"name": name} for name in sinks],
    }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    return str(path)


@pytest.mark.parametrize("dry_run", [["--dry-run"], []], ids=["dry run", "run"])
def test_a_missing_tracker_is_refused_with_the_command_that_installs_it(tmp_path, without, dry_run):
    without("wandb", "sqlalchemy", "alembic")
    done = CliRunner().invoke(main, ["train", recipe_with(tmp_path, "wandb", "mlflow"), *dry_run])
    assert done.exit_code == 12
    assert done.stderr == (
        "error: sink 'wandb' needs wandb>=0.19\n"
        "  sink 'mlflow' needs sqlalchemy>=2 and alembic>=1.10\n"
        'hint: pip install "qpref[wandb]"; pip install "qpref[mlflow]"\n'
    )


def test_a_version_that_is_too_old_is_missing(monkeypatch):
    monkeypatch.setattr(installed, "version_of", lambda name: "0.18.7")
    assert installed.missing(["wandb>=0.19", "wandb>=0.18"]) == ["wandb>=0.19"]


def test_a_package_that_no_extra_has_is_installed_by_its_name():
    assert installed.install_command("qpref", ["acme-tracker>=2"]) == 'pip install "acme-tracker>=2"'
    assert installed.install_command("no-such-distribution", ["acme>=2"]) == 'pip install "acme>=2"'


def test_a_process_that_opens_no_sink_needs_no_package(monkeypatch, without):
    record = MetricSink(name="odd", summary="", options=Options, open=lambda *_: None, requires=("no-such>=1",))
    choice = Choice(Loaded(record, Offer("sink", "odd", "acme", "1", "acme")), Options())
    monkeypatch.setattr(requirements, "is_first", lambda: False)
    requirements.refuse_missing([choice])


@pytest.mark.parametrize("name", TRACKERS)
def test_each_tracker_has_an_extra_with_what_it_requires(name):
    record = PluginHost().load(SINK, name).record
    assert record.requires
    assert installed.install_command("qpref", record.requires) == f'pip install "qpref[{name}]"'


def test_every_sink_with_packages_of_its_own_is_among_them():
    names = {point.name.removeprefix("sink-") for point in metadata.entry_points(group="qpref")
             if point.name.startswith("sink-") and point.value.startswith("qpref_plugins.")}  # fmt: skip
    assert names - {"console"} == set(TRACKERS)
