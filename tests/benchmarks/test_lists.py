"""A smoke run of the benchmark on lists: every contestant trains on six pairs of the same rows."""

from __future__ import annotations

from benchmarks.lists import CONTESTANTS, measure, table
from benchmarks.shapes import SHAPES


def test_a_list_is_its_six_pairs_with_each_response_once():
    measured = measure(SHAPES["tiny"], prompt=10, response=9, turns=1)
    assert list(measured) == [contestant.name for contestant in CONTESTANTS]
    one_list, *pairs = (found["tokens"] for found in measured.values())
    # A response's last token predicts nothing, so it isn't fed.
    assert one_list == 10 + 4 * 8
    assert pairs == [6 * (10 + 2 * 8)] * 3
    assert all(found["cpu_seconds"] > 0 for found in measured.values())
    assert len(list(table(measured))) == 2 + len(CONTESTANTS)
