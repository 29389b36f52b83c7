"""`qpref plugins check`, and commands that meet a plugin which breaks its contract: exit code 6, with its name."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from installed import put_distribution

from qpref.cli import main

PLUGINS = """
import json

from qpref.hooks import Field, MetricSink, Options, Reader, Validator, hookimpl
from qpref.records import Finding, Row, Source


class Limit(Options):
    limit: int = Field(ge=1)


class Fine:
    def __init__(self, options): ...
    def look(self, example, split): return ()
    def finish(self): return ()


class Severe(Fine):
    def look(self, example, split):
        yield Finding(code="odd", severity="fatal", message="odd", source=example.source)


def read_lines(path):
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        source = Source(path=str(path), line=number)
        try:
            yield Row(values=dict(json.loads(line)), source=source)
        except ValueError:
            yield Finding(code="unreadable", severity="error", message="no JSON", source=source)


def read_twice(path):
    for row in read_lines(path):
        yield Row(values=row.values, source=Source(path=str(path), line=1))


@hookimpl
def qpref_validators():
    yield Validator(name="fine", summary="", options=Options, start=Fine)
    yield Validator(name="limited", summary="", options=Limit, start=Fine)
    yield Validator(name="severe", summary="", options=Options, start=Severe)
    yield Validator(name="typo", summary="", options=Options, start=Fine, skips_refused="no")


@hookimpl
def qpref_readers():
    yield Reader(name="fine", summary="", read=read_lines)
    yield Reader(name="twice", summary="", read=read_twice)
"""
POINTS = ("check-fine", "check-limited", "check-severe", "check-typo", "read-fine", "read-twice")


@pytest.fixture
def acme(tmp_path, monkeypatch):
    put_distribution(tmp_path / "site", monkeypatch, dict.fromkeys(POINTS, "acme_all"), {"acme_all": PLUGINS})
    rows = [{"prompt": f"What is {number}?", "chosen": "One.", "rejected": "Two."} for number in range(3)]
    for suffix in ("fine", "twice"):
        (tmp_path / f"pairs.{suffix}").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_a_plugin_that_keeps_its_contract_is_ok(acme):
    done = invoke("plugins", "check", "check-fine")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "fine (acme 2.0 [check-fine]): ok"
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [
        [rule, "ok"] for rule in ("record", "findings", "any_data", "repeatable", "stateless", "input", "memory")
    ]


def test_a_plugin_that_breaks_a_rule_exits_with_6_and_its_distribution(acme):
    done = invoke("plugins", "check", "severe")
    assert done.exit_code == 6
    assert "findings" in done.stdout
    assert "severity 'fatal'; it is 'error' or 'warning'" in done.stdout
    assert done.stderr.splitlines()[0].startswith("error: acme 2.0 [check-severe] breaks: findings")


def test_a_reader_is_checked_on_a_sample(acme):
    sample = acme / "pairs.twice"
    done = invoke("plugins", "check", "twice", "--sample", sample, "--json")
    (fact,) = json.loads(done.stdout)
    assert fact["plugin"] == "read-twice"
    broken = [(result["rule"], result["message"]) for result in fact["results"] if result["status"] == "broken"]
    assert ("rows", f"two rows have the source {sample}:1") in broken
    assert done.exit_code == 6


def test_options_are_set_as_in_a_recipe(acme):
    assert invoke("plugins", "check", "limited").exit_code == 6
    assert invoke("plugins", "check", "limited", "--set", "limit=3").exit_code == 0


def test_a_loss_is_checked_by_its_own_rules():
    (fact,) = json.loads(invoke("plugins", "check", "ipo", "--json").stdout)
    assert "gradient" in [result["rule"] for result in fact["results"]]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["fine"],
            2,
            "several plugins have the name 'fine'\nhint: name one of the entry points: check-fine, read-fine",
        ),
        (["sever"], 2, "no plugin 'sever' is installed; did you mean 'severe'?"),
        (["severe", "--sample", "x"], 2, "--sample is for a reader, and acme 2.0 [check-severe] is none"),
        (
            ["severe", "limited", "--set", "limit=1"],
            2,
            "--sample and --set are for one plugin, not for severe, limited",
        ),
        (["typo"], 6, "acme 2.0 [check-typo]: Validator 'typo': skips_refused is 'no', and has to be True or False"),
    ],
)
def test_a_mistake_in_the_command_is_said(acme, arguments, code, message):
    done = invoke("plugins", "check", *arguments)
    assert done.exit_code == code
    assert done.stderr.startswith(f"error: {message}")


RUNS = {
    "a row with another's source": (
        {"train": "pairs.twice"},
        {},
        "acme 2.0 [read-twice] yields two rows with the source {folder}/pairs.twice:1",
    ),
    "a finding of no severity": (
        {"train": "pairs.fine"},
        {"severe": {}},
        "acme 2.0 [check-severe] yields a finding 'odd' of severity 'fatal'; it is 'error' or 'warning'",
    ),
    "a record with a wrong field": (
        {"train": "pairs.fine"},
        {"typo": {}},
        "acme 2.0 [check-typo]: Validator 'typo': skips_refused is 'no', and has to be True or False",
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_data_of_a_plugin_that_breaks_its_contract_stop_a_command_with_6(acme, case):
    data, checks, message = RUNS[case]
    lines = ["[model]", 'base = "org/base"', "[data]", *(f'{key} = "{value}"' for key, value in data.items())]
    lines += [*(f"[checks.{name}]" for name in checks), "[loss]", 'name = "dpo"']
    (acme / "recipe.toml").write_text("\n".join(lines))
    done = invoke("check", acme / "recipe.toml")
    assert done.exit_code == 6
    assert done.stderr.startswith(f"error: {message.format(folder=acme)}")
