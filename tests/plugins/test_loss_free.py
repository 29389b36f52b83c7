"""The losses without a reference against their papers' formulas, in float64 that shares no code with the plugin."""

from __future__ import annotations

import functools
import itertools
import math
import random

import pydantic
import pytest
import torch
from loss_cases import finite_difference, random_tokens, runner, scores, smoothed

from qpref.records import PairedInputs, PairLogProbs
from qpref_plugins.loss_free import qpref_losses

SIDES = ("chosen", "rejected")
RECORDS = {record.name: record for record in qpref_losses()}


def paired(pairs: list[dict], dtype: torch.dtype = torch.float64) -> PairedInputs:
    """Inputs from one dict a pair: a list of token log-probabilities for each of SIDES, and the margin."""
    chosen, rejected = (scores([pair[side] for pair in pairs], dtype) for side in SIDES)
    chosen.values.requires_grad_()
    rejected.values.requires_grad_()
    return PairedInputs(
        policy=PairLogProbs(chosen=chosen, rejected=rejected),
        reference=None,
        margin=torch.tensor([pair["margin"] for pair in pairs], dtype=dtype),
    )


def random_pair(rng: random.Random, longest: int = 12) -> dict:
    """Log-probabilities from -1e-8 to -20, a margin in half of the pairs."""
    tokens = {side: random_tokens(rng, rng.randint(1, longest)) for side in SIDES}
    return tokens | {"margin": rng.choice([0.0, rng.uniform(-3, 3)])}


def flat_pair(chosen: float, rejected: float, tokens: int = 1, margin: float = 0.0) -> dict:
    """A pair whose tokens have one log-probability on each side."""
    return {"chosen": [chosen] * tokens, "rejected": [rejected] * tokens, "margin": margin}


run = runner(RECORDS, paired)


def mean(tokens: list[float]) -> float:
    return math.fsum(tokens) / len(tokens)


def shaped(tokens: list[float], alpha: float) -> float:
    """(1 - p^-alpha) / alpha with p^-alpha at most e^80; log p for alpha = 0."""
    return mean(tokens) if alpha == 0 else -math.expm1(min(80.0, -alpha * mean(tokens))) / alpha


def exact_loss(name: str, pair: dict, options: dict) -> float:
    chosen, rejected, margin = pair["chosen"], pair["rejected"], pair["margin"]
    given = {"beta": 1.0, "gamma": 0.0, "alpha": 0.0, "label_smoothing": 0.0, "nll": "mean"} | options
    beta, gamma, alpha, eps = (given[key] for key in ("beta", "gamma", "alpha", "label_smoothing"))
    match name:
        case "cpo":
            nll = -mean(chosen) if given["nll"] == "mean" else -math.fsum(chosen)
            return smoothed(beta * (math.fsum(chosen) - math.fsum(rejected)) - margin, eps) + alpha * nll
        case "simpo":
            return smoothed(beta * (mean(chosen) - mean(rejected)) - gamma - margin, eps) - alpha * mean(chosen)
        case "alphapo":
            return smoothed(beta * (shaped(chosen, alpha) - shaped(rejected, alpha)) - gamma - margin, 0.0)
        case "simper":
            return math.exp(mean(rejected)) - math.exp(mean(chosen))
        case "sft":
            return -mean(chosen)
    raise AssertionError(name)


CASES = [
    ("cpo", {"beta": 0.1, "alpha": 1.0}),
    ("cpo", {"beta": 1.0, "alpha": 0.3, "label_smoothing": 0.2}),
    ("cpo", {"beta": 0.5, "alpha": 2.0, "nll": "sum"}),
    ("cpo", {"beta": 0.5, "alpha": 0.0}),
    ("simpo", {"beta": 2.0, "gamma": 0.5}),
    ("simpo", {"beta": 10.0, "gamma": 1.6, "label_smoothing": 0.2}),
    ("simpo", {"beta": 2.0, "gamma": 0.0, "alpha": 0.7}),
    ("alphapo", {"beta": 2.5, "gamma": 0.1, "alpha": 0.25}),
    ("alphapo", {"beta": 10.0, "gamma": 1.6, "alpha": -0.5}),
    ("alphapo", {"beta": 2.0, "gamma": 0.5, "alpha": 0.0}),
    ("alphapo", {"beta": 2.0, "gamma": 0.5, "alpha": 1e-4}),
    ("alphapo", {"beta": 1.0, "gamma": 0.5, "alpha": 1.0}),
    ("simper", {}),
    ("sft", {}),
]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))


