"""Wilson's intervals."""

from __future__ import annotations

import math

import pytest

from qpref.report.shares import Share


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_of_newcombes_table(right, count, low, high):
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    assert Share(right / count, count).interval == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("value", "count"), [(0.5, math.nan), (math.nan, 10), (0.5, 0), (1.5, 10), (-0.1, 10)])
def test_what_is_no_share_of_a_number_has_no_interval(value, count):
    share = Share(value, count)
    assert all(math.isnan(end) for end in share.interval)
    assert "to" not in str(share)


def test_all_of_a_few_is_not_certain():
    assert str(Share(1.0, 8)) == "100.0 % (68 to 100 %)"


def test_only_many_pairs_have_decimals_in_their_interval():
    assert str(Share(0.5, 2000)) == "50.0 % (47.8 to 52.2 %)"
