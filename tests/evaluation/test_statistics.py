"""Each statistic against its definition, computed in another way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qpref.evaluation.statistics import (
    Bootstrap,
    is_right,
    is_saturated,
    length_buckets,
    length_controlled,
    length_strata,
)


def some_values(count=40, seed=1):
    return np.random.default_rng(seed).normal(size=count)


def by_hand(values, clusters, samples=4000, seed=5):
    """The cluster bootstrap in plain Python: draw prompts with replacement, average all their pairs."""
    random = np.random.default_rng(seed)
    names = sorted(set(clusters))
    members = {name: [value for value, own in zip(values, clusters, strict=True) if own == name] for name in names}
    means = []
    for _ in range(samples):
        drawn = [value for place in random.integers(0, len(names), len(names)) for value in members[names[place]]]
        means.append(sum(drawn) / len(drawn))
    return np.quantile(means, [0.025, 0.975])


def test_an_interval_is_that_of_resampled_prompts():
    """Eight prompts of five pairs that are alike: resampling pairs would give an interval half as wide."""
    prompts = [str(place // 5) for place in range(40)]
    values = np.repeat(some_values(8), 5) + 0.01 * some_values(40)
    estimate = Bootstrap.of(prompts, 4000, seed=0).mean(values)
    low, high = by_hand(values.tolist(), prompts)
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.05)
    alone = Bootstrap.of([str(place) for place in range(40)], 4000, seed=0).mean(values)
    assert alone.high - alone.low < 0.6 * (estimate.high - estimate.low)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Of 200 samples of 60 normal numbers, about 95 % have the true mean, 0, in their interval."""
    prompts = [str(place) for place in range(60)]
    found = [Bootstrap.of(prompts, 400, seed=0).mean(some_values(60, seed)) for seed in range(200)]
    covered = sum(estimate.low <= 0 <= estimate.high for estimate in found)
    assert 180 <= covered <= 198


