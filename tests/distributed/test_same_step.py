"""One process and several take the same step: the same gradient, the same metrics, the same reference rows."""

from __future__ import annotations

import pytest
from processes import run_ranks
from step_cases import all_cases, compare_steps


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def compared(request, make_base) -> dict[str, dict]:
    results = run_ranks(request.param, compare_steps, str(make_base(initializer_range=0.2)))
    return {each["case"]: each for rank in results for each in rank}


def test_every_case_is_compared_once(compared):
    assert sorted(compared) == sorted(case.name for case in all_cases())


@pytest.mark.parametrize("case", [case.name for case in all_cases()])
def test_gradient_is_that_of_one_process(compared, case):
    print(compared[case]["difference"])
    assert compared[case]["largest"] > 1e-3
    assert compared[case]["difference"] <= 1e-6
