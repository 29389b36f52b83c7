"""One process and several take the same steps: the same gradients, metrics and reference rows, whatever the loss."""

from __future__ import annotations

from typing import Any

import pytest
from processes import fork_ranks
from step_cases import MISTAKES, ROW_LOSSES, cases_for, compare


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def results(request, make_base) -> list[dict[str, Any]]:
    """What each process returned: one start of the processes serves all tests here."""
    return fork_ranks(request.param, compare, str(make_base(initializer_range=0.2)), limit=500)


@pytest.fixture(scope="module")
def steps(results) -> list[dict[str, Any]]:
    found = [each for result in results for each in result["steps"]]
    assert sorted(each["case"] for each in found) == sorted(case.name for case in cases_for(len(results)))
    return found


def test_gradients_are_those_of_one_process(steps):
    assert min(each["largest"] for each in steps) > 1e-3
    assert {each["case"]: each["difference"] for each in steps if each["difference"] > each["tolerance"]} == {}


def test_metrics_and_tokens_are_those_of_one_process(steps):
    for each in steps:
        found, wanted = each["means"]
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6, nan_ok=True), each["case"]
        for name in ("counts", "tokens"):
            assert each[name][0] == each[name][1], each["case"]


def test_processes_agree_to_the_bit(steps):
    assert [each["case"] for each in steps if not each["same everywhere"]] == []


def test_every_process_has_the_reference_rows_that_one_has(steps):
    assert [each["case"] for each in steps if not each["same rows"]] == []


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_rows_of_24_steps_are_those_of_one_process(results, loss):
    (pair,) = [result["rows"][loss] for result in results if loss in result["rows"]]
    found, wanted = pair
    assert [row["step"] for row in wanted if row["split"] == "train"] == [4, 8, 12, 16, 20, 24]
    assert [row["step"] for row in wanted if row["split"] == "eval"] == [0, 8, 16, 24]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.pop("split") == theirs.pop("split")
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(results, mistake):
    """The comparisons above would see it."""
    assert results[0]["mistakes"][mistake] > 1e-3


def test_a_parameter_without_a_gradient_in_any_process_has_none_afterwards(results):
    size = len(results)
    total = [size * (size + 1) / 2] * 2
    assert [result["sum"] for result in results] == [[[total, [3.0, float("inf")], None], [False, True]]] * size
