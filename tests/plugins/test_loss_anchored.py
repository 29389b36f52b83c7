"""The anchored losses against their papers' formulas, in float64 arithmetic that shares no code with the plugin."""

from __future__ import annotations

import itertools
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
    nearby,
    paired,
    random_tokens,
    runner,
    untrained,
)

from qpref_plugins.loss_anchored import qpref_losses

RECORDS = {record.name: record for record in qpref_losses()}


def random_pair(rng: random.Random, longest: int = 12) -> dict:
    """Log-probabilities from -1e-8 to -20, a reference near the policy, a margin in half of the pairs."""
    pair: dict = {"margin": rng.choice([0.0, rng.uniform(-3, 3)])}
    for side in ("chosen", "rejected"):
        tokens = random_tokens(rng, rng.randint(1, longest))
        pair[f"policy {side}"] = tokens
        pair[f"reference {side}"] = nearby(rng, tokens)
    return pair


run = runner(RECORDS)


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def log_ratio(pair: dict, side: str) -> float:
    return math.fsum(pair[f"policy {side}"]) - math.fsum(pair[f"reference {side}"])


def baseline(pairs: list[dict], options: dict) -> float:
    """The step's delta of bco_pair."""
    if options.get("baseline") != "step":
        return 0.0
    ratios = [log_ratio(pair, side) for pair in pairs for side in ("chosen", "rejected")]
    return options["beta"] * math.fsum(ratios) / len(ratios)


def exact_loss(name: str, pair: dict, beta: float, delta: float = 0.0) -> float:
    chosen, rejected, margin = log_ratio(pair, "chosen"), log_ratio(pair, "rejected"), pair["margin"]
    match name:
        case "nca_pair":
            mixture = log_sigmoid(-beta * chosen) + log_sigmoid(-beta * rejected)
            return -log_sigmoid(beta * chosen) - mixture / 2
        case "sppo_hard":
            return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2
        case "bco_pair":
            return -log_sigmoid(beta * chosen - delta) - log_sigmoid(-(beta * rejected - delta))
        case "apo_zero":
            return sigmoid(-beta * chosen) + sigmoid(beta * rejected)
        case "apo_down":
            return sigmoid(beta * chosen) + sigmoid(-(beta * (chosen - rejected) - margin))
    raise AssertionError(name)


CASES = [
    (name, {"beta": beta})
    for name, beta in itertools.product(("nca_pair", "sppo_hard", "bco_pair", "apo_zero", "apo_down"), (0.05, 0.1, 1.0))
] + [("bco_pair", {"beta": beta, "baseline": "step"}) for beta in (0.1, 1.0)]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))


@every_case
def test_anchored_loss_is_its_formula_on_1000_random_pairs(name, options):
    rng = random.Random(1)
    for _ in range(10):  # steps of 100 pairs, each with a baseline of its own
        pairs = [random_pair(rng) for _ in range(100)]
        delta = baseline(pairs, options)
        exact = [exact_loss(name, pair, options["beta"], delta) for pair in pairs]
        assert run(name, pairs, **options).losses.tolist() == pytest.approx(exact, rel=1e-6, abs=0)


