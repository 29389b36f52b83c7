"""The measure of forgetting and its test: what cancels, what counts as a loss, and how rarely chance does."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from qpref.evaluation.forgetting import FLIPS, Items, _p_of_loss, holm, measure

COUPLES = 60


def couples(*categories):
    """A regression set of COUPLES couples for each category: answers a and b, each right once."""
    answers, names = [], []
    for name in categories:
        for number in range(COUPLES):
            answers += [(f"a{number}", f"b{number}"), (f"b{number}", f"a{number}")]
            names += [name, name]
    return Items.of(answers, names)


def totals(log_odds):
    """[N, 2] log-probabilities with these log-odds of the right answer."""
    return np.stack([np.asarray(log_odds) - 30.0, np.full(len(log_odds), -30.0)], 1)


def changes(items, base, trained):
    return measure(items, totals(base), totals(trained), samples=100)


def base_log_odds(items, seed=0):
    """A base that tells prompts apart by 1.5 nats, and likes some answers by several nats whatever the prompt."""
    draw = np.random.default_rng(seed)
    count = len(items.partner) // 2
    liking = draw.normal(0, 5, count)
    return 1.5 + draw.normal(0, 0.5, 2 * count) + np.stack([liking, -liking], 1).ravel()


def test_an_item_and_the_one_with_its_answers_swapped_are_a_couple():
    items = Items.of([("x", "y"), ("p", "q"), ("y", "x"), ("y", "x"), ("q", "p")], ["one", "one", "one", "one", "two"])
    assert items.partner.tolist() == [2, 1, 0, 3, 4]
    assert items.couples.tolist() == [0, 1, 0, 3, 4]


def test_the_score_is_the_probability_of_the_right_answer_without_the_bases_liking():
    """Log-odds 3 and -1: the base likes the first answer by (3 - -1) / 2 = 2 nats, and tells the prompts apart by 1."""
    found = measure(Items.of([("a", "b"), ("b", "a")], ["x", "x"]), totals([3, -1]), totals([4, -3]), samples=10)
    np.testing.assert_allclose(found.log_odds, [[1, 2], [1, -1]])
    of = [1 / (1 + np.exp(-value)) for value in (1, 2, -1)]
    assert found.overall.base.value == pytest.approx(of[0])
    assert found.overall.trained.value == pytest.approx((of[1] + of[2]) / 2)
    assert (found.overall.lost, found.overall.gained, found.lost_items()) == (1, 0, [1])
    assert found.categories == {}


def test_an_item_without_a_counterpart_counts_by_its_own_log_odds():
    found = measure(Items.of([("a", "b")], ["x"]), totals([2]), totals([2]), samples=10)
    assert found.log_odds.tolist() == [[2, 2]]


def test_a_model_that_is_its_base_has_lost_nothing():
    items = couples("facts", "format")
    base = base_log_odds(items)
    found = changes(items, base, base)
    for change in found.changes().values():
        assert (change.difference.value, change.lost, change.gained, change.is_loss) == (0, 0, 0, False)
        assert change.p_value == 1.0


def test_a_small_liking_for_some_answers_is_no_loss():
    """Each couple's first answer gets 0.3 nats likelier after both prompts: one item gains what the other loses."""
    items = couples("facts")
    base = base_log_odds(items)
    found = changes(items, base, base + np.tile([0.3, -0.3], COUPLES))
    assert abs(found.overall.difference.value) < 0.005
    assert not found.overall.is_loss


def test_refusing_everything_is_a_loss_in_its_category_though_the_mean_log_odds_stay():
    """Each couple is a harmful and a harmless prompt: refusals gain 4 nats after both."""
    items = couples("facts", "refusals")
    base = base_log_odds(items)
    trained = base + np.concatenate([np.zeros(2 * COUPLES), np.tile([4.0, -4.0], COUPLES)])
    found = changes(items, base, trained)
    assert np.mean(trained - base) == pytest.approx(0)
    assert found.categories["refusals"].is_loss
    assert found.categories["refusals"].lost > COUPLES / 2
    assert not found.categories["facts"].is_loss


def test_a_loss_that_training_cannot_help_is_none():
    """The loss is certain, since all items lose, but below 1 point: a derivative of at most 1/4 times 0.02 nats."""
    items = couples("facts")
    base = base_log_odds(items)
    assert not changes(items, base, base - 0.02).overall.is_loss
    assert changes(items, base, base - 0.3).overall.is_loss


def test_a_base_at_chance_is_said_and_its_noise_is_no_loss():
    items = couples("arithmetic")
    draw = np.random.default_rng(3)
    base = np.repeat(draw.normal(0, 4, COUPLES), 2) * np.tile([1, -1], COUPLES)
    found = changes(items, base, base + draw.normal(0, 0.5, 2 * COUPLES))
    assert found.overall.at_chance
    assert not found.overall.is_loss


def test_p_values_are_those_of_all_sign_vectors():
    values = np.random.default_rng(5).normal(-0.4, 1, 10)
    signs = np.array(list(product([-1, 1], repeat=10)))
    exact = np.mean(signs @ values <= values.sum() + 1e-12)
    assert 0.01 < exact < 0.4
    assert _p_of_loss(values, seed=0) == pytest.approx(exact, abs=4 * np.sqrt(exact / FLIPS))


def test_holm_divides_by_the_hypotheses_that_are_left():
    """0.012 <= 0.05 / 4 and 0.016 <= 0.05 / 3, but 0.03 > 0.05 / 2; so 0.04 isn't reached, though it is <= 0.05."""
    assert holm({"a": 0.04, "b": 0.012, "c": 0.03, "d": 0.016}) == {"b", "d"}
    assert holm({"a": 0.013, "b": 0.013, "c": 0.013, "d": 0.013}) == set()


def test_chance_rarely_makes_a_loss():
    """Changes without a mean, of 0.4 nats, on sets of 4 categories: at most 5 % of the models are warned of."""
    items = couples("facts", "format", "reading", "refusals")
    base = base_log_odds(items)
    draw = np.random.default_rng(7)
    alarms = 0
    for _ in range(40):
        found = measure(items, totals(base), totals(base + draw.normal(0, 0.4, len(base))), samples=2)
        alarms += any(change.is_loss for change in found.changes().values())
    assert alarms <= 2
