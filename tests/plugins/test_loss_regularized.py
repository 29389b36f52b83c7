"""The regularized losses against their papers' formulas, in float64 arithmetic that shares no code with the plugin."""

from __future__ import annotations

import math
import random

import pydantic
import pytest
import torch
from loss_cases import (
    SIDES,
    all_finite,
    extremes,
    finite_difference,
    flat_pair,
    log_sigmoid,
    paired,
    random_pair,
    runner,
    untrained,
)

from qpref_plugins.loss_regularized import qpref_losses

RECORDS = {record.name: record for record in qpref_losses()}
run = runner(RECORDS)


def ratio(pair: dict, side: str) -> float:
    return math.fsum(pair[f"policy {side}"]) - math.fsum(pair[f"reference {side}"])


def exact_loss(name: str, pair: dict, options: dict) -> float:
    chosen, rejected, margin, beta = ratio(pair, "chosen"), ratio(pair, "rejected"), pair["margin"], options["beta"]
    match name:
        case "dpop":  # the penalty stands inside the sigmoid, times beta
            penalty = options["penalty"] * max(0.0, -chosen)
            return -log_sigmoid(beta * (chosen - rejected - penalty) - margin)
        case "r_dpo":  # r = beta log-ratio + alpha |y|, so the longer chosen response is ahead already
            length = len(pair["policy chosen"]) - len(pair["policy rejected"])
            return -log_sigmoid(beta * (chosen - rejected) + options["alpha"] * length - margin)
        case "cal_dpo":  # the contrast has no beta; the two targets have
            calibration = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
            return -log_sigmoid(chosen - rejected) + options["calibration"] * calibration
        case "chipo":  # phi(z) = z + log z of the ratios z, clipped to 2 R_max in both directions
            phi_chosen, phi_rejected = (math.exp(d) + d for d in (chosen, rejected))
            clipped = min(max(beta * (phi_chosen - phi_rejected), -options["clip"]), options["clip"])
            return -log_sigmoid(clipped - margin)
    raise AssertionError(name)


CASES = [
    ("dpop", {"beta": 0.3, "penalty": 50.0}),
    ("dpop", {"beta": 0.1, "penalty": 5.0}),
    ("dpop", {"beta": 0.1, "penalty": 0.0}),
    ("r_dpo", {"beta": 0.1, "alpha": 0.01}),
    ("r_dpo", {"beta": 0.5, "alpha": 0.1}),
    ("cal_dpo", {"beta": 0.1, "calibration": 1.0}),
    ("cal_dpo", {"beta": 0.01, "calibration": 0.5}),
    ("chipo", {"beta": 0.05, "clip": 10.0}),
    ("chipo", {"beta": 0.5, "clip": 1.0}),
    ("chipo", {"beta": 0.005, "clip": 1000.0}),
]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))


@every_case
def test_regularized_loss_is_its_formula_on_1000_random_pairs(name, options):
    rng = random.Random(1)
    pairs = [random_pair(rng, longest=12) for _ in range(1000)]
    exact = [exact_loss(name, pair, options) for pair in pairs]
    assert run(name, pairs, **options).losses.tolist() == pytest.approx(exact, rel=1e-6, abs=0)


@every_case
def test_regularized_gradient_is_the_finite_difference_on_1000_random_pairs(name, options):
    rng = random.Random(2)
    pairs = [random_pair(rng, longest=5) for _ in range(1000)]
    inputs = paired(pairs)
    record = RECORDS[name]
    record.build(record.options(**options))(inputs).losses.sum().backward()
    for side in ("chosen", "rejected"):
        scored = getattr(inputs.policy, side)
        for pair, gradient in zip(pairs, scored.values.grad.split(list(scored.lengths)), strict=True):
            token, step = rng.randrange(len(gradient)), 1e-4
            estimate = finite_difference(
                lambda moved: exact_loss(name, moved, options), pair, f"policy {side}", token, step
            )
            near_a_kink = abs(ratio(pair, "chosen")) < step or abs(abs(unclipped(pair, options)) - 1) < 1e-2
            if not near_a_kink:
                rounding = 1e-11 * abs(exact_loss(name, pair, options))  # of float64, over twice the step
                assert gradient[token].item() == pytest.approx(estimate, rel=1e-4, abs=max(1e-7, rounding))


def unclipped(pair: dict, options: dict) -> float:
    """The reward margin of chipo as a share of its clip; 0 for the others."""
    if "clip" not in options:
        return 0.0
    phi = [math.exp(ratio(pair, side)) + ratio(pair, side) for side in ("chosen", "rejected")]
    return options["beta"] * (phi[0] - phi[1]) / options["clip"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "options"), [*CASES, ("chipo", {"beta": 100.0, "clip": 1e30})], ids=lambda value: str(value)
)
def test_regularized_loss_is_finite_with_a_finite_gradient_at_extremes(name, options, dtype):
    inputs = extremes(dtype)
    record = RECORDS[name]
    assert all_finite(record.build(record.options(**options))(inputs).losses, inputs)


def test_dpop_by_hand():
    # Dc = -1, Dr = -4, penalty 2, beta 1: 3 - 2 = 1; the other pair's chosen response rose, and there is no penalty
    pairs = [flat_pair(-2.0, -5.0), flat_pair(0.0, -3.0)]
    expected = [math.log1p(math.exp(-1)), math.log1p(math.exp(-3))]
    assert run("dpop", pairs, beta=1.0, penalty=2.0).losses.tolist() == pytest.approx(expected, rel=1e-12)