# Bends too sharply for finite differences.
STEEP = ("alphapo", {"beta": 1.0, "gamma": 0.5, "alpha": 10.0})


@pytest.mark.parametrize(("name", "options"), [*CASES, STEEP], ids=lambda value: str(value))
def test_free_loss_is_its_formula_on_1000_random_pairs(name, options):
    rng = random.Random(1)
    pairs = [random_pair(rng) for _ in range(1000)]
    exact = [exact_loss(name, pair, options) for pair in pairs]
    assert run(name, pairs, **options).losses.tolist() == pytest.approx(exact, rel=1e-6, abs=1e-300)


@every_case
def test_free_gradient_is_the_finite_difference_on_1000_random_pairs(name, options):
    rng = random.Random(2)
    pairs = [random_pair(rng, longest=5) for _ in range(1000)]
    inputs = paired(pairs)
    record = RECORDS[name]
    losses = record.build(record.options(**options))(inputs).losses
    scored = (inputs.policy.chosen, inputs.policy.rejected)
    gradients = torch.autograd.grad(losses.sum(), [side.values for side in scored], materialize_grads=True)
    for side, log_probs, values in zip(SIDES, scored, gradients, strict=True):
        for pair, gradient in zip(pairs, values.split(list(log_probs.lengths)), strict=True):
            token = rng.randrange(len(gradient))
            estimate = finite_difference(lambda moved: exact_loss(name, moved, options), pair, side, token, 1e-5)
            rounding = 1e-10 * abs(exact_loss(name, pair, options))  # of float64, over twice the step
            assert gradient[token].item() == pytest.approx(estimate, rel=1e-5, abs=max(1e-8, rounding))


@functools.cache
def extremes(dtype: torch.dtype) -> PairedInputs:
    levels = (0.0, -1e-8, -1e-3, -1.0, -8.0, -1e4)
    pairs = [
        flat_pair(*values, tokens, margin)
        for values in itertools.product(levels, repeat=2)
        for tokens in (1, 4096)
        for margin in (0.0, -1e4, 1e4)
    ]
    return paired(pairs, dtype)


EXTREME_OPTIONS = [("alphapo", {"beta": 40.0, "alpha": alpha}) for alpha in (-10.0, -1e-60, 1e-11, 0.008, 1.0, 10.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), CASES + EXTREME_OPTIONS, ids=lambda value: str(value))
def test_free_loss_is_finite_with_a_finite_gradient_at_extremes(name, options, dtype):
    inputs = extremes(dtype)
    record = RECORDS[name]
    losses = record.build(record.options(**options))(inputs).losses
    sides = (inputs.policy.chosen.values, inputs.policy.rejected.values)
    gradients = torch.autograd.grad(losses, sides, torch.ones_like(losses), materialize_grads=True)
    assert all(bool(value.isfinite().all()) for value in (losses, *gradients))
    assert losses.dtype == dtype


def test_cpo_by_hand():
    # c = -2, r = -6 over 2 tokens, beta 0.5: x = 2 less a margin of 1; NLL 1 per token, 2 in sum, times 3
    pair = flat_pair(-1.0, -3.0, tokens=2, margin=1.0)
    losses = [run("cpo", [pair], beta=0.5, alpha=3.0, nll=nll).losses.item() for nll in ("mean", "sum")]
    assert losses == pytest.approx([math.log(1 + math.exp(-1)) + nll for nll in (3, 6)], rel=1e-12)


def test_simpo_by_hand():
    # c' = -1, r' = -3 whatever the number of tokens, beta 2: 4 less gamma 1.5 and a margin of 0.5
    pairs = [flat_pair(-1.0, -3.0, tokens, margin=0.5) for tokens in (1, 7)]
    losses = run("simpo", pairs, beta=2.0, gamma=1.5).losses.tolist()
    assert losses == pytest.approx([math.log(1 + math.exp(-2))] * 2, rel=1e-12)


def test_simpo_gamma_is_not_multiplied_by_beta():
    # Equal means: -ls(-gamma), whatever beta
    losses = [run("simpo", [flat_pair(-1.0, -1.0)], beta=beta, gamma=1.0).losses.item() for beta in (2.0, 10.0)]
    assert losses == pytest.approx([math.log(1 + math.e)] * 2, rel=1e-12)


