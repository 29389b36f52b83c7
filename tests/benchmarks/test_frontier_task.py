"""The frontier's task: openings, their split, preferences by Bradley-Terry, and intervals."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from benchmarks.frontier.measures import estimate
from benchmarks.frontier.openings import FILE, openings
from benchmarks.frontier.task import PAIRS_PER_OPENING, Continuations, draw_pairs, preference
from qpref.records import SampledResponse
from qpref.sampling.reward import Scorer


def sampled(opening, *scored, ended=True):
    texts, rewards = zip(*scored, strict=True)
    return Continuations(
        opening=opening,
        prompt=(1,),
        tokens=((1,),) * len(texts),
        texts=texts,
        ended=(ended,) * len(texts),
        rewards=rewards,
    )


def test_openings_are_different_and_split_once():
    train, heldout = openings()
    assert (len(train), len(heldout)) == (160, 64)
    assert len({line.casefold() for line in train + heldout}) == 224
    assert not [line for line in train + heldout if line != line.strip() or line.endswith((".", "!", "?"))]


def test_each_subject_has_openings_in_both_parts():
    train, heldout = map(set, openings())
    lines = [line for line in FILE.read_text().splitlines() if not line.startswith("#")]
    blocks = [set(lines[start : start + 14]) for start in range(0, len(lines), 14)]
    assert all(len(block & heldout) == 4 and len(block & train) == 10 for block in blocks)


def test_openings_are_neutral_by_the_reward():
    score = Scorer("sentiment", {})
    responses = [SampledResponse(prompt=(), text=line, ended=True) for part in openings() for line in part]
    assert set(score(responses)) == {0.0}


def test_preferences_are_drawn_with_the_probability_of_bradley_and_terry():
    scale, better, worse, count = 2.0, 0.4, -0.1, 4000
    pairs = draw_pairs([sampled(f"{n}", ("a", better), ("b", worse)) for n in range(count)], scale, seed=3)
    flipped = sum(pair.is_flipped for pair in pairs) / count
    expected = 1 - 1 / (1 + math.exp(-scale * (better - worse)))
    assert flipped == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))
    assert preference(better, worse, scale) == pytest.approx(1 - expected)


def test_pairs_are_of_distinct_finished_responses_with_different_rewards():
    four = sampled("o", ("a", 0.5), ("b", 0.1), ("b", 0.1), ("c", 0.0), ("d", -0.5), (" ", 0.9))
    pairs = draw_pairs(
        [four, sampled("p", ("a", 0.3), ("b", 0.3)), sampled("q", ("a", 1), ("b", 0), ended=False)], 1e6, 0
    )
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "d"), ("b", "c")]
    assert len(pairs) == PAIRS_PER_OPENING
    assert pairs[0].row() == {
        "prompt": "o", "chosen": "a", "rejected": "d", "score_chosen": 0.5, "score_rejected": -0.5
    }  # fmt: skip


def test_a_pair_depends_on_its_opening_and_the_seed_alone():
    many = [sampled(f"{n}", ("a", 0.1), ("b", 0.0)) for n in range(64)]
    assert draw_pairs(many, 4, 0)[32:] == draw_pairs(many[32:], 4, 0)
    assert draw_pairs(many, 4, 0) != draw_pairs(many, 4, 1)


def test_interval_is_the_normal_one_where_openings_are_independent():
    values = [[NormalDist().inv_cdf((n + 0.5) / 400)] for n in range(400)]
    found, half = estimate(values), 1.96 / math.sqrt(400)
    assert found.value == pytest.approx(0, abs=1e-9)
    assert (found.low, found.high) == pytest.approx((-half, half), rel=0.15)


def test_equal_responses_to_an_opening_narrow_no_interval():
    once = estimate([[float(n % 2)] for n in range(100)])
    repeated = estimate([[float(n % 2)] * 8 for n in range(100)])
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))