def test_dpop_raises_a_sunk_chosen_response_even_where_the_pair_is_ahead():
    # h = 30 nats, so DPO is content; the chosen response has lost 10 nats, and the penalty of 5 each outweighs the lead
    inputs = paired([flat_pair(-11.0, -41.0)])
    record = RECORDS["dpop"]
    record.build(record.options(beta=0.3, penalty=5.0))(inputs).losses.sum().backward()
    pull = -inputs.policy.chosen.values.grad.item()
    assert pull > 0.3 * (1 + 5) * 0.99  # sigmoid(6) of the whole slope, beta (1 + lambda)


def test_r_dpo_learns_less_from_a_longer_chosen_response():
    # Policy and reference are the same: a chosen response longer by 10 tokens counts as ahead by 10 alpha
    longer, shorter = ({"margin": 0.0} | {side: [-1.0] * n for side, n in zip(SIDES, lengths * 2, strict=True)}
                       for lengths in ((30, 20), (20, 30)))  # fmt: skip
    losses = run("r_dpo", [longer, shorter], beta=0.1, alpha=0.1).losses.tolist()
    assert losses == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.exp(1))], rel=1e-12)


def test_cal_dpo_by_hand():
    # beta 0.25 aims at 2 and -2; Dc = 1 is 1 short, Dr = -5 is 3 too far, h = 6
    loss = run("cal_dpo", [flat_pair(-1.0, -7.0, reference=-2.0)], beta=0.25, calibration=0.5).losses.item()
    assert loss == pytest.approx(math.log1p(math.exp(-6)) + 0.5 * (1 + 9), rel=1e-12)


def test_chipo_by_hand():
    # ratios 3 and 1/3: phi is 3 + ln 3 and 1/3 - ln 3
    pair = flat_pair(-1 + math.log(3), -1 - math.log(3))
    z = 0.5 * (3 - 1 / 3 + 2 * math.log(3))
    assert run("chipo", [pair], beta=0.5).losses.item() == pytest.approx(math.log1p(math.exp(-z)), rel=1e-12)


def test_chipo_has_no_gradient_beyond_its_clip():
    # beta phi differs by 0.5 * (e^2 + 2 - (e^-2 - 2)) = 5.6 and by -5.6
    inputs = paired([flat_pair(1.0, -3.0), flat_pair(-3.0, 1.0), flat_pair(-0.9, -1.1)])
    record = RECORDS["chipo"]
    losses = record.build(record.options(beta=0.5, clip=2.0))(inputs).losses
    losses.sum().backward()
    assert losses[:2].tolist() == pytest.approx([math.log1p(math.exp(-2)), math.log1p(math.exp(2))], rel=1e-12)
    assert [bool(value) for value in inputs.policy.chosen.values.grad] == [False, False, True]


@pytest.mark.parametrize("name", ["dpop", "r_dpo", "chipo"])
def test_the_rows_margin_is_subtracted_from_the_reward_margin(name):
    pairs = [untrained(flat_pair(-1.0, -3.0)) | {"margin": margin} for margin in (0.0, 1.0)]
    expected = [math.log(2), math.log1p(math.exp(1))]
    assert run(name, pairs).losses.tolist() == pytest.approx(expected, rel=1e-12)


def test_cal_dpo_ignores_the_rows_margin():
    with_margin, without = run("cal_dpo", [flat_pair(-1.0, -3.0, margin=5.0), flat_pair(-1.0, -3.0)]).losses.tolist()
    assert with_margin == without


@every_case
def test_regularized_loss_starts_where_its_record_says(name, options):
    rng = random.Random(3)
    pairs = [untrained(random_pair(rng)) for _ in range(8)]
    start = RECORDS[name].starts_at(RECORDS[name].options(**options))
    assert (start is None) == (name == "r_dpo")  # which starts elsewhere for each pair of lengths
    if start is not None:
        assert run(name, pairs, **options).losses.tolist() == pytest.approx([start] * 8, rel=1e-12)


def test_dpo_is_a_special_case_of_dpop_and_r_dpo():
    rng = random.Random(4)
    pairs = [random_pair(rng) for _ in range(20)]
    dpo = [-log_sigmoid(0.2 * (ratio(pair, "chosen") - ratio(pair, "rejected")) - pair["margin"]) for pair in pairs]
    assert run("dpop", pairs, beta=0.2, penalty=0.0).losses.tolist() == pytest.approx(dpo, rel=1e-9)
    assert run("r_dpo", pairs, beta=0.2, alpha=0.0).losses.tolist() == pytest.approx(dpo, rel=1e-9)


def test_regularized_rewards_are_detached_and_0_at_the_reference():
    # 2 tokens, 3 nats and 2 nats above the reference: 6 and 4 nats, times beta 0.5; chipo adds the ratio less 1
    pair = flat_pair(-1.0, -2.0, reference=-4.0, tokens=2)
    for name in RECORDS:
        expected = [0.5 * (d + (math.expm1(d) if name == "chipo" else 0.0)) for d in (6.0, 4.0)]
        metrics = run(name, [pair, untrained(pair)], beta=0.5).metrics
        for side, reward in zip(("chosen", "rejected"), expected, strict=True):
            assert metrics[f"rewards/{side}"].tolist() == pytest.approx([reward, 0.0], rel=1e-12)
        assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"beta": beta}) for name in RECORDS for beta in (0.0, -0.1, math.inf, math.nan)),
        ("dpop", {"penalty": -1.0}),
        ("r_dpo", {"alpha": -0.1}),
        ("cal_dpo", {"calibration": -1.0}),
        ("chipo", {"clip": 0.0}),
        ("chipo", {"beta": 101.0}),
    ],
)
def test_regularized_options_out_of_range_are_refused(name, options):
    with pytest.raises(pydantic.ValidationError):
        RECORDS[name].options(**options)