def test_the_same_seed_draws_the_same_and_another_doesnt():
    prompts = [str(place) for place in range(40)]
    intervals = [Bootstrap.of(prompts, 200, seed).mean(some_values()) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_draws_dont_depend_on_how_many_exist_at_a_time(monkeypatch):
    prompts = [str(place) for place in range(40)]
    whole = Bootstrap.of(prompts, 50, 0).mean(some_values())
    monkeypatch.setattr("qpref.evaluation.statistics.CHUNK_NUMBERS", 100)
    parts = Bootstrap.of(prompts, 50, 0).mean(some_values())
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_a_difference_of_models_is_paired():
    """Two models that differ by 0.1 on every pair: the difference is sure, though each model's mean isn't."""
    bootstrap = Bootstrap.of([str(place) for place in range(40)], 500, 0)
    first = some_values()
    difference = bootstrap.mean((first + 0.1) - first)
    assert (difference.low, difference.high) == pytest.approx((0.1, 0.1))
    assert bootstrap.mean(first).high - bootstrap.mean(first).low > 0.3


def test_a_pair_that_has_no_value_doesnt_count():
    values = np.array([1.0, math.nan, 3.0])
    estimate = Bootstrap.of(["a", "b", "c"], 500, 0).mean(values)
    assert (estimate.value, estimate.pairs) == (2.0, 2)
    assert not math.isnan(estimate.low)


def test_a_mean_can_weigh_pairs_by_their_tokens():
    estimate = Bootstrap.of(["a", "b"], 10, 0).mean(np.array([1.0, 4.0]), np.array([30.0, 10.0]))
    assert estimate.value == pytest.approx((30 * 1 + 10 * 4) / 40)


def test_a_tie_is_half_right():
    assert is_right(np.array([1.0, 0.0, 2.0]), np.array([0.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]


def judged(count, theta, phi, seed=0):
    """Verdicts of a model that prefers longer responses by `phi`, and the tokens by which chosen are longer."""
    random = np.random.default_rng(seed)
    difference = random.normal(20, 50, count)
    chance = 1 / (1 + np.exp(-(theta + phi * np.tanh(difference / difference.std()))))
    return (random.random(count) < chance).astype(float), difference


def fitted_by_search(right, difference, spread):
    """Maximum a posteriori of the same two numbers by ever finer grids."""
    feature = np.tanh(difference / spread)
    center, width = np.zeros(2), 6.0
    for _ in range(30):
        steps = np.linspace(-width, width, 13)
        grid = center + np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
        scores = grid[:, :1] + grid[:, 1:] * feature
        posterior = (right * scores - np.logaddexp(0, scores)).sum(1) - 0.5 * (grid[:, 1] / 2.5) ** 2
        center, width = grid[posterior.argmax()], width * 0.6
    return center


def test_length_control_is_the_logistic_fit_at_no_difference():
    right, difference = judged(400, theta=0.4, phi=1.5)
    accuracy, effect = length_controlled(right, difference, np.ones((1, 400)))
    theta, phi = fitted_by_search(right, difference, difference.std())
    assert accuracy[0] == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-4)
    assert effect[0] == pytest.approx(phi, abs=1e-3)


def test_length_control_takes_a_taste_for_length_away():
    """The model knows nothing but length, and chosen responses are longer on average: it looks better than chance."""
    right, difference = judged(20_000, theta=0.0, phi=3.0)
    accuracy, effect = length_controlled(right, difference, np.ones((1, 20_000)))
    assert right.mean() > 0.58
    assert accuracy[0] == pytest.approx(0.5, abs=0.02)
    assert effect[0] == pytest.approx(3.0, abs=0.2)


def test_length_control_changes_nothing_where_length_has_no_effect():
    right, difference = judged(20_000, theta=1.0, phi=0.0)
    accuracy, _ = length_controlled(right, difference, np.ones((1, 20_000)))
    assert accuracy[0] == pytest.approx(right.mean(), abs=0.005)


def test_a_draw_counts_pairs_as_often_as_they_are_in_it():
    right, difference = judged(50, theta=0.5, phi=1.0)
    weights = np.random.default_rng(3).integers(0, 4, (1, 50)).astype(float)
    twice = np.repeat(np.arange(50), weights[0].astype(int))
    theta, _ = fitted_by_search(right[twice], difference[twice], difference.std())
    accuracy, _ = length_controlled(right, difference, weights)
    assert accuracy[0] == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-4)


@pytest.mark.parametrize("verdict", [0.0, 1.0])
def test_a_model_that_is_always_right_or_wrong_is_so_at_equal_length(verdict):
    accuracy, effect = length_controlled(np.full(9, verdict), np.arange(9.0), np.ones((1, 9)))
    assert accuracy[0] == verdict
    assert math.isnan(effect[0])


def test_length_that_separates_right_from_wrong_has_a_finite_effect():
    difference = np.array([-30.0, -20, -10, 10, 20, 30])
    accuracy, effect = length_controlled((difference > 0).astype(float), difference, np.ones((1, 6)))
    assert accuracy[0] == pytest.approx(0.5, abs=1e-6)
    assert 1 < effect[0] < 10


def test_responses_of_one_length_leave_the_accuracy_as_it_is():
    accuracy, _ = length_controlled(np.array([1.0, 1, 0, 1]), np.zeros(4), np.ones((1, 4)))
    assert accuracy[0] == pytest.approx(0.75)


def test_a_pair_is_saturated_where_the_logistic_loss_has_a_hundredth_of_its_gradient():
    """Gradient sigmoid(-m): 0.01 at m = ln 99 = 4.595. A pair that is very wrong has its full gradient."""
    edge = math.log(99)
    assert is_saturated(np.array([edge - 0.01, edge + 0.01, 50, -50, 0])).tolist() == [0, 1, 1, 0, 0]


def test_length_buckets_hold_about_as_many_pairs_each():
    lengths = np.random.default_rng(0).integers(10, 500, 400)
    names = length_buckets(lengths)
    counts = [names.count(name) for name in set(names)]
    assert len(counts) == 4
    assert min(counts) > 90
    for length, name in zip(lengths.tolist(), names, strict=True):
        low, high = map(int, name.split("-"))
        assert low <= length <= high


def test_length_buckets_of_few_or_equal_lengths():
    assert length_buckets(np.array([7])) == ["7"]
    assert length_buckets(np.array([5, 5, 5])) == ["5", "5", "5"]
    assert len(set(length_buckets(np.array([1, 2, 3])))) >= 2


def test_strata_say_which_response_is_longer():
    lengths = np.array([[100, 50], [50, 100], [100, 95], [95, 100], [100, 89]])
    assert length_strata(lengths) == ["longer", "shorter", "as long", "as long", "longer"]
