"""The losses of the reward margin against their papers' equations, in 50-digit arithmetic sharing no code with them.

z is beta h less the row's margin, h the difference of the two responses' log-ratios.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable

import mpmath
import pytest
import torch
from loss_cases import (
    SIDES,
    all_finite,
    directional_derivatives,
    extreme_margins,
    extreme_pairs,
    flat_pair,
    losses_at,
    paired,
    random_pair,
    untrained,
)
from pydantic import ValidationError

from qpref.records import LossOutput, PairedInputs
from qpref_plugins.loss_margin import qpref_losses

RECORDS = {record.name: record for record in qpref_losses()}
CASES = [
    ("hinge", {}),
    ("robust", {}),
    ("robust", {"label_smoothing": 0.0}),
    ("robust", {"label_smoothing": 0.4}),
    ("exo_pair", {}),
    ("exo_pair", {"label_smoothing": 0.3}),
    ("discopop", {}),
    ("discopop", {"tau": 1.0}),
    ("discopop", {"tau": 0.001}),
    ("sigmoid_norm", {}),
    ("rpo", {}),
    ("rpo", {"alpha": 0.2}),
]
each_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[" ".join([name, *map(str, options.values())]) for name, options in CASES]
)
each_loss = pytest.mark.parametrize("name", RECORDS)


def built(name: str, options: dict) -> Callable[[PairedInputs], LossOutput]:
    record = RECORDS[name]
    return record.build(record.options.model_validate(options))


def loss_of(name: str, pairs: list[dict], dtype: torch.dtype = torch.float64, **options: object) -> LossOutput:
    return built(name, options)(paired(pairs, dtype))


def exact_hinge(z: mpmath.mpf) -> mpmath.mpf:
    return max(mpmath.mpf(0), 1 - z)


def exact_dpo(z: mpmath.mpf) -> mpmath.mpf:
    return mpmath.log1p(mpmath.exp(-z))


def exact_robust(z: mpmath.mpf, label_smoothing: float = 0.1) -> mpmath.mpf:
    eps = mpmath.mpf(label_smoothing)
    return ((1 - eps) * exact_dpo(z) - eps * exact_dpo(-z)) / (1 - 2 * eps)


def exact_exo_pair(z: mpmath.mpf, label_smoothing: float = 1e-3) -> mpmath.mpf:
    eps = mpmath.mpf(label_smoothing)
    chosen, rejected = 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))
    return chosen * mpmath.log(chosen / (1 - eps)) + rejected * mpmath.log(rejected / eps)


def exact_discopop(z: mpmath.mpf, tau: float = 0.05) -> mpmath.mpf:
    logistic, exponential = 1 / (1 + mpmath.exp(z / mpmath.mpf(tau))), 1 / (1 + mpmath.exp(-z / mpmath.mpf(tau)))
    return logistic * exact_dpo(z) + exponential * mpmath.exp(-z)


EXACT = {
    "hinge": exact_hinge,
    "robust": exact_robust,
    "exo_pair": exact_exo_pair,
    "discopop": exact_discopop,
    "sigmoid_norm": exact_dpo,
    "rpo": exact_dpo,
}


@mpmath.workdps(50)
def exact_loss(name: str, pair: dict, beta: float, **options: float) -> mpmath.mpf:
    def log_ratio(side: str) -> mpmath.mpf:
        policy, reference = pair[f"policy {side}"], pair[f"reference {side}"]
        ratio = mpmath.fsum(policy) - mpmath.fsum(reference)
        return ratio / len(policy) if name == "sigmoid_norm" else ratio

    z = mpmath.mpf(beta) * (log_ratio("chosen") - log_ratio("rejected")) - mpmath.mpf(pair["margin"])
    if name == "rpo":
        alpha = mpmath.mpf(options.get("alpha", 1.0))
        return exact_dpo(z) - alpha * mpmath.fsum(pair["policy chosen"]) / len(pair["policy chosen"])
    return EXACT[name](z, **options)


@each_case
def test_loss_is_its_equation_on_1000_random_pairs(name, options):
    rng = random.Random(1)
    for beta in (0.01, 0.1, 0.5, 2.0):
        pairs = [random_pair(rng, longest=16) for _ in range(250)]
        for loss, pair in zip(loss_of(name, pairs, beta=beta, **options).losses.tolist(), pairs, strict=True):
            exact = exact_loss(name, pair, beta, **options)
            # Below 1e-300 no float64 holds six digits.
            assert abs(mpmath.mpf(loss) - exact) <= 1e-6 * abs(exact) + mpmath.mpf("1e-300")


@each_case
def test_gradient_is_the_finite_difference_on_1000_random_pairs(name, options):
    # Each pair's loss depends on its own tokens alone, so one random direction for all gives 1000 derivatives.
    rng = random.Random(2)
    inputs = paired([random_pair(rng, longest=20) for _ in range(1000)])
    function = built(name, options)
    function(inputs).losses.sum().backward()
    derivatives, differences = directional_derivatives(function, inputs, step=1e-6)
    torch.testing.assert_close(derivatives, differences, rtol=1e-4, atol=1e-7)


@each_case
def test_gradient_of_every_token_is_the_finite_difference(name, options):
    rng = random.Random(3)
    inputs = paired([random_pair(rng, longest=5) for _ in range(12)])
    function = built(name, options)

    sides = (inputs.policy.chosen.values, inputs.policy.rejected.values)
    assert torch.autograd.gradcheck(
        functools.partial(losses_at, function, inputs), sides, eps=1e-6, rtol=1e-4, atol=1e-7
    )


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def extremes(request):
    return paired(extreme_pairs() + extreme_margins(), request.param)


@each_case
def test_loss_is_finite_with_a_finite_gradient_at_extremes(extremes, name, options):
    losses = built(name, options)(extremes).losses
    assert losses.dtype == extremes.margin.dtype
    assert all_finite(losses, extremes)


@pytest.mark.parametrize(
    ("name", "options", "at_minus_10000", "at_10000"),
    [
        ("hinge", {}, 10001.0, 0.0),
        ("robust", {"label_smoothing": 0.25}, 0.75 * 1e4 / 0.5, -0.25 * 1e4 / 0.5),
        ("exo_pair", {"label_smoothing": 0.25}, math.log(4), math.log(4 / 3)),
        ("discopop", {}, 1e4, 0.0),
        ("sigmoid_norm", {}, 1e4, 0.0),
        ("rpo", {"alpha": 0.5}, 1e4 + 0.5, 0.5),
    ],
)
def test_loss_at_extreme_reward_margins(name, options, at_minus_10000, at_10000):
    pairs = [flat_pair(-1.0, -1.0, margin=margin) for margin in (1e4, -1e4)]
    losses = loss_of(name, pairs, **options).losses.tolist()
    assert losses == pytest.approx([at_minus_10000, at_10000], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "loss"),
    [
        ("hinge", {}, 0.25),  # 1 - 0.75
        ("robust", {"label_smoothing": 0.0}, math.log(1 + math.exp(-0.75))),
        (
            "robust",
            {"label_smoothing": 0.25},
            1.5 * math.log(1 + math.exp(-0.75)) - 0.5 * math.log(1 + math.exp(0.75)),
        ),
        # sigmoid(0.75) = 0.679178699
        (
            "exo_pair",
            {"label_smoothing": 0.1},
            0.679178699 * math.log(0.679178699 / 0.9) + 0.320821301 * math.log(3.20821301),
        ),
        # sigmoid(0.75 / 0.5) = 0.817574476, -log sigmoid(0.75) = 0.386871006
        ("discopop", {"tau": 0.5}, 0.182425524 * 0.386871006 + 0.817574476 * math.exp(-0.75)),
        ("sigmoid_norm", {}, math.log(1 + math.exp(-0.75))),
        ("rpo", {"alpha": 0.5}, math.log(1 + math.exp(-0.75)) + 0.5),
    ],
)
def test_loss_subtracts_the_rows_margin_from_the_reward_margin(name, options, loss):
    # h = (-1 - -1) - (-3 - -1) = 2; z = 0.5 * 2 - 0.25
    assert loss_of(name, [flat_pair(-1.0, -3.0, margin=0.25)], beta=0.5, **options).losses.item() == pytest.approx(
        loss, rel=1e-6
    )


def test_hinge_is_done_with_a_pair_beyond_1_over_beta():
    inputs = paired([flat_pair(-1.0, -1.0 - h) for h in (1.0, 1.9, 2.1)])
    losses = built("hinge", {"beta": 0.5})(inputs).losses
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.5, 0.05, 0.0])
    assert inputs.policy.chosen.values.grad.tolist() == [-0.5, -0.5, 0.0]


def test_robust_is_dpo_on_average_over_swapped_labels():
    # The expectation over labels swapped with probability eps is the clean loss.
    eps, clean, swapped = 0.2, flat_pair(-1.0, -3.0), flat_pair(-3.0, -1.0)
    right, wrong = loss_of("robust", [clean, swapped], beta=0.5, label_smoothing=eps).losses.tolist()
    assert (1 - eps) * right + eps * wrong == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-12)


def test_exo_pair_is_least_where_the_policy_agrees_with_the_labels():
    # z = log((1 - eps) / eps)
    inputs = paired([flat_pair(-1.0, -1.0 - math.log(9))])
    losses = built("exo_pair", {"beta": 1.0, "label_smoothing": 0.1})(inputs).losses
    losses.sum().backward()
    assert losses.item() == pytest.approx(0.0, abs=1e-14)
    assert inputs.policy.chosen.values.grad.item() == pytest.approx(0.0, abs=1e-14)


def test_discopop_is_logistic_on_the_left_and_exponential_on_the_right():
    left, right = loss_of("discopop", [flat_pair(-7.0, -1.0), flat_pair(-1.0, -7.0)], beta=0.5).losses.tolist()
    assert (left, right) == pytest.approx((math.log(1 + math.exp(3)), math.exp(-3)), rel=1e-12)


def test_sigmoid_norm_divides_each_response_by_its_own_length():
    # chosen: 1 nat over 1 token = 1 a token; rejected: -2 nats over 4 tokens = -0.5 a token; z = 2 * 1.5
    pair = flat_pair(-1.0, -1.5) | {"reference chosen": [-2.0]}
    pair |= {"policy rejected": [-1.5] * 4, "reference rejected": [-1.0] * 4}
    output = loss_of("sigmoid_norm", [pair], beta=2.0)
    assert output.losses.item() == pytest.approx(math.log(1 + math.exp(-3)), rel=1e-12)
    assert output.metrics["rewards/margins"].item() == 3.0


def test_rpo_adds_the_likelihood_of_the_chosen_response_per_token():
    # h = 0; 0.5 * (1 + 3) / 2 = 1
    pair = {side: [-1.0, -3.0] for side in SIDES} | {"margin": 0.0}
    assert loss_of("rpo", [pair], alpha=0.5).losses.item() == pytest.approx(math.log(2) + 1, rel=1e-12)


def test_logistic_losses_keep_their_tail_in_float32():
    # z = 60: computed as log(1 + exp(-60)) it would be 0 and so would its gradient.
    pair = flat_pair(-1.0, -601.0)
    for name, options in [("robust", {"label_smoothing": 0.0, "beta": 0.1}), ("sigmoid_norm", {"beta": 0.1})]:
        loss = loss_of(name, [pair], torch.float32, **options).losses.item()
        assert loss == pytest.approx(math.exp(-60), rel=1e-5, abs=0)


@each_loss
def test_loss_of_a_pair_does_not_depend_on_its_batch(name):
    rng = random.Random(4)
    pairs = [random_pair(rng) for _ in range(32)]
    # Torch's vectorized sigmoid rounds differently than that of a single element.
    together = loss_of(name, pairs, torch.float32).losses.tolist()
    alone = [loss_of(name, [pair], torch.float32).losses.item() for pair in pairs]
    assert together == pytest.approx(alone, rel=1e-6, abs=0)


@each_loss
def test_loss_keeps_the_order_of_the_batch(name):
    rng = random.Random(5)
    pairs = [random_pair(rng) for _ in range(32)]
    forward, backward = (loss_of(name, each).losses.tolist() for each in (pairs, pairs[::-1]))
    assert backward == pytest.approx(forward[::-1], rel=1e-12)


@each_loss
def test_loss_of_a_pair_survives_a_neighbour_that_is_not_a_number(name):
    good, bad = flat_pair(-1.0, -3.0), flat_pair(math.nan, -3.0)
    alone = loss_of(name, [good]).losses.item()
    assert loss_of(name, [bad, good, bad]).losses[1].item() == pytest.approx(alone, rel=1e-12)


@each_loss
def test_loss_is_one_value_a_pair_with_a_gradient(name):
    losses = loss_of(name, [flat_pair(-1.0, -2.0)] * 3).losses
    assert losses.shape == (3,)
    assert losses.requires_grad


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "sigmoid_norm"])
def test_rewards_are_beta_times_the_log_ratios(name):
    # chosen: -1 - -4 = 3 over 2 tokens each = 6 nats, rejected: -2 - -4 = 2 over 2 tokens = 4 nats, times beta 0.5
    metrics = loss_of(name, [flat_pair(-1.0, -2.0, reference=-4.0, tokens=2, margin=5.0)], beta=0.5).metrics
    assert {key: value.item() for key, value in metrics.items()} == {
        "rewards/chosen": 3.0,
        "rewards/rejected": 2.0,
        "rewards/margins": 1.0,
        "rewards/accuracies": 1.0,
    }
    assert not any(value.requires_grad for value in metrics.values())


@each_case
def test_loss_starts_where_its_record_says(name, options):
    pair = untrained(random_pair(random.Random(6)))
    record = RECORDS[name]
    if name == "rpo":
        assert record.starts_at is None
    else:
        loss = loss_of(name, [pair], **options).losses.item()
        assert record.starts_at(record.options(**options)) == pytest.approx(loss, rel=1e-12)


@each_loss
def test_the_same_shift_of_policy_and_reference_changes_no_loss_that_says_so(name):
    rng = random.Random(7)
    pairs = [random_pair(rng) for _ in range(20)]
    shifted = [
        {side: [token - 1.5 for token in pair[side]] for side in SIDES} | {"margin": pair["margin"]} for pair in pairs
    ]
    before, after = (loss_of(name, each).losses.tolist() for each in (pairs, shifted))
    assert (before == pytest.approx(after, rel=1e-9)) == RECORDS[name].log_ratios_only == (name != "rpo")


@each_loss
def test_record_is_whole(name):
    record = RECORDS[name]
    assert record.needs_of(record.options()) == {"reference"}
    assert record.formula
    assert record.paper
    assert all(record.options.model_validate(variant) for variant in record.variants)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {"beta": 0.0}) for name in RECORDS]
    + [
        ("robust", {"label_smoothing": 0.5}),
        ("robust", {"label_smoothing": -0.1}),
        ("exo_pair", {"label_smoothing": 0.0}),
        ("exo_pair", {"label_smoothing": 0.5}),
        ("discopop", {"tau": 0.0}),
        ("discopop", {"tau": 1.1}),
        ("rpo", {"alpha": -0.1}),
        ("hinge", {"label_smoothing": 0.1}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    (option,) = options
    with pytest.raises(ValidationError, match=option):
        RECORDS[name].options.model_validate(options)
