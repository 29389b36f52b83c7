"""The pictures and tables of docs/metrics.md and of the tutorial are those of the metrics that were kept."""

from __future__ import annotations

import pytest
from manual_commands import ROOT, problem_of
from test_docs import loaded

PICTURES = loaded("make_run_pictures")
BETAS = PICTURES.BETAS


@pytest.mark.parametrize("page", PICTURES.PAGES)
def test_the_tables_are_up_to_date(page):
    assert "python docs/make_run_pictures.py -->" in (ROOT / page).read_text()
    assert PICTURES.page(ROOT / page) == (ROOT / page).read_text(), "run python docs/make_run_pictures.py"


@pytest.mark.parametrize("name", PICTURES.SICK_AND_HEALTHY)
def test_a_picture_is_of_the_metrics_that_were_kept(name):
    assert PICTURES.checksum(name) in (PICTURES.PICTURES / f"run-{name}.svg").read_text()
    assert f"(pictures/run-{name}.svg)" in (ROOT / "docs/metrics.md").read_text()


@pytest.mark.parametrize("name", {**PICTURES.SICK_AND_HEALTHY, **PICTURES.BETAS})
def test_the_settings_of_a_run_exist(name):
    run = (PICTURES.SICK_AND_HEALTHY | PICTURES.BETAS)[name]
    for change in run.changes:
        assert problem_of(f"qpref train {PICTURES.RECIPE} --set {change}") is None


def test_the_runs_are_as_healthy_and_as_sick_as_the_page_says():
    def first_and_last(name, metric):
        rows = PICTURES.rows_of(name, "eval")
        return rows[0][metric], rows[-1][metric]

    start, end = first_and_last("healthy", "loss")
    assert end < 0.1 < start
    start, end = first_and_last("healthy", "logps/chosen")
    assert abs(end - start) < 5
    start, end = first_and_last("flat", "loss")
    assert abs(end - start) < 0.01
    start, end = first_and_last("displaced", "logps/chosen")
    assert end < start - 100
    start, end = first_and_last("memorized", "loss")
    assert end > start
    assert PICTURES.rows_of("memorized", "train")[-1]["loss"] < 0.2


def test_a_smaller_beta_moves_the_policy_further():
    nats = [PICTURES.rows_of(name, "eval")[-1]["rewards/margins"] / float(run.title) for name, run in BETAS.items()]
    assert nats == sorted(nats, reverse=True)
    assert 15 < nats[-1] < nats[0] < 18, "as the tutorial says"
