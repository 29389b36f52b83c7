"""One process and several take the same steps: the same gradients, metrics and reference rows, whatever the loss."""

from __future__ import annotations

from typing import Any

import pytest
from processes import run_ranks
from step_cases import MISTAKES, ONE_OF_EACH_PATH, all_cases, compare

CASES = [case.name for case in all_cases()]


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def results(request, make_base) -> list[dict[str, Any]]:
    """What each process returned: one start of the processes serves all tests here."""
    return run_ranks(request.param, compare, str(make_base(initializer_range=0.2)), timeout=500)


@pytest.fixture(scope="module")
def steps(results) -> dict[str, dict[str, Any]]:
    found = {each["case"]: each for result in results for each in result["steps"]}
    assert sorted(found) == sorted(CASES)
    return found


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_one_process(steps, case):
    assert steps[case]["largest"] > 1e-3
    assert steps[case]["difference"] <= 1e-6


@pytest.mark.parametrize("case", CASES)
def test_metrics_and_tokens_are_those_of_one_process(steps, case):
    found, wanted = steps[case]["means"]
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6, nan_ok=True)
    for name in ("counts", "tokens"):
        assert steps[case][name][0] == steps[case][name][1]


@pytest.mark.parametrize("case", CASES)
def test_processes_agree_to_the_bit_and_know_the_same_reference_rows_as_one(steps, case):
    assert steps[case]["same everywhere"]
    assert steps[case]["same rows"]


@pytest.mark.parametrize("loss", [losses[0]["name"] for losses in ONE_OF_EACH_PATH])
def test_rows_of_24_steps_are_those_of_one_process(results, loss):
    (pair,) = [result["rows"][loss] for result in results if loss in result["rows"]]
    found, wanted = pair
    assert [row["step"] for row in wanted if row["split"] == "train"] == [4, 8, 12, 16, 20, 24]
    assert [row["step"] for row in wanted if row["split"] == "eval"] == [0, 8, 16, 24]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.pop("split") == theirs.pop("split")
        assert ours == pytest.approx(theirs, rel=3e-6, abs=3e-6, nan_ok=True)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(results, mistake):
    """The comparisons above would see it."""
    assert all(result["mistakes"][mistake] > 1e-3 for result in results[:1])


def test_a_parameter_without_a_gradient_in_any_process_has_none_afterwards(results):
    size = len(results)
    total = [size * (size + 1) / 2] * 2
    assert [result["sum"] for result in results] == [[[total, [3.0, float("inf")], None], [False, True]]] * size
