"""The loss `tdpo_sampled` against TDPO's equations with sampled divergences, in 50-digit arithmetic of its own."""

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
    directional_derivatives,
    extreme_margins,
    extreme_pairs,
    paired,
    random_pair,
    runner,
    untrained,
)

from qpref_plugins.loss_dpo import qpref_losses as dpo_losses
from qpref_plugins.loss_tdpo_sampled import MAX_LOG_RATIO, qpref_losses

(RECORD,) = qpref_losses()
(DPO,) = dpo_losses()
loss_of = runner({"tdpo_sampled": RECORD, "dpo": DPO})
CASES = [{}, {"variant": "tdpo1", "alpha": 1.0}, {"alpha": 0.2, "beta": 0.5}]


@functools.cache
def pairs() -> list[dict]:
    return [random_pair(random.Random(number)) for number in range(1000)]


def oracle(pair: dict, beta: float = 0.1, alpha: float = 0.5, variant: str = "tdpo2") -> mpmath.mpf:
    """TDPO's value, which is the same in both variants but for alpha; the paper's delta is rejected less chosen."""
    with mpmath.workdps(50):
        ratio, kl = {}, {}
        for side in ("chosen", "rejected"):
            tokens = zip(pair[f"policy {side}"], pair[f"reference {side}"], strict=True)
            of_tokens = [mpmath.mpf(own) - mpmath.mpf(other) for own, other in tokens]
            ratio[side] = mpmath.fsum(of_tokens)
            capped = [min(each, mpmath.mpf(MAX_LOG_RATIO)) for each in of_tokens]
            kl[side] = mpmath.fsum(mpmath.exp(each) - 1 - each for each in capped)
        u = beta * ratio["chosen"] - beta * ratio["rejected"]
        delta = beta * kl["rejected"] - beta * kl["chosen"]
        return mpmath.log1p(mpmath.exp(-(u - alpha * delta - pair["margin"])))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_losses_are_the_papers_with_sampled_divergences(options):
    found = loss_of("tdpo_sampled", pairs(), **options).losses.tolist()
    for value, pair in zip(found, pairs(), strict=True):
        assert value == pytest.approx(float(oracle(pair, **options)), rel=1e-6, abs=1e-12)


def test_alpha_0_is_dpo():
    found, expected = (
        loss_of(name, pairs(), **options) for name, options in (("tdpo_sampled", {"alpha": 0.0}), ("dpo", {}))
    )
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=0)


def test_the_plain_estimate_would_cancel_the_margin():
    """Why the divergences aren't estimated by -d: u - delta is 0 for any policy."""
    for pair in pairs()[:20]:
        total = {side: sum(pair[side]) for side in SIDES}
        ratio = {side: total[f"policy {side}"] - total[f"reference {side}"] for side in ("chosen", "rejected")}
        u, delta = ratio["chosen"] - ratio["rejected"], -ratio["rejected"] + ratio["chosen"]
        assert u - delta == pytest.approx(0, abs=1e-9)


def test_the_estimate_has_the_divergence_as_its_mean_over_the_references_tokens():
    generator = torch.Generator().manual_seed(3)
    policy, reference = torch.randn(2, 50, dtype=torch.float64, generator=generator).log_softmax(1)
    exact = (reference.exp() * (reference - policy)).sum()
    pair = {side: [] for side in SIDES} | {"margin": 0.0}
    values = []
    for own, other in zip(policy.tolist(), reference.tolist(), strict=True):
        pair |= {f"policy {side}": [own] for side in ("chosen", "rejected")}
        pair |= {f"reference {side}": [other] for side in ("chosen", "rejected")}
        values.append(loss_of("tdpo_sampled", [pair]).metrics["seq_kl/chosen"].item())
    mean = (reference.exp() * torch.tensor(values, dtype=torch.float64)).sum()
    assert mean.item() == pytest.approx(exact.item(), rel=1e-12)


@pytest.mark.parametrize(("variant", "moves"), [("tdpo1", True), ("tdpo2", False)])
def test_only_tdpo1_has_a_gradient_through_the_chosen_divergence(variant, moves):
    inputs = paired(pairs()[:200])
    function = RECORD.build(RECORD.options(variant=variant))
    function(inputs).losses.sum().backward()
    derivative, difference = directional_derivatives(function, inputs, 1e-6)
    assert torch.allclose(derivative, difference, rtol=1e-4, atol=1e-7) is moves
    plain = RECORD.build(RECORD.options(variant="tdpo1"))
    same = paired(pairs()[:200])
    plain(same).losses.sum().backward()
    assert torch.equal(same.policy.rejected.values.grad, inputs.policy.rejected.values.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_extremes_are_finite(options, dtype):
    inputs = paired([*extreme_pairs(), *extreme_margins()], dtype)
    assert all_finite(RECORD.build(RECORD.options(**options))(inputs).losses, inputs)


def test_it_starts_at_ln_2_with_divergences_of_0():
    output = loss_of("tdpo_sampled", [untrained(pair) for pair in pairs()[:50]])
    assert output.losses.tolist() == pytest.approx([RECORD.starts_at(RECORD.options())] * 50, rel=1e-12)
    assert not output.metrics["seq_kl/rejected"].any()


def test_the_signs_are_those_of_the_authors_code():
    """The authors' `tdpo_loss`: logits = margin + alpha (chosen_position_kl.detach() - rejected_position_kl)."""
    pair = {
        "policy chosen": [-1.0],
        "reference chosen": [-1.5],
        "policy rejected": [-3.0],
        "reference rejected": [-2.0],
    }
    chosen_kl, rejected_kl = math.exp(0.5) - 1 - 0.5, math.exp(-1.0) - 1 + 1.0
    logits = (0.5 + 1.0) + 0.5 * (chosen_kl - rejected_kl)
    found = loss_of("tdpo_sampled", [pair | {"margin": 0.0}], beta=0.3).losses.item()
    assert found == pytest.approx(math.log1p(math.exp(-0.3 * logits)), rel=1e-12)
