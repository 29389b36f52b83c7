"""The loss `orpo` against eq. 3 to 7 of Hong et al. 2024, in 50-digit arithmetic of its own."""

from __future__ import annotations

import itertools
import math
import random

import mpmath
import pytest
import torch
from loss_cases import all_finite, exact_total, nudged, random_tokens, scores
from pydantic import ValidationError

from qpref.records import LossOutput, PairedInputs, PairLogProbs
from qpref_plugins.loss_orpo import OrpoOptions, build, log1mexp, qpref_losses

SIDES = ("chosen", "rejected", "prompt")
BETAS = (0.01, 0.1, 0.5, 2.0)


def paired(pairs: list[dict], dtype: torch.dtype = torch.float64) -> PairedInputs:
    """Inputs from one dict a pair: a list of token log-probabilities for each of SIDES."""
    policy = {side: scores([pair[side] for pair in pairs], dtype) for side in SIDES}
    for side in policy.values():
        side.values.requires_grad_()
    return PairedInputs(policy=PairLogProbs(**policy), reference=None, margin=torch.zeros(len(pairs), dtype=dtype))


def random_pair(rng: random.Random, longest: int = 40) -> dict:
    """Log-probabilities from -1e-8 to -20, so that a short response may be certain; the prompt may have one token."""
    lengths = {"chosen": rng.randint(1, longest), "rejected": rng.randint(1, longest), "prompt": rng.randint(0, 20)}
    return {side: random_tokens(rng, length) for side, length in lengths.items()}


def flat_pair(chosen: float, rejected: float, tokens: int = 1, prompt: float = -1.0) -> dict:
    return {"chosen": [chosen] * tokens, "rejected": [rejected] * tokens, "prompt": [prompt] * (tokens - 1)}


def mean(tokens: list[float]) -> mpmath.mpf:
    return exact_total(tokens) / len(tokens)


@mpmath.workdps(50)
def exact_odds_ratio(pair: dict) -> mpmath.mpf:
    """The ratio of the odds P / (1 - P), P the geometric mean of the probabilities, 1 - P at least 1 - exp(-1e-6)."""
    chosen, rejected = (
        mpmath.exp(mean(pair[side])) / (1 - mpmath.exp(min(mean(pair[side]), mpmath.mpf(-1e-6))))
        for side in ("chosen", "rejected")
    )
    return chosen / rejected


@mpmath.workdps(50)
def exact_nll(pair: dict, nll: str) -> mpmath.mpf:
    return -mean(pair["chosen"] + (pair["prompt"] if nll == "all" else []))


@mpmath.workdps(50)
def exact_loss(pair: dict, beta: float, nll: str) -> mpmath.mpf:
    """NLL - beta log sigmoid(log OR) = NLL + beta log(1 + 1 / OR)."""
    return exact_nll(pair, nll) + mpmath.mpf(beta) * mpmath.log1p(1 / exact_odds_ratio(pair))


def orpo(pairs: list[dict], dtype: torch.dtype = torch.float64, **options) -> LossOutput:
    return build(OrpoOptions(**options))(paired(pairs, dtype))


@pytest.mark.parametrize("nll", ["all", "response"])
def test_orpo_is_equation_6_on_2000_random_pairs(nll):
    rng = random.Random(1)
    worst = 0.0
    for beta in BETAS:
        pairs = [random_pair(rng, longest) for longest in (1, 40) for _ in range(250)]
        for loss, pair in zip(orpo(pairs, beta=beta, nll=nll).losses.tolist(), pairs, strict=True):
            exact = exact_loss(pair, beta, nll)
            worst = max(worst, float(abs((mpmath.mpf(loss) - exact) / exact)))
    assert worst <= 1e-6


