"""The loss `dpo` against eq. 7 of Rafailov et al. 2023, in 50-digit arithmetic that shares no code with the plugin."""

from __future__ import annotations

import itertools
import math
import random

import mpmath
import pytest
import torch

from qpref.records import LossOutput, PairedInputs, PairLogProbs, TokenLogProbs
from qpref_loss_dpo import DpoOptions, build, qpref_losses

SIDES = ("policy chosen", "policy rejected", "reference chosen", "reference rejected")


def scores(rows: list[list[float]], dtype: torch.dtype = torch.float64) -> TokenLogProbs:
    values = torch.tensor([value for row in rows for value in row], dtype=dtype)
    return TokenLogProbs(values=values, lengths=tuple(map(len, rows)))


def paired(pairs: list[dict], dtype: torch.dtype = torch.float64) -> PairedInputs:
    """Inputs from one dict a pair: a list of token log-probabilities for each of SIDES, and the margin."""
    chosen, rejected, reference_chosen, reference_rejected = (
        scores([pair[side] for pair in pairs], dtype) for side in SIDES
    )
    chosen.values.requires_grad_()
    rejected.values.requires_grad_()
    return PairedInputs(
        policy=PairLogProbs(chosen=chosen, rejected=rejected),
        reference=PairLogProbs(chosen=reference_chosen, rejected=reference_rejected),
        margin=torch.tensor([pair["margin"] for pair in pairs], dtype=dtype),
    )


def random_pair(rng: random.Random, longest: int = 40) -> dict:
    """Log-probabilities from -1e-8 to -20, a reference near the policy, a margin in half of the pairs."""
    lengths = {"chosen": rng.randint(1, longest), "rejected": rng.randint(1, longest)}
    pair: dict = {"margin": rng.choice([0.0, rng.uniform(-3, 3)])}
    for side, length in lengths.items():
        tokens = [-(10 ** rng.uniform(-8, 1.3)) for _ in range(length)]
        pair[f"policy {side}"] = tokens
        pair[f"reference {side}"] = [min(0.0, token + rng.gauss(0, 0.3)) for token in tokens]
    return pair


def flat_pair(chosen: float, rejected: float, reference: float = -1.0, tokens: int = 1, margin: float = 0.0) -> dict:
    """A pair whose tokens have one log-probability on each side."""
    values = (chosen, rejected, reference, reference)
    return {side: [value] * tokens for side, value in zip(SIDES, values, strict=True)} | {"margin": margin}