def test_alphapo_by_hand():
    # p = 1/2 and 1/4, alpha 1: rewards 1 - 2 and 1 - 4, beta 0.5: a difference of 1, less gamma 0.25
    loss = run("alphapo", [flat_pair(-math.log(2), -math.log(4))], beta=0.5, gamma=0.25, alpha=1.0).losses.item()
    assert loss == pytest.approx(math.log(1 + math.exp(-0.75)), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1e-13, 1e-9, -1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alphapo_tends_to_simpo_as_alpha_tends_to_0(alpha, dtype):
    rng = random.Random(3)
    pairs = [random_pair(rng) for _ in range(50)]
    options = {"beta": 2.0, "gamma": 0.5}
    simpo = run("simpo", pairs, dtype, **options).losses.tolist()
    assert run("alphapo", pairs, dtype, alpha=alpha, **options).losses.tolist() == pytest.approx(simpo, rel=1e-5)


def test_alphapo_holds_the_exponent_at_80():
    # alpha 1: -c' = 0 and -r' = 1e4, held at 80; the chosen reward is 0
    output = run("alphapo", [flat_pair(0.0, -1e4)], beta=1.0, alpha=1.0)
    assert output.metrics["rewards/rejected"].item() == pytest.approx(-math.expm1(80), rel=1e-12)


def test_sft_by_hand():
    # The mean of 1, 2 and 6; neither the rejected response nor the margin counts.
    pair = {"chosen": [-1.0, -2.0, -6.0], "rejected": [-4.0], "margin": 0.5}
    assert run("sft", [pair]).losses.item() == 3.0


def test_simper_by_hand():
    # Geometric means of the tokens' probabilities: 1/2 over two tokens, 1/4 over one; the margin doesn't count.
    pair = {"chosen": [math.log(1 / 8), math.log(2)], "rejected": [math.log(1 / 4)], "margin": 0.5}
    assert run("simper", [pair]).losses.item() == pytest.approx(1 / 4 - 1 / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "rewards"),
    [
        ("cpo", {"beta": 0.5}, (-1.0, -3.0)),
        ("simpo", {"beta": 2.0}, (-2.0, -6.0)),
        ("alphapo", {"beta": 2.0, "alpha": 1.0}, (2 - 2 * math.e, 2 - 2 * math.exp(3))),
        ("simper", {}, (math.exp(-1), math.exp(-3))),
        ("sft", {}, (-1.0, -3.0)),
    ],
)
def test_free_rewards_are_what_the_loss_compares_and_detached(name, options, rewards):
    output = run(name, [flat_pair(-1.0, -3.0, tokens=2, margin=5.0)], **options)
    chosen, rejected = rewards
    assert {key: value.item() for key, value in output.metrics.items()} == pytest.approx(
        {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": 1.0,
        }
    )
    assert not any(value.requires_grad for value in output.metrics.values())
    assert output.losses.requires_grad


@pytest.mark.parametrize("name", RECORDS)
def test_free_loss_of_a_pair_does_not_depend_on_its_neighbors(name):
    # To the last bits: torch's exponential rounds differently in a vector's tail, at the end of a batch.
    rng = random.Random(4)
    pairs = [random_pair(rng) for _ in range(32)]
    together = run(name, [*pairs, flat_pair(math.nan, -1.0)]).losses.tolist()[:-1]
    assert together == pytest.approx([run(name, [pair]).losses.item() for pair in pairs], rel=1e-14)


OUT_OF_RANGE = [
    *itertools.product(("cpo", "simpo", "alphapo"), [{"beta": 0.0}, {"beta": -1.0}, {"beta": math.inf}]),
    *itertools.product(("cpo", "simpo"), [{"alpha": -0.1}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}]),
    *itertools.product(("simpo", "alphapo"), [{"gamma": -0.1}, {"gamma": math.nan}]),
    *itertools.product(("alphapo",), [{"beta": 41.0}, {"alpha": 10.1}, {"alpha": -10.1}]),
    ("cpo", {"nll": "prompt"}),
    ("simper", {"beta": 0.1}),
    ("sft", {"beta": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), OUT_OF_RANGE, ids=lambda value: str(value))
def test_free_options_out_of_range_are_refused(name, options):
    with pytest.raises(pydantic.ValidationError):
        RECORDS[name].options(**options)


@pytest.mark.parametrize("name", RECORDS)
def test_free_record_says_that_it_needs_nothing(name):
    record = RECORDS[name]
    assert record.needs_of(record.options()) == frozenset()
    assert record.scope == "example"
    assert record.starts_at is None
    assert not record.log_ratios_only
    assert record.formula
    assert record.paper
    assert all(record.options(**variant) for variant in record.variants)
