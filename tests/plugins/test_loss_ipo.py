"""The loss `ipo` against eq. 17 of Azar et al. 2023, in 50-digit arithmetic that shares no code with the plugin."""

from __future__ import annotations

import functools
import math
import random

import mpmath
import pytest
import torch
from loss_cases import (
    SIDES,
    all_finite,
    exact_total,
    extreme_pairs,
    flat_pair,
    losses_at,
    paired,
    random_pair,
    untrained,
)

from qpref.records import LossOutput
from qpref_plugins.loss_ipo import IpoOptions, build, qpref_losses


@mpmath.workdps(50)
def exact_loss(pair: dict, beta: float, normalize: str) -> mpmath.mpf:
    """(h - margin - 1 / (2 beta))^2; each side's log-ratio is divided by its own number of tokens, or not."""

    def log_ratio(side: str) -> mpmath.mpf:
        ratio = exact_total(pair[f"policy {side}"]) - exact_total(pair[f"reference {side}"])
        return ratio / len(pair[f"policy {side}"]) if normalize == "mean" else ratio

    h = log_ratio("chosen") - log_ratio("rejected")
    return (h - mpmath.mpf(pair["margin"]) - 1 / (2 * mpmath.mpf(beta))) ** 2


def ipo(
    pairs: list[dict], beta: float = 0.1, normalize: str = "mean", dtype: torch.dtype = torch.float64
) -> LossOutput:
    return build(IpoOptions(beta=beta, normalize=normalize))(paired(pairs, dtype))


@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_ipo_is_equation_17_on_2000_random_pairs(normalize):
    rng = random.Random(1)
    worst = 0.0
    for beta in (0.01, 0.1, 0.5, 2.0):
        pairs = [random_pair(rng) for _ in range(500)]
        for loss, pair in zip(ipo(pairs, beta, normalize).losses.tolist(), pairs, strict=True):
            exact = exact_loss(pair, beta, normalize)
            worst = max(worst, float(abs((mpmath.mpf(loss) - exact) / exact)))
    assert worst <= 1e-6