def test_orpo_metrics_are_the_log_odds_ratio_and_the_nll_on_1000_random_pairs():
    rng = random.Random(2)
    pairs = [random_pair(rng) for _ in range(1000)]
    metrics = orpo(pairs, beta=0.5).metrics
    log_odds_ratios = [float(mpmath.log(exact_odds_ratio(pair))) for pair in pairs]
    assert metrics["log_odds_ratio"].tolist() == pytest.approx(log_odds_ratios, rel=1e-6, abs=1e-12)
    assert metrics["nll"].tolist() == pytest.approx([float(exact_nll(pair, "all")) for pair in pairs], rel=1e-6)


@pytest.mark.parametrize("nll", ["all", "response"])
def test_orpo_gradient_is_the_central_difference_on_1000_random_pairs(nll):
    # Each pair depends on its own tokens alone, so one nudge of all pairs' tokens number k measures 1000 gradients.
    rng = random.Random(3)
    pairs = [{side: [-(10 ** rng.uniform(-2, 1)) for _ in range(3)] for side in SIDES} for _ in range(1000)]
    inputs = paired(pairs)
    function = build(OrpoOptions(beta=0.7, nll=nll))
    function(inputs).losses.sum().backward()
    for side, place in itertools.product(SIDES, range(3)):
        gradients = getattr(inputs.policy, side).values.grad
        if side == "prompt" and nll == "response":
            assert gradients is None
            continue
        up, down = (
            function(paired([pair | {side: nudged(pair[side], place, step)} for pair in pairs])).losses
            for step in (1e-6, -1e-6)
        )
        measured = (up - down) / 2e-6
        torch.testing.assert_close(gradients.view(1000, 3)[:, place], measured.detach(), rtol=1e-4, atol=1e-8)


EXTREMES = [
    flat_pair(chosen, rejected, tokens, prompt)
    for chosen, rejected, prompt in itertools.product((0.0, -1e-8, -1e-6, -1e-3, -1.0, -1e4), repeat=3)
    for tokens in (1, 4096)
    if tokens == 1 or prompt in (0.0, -1e4)
]


