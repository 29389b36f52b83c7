"""The loss `d2po` against its formula in 50-digit arithmetic, and against the weights of its authors' code."""

from __future__ import annotations

import functools
import random

import mpmath
import pytest
import torch
from loss_cases import (
    all_finite,
    directional_derivatives,
    extreme_margins,
    extreme_pairs,
    paired,
    random_pair,
    runner,
    untrained,
)

from qpref_plugins.loss_d2po import qpref_losses
from qpref_plugins.loss_dpo import qpref_losses as dpo_losses

(RECORD,) = qpref_losses()
(DPO,) = dpo_losses()
loss_of = runner({"d2po": RECORD, "dpo": DPO})
CASES = [{}, {"gamma": 0.5}, {"gamma": 0.9, "beta": 0.7}, {"gamma": 1.0}]


@functools.cache
def pairs() -> list[dict]:
    return [random_pair(random.Random(number)) for number in range(1000)]


def oracle(pair: dict, beta: float = 0.1, gamma: float = 0.98, first: int = 0) -> float:
    """The loss with weights gamma^first, gamma^(first + 1) and so on."""
    with mpmath.workdps(50):
        rewards = {}
        for side in ("chosen", "rejected"):
            tokens = zip(pair[f"policy {side}"], pair[f"reference {side}"], strict=True)
            rewards[side] = beta * mpmath.fsum(
                mpmath.mpf(gamma) ** (first + position) * (mpmath.mpf(own) - mpmath.mpf(other))
                for position, (own, other) in enumerate(tokens)
            )
        return float(mpmath.log1p(mpmath.exp(-(rewards["chosen"] - rewards["rejected"] - pair["margin"]))))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_losses_are_the_formulas(options):
    found = loss_of("d2po", pairs(), **options).losses.tolist()
    for value, pair in zip(found, pairs(), strict=True):
        assert value == pytest.approx(oracle(pair, **options), rel=1e-6, abs=1e-12)


def test_gamma_1_is_dpo():
    found, expected = loss_of("d2po", pairs(), gamma=1.0), loss_of("dpo", pairs())
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=0)


def test_the_authors_beta_times_gamma_is_the_beta_here():
    """Their `get_batch_logps` weighs by gamma^cumsum(mask), so the first token has gamma^1."""
    found = loss_of("d2po", pairs()[:100], beta=0.3 * 0.8, gamma=0.8).losses.tolist()
    assert found == pytest.approx([oracle(pair, 0.3, 0.8, first=1) for pair in pairs()[:100]], rel=1e-9)


def test_the_gradient_of_each_token_is_gamma_times_that_of_the_one_before():
    inputs = paired([random_pair(random.Random(number)) for number in range(20)])
    RECORD.build(RECORD.options(gamma=0.9))(inputs).losses.sum().backward()
    for side in (inputs.policy.chosen, inputs.policy.rejected):
        for gradient in side.values.grad.split(list(side.lengths)):
            torch.testing.assert_close(gradient[1:], 0.9 * gradient[:-1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradients_are_those_of_the_value(options):
    inputs, function = paired(pairs()[:200]), RECORD.build(RECORD.options(**options))
    function(inputs).losses.sum().backward()
    derivative, difference = directional_derivatives(function, inputs, 1e-6)
    torch.testing.assert_close(derivative, difference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_extremes_are_finite(options, dtype):
    inputs = paired([*extreme_pairs(), *extreme_margins()], dtype)
    assert all_finite(RECORD.build(RECORD.options(**options))(inputs).losses, inputs)


def test_it_starts_at_ln_2():
    output = loss_of("d2po", [untrained(pair) for pair in pairs()[:50]])
    assert output.losses.tolist() == pytest.approx([RECORD.starts_at(RECORD.options())] * 50, rel=1e-12)