@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_ipo_gradient_is_the_finite_difference(normalize):
    rng = random.Random(2)
    inputs = paired([random_pair(rng, longest=6) for _ in range(12)])
    function = build(IpoOptions(beta=0.3, normalize=normalize))

    sides = (inputs.policy.chosen.values, inputs.policy.rejected.values)
    assert torch.autograd.gradcheck(
        functools.partial(losses_at, function, inputs), sides, eps=1e-6, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("normalize", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ipo_is_finite_with_a_finite_gradient_at_extremes(dtype, normalize):
    inputs = paired(extreme_pairs() + [flat_pair(-1.0, -1.0, margin=margin) for margin in (-1e4, 1e4)], dtype)
    losses = build(IpoOptions(beta=0.1, normalize=normalize))(inputs).losses
    assert all_finite(losses, inputs)


def test_ipo_drives_the_log_ratio_margin_to_1_over_2_beta_and_no_further():
    # beta 0.25 aims at 2: h = 1, 2, 3 are 1, 0, 1 away, squared.
    pairs = [flat_pair(-1.0, -1.0 - h) for h in (1.0, 2.0, 3.0)]
    assert ipo(pairs, beta=0.25).losses.tolist() == [1.0, 0.0, 1.0]


def test_ipo_adds_the_rows_margin_to_the_distance():
    # h = 2; (2 - 0.5 - 1 / (2 * 0.5))^2 = 0.25
    assert ipo([flat_pair(-1.0, -3.0, margin=0.5)], beta=0.5).losses.item() == 0.25


def test_ipo_mean_is_the_same_when_every_token_stands_twice():
    rng = random.Random(3)
    pairs = [random_pair(rng) for _ in range(50)]
    doubled = [{side: pair[side] * 2 for side in SIDES} | {"margin": pair["margin"]} for pair in pairs]
    assert ipo(doubled).losses.tolist() == pytest.approx(ipo(pairs).losses.tolist(), rel=1e-12)


def test_ipo_sum_doubles_its_log_ratios_when_every_token_stands_twice():
    # h = 0.5 a token: (0.5 - 1)^2 = 0.25 for one, (2 * 0.5 - 1)^2 = 0 for two.
    once, twice = flat_pair(-1.0, -1.5, tokens=1), flat_pair(-1.0, -1.5, tokens=2)
    assert ipo([once, twice], beta=0.5, normalize="sum").losses.tolist() == [0.25, 0.0]


def test_ipo_mean_divides_each_response_by_its_own_length():
    # chosen: 1 nat over 1 token = 1 a token; rejected: -2 nats over 4 tokens = -0.5 a token; (1.5 - 1)^2 = 0.25
    pair = {
        "policy chosen": [-1.0],
        "reference chosen": [-2.0],
        "policy rejected": [-1.5] * 4,
        "reference rejected": [-1.0] * 4,
        "margin": 0.0,
    }
    assert ipo([pair], beta=0.5).losses.item() == 0.25


def test_ipo_is_per_token_by_default():
    assert IpoOptions().normalize == "mean"


def test_ipo_of_a_pair_does_not_depend_on_its_batch():
    rng = random.Random(4)
    pairs = [random_pair(rng) for _ in range(32)]
    together = ipo(pairs, dtype=torch.float32).losses.tolist()
    assert together == [ipo([pair], dtype=torch.float32).losses.item() for pair in pairs]


def test_ipo_keeps_the_order_of_the_batch():
    rng = random.Random(5)
    pairs = [random_pair(rng) for _ in range(32)]
    assert ipo(pairs[::-1]).losses.tolist() == ipo(pairs).losses.tolist()[::-1]


def test_ipo_of_a_pair_survives_a_neighbour_that_is_not_a_number():
    good, bad = flat_pair(-1.0, -3.0), flat_pair(math.nan, -3.0)
    assert ipo([bad, good, bad]).losses[1].item() == ipo([good]).losses.item()


def test_ipo_returns_one_loss_a_pair_with_a_gradient():
    losses = ipo([flat_pair(-1.0, -2.0)] * 3).losses
    assert losses.shape == (3,)
    assert losses.requires_grad


@pytest.mark.parametrize(("normalize", "tokens"), [("mean", 1), ("sum", 2)])
def test_ipo_rewards_are_beta_times_the_log_ratios_that_it_compares(normalize, tokens):
    # 2 tokens each. chosen: -1 - -4 = 3 a token, rejected: -2 - -4 = 2 a token; times beta 0.5, and 2 when summed
    metrics = ipo([flat_pair(-1.0, -2.0, reference=-4.0, tokens=2)], beta=0.5, normalize=normalize).metrics
    assert {name: value.item() for name, value in metrics.items()} == {
        "rewards/chosen": 1.5 * tokens,
        "rewards/rejected": 1.0 * tokens,
        "rewards/margins": 0.5 * tokens,
        "rewards/accuracies": 1.0,
    }


def test_ipo_counts_a_tie_as_half_right():
    right, wrong, tie = flat_pair(-1.0, -2.0), flat_pair(-2.0, -1.0), flat_pair(-1.0, -1.0)
    assert ipo([right, wrong, tie]).metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.5]


def test_ipo_metrics_are_detached():
    assert not any(value.requires_grad for value in ipo([flat_pair(-1.0, -2.0)]).metrics.values())


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_ipo_starts_at_the_square_of_1_over_2_beta(beta, normalize):
    (record,) = qpref_losses()
    pair = untrained(random_pair(random.Random(6)))
    loss = ipo([pair], beta, normalize).losses.item()
    assert [loss, record.starts_at(IpoOptions(beta=beta))] == pytest.approx([1 / (4 * beta**2)] * 2, rel=1e-12)


def test_ipo_asks_for_the_reference():
    (record,) = qpref_losses()
    assert record.needs == {"reference"}
