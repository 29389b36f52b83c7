"""Intervals have the width that their formulas give, and widen where pairs share prompts."""

import math
import random

import pytest

from qpref.training.intervals import Interval, difference_interval, mean_interval, share_change_interval


def test_interval_of_single_prompts_is_students():
    # Mean 3; standard deviation sqrt(10 / 4); standard error sqrt(2.5 / 5); t of 4 degrees of freedom 2.776.
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0], range(5))
    assert found.value == 3.0
    assert found.high - 3.0 == pytest.approx(2.776 * math.sqrt(0.5), rel=0.01)
    assert 3.0 - found.low == pytest.approx(found.high - 3.0)


def test_pairs_of_one_prompt_count_as_one():
    """Each value twice, under the same prompt: as uncertain as once; under prompts of its own it would be narrower."""
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    once = mean_interval(values, range(5))
    twice = mean_interval(values * 2, [*range(5)] * 2)
    apart = mean_interval(values * 2, range(10))
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    assert apart.high - apart.low < 0.8 * (once.high - once.low)


def test_one_prompt_has_no_interval():
    found = mean_interval([1.0, 2.0], ["same", "same"])
    assert math.isnan(found.low)
    assert found.sign == 0


def test_share_that_all_pairs_changed_has_a_width():
    # 32 of 32 became right; with two more pairs 33 and 1 of 34: mean 32/34, mean square 1.
    found = share_change_interval([1] * 32, range(32))
    mean = 32 / 34
    half = 2.0345 * math.sqrt((1 - mean**2) / 33)  # t of 33 degrees of freedom
    assert found.value == 1.0
    assert found.low == pytest.approx(mean - half, rel=1e-3)
    assert found.high == 1.0


def test_share_that_no_pair_changed_has_a_width():
    found = share_change_interval([0] * 32, range(32))
    assert found.low < 0.0 < found.high
    assert found.value == found.sign == 0


def test_interval_of_a_difference_adds_the_variances():
    found = difference_interval(Interval(5.0, 2.0, 8.0), Interval(1.0, -3.0, 5.0))
    assert (found.value, found.low, found.high) == (4.0, -1.0, 9.0)  # sqrt(3^2 + 4^2) = 5


@pytest.mark.parametrize("clusters", [20, 60])
def test_95_of_100_intervals_hold_the_truth(clusters):
    """Skewed values, up to three of one prompt that share its mean."""
    random.seed(0)
    hits = 0
    for _ in range(1000):
        values, prompts = [], []
        for prompt in range(clusters):
            shared = random.expovariate(1.0) - 1.0
            for _ in range(prompt % 3 + 1):
                values.append(shared + random.gauss(0.0, 1.0))
                prompts.append(prompt)
        found = mean_interval(values, prompts)
        hits += found.low <= 0.0 <= found.high
    assert 910 <= hits <= 975
