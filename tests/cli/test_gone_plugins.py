"""A finished run whose plugins are gone: what each command does without, and what it says of the rest."""

from __future__ import annotations

import importlib
import json
import shutil
import sys

import pytest
from click.testing import CliRunner
from conftest import preference_rows, write_jsonl
from edited_runs import edit_facts, reseal

from qpref.cli import main
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan

ACME = """
import json
from qpref.hooks import MetricSink, Options, PairedLoss, Reader, UnpairedLoss, Validator, hookimpl
from qpref.records import Finding, LossOutput, Row, Source

class Quiet:
    def write(self, row): ...
    def close(self): ...

class NoBad:
    def look(self, example, split):
        if "BAD" in example.prompt[0].content:
            yield Finding(code="bad", severity="error", message="bad", source=example.source)
    def finish(self):
        return ()

def build(options):
    def loss(inputs):
        return LossOutput(losses=-(inputs.policy.chosen.total - inputs.policy.rejected.total), metrics={})
    return loss

def build_single(options):
    def loss(inputs):
        return LossOutput(losses=-inputs.policy.total * (2.0 * inputs.desirable - 1), metrics={})
    return loss

def read(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        yield Row(values=json.loads(line), source=Source(path=str(path), line=number))

@hookimpl
def qpref_metric_sinks():
    yield MetricSink(name="quiet", summary="", options=Options, open=lambda options, context: Quiet())

@hookimpl
def qpref_validators():
    yield Validator(name="no-bad", summary="", options=Options, start=lambda options: NoBad())

@hookimpl
def qpref_losses():
    yield PairedLoss(name="plain", summary="", options=Options, needs=frozenset(), build=build)
    yield UnpairedLoss(name="plain_single", summary="", options=Options, needs=frozenset(), build=build_single)

@hookimpl
def qpref_readers():
    yield Reader(name="chat.jsonl", summary="", read=read)
"""
OFFERS = {
    "sink-quiet": "acme",
    "check-no-bad": "acme",
    "loss-plain": "acme",
    "loss-plain_single": "acme",
    "read-chat.jsonl": "acme",
}
EVERYTHING = {"loss": {"name": "plain"}, "sinks": [{"name": "quiet"}], "checks": {"too_short": "off", "no-bad": {}}}
"""Of the recipe: all that reading a run's data again does without."""


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """A third-party distribution, installed; calling it uninstalls it."""
    site = tmp_path / "site"
    info = site / "acme-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[qpref]\n" + "".join(f"{key} = {OFFERS[key]}\n" for key in OFFERS))
    (site / "acme.py").write_text(ACME)
    monkeypatch.syspath_prepend(site)

    def uninstall():
        shutil.rmtree(site)
        sys.modules.pop("acme", None)
        importlib.invalidate_caches()

    yield uninstall
    sys.modules.pop("acme", None)


@pytest.fixture
def train(make_recipe, tmp_path):
    """`train({...}, loss={...})`: a finished run of a recipe with some tables replaced."""

    def run(changes=None, **tables):
        recipe = make_recipe({"train.learning_rate": 0.02} | (changes or {})) | tables
        return train_plan(make_plan(recipe, output=tmp_path / "run"))

    return run