@pytest.mark.parametrize("nll", ["all", "response"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_is_finite_with_a_finite_gradient_at_extremes(dtype, nll):
    inputs = paired(EXTREMES, dtype)
    losses = build(OrpoOptions(nll=nll))(inputs).losses
    assert all_finite(losses, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_log1mexp_has_a_finite_gradient_where_exp_rounds_to_1(dtype):
    x = torch.tensor([0.0, -1e-8, -1e-6, -1e-5, -1e-3, -0.69, -0.7, -1e4], dtype=dtype, requires_grad=True)
    value = log1mexp(x)
    value.sum().backward()
    assert value.isfinite().all()
    assert x.grad.isfinite().all()


def test_orpo_of_a_certain_response_is_that_of_odds_of_a_million():
    # log OR = log(e^0 / 1e-6) - log(1 / (e - 1)) up to 1e-6, and the NLL of a certain response is 0.
    loss = orpo([flat_pair(0.0, -1.0)], beta=1.0).losses.item()
    assert loss == pytest.approx(math.log1p(1e-6 / (math.e - 1)), rel=1e-5, abs=0)


def test_orpo_still_pushes_the_rejected_response_down_when_it_is_certain():
    inputs = paired([flat_pair(-1.0, 0.0)])
    build(OrpoOptions())(inputs).losses.sum().backward()
    assert inputs.policy.rejected.values.grad.item() > 0


def test_orpo_by_hand():
    # P(chosen) = 1/2 and P(rejected) = 1/5: odds 1 and 1/4, OR 4; NLL over one prompt token of 1/8: (3 + 1) / 2 log 2.
    pair = {"chosen": [math.log(1 / 2)], "rejected": [math.log(1 / 5)], "prompt": [math.log(1 / 8)]}
    output = orpo([pair], beta=0.5)
    assert output.losses.item() == pytest.approx(2 * math.log(2) + 0.5 * math.log(1 + 1 / 4), rel=1e-12)
    assert {name: value.item() for name, value in output.metrics.items()} == pytest.approx(
        {
            "rewards/chosen": 0.5 * math.log(1 / 2),
            "rewards/rejected": 0.5 * math.log(1 / 5),
            "rewards/margins": 0.5 * math.log(5 / 2),
            "rewards/accuracies": 1.0,
            "log_odds_ratio": math.log(4),
            "nll": 2 * math.log(2),
        },
        rel=1e-12,
    )


def test_orpo_of_the_response_alone_by_hand():
    pair = {"chosen": [math.log(1 / 2)], "rejected": [math.log(1 / 5)], "prompt": [math.log(1 / 8)]}
    loss = orpo([pair], beta=0.5, nll="response").losses.item()
    assert loss == pytest.approx(math.log(2) + 0.5 * math.log(1 + 1 / 4), rel=1e-12)


def test_orpo_weighs_prompt_and_response_by_their_tokens():
    # 3 tokens at -1 and 1 at -5 are 2 nats a token; equal responses have OR 1.
    pair = {"chosen": [-1.0, -1.0], "rejected": [-1.0], "prompt": [-1.0, -5.0]}
    assert orpo([pair], beta=1.0).losses.item() == pytest.approx(2 + math.log(2), rel=1e-12)


def test_orpo_compares_per_token():
    # Twice the tokens at the same log-probability change nothing.
    once, twice = orpo([flat_pair(-1.0, -3.0, tokens) for tokens in (1, 2)], nll="response").losses.tolist()
    assert once == pytest.approx(twice, rel=1e-12)


def test_orpo_of_a_prompt_of_one_token_is_that_of_the_response():
    pair = flat_pair(-1.0, -3.0)
    assert orpo([pair]).losses.tolist() == orpo([pair], nll="response").losses.tolist()


def test_orpo_of_the_response_needs_no_prompt():
    (record,) = qpref_losses()
    assert record.needs_of(OrpoOptions()) == {"prompt"}
    assert record.needs_of(OrpoOptions(nll="response")) == frozenset()
    inputs = paired([flat_pair(-1.0, -3.0)])
    policy = PairLogProbs(chosen=inputs.policy.chosen, rejected=inputs.policy.rejected)
    without = build(OrpoOptions(nll="response"))(PairedInputs(policy=policy, reference=None, margin=inputs.margin))
    assert without.losses.isfinite().all()


def test_orpo_of_a_pair_does_not_depend_on_its_batch():
    rng = random.Random(4)
    pairs = [random_pair(rng) for _ in range(32)]
    together = orpo(pairs, torch.float32).losses.tolist()
    assert together == [orpo([pair], torch.float32).losses.item() for pair in pairs]


def test_orpo_of_a_pair_survives_a_neighbour_that_is_not_a_number():
    good, bad = flat_pair(-1.0, -3.0), flat_pair(math.nan, -3.0)
    assert orpo([bad, good, bad]).losses[1].item() == orpo([good]).losses.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_returns_one_loss_a_pair_in_the_dtype_of_its_inputs(dtype):
    output = orpo([flat_pair(-1.0, -2.0)] * 3, dtype)
    assert output.losses.shape == (3,)
    assert output.losses.requires_grad
    assert {output.losses.dtype} | {value.dtype for value in output.metrics.values()} == {dtype}


def test_orpo_metrics_are_detached():
    assert not any(value.requires_grad for value in orpo([flat_pair(-1.0, -2.0)]).metrics.values())


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": -0.1}, {"beta": math.inf}, {"nll": "prompt"}, {"gamma": 1}]
)
def test_orpo_refuses_options_out_of_range(options):
    with pytest.raises(ValidationError):
        OrpoOptions.model_validate(options)


def test_orpo_record_says_what_the_loss_is():
    (record,) = qpref_losses()
    assert record.formula.startswith("NLL - beta log sigmoid")
    assert record.paper.startswith("Hong et al. 2024")
    assert not record.log_ratios_only
    assert record.starts_at is None
    assert [OrpoOptions.model_validate(variant).nll for variant in record.variants].count("response") == 1