@mpmath.workdps(50)
def exact_loss(pair: dict, beta: float) -> mpmath.mpf:
    """-log sigmoid(beta h - margin) = log(1 + exp(margin - beta h))."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (
        mpmath.fsum(map(mpmath.mpf, pair[side])) for side in SIDES
    )
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return mpmath.log1p(mpmath.exp(mpmath.mpf(pair["margin"]) - mpmath.mpf(beta) * h))


def dpo(pairs: list[dict], beta: float = 0.1, dtype: torch.dtype = torch.float64) -> LossOutput:
    return build(DpoOptions(beta=beta))(paired(pairs, dtype))


def test_dpo_is_equation_7_on_2000_random_pairs():
    rng = random.Random(1)
    worst = 0.0
    for beta in (0.01, 0.1, 0.5, 2.0):
        pairs = [random_pair(rng) for _ in range(500)]
        for loss, pair in zip(dpo(pairs, beta).losses.tolist(), pairs, strict=True):
            exact = exact_loss(pair, beta)
            worst = max(worst, float(abs((mpmath.mpf(loss) - exact) / exact)))
    assert worst <= 1e-6


def test_dpo_keeps_its_tail_in_float32():
    # -log sigmoid(60) = exp(-60) to 27 digits; computed as log(1 + exp(-60)) it would be 0 and so would its gradient.
    loss = dpo([flat_pair(chosen=-1.0, rejected=-601.0)], beta=0.1, dtype=torch.float32).losses.item()
    assert loss == pytest.approx(math.exp(-60), rel=1e-5, abs=0)


def test_dpo_gradient_is_the_finite_difference():
    rng = random.Random(2)
    inputs = paired([random_pair(rng, longest=6) for _ in range(12)])
    function = build(DpoOptions(beta=0.3))

    def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        policy = PairLogProbs(
            chosen=TokenLogProbs(values=chosen, lengths=inputs.policy.chosen.lengths),
            rejected=TokenLogProbs(values=rejected, lengths=inputs.policy.rejected.lengths),
        )
        return function(PairedInputs(policy=policy, reference=inputs.reference, margin=inputs.margin)).losses

    sides = (inputs.policy.chosen.values, inputs.policy.rejected.values)
    assert torch.autograd.gradcheck(losses, sides, eps=1e-6, rtol=1e-4, atol=1e-9)


EXTREMES = [
    flat_pair(chosen, rejected, reference, tokens)
    for chosen, rejected, reference in itertools.product((0.0, -1e-8, -1e-3, -1.0, -1e4), repeat=3)
    for tokens in (1, 4096)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dpo_is_finite_with_a_finite_gradient_at_extremes(dtype):
    inputs = paired(EXTREMES + [flat_pair(-1.0, -1.0, margin=margin) for margin in (-1e4, 1e4)], dtype)
    losses = build(DpoOptions(beta=0.1))(inputs).losses
    losses.sum().backward()
    values = (losses, inputs.policy.chosen.values.grad, inputs.policy.rejected.values.grad)
    assert all(bool(value.isfinite().all()) for value in values)


@pytest.mark.parametrize(("margin", "loss"), [(1e4, 1e4), (-1e4, 0.0)])
def test_dpo_of_an_extreme_margin_is_the_margin_or_nothing(margin, loss):
    # log(1 + exp(m)) is m for m = 1e4, and exp(-1e4), which no float64 holds, for m = -1e4.
    assert dpo([flat_pair(-1.0, -1.0, margin=margin)]).losses.item() == loss


def test_dpo_subtracts_the_rows_margin_from_the_reward_margin():
    # h = (-1 - -1) - (-3 - -1) = 2; -log sigmoid(0.5 * 2 - 0.25) = log(1 + exp(-0.75))
    loss = dpo([flat_pair(chosen=-1.0, rejected=-3.0, margin=0.25)], beta=0.5).losses.item()
    assert loss == pytest.approx(math.log(1 + math.exp(-0.75)), rel=1e-12)


def test_dpo_sums_over_tokens():
    # Twice the tokens, each with the same log-ratio, are twice the log-ratio: h = 2 becomes 4.
    once, twice = dpo([flat_pair(-1.0, -3.0, tokens=1), flat_pair(-1.0, -3.0, tokens=2)], beta=0.5).losses.tolist()
    assert (once, twice) == pytest.approx((math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2))), rel=1e-12)


def test_dpo_of_a_pair_does_not_depend_on_its_batch():
    rng = random.Random(3)
    pairs = [random_pair(rng) for _ in range(32)]
    together = dpo(pairs, dtype=torch.float32).losses.tolist()
    assert together == [dpo([pair], dtype=torch.float32).losses.item() for pair in pairs]


def test_dpo_keeps_the_order_of_the_batch():
    rng = random.Random(4)
    pairs = [random_pair(rng) for _ in range(32)]
    assert dpo(pairs[::-1]).losses.tolist() == dpo(pairs).losses.tolist()[::-1]


def test_dpo_of_a_pair_survives_a_neighbour_that_is_not_a_number():
    good, bad = flat_pair(-1.0, -3.0), flat_pair(math.nan, -3.0)
    assert dpo([bad, good, bad]).losses[1].item() == dpo([good]).losses.item()


def test_dpo_returns_one_loss_a_pair_with_a_gradient():
    losses = dpo([flat_pair(-1.0, -2.0)] * 3).losses
    assert losses.shape == (3,)
    assert losses.requires_grad


def test_dpo_rewards_are_beta_times_the_log_ratios():
    # chosen: -1 - -4 = 3 over 2 tokens each = 6 nats, rejected: -2 - -4 = 2 over 2 tokens = 4 nats, times beta 0.5
    metrics = dpo([flat_pair(-1.0, -2.0, reference=-4.0, tokens=2)], beta=0.5).metrics
    assert {name: value.item() for name, value in metrics.items()} == {
        "rewards/chosen": 3.0,
        "rewards/rejected": 2.0,
        "rewards/margins": 1.0,
        "rewards/accuracies": 1.0,
    }


def test_dpo_rewards_leave_the_rows_margin_out():
    metrics = dpo([flat_pair(-1.0, -3.0, margin=5.0)], beta=0.5).metrics
    assert metrics["rewards/margins"].item() == 1.0


def test_dpo_counts_a_tie_as_half_right():
    right, wrong, tie = flat_pair(-1.0, -2.0), flat_pair(-2.0, -1.0), flat_pair(-1.0, -1.0)
    assert dpo([right, wrong, tie]).metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.5]


def test_dpo_metrics_are_detached():
    assert not any(value.requires_grad for value in dpo([flat_pair(-1.0, -2.0)]).metrics.values())


def test_dpo_gradient_is_beta_times_how_wrong_the_pair_is():
    # d/dh -log sigmoid(beta h) = -beta sigmoid(-beta h); h = 2
    for beta in (0.1, 0.5):
        inputs = paired([flat_pair(-1.0, -3.0)])
        build(DpoOptions(beta=beta))(inputs).losses.sum().backward()
        slope = inputs.policy.chosen.values.grad.item()
        assert slope == pytest.approx(-beta / (1 + math.exp(2 * beta)), rel=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_dpo_starts_at_log_2_whatever_beta(beta):
    (record,) = qpref_losses()
    rng = random.Random(5)
    pair = random_pair(rng) | {"margin": 0.0}
    pair |= {"reference chosen": pair["policy chosen"], "reference rejected": pair["policy rejected"]}
    loss = dpo([pair], beta).losses.item()
    assert [loss, record.starts_at(DpoOptions(beta=beta))] == pytest.approx([math.log(2)] * 2, rel=1e-12)


def test_dpo_asks_for_the_reference():
    (record,) = qpref_losses()
    assert record.needs == {"reference"}