def qpref(*arguments, code=0, **environment):
    done = CliRunner().invoke(main, [*map(str, arguments)], env=environment, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def merged(run, out, code=0, **environment):
    qpref("merge", run, out, "--dtype", "float32", code=code, **environment)
    return json.loads((out / "merge.json").read_text())["verdict"]


def use_all(run, out, **environment):
    """Every command on the run, and what merge and eval say of its data."""
    verdict = merged(run, out, **environment)
    qpref("report", run, **environment)
    qpref("generate", run, "--json", "--max-new-tokens", 1, **environment)
    found = json.loads(qpref("eval", run, out, "--samples", 20, "--json", **environment).stdout)
    return verdict, found


def test_a_run_does_without_the_plugins_that_decide_nothing_about_its_rows(acme, train, tmp_path):
    """The verdict and the evaluation are those with them, and the data are known to be the same."""
    run = train(**EVERYTHING)
    before = use_all(run, tmp_path / "before")
    acme()
    verdict, found = use_all(run, tmp_path / "after")
    assert verdict["data_changed"] is found["data_changed"] is False
    assert verdict == before[0]
    assert found["models"][0] == before[1]["models"][0]


def test_a_run_does_without_the_loss_of_single_completions(acme, train, tmp_path):
    """Its pairs were taken apart, and their fingerprint is of the parts."""
    run = train({"data.heldout": None}, loss={"name": "plain_single"})
    before = merged(run, tmp_path / "before")
    acme()
    assert merged(run, tmp_path / "after") == before
    assert before["data_changed"] is False


@pytest.mark.parametrize("left_out", ["sink-console", "loss-dpo,check-pairs,check-text,check-leakage,sink-console"])
def test_a_run_does_without_what_qpref_disable_leaves_out(train, tmp_path, left_out):
    run = train(sinks=[{"name": "console"}])
    verdict, found = use_all(run, tmp_path / "out", QPREF_DISABLE=left_out)
    assert verdict["data_changed"] is found["data_changed"] is False


def test_a_run_from_before_its_losses_were_recorded_asks_them(acme, train, tmp_path):
    run = train(loss={"name": "plain"})
    edit_facts(run, losses=None)
    assert merged(run, tmp_path / "before")["data_changed"] is False
    acme()
    what = "loss 'plain' is not installed; the run had it from acme 2.0 [loss-plain]: pip install acme==2.0"
    done = qpref("merge", run, tmp_path / "after", code=2)
    assert done.stderr == f"error: {run}/recipe.lock.toml: 1 problem\n  [loss] name: {what}\n"


ODD_FACTS = {
    "plugins of other kinds": {"plugins": [1, None, [], {"kind": 1}]},
    "plugins that are no list": {"plugins": "all"},
    "versions that nobody knows": {"versions": {"qpref": None}},
    "losses without needs": {"losses": {"is_paired": True}},
    "losses with needs of another kind": {"losses": {"is_paired": True, "needs": 5}},
    "losses with nested needs": {"losses": {"is_paired": True, "needs": [["reference"]]}},
    "losses with needs in one text": {"losses": {"is_paired": True, "needs": "mismatched"}},
    "losses with an unknown need": {"losses": {"is_paired": True, "needs": ["tomorrow"]}},
    "losses of neither kind": {"losses": {"is_paired": None, "needs": []}},
    "losses in a list": {"losses": []},
}


@pytest.mark.parametrize("odd", ODD_FACTS)
def test_a_run_with_odd_facts_is_read_by_its_recipe(odd, train, tmp_path):
    run = train()
    edit_facts(run, **ODD_FACTS[odd])
    verdict, found = use_all(run, tmp_path / "out")
    assert verdict["data_changed"] is found["data_changed"] is False


SKIPPING = {"data.skip_bad": 0.5}
CHECKED = {"too_short": "off", "no-bad": {}}


def bad_rows(folder, count):
    rows = preference_rows(6, start=100)
    for row in rows[:count]:
        row["prompt"] = f"BAD {row['prompt']}"
    return {"data.heldout": str(write_jsonl(folder / "some-bad.jsonl", rows))}


def test_a_check_that_has_refused_rows_decides_which_are_replayed(acme, train, tmp_path):
    run = train(SKIPPING | bad_rows(tmp_path, 2), checks=CHECKED)
    verdict = merged(run, tmp_path / "out")
    assert (verdict["pairs"], verdict["data_changed"]) == (4, False)


def test_a_check_that_has_refused_rows_and_is_gone_is_asked_for(acme, train, tmp_path):
    """A merge would be judged on other pairs; an evaluation leaves no row out, but can't say whether data changed."""
    run = train(SKIPPING | bad_rows(tmp_path, 2), checks=CHECKED)
    acme()
    what = "validator 'no-bad' is not installed; the run had it from acme 2.0 [check-no-bad]: pip install acme==2.0"
    done = qpref("merge", run, tmp_path / "out", code=2)
    assert done.stderr.endswith(f"recipe.lock.toml: 1 problem\n  [checks.no-bad] name: {what}\n")
    assert not (tmp_path / "out").exists()
    done = qpref("eval", run, "--samples", 10, "--json")
    assert json.loads(done.stdout)["data_changed"] is None
    assert "can't check whether the held-out data have changed: " in done.stderr
    assert what in done.stderr
    qpref("generate", run, "--max-new-tokens", 1)


def test_a_check_that_could_have_refused_rows_and_has_not_may_be_gone(acme, train, tmp_path):
    run = train(SKIPPING, checks=CHECKED)
    acme()
    assert merged(run, tmp_path / "out")["data_changed"] is False


@pytest.mark.parametrize("report", ["{}", '{"refused": null}'])
def test_a_check_is_asked_for_where_nobody_knows_what_it_refused(acme, train, tmp_path, report):
    run = train(SKIPPING, checks=CHECKED)
    (run / "data.json").write_text(report)
    reseal(run)
    acme()
    done = qpref("merge", run, tmp_path / "out", code=2)
    assert "validator 'no-bad' is not installed; the run had it from acme 2.0" in done.stderr


def test_a_reader_that_is_gone_is_named_and_no_other_takes_its_files(acme, train, tmp_path):
    """`jsonl` reads these too, and might make other rows of them."""
    data = {"data.heldout": str(write_jsonl(tmp_path / "held.chat.jsonl", preference_rows(4, start=100)))}
    run = train(data)
    acme()
    problem = (
        "[data] heldout: reader 'chat.jsonl' is not installed; the run had it from acme 2.0 [read-chat.jsonl]: "
        "pip install acme==2.0"
    )
    message = f"error: {run}/recipe.lock.toml: 1 problem\n  {problem}\n"
    for command in (("merge", run, tmp_path / "out"), ("eval", run), ("generate", run)):
        assert qpref(*command, code=2).stderr == message, command
    qpref("report", run)
    qpref("generate", run, "--prompt", "Hi", "--max-new-tokens", 1)
    qpref("eval", run, "--data", tmp_path / "train.jsonl", "--samples", 10)


def test_a_reader_of_training_data_is_not_needed_for_what_is_held_out(acme, train, tmp_path):
    run = train({"data.train": str(write_jsonl(tmp_path / "all.chat.jsonl", preference_rows(12)))})
    acme()
    assert merged(run, tmp_path / "out")["data_changed"] is False
    qpref("generate", run, "--max-new-tokens", 1)
    done = qpref("eval", run, "--samples", 10)
    assert "can't check the overlap with its training data: " in done.stderr
    assert "pip install acme==2.0" in done.stderr


def test_a_reader_that_qpref_disable_leaves_out_is_said_to_be(train, tmp_path):
    run = train()
    done = qpref("generate", run, code=2, QPREF_DISABLE="read-jsonl")
    version = json.loads((run / "run.json").read_text())["versions"]["qpref"]
    assert done.stderr.endswith(
        f"[data] heldout: reader 'jsonl', which the run had from qpref {version} [read-jsonl], is disabled by "
        "QPREF_DISABLE\n"
    )


def test_a_run_goes_on_with_all_its_plugins_alone(acme, train, make_recipe, tmp_path):
    """Reading data again does without some; training needs what its recipe names."""
    recipe = tmp_path / "run/recipe.lock.toml"
    run = train(**EVERYTHING)
    acme()
    shutil.rmtree(run / "adapter")
    done = qpref("train", recipe, "--resume", "--output", run, code=2)
    assert "no loss 'plain' is installed" in done.stderr
