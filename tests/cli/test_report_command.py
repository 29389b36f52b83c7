"""`qpref report`: where the page goes, what is refused, and what it doesn't need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from hatchling.builders.wheel import WheelBuilder

from qpref.cli import main

ROOT = Path(__file__).parents[2]


def report(*arguments, code=0):
    done = CliRunner().invoke(main, ["report", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def make_run(tmp_path):
    def make(name="quickstart"):
        folder = tmp_path / "runs" / name
        (folder / "adapter").mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        row = {"step": 1, "split": "train", "loss": 0.5, "tokens": 10, "seconds": 1.0}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return folder

    return make


def test_the_report_of_one_run_stands_in_its_folder_and_is_named(make_run):
    run = make_run()
    assert report(run).stdout == f"report: {run}/report.html\n"
    assert "quickstart - qpref report" in (run / "report.html").read_text()


def test_a_report_replaces_the_one_before_and_others_may_read_it(make_run):
    run = make_run()
    (run / "report.html").write_text("old")
    before = os.umask(0o022)
    report(run)
    os.umask(before)
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert (run / "report.html").stat().st_mode & 0o777 == 0o644
    assert not list(run.glob(".tmp-*"))


def test_several_runs_need_a_file_that_is_named(make_run, tmp_path):
    runs = make_run("a"), make_run("b")
    done = report(*runs, code=2)
    assert done.stderr == ("error: a report of several runs has no default path\nhint: name its file with --output\n")
    out = tmp_path / "new" / "both.html"
    assert report(*runs, "--output", out).stdout == f"report: {out}\n"
    assert "2 runs: a, b" in out.read_text()


@pytest.mark.parametrize("output", ["metrics.jsonl", "runs", "page"])
def test_an_output_that_is_no_page_is_refused_and_left_alone(make_run, output, tmp_path):
    run = make_run()
    before = (run / "metrics.jsonl").read_text()
    assert "expected the name of an .html file" in report(run, "--output", run / output, code=2).stderr
    assert (run / "metrics.jsonl").read_text() == before


def test_a_folder_without_a_run_is_refused(tmp_path):
    done = report(tmp_path, code=2)
    assert done.stderr.startswith(f"error: {tmp_path}: no run of qpref (it has no run.json)\nhint: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--eval", "--samples", "--merged"])
def test_a_file_that_cannot_be_read_is_named(make_run, tmp_path, option):
    run, file = make_run(), tmp_path / "file.json"
    assert f"{file}: cannot be read: No such file or directory" in report(run, option, file, code=3).stderr
    file.write_text("{torn")
    assert f"{file}: not JSON" in report(run, option, file, code=3).stderr
    assert not (run / "report.html").exists()


def test_a_merged_folder_without_a_verdict_is_named(make_run, tmp_path):
    assert f"{tmp_path}/merge.json: cannot be read" in report(make_run(), "--merged", tmp_path, code=3).stderr


def test_a_damaged_file_that_the_page_can_do_without_is_a_note_on_it(make_run):
    run = make_run()
    for name in ("data.json", "result.json"):
        (run / name).write_text("[1")
    assert report(run).stdout == f"report: {run}/report.html\n"
    page = (run / "report.html").read_text()
    assert "data.json is left out: not JSON: " in page
    assert "result.json is left out: not JSON: " in page
    assert "data report (data.json) in this run" not in page


def test_a_report_needs_no_model_library(make_run):
    program = (
        "import sys; from pathlib import Path; from qpref.report.write import write_report; "
        f"write_report([Path({str(make_run())!r})]); "
        "print([name for name in ('torch', 'transformers', 'peft', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_run_with_a_report_is_replaced_even_where_its_start_was_killed(make_run, make_recipe):
    """--overwrite removes run.json first; what is left then is still known as a run's."""
    import qpref

    run = make_run()
    report(run)
    (run / "run.json").unlink()
    recipe = make_recipe({"train.max_steps": 1})
    assert qpref.train(recipe, output=run, overwrite=True).path == run
    assert not (run / "report.html").exists()


def test_the_wheel_holds_the_page(tmp_path):
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path)))
    for name in ("page.html.j2", "page.css", "page.js"):
        assert f"qpref/report/{name}" in zipfile.ZipFile(wheel).namelist()
