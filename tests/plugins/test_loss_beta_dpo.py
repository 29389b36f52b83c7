"""beta_dpo against the arithmetic of its authors' code, with the likeliest of its random draws, over several steps."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pydantic
import pytest
import torch
from loss_cases import SIDES, all_finite, extremes, flat_pair, log_sigmoid, paired, random_pair, untrained

from qpref.records import LossOutput
from qpref_plugins.loss_beta_dpo import BETA_DPO, BetaDpoOptions

CASES = [{}, {"beta": 0.3, "alpha": 0.1}, {"filter": 0.0}, {"filter": 0.5, "momentum": 0.5}, {"alpha": 0.0}]
every_case = pytest.mark.parametrize("options", CASES, ids=str)


def step(pairs: list[dict], average: float, dtype: torch.dtype = torch.float64, **options: object) -> LossOutput:
    inputs = replace(paired(pairs, dtype), state={"average": torch.tensor(average, dtype=dtype)})
    return BETA_DPO.build(BetaDpoOptions(**options))(inputs)


def gap(pair: dict) -> float:
    sums = [math.fsum(pair[side]) for side in SIDES]
    return (sums[0] - sums[2]) - (sums[1] - sums[3])


def exact_step(pairs: list[dict], average: float, options: BetaDpoOptions) -> tuple[list[float], float, float]:
    """The authors' step: gap_mean moves first, K pairs of the largest density are drawn, beta follows their mean.

    Returns:
        The losses, beta and the average after the step.
    """
    gaps = [gap(pair) for pair in pairs]
    average = options.momentum * average + (1 - options.momentum) * math.fsum(gaps) / len(gaps)
    count = int(len(gaps) * (1 - options.filter))
    drawn = sorted(range(len(gaps)), key=lambda index: abs(gaps[index] - average))[:count]
    used = math.fsum(gaps[index] for index in drawn) / count
    beta = max(options.beta * (1 + options.alpha * (used - average)), 1e-3)
    losses = [-log_sigmoid(beta * gap - pair["margin"]) for gap, pair in zip(gaps, pairs, strict=True)]
    return [loss * len(gaps) / count if at in drawn else 0.0 for at, loss in enumerate(losses)], beta, average


@every_case
def test_beta_dpo_is_its_authors_step_on_1000_random_pairs(options):
    """50 steps of 20 pairs, the average of each handed to the next."""
    rng = random.Random(1)
    average = expected = 0.0
    for _ in range(50):
        pairs = [random_pair(rng, longest=12) for _ in range(20)]
        output = step(pairs, average, **options)
        losses, beta, expected = exact_step(pairs, expected, BetaDpoOptions(**options))
        assert output.losses.tolist() == pytest.approx(losses, rel=1e-6, abs=1e-12)
        assert output.metrics["beta_dpo/beta"].tolist() == pytest.approx([beta] * 20, rel=1e-6)
        average = output.state["average"].item()
        assert average == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_beta_dpo_by_hand():
    # h = 1, 3 and 20 nats, mean 8, so M_0 = 4 after 0 at momentum 0.5; 1 and 3 are kept, with the mean 2
    pairs = [flat_pair(0.0, -1.0), flat_pair(0.0, -3.0), flat_pair(0.0, -20.0)]
    output = step(pairs, 0.0, beta=0.5, alpha=0.25, filter=0.33, momentum=0.5)
    assert output.state["average"].item() == pytest.approx(4.0)
    beta = 0.5 * (1 + 0.25 * (2 - 4))
    expected = [1.5 * math.log1p(math.exp(-beta * h)) for h in (1, 3)]
    assert output.losses.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)


def test_beta_has_no_gradient_and_pairs_that_are_left_out_have_none():
    inputs = paired([flat_pair(0.0, -1.0), flat_pair(0.0, -3.0), flat_pair(0.0, -20.0)])
    inputs = replace(inputs, state={"average": torch.tensor(0.0, dtype=torch.float64)})
    output = BETA_DPO.build(BetaDpoOptions(filter=0.33))(inputs)
    output.losses.sum().backward()
    beta = output.metrics["beta_dpo/beta"][0].item()
    expected = [-1.5 * beta / (1 + math.exp(beta * h)) for h in (1, 3)]
    assert inputs.policy.chosen.values.grad.tolist() == pytest.approx([*expected, 0.0], rel=1e-9)
    assert not output.state["average"].requires_grad


def test_beta_does_not_fall_below_its_bound():
    output = step([flat_pair(0.0, -1.0)] * 4, 1000.0)
    assert output.metrics["beta_dpo/beta"].tolist() == pytest.approx([1e-3] * 4)


def test_pairs_as_far_as_the_last_one_that_is_kept_are_kept_in_any_order():
    pairs = [flat_pair(0.0, -h) for h in (1.0, 1.0, 1.0, 9.0)]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        losses = step([pairs[index] for index in order], 0.0, filter=0.5, momentum=0.9).losses.tolist()
        assert [loss > 0 for loss in losses] == [index != 3 for index in order]


@every_case
def test_beta_dpo_starts_at_ln_2_and_averages_to_dpo_over_all_pairs(options):
    pairs = [untrained(random_pair(random.Random(seed))) for seed in range(9)]
    assert step(pairs, 0.0, **options).losses.tolist() == pytest.approx([math.log(2)] * 9, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_case
def test_beta_dpo_is_finite_with_a_finite_gradient_at_extremes(options, dtype):
    inputs = replace(extremes(dtype), state={"average": torch.tensor(-1e6, dtype=dtype)})
    output = BETA_DPO.build(BetaDpoOptions(**options))(inputs)
    assert all_finite(output.losses, inputs)
    assert output.state["average"].isfinite()


@pytest.mark.parametrize(
    "options",
    [{"beta": 0.0}, {"alpha": -1.0}, {"filter": 1.0}, {"filter": -0.1}, {"momentum": 1.0}, {"momentum": -0.1}],
)
def test_beta_dpo_refuses_options_out_of_range(options):
    with pytest.raises(pydantic.ValidationError):
        BetaDpoOptions(**options)