@every_case
def test_anchored_gradient_is_the_finite_difference_on_1000_random_pairs(name, options):
    rng = random.Random(2)
    pairs = [random_pair(rng, longest=5) for _ in range(1000)]
    delta = baseline(pairs, options)  # has no gradient, so it stays where it is while a token moves
    inputs = paired(pairs)
    record = RECORDS[name]
    record.build(record.options(**options))(inputs).losses.sum().backward()
    for side in ("chosen", "rejected"):
        scored = getattr(inputs.policy, side)
        for pair, gradient in zip(pairs, scored.values.grad.split(list(scored.lengths)), strict=True):
            token = rng.randrange(len(gradient))
            estimate = finite_difference(
                lambda moved: exact_loss(name, moved, options["beta"], delta), pair, f"policy {side}", token, 1e-4
            )
            assert gradient[token].item() == pytest.approx(estimate, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_case
def test_anchored_loss_is_finite_with_a_finite_gradient_at_extremes(name, options, dtype):
    inputs = extremes(dtype)
    record = RECORDS[name]
    losses = record.build(record.options(**options))(inputs).losses
    assert all_finite(losses, inputs)


def test_nca_pair_by_hand():
    # Dc = ln 3, Dr = -ln 3, beta 1: sg(Dc) = 3/4, sg(-Dc) = 1/4, sg(-Dr) = 3/4
    loss = run("nca_pair", [flat_pair(-1 + math.log(3), -1 - math.log(3))], beta=1.0).losses.item()
    assert loss == pytest.approx(math.log(4 / 3) + 0.5 * math.log(4) + 0.5 * math.log(4 / 3), rel=1e-12)


def test_sppo_hard_by_hand():
    # beta 0.25 aims at 2 and -2; Dc = 1 is 1 short, Dr = -5 is 3 too far
    assert run("sppo_hard", [flat_pair(-1.0, -7.0, reference=-2.0)], beta=0.25).losses.item() == 10.0


def test_bco_pair_by_hand():
    # Dc = 2, Dr = -2, beta 0.5: twice -ls(1)
    loss = run("bco_pair", [flat_pair(-1.0, -5.0, reference=-3.0)], beta=0.5).losses.item()
    assert loss == pytest.approx(2 * math.log(1 + math.exp(-1)), rel=1e-12)


def test_bco_pair_classifies_around_the_mean_reward_of_the_step():
    # rewards 2 and 0, then 4 and 2: delta = 2, and the rewards less delta are 0, -2, 2, 0
    pairs = [flat_pair(1.0, -1.0), flat_pair(3.0, 1.0)]
    losses = run("bco_pair", pairs, beta=1.0, baseline="step").losses.tolist()
    assert losses == pytest.approx([math.log(2) + math.log(1 + math.exp(-2))] * 2, rel=1e-12)


def test_apo_zero_by_hand():
    # beta Dc = ln 3, beta Dr = -ln 3: 1 - 3/4 + 1/4
    loss = run("apo_zero", [flat_pair(-1 + math.log(3), -1 - math.log(3))], beta=1.0).losses.item()
    assert loss == pytest.approx(0.5, rel=1e-12)


def test_apo_down_by_hand():
    # beta Dc = -ln 3, beta h = ln 3 with a margin of 0, or 0 with a margin of ln 3: 1/4 + 1/4 and 1/4 + 1/2
    chosen, rejected = -1 - math.log(3), -1 - 2 * math.log(3)
    pairs = [flat_pair(chosen, rejected), flat_pair(chosen, rejected, margin=math.log(3))]
    assert run("apo_down", pairs, beta=1.0).losses.tolist() == pytest.approx([0.5, 0.75], rel=1e-12)


@pytest.mark.parametrize("name", ["nca_pair", "sppo_hard", "bco_pair", "apo_zero"])
def test_margin_is_ignored_where_no_rewards_are_compared(name):
    pair = flat_pair(-1.0, -3.0)
    with_margin, without = run(name, [pair | {"margin": 5.0}, pair]).losses.tolist()
    assert with_margin == without


@pytest.mark.parametrize(
    ("name", "chosen", "rejected"), [("bco_pair", 59.0, -61.0), ("apo_zero", 59.0, -61.0), ("apo_down", -61.0, -121.0)]
)
def test_anchored_tail_is_kept_in_float32(name, chosen, rejected):
    # Both sigmoids are exp(-60); one of them written as 1 - sigmoid(60) would be 0, and so would its gradient.
    loss = run(name, [flat_pair(chosen, rejected)], torch.float32, beta=1.0).losses.item()
    assert loss == pytest.approx(2 * math.exp(-60), rel=1e-5, abs=0)


@every_case
def test_anchored_loss_starts_where_its_record_says(name, options):
    rng = random.Random(3)
    pairs = [untrained(random_pair(rng)) for _ in range(8)]
    start = RECORDS[name].starts_at(RECORDS[name].options(**options))
    assert run(name, pairs, **options).losses.tolist() == pytest.approx([start] * 8, rel=1e-12)


def test_anchored_losses_start_at_the_values_of_their_formulas():
    starts = {name: record.starts_at(record.options(beta=0.5)) for name, record in RECORDS.items()}
    assert starts == {
        "nca_pair": 2 * math.log(2),
        "sppo_hard": 2.0,
        "bco_pair": 2 * math.log(2),
        "apo_zero": 1.0,
        "apo_down": 1.0,
    }


@every_case
def test_anchored_loss_depends_on_log_ratios_only(name, options):
    rng = random.Random(4)
    pairs = [random_pair(rng) for _ in range(20)]
    shifted = [pair | {side: [value - 0.5 for value in pair[side]] for side in SIDES} for pair in pairs]
    losses = run(name, pairs, **options).losses.tolist()
    assert RECORDS[name].log_ratios_only
    assert run(name, shifted, **options).losses.tolist() == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize("name", RECORDS)
def test_anchored_loss_of_a_pair_does_not_depend_on_its_neighbors(name):
    # To the last bits: torch's sigmoid rounds differently in a vector's tail, at the end of a batch.
    rng = random.Random(5)
    pairs = [random_pair(rng) for _ in range(32)]
    together = run(name, [*pairs, flat_pair(math.nan, -1.0)]).losses.tolist()[:-1]
    assert together == pytest.approx([run(name, [pair]).losses.item() for pair in pairs], rel=1e-14)


@pytest.mark.parametrize("name", RECORDS)
def test_anchored_rewards_are_beta_times_the_log_ratios_and_detached(name):
    # chosen: -1 - -4 = 3 over 2 tokens = 6 nats, rejected: 2 over 2 tokens = 4 nats, times beta 0.5
    output = run(name, [flat_pair(-1.0, -2.0, reference=-4.0, tokens=2, margin=5.0)], beta=0.5)
    assert {key: value.item() for key, value in output.metrics.items()} == {
        "rewards/chosen": 3.0,
        "rewards/rejected": 2.0,
        "rewards/margins": 1.0,
        "rewards/accuracies": 1.0,
    }
    assert not any(value.requires_grad for value in output.metrics.values())
    assert output.losses.requires_grad


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_anchored_beta_out_of_range_is_refused(name, beta):
    with pytest.raises(pydantic.ValidationError):
        RECORDS[name].options(beta=beta)


def test_bco_pair_refuses_an_unknown_baseline():
    with pytest.raises(pydantic.ValidationError):
        RECORDS["bco_pair"].options(baseline="batch")


@pytest.mark.parametrize("name", RECORDS)
def test_anchored_record_says_what_it_needs(name):
    record = RECORDS[name]
    assert record.needs_of(record.options()) == {"reference"}
    assert record.scope_of(record.options()) == "example"
    if name == "bco_pair":
        assert record.scope_of(record.options(baseline="step")) == "step"
    assert record.formula
    assert record.paper
    assert all(record.options(**variant) for variant in record.variants)
