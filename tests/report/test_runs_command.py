"""`qpref runs`: the runs of a folder with their verdicts."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from run_folders import make_run

from qpref.cli import main


def runs(*arguments, code=0):
    done = CliRunner().invoke(main, ["runs", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def folder(tmp_path):
    """A sweep's run of yesterday, a run of today that isn't finished, a folder without a run, and a link to a run."""
    rows = [{"step": step, "split": "eval", "eval_rewards/accuracies": share, "eval_loss": 0.6, "seconds": 3.0}
            for step, share in ((0, 0.5), (4, 1.0))]  # fmt: skip
    facts = {"steps": 4, "examples": {"train": 9, "heldout": 8}}
    made = tmp_path / "runs"
    make_run(made / "new", facts=facts | {"created": "2026-11-30T00:00:00+00:00"}, finished=False)
    make_run(made / "sweep" / "beta=0.1", rows, recipe='[loss]\nname = "acme"\nbeta = 0.1\n',
             facts=facts | {"created": "2026-11-29T00:00:00+00:00"})  # fmt: skip
    (made / "empty").mkdir()
    make_run(tmp_path / "elsewhere", facts=facts)
    (made / "link").symlink_to(tmp_path / "elsewhere")
    return made


def test_runs_are_listed_with_their_verdicts_the_newest_last(folder):
    assert runs(folder).stdout == (
        f"{folder}/sweep/beta=0.1: finished, step 4 of 4\n"
        "    loss acme, beta 0.1, data 9 examples, 8 held out\n"
        "    held-out accuracy 0.50 → 1.00 of 8 (95 % interval 0.68 to 1.00)\n"
        f"{folder}/new: not finished, step 0 of 4\n"
        "    data 9 examples, 8 held out\n"
        "    no held-out rows yet\n"
    )
    (folder / "new" / "run.json").write_text('{"examples": {"heldout": 0}, "created": "z"}')
    assert runs(folder / "new").stdout.endswith("\n    no held-out data, so nothing tells what was learned\n")


def test_json_has_the_numbers(folder):
    first, second = json.loads(runs(folder, "--json").stdout)
    assert first["run"] == f"{folder}/sweep/beta=0.1"
    assert first["accuracy"] == {"value": 1.0, "low": pytest.approx(0.6756, abs=1e-4), "high": 1.0, "examples": 8.0}
    assert (first["finished"], first["step"], first["steps"], first["loss"]) == (True, 4, 4, 0.6)
    assert first["trained"]["loss"] == "acme, beta 0.1"
    (folder / "new" / "result.json").write_text('{"verdict": {"sentence": "it learned", "outcome": "better"}}')
    told = json.loads(runs(folder, "--json").stdout)[1]
    assert (told["verdict"], told["outcome"], first["outcome"]) == ("it learned", "better", None)
    assert (second["finished"], second["accuracy"]["value"], second["margin"]) == (False, None, None)


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_listed(folder):
    (folder / "new" / "run.json").write_text("no json")
    done = runs(folder)
    assert done.stdout.startswith(f"{folder}/sweep/beta=0.1: finished")
    assert done.stderr.startswith(f"warning: {folder}/new/run.json: not JSON")


def test_a_folder_without_runs_says_so(tmp_path):
    assert runs(tmp_path).stdout == f"{tmp_path}: no runs\n"
    assert json.loads(runs(tmp_path, "--json").stdout) == []


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert runs(tmp_path / "none", code=2).stderr.startswith(f"error: {tmp_path}/none: no such folder\n")


def test_no_text_of_a_run_moves_the_terminal(folder):
    (folder / "new" / "run.json").write_text(json.dumps({"base": "a\x1b[2Jb", "created": "z"}))
    output = runs(folder).stdout
    assert "\x1b" not in output
    assert "\\u001b[2Jb" in output
