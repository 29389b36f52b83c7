"""`qpref doctor`: exit codes and JSON."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from qpref.cli import main
from qpref.doctor import packages


@pytest.fixture
def doctor(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *options: CliRunner().invoke(main, ["doctor", *options], catch_exceptions=False)


def test_a_machine_without_problems_exits_0(doctor):
    done = doctor()
    assert done.exit_code == 0
    assert done.stdout.endswith("\nno problem found\n")
    for topic in ("packages", "device", "memory", "processor", "disk and cache", "environment", "plugins"):
        assert f"\n{topic}\n" in f"\n{done.stdout}"


def test_a_problem_exits_1_and_names_its_fix(doctor, monkeypatch):
    monkeypatch.setattr(packages, "_version", lambda name: None if name == "peft" else "1.0" if name == "trl" else "0")
    done = doctor("--json")
    facts = json.loads(done.stdout)
    assert (done.exit_code, facts["ok"]) == (1, False)
    peft = next(one for one in facts["findings"] if one["message"] == "peft is not installed")
    assert peft == {"topic": "packages", "status": "problem", "message": "peft is not installed",
                    "fix": "pip install 'peft<0.22,>=0.21'"}  # fmt: skip
    assert "PROBLEM  peft is not installed" in doctor().stdout
