"""`qpref report --watch`: the page is rewritten while a run is in training, and reloads itself until then."""

from __future__ import annotations

import json
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from run_folders import make_run, parsed, train_rows

from qpref import locks
from qpref.cli import main
from qpref.report import watch


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", train_rows([0.7]), finished=False)


def refreshes(run):
    page = parsed((run / "report.html").read_text())
    return [meta.attributes["content"] for meta in page.all("meta") if meta.attributes.get("http-equiv") == "refresh"]


def test_the_page_follows_the_run_until_its_end(run, monkeypatch):
    seen = []
    with ExitStack() as training:
        training.enter_context(locks.locked(run))

        def sleep(seconds):
            seen.append((seconds, refreshes(run), "step 2" in (run / "report.html").read_text()))
            if len(seen) == 2:
                training.close()
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 2, "split": "train", "loss": 0.6}) + "\n")

        monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep))
        done = CliRunner().invoke(main, ["report", str(run), "--watch", "--every", "7"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout == f"report: {run}/report.html, rewritten every 7 s while a run is in training\n"
    assert seen == [(7, ["7"], False), (7, ["7"], True)]
    assert refreshes(run) == []


def test_an_interrupt_ends_the_watch_with_a_page_that_stays(run, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=interrupted))
    with locks.locked(run):
        done = CliRunner().invoke(main, ["report", str(run), "--watch"], catch_exceptions=False)
    assert done.exit_code == 0
    assert refreshes(run) == []


def test_a_run_that_nobody_trains_is_reported_once(run, monkeypatch):
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=lambda seconds: pytest.fail("it waits")))
    assert CliRunner().invoke(main, ["report", str(run), "--watch"], catch_exceptions=False).exit_code == 0
    assert refreshes(run) == []
