"""`qpref init-plugin`: each kind's tree installs without a network, passes its own tests, and keeps the contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from qpref.cli import main
from qpref.cli.init_plugin import KINDS

NAME = "brand_new"
IN_THE_SITE = """
import json, sys
import pytest
from click.testing import CliRunner
from qpref.cli import main

found = {}
for kind, tree in json.loads(sys.argv[1]).items():
    own = pytest.main(["-q", "-p", "no:cacheprovider", "-c", f"{tree}/pyproject.toml", f"{tree}/tests"])
    sample = ["--sample", f"{tree}/pairs"] if kind == "read" else []
    check = CliRunner().invoke(main, ["plugins", "check", f"{kind}-brand_new_{kind}", "--json", *sample])
    found[kind] = [int(own), check.exit_code, check.stdout]
print("FOUND", json.dumps(found))
"""


def invoke(*arguments):
    return CliRunner().invoke(main, ["init-plugin", *map(str, arguments)])


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """kind -> the folder of a new plugin `brand_new_KIND`."""
    folder = tmp_path_factory.mktemp("trees")
    for kind in KINDS:
        done = invoke(kind, f"{NAME}_{kind}", "--output", folder / kind)
        assert done.exit_code == 0, done.output
    (folder / "read" / "pairs").write_text("What is 1?|One.|Two.\nWhat is 2?|Zwölf.|Two.\n")
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def outcomes(trees, tmp_path_factory):
    """kind -> exit code of its tests, exit code and results of `qpref plugins check`, once it is installed."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--target", site]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *options, *trees.values()], check=True)
    listed = json.dumps({kind: str(tree) for kind, tree in trees.items()})
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_SITE, listed],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    return {kind: (own, code, json.loads(text), done.stdout) for kind, (own, code, text) in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_tests_pass(outcomes, kind):
    own, _, _, log = outcomes[kind]
    assert own == 0, log


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_the_contract_once_it_is_installed(outcomes, kind):
    _, code, facts, _ = outcomes[kind]
    assert [fact["from"] for fact in facts] == [f"qpref-brand-new-{kind} 0.1.0 [{kind}-brand_new_{kind}]"]
    assert [result for result in facts[0]["results"] if result["status"] == "broken"] == []
    passed = [result for result in facts[0]["results"] if result["status"] == "passed"]
    assert len(passed) > (2 if kind == "reward" else 5)
    assert code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_its_metadata_follow_the_conventions(trees, kind):
    project = tomllib.loads((trees[kind] / "pyproject.toml").read_text())["project"]
    assert project["name"] == f"qpref-brand-new-{kind}"
    assert "qpref-plugin" in project["keywords"]
    (core,) = [line for line in map(Requirement, project["dependencies"]) if line.name == "qpref"]
    version = metadata.version("qpref")
    major, minor = version.split(".")[:2]
    assert core.specifier.contains(version, prereleases=True)
    assert not core.specifier.contains(f"{major}.{int(minor) + 1}.0")


def test_the_command_lists_its_files_and_says_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = invoke("check", "tidy").stdout.splitlines()
    assert lines == [
        "written: qpref-tidy/pyproject.toml",
        "written: qpref-tidy/README.md",
        "written: qpref-tidy/src/qpref_tidy/__init__.py",
        "written: qpref-tidy/src/qpref_tidy/py.typed",
        "written: qpref-tidy/tests/test_qpref_tidy.py",
        'next: cd qpref-tidy && pip install -e ".[dev]" && pytest && qpref plugins check check-tidy',
    ]
    assert all((tmp_path / line.split()[1]).is_file() for line in lines[:-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss", "dpo"], "loss 'dpo' is offered by qpref"),
        (["loss", "My-Loss"], "the name 'My-Loss' isn't lower-case letters and digits"),
        (["loss", "../up"], "the name '../up' isn't"),
        (["loss", "new", "--output", "here"], "here exists"),
        (["loss", "new", "--output", "no/where"], "no: no such folder"),
    ],
)
def test_a_name_or_a_folder_that_cannot_be_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
