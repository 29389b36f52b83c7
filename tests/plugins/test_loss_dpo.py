"""The loss `dpo` against its papers' equations, in 50-digit arithmetic that shares no code with the plugin."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random

import loss_cases
import mpmath
import pytest
import torch
from loss_cases import (
    all_finite,
    directional_derivatives,
    extreme_margins,
    extreme_pairs,
    losses_at,
    nearby,
    random_tokens,
    scores,
    untrained,
)
from pydantic import ValidationError

from qpref.records import LossOutput, PairedInputs, PairLogProbs
from qpref_plugins.loss_dpo import DpoOptions, build, qpref_losses

VARIANTS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2},
    "forward_kl": {"divergence": "forward_kl"},
    "js": {"divergence": "js"},
    "alpha 0.3": {"divergence": "alpha", "alpha": 0.3},
    "alpha 1.5": {"divergence": "alpha", "alpha": 1.5},
    "ld": {"ld_alpha": 0.4},
    "wpo": {"wpo": True},
    "all": {"label_smoothing": 0.1, "divergence": "alpha", "alpha": 0.6, "ld_alpha": 0.3, "wpo": True},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def paired(pairs: list[dict], dtype: torch.dtype = torch.float64) -> PairedInputs:
    """Inputs from one dict a pair: a list of token log-probabilities for each side, of log sum p^2 for the
    policy's, and the margin."""
    plain = loss_cases.paired(pairs, dtype)
    policy = {
        side: dataclasses.replace(
            getattr(plain.policy, side),
            log_sum_squares=scores([pair[f"squares {side}"] for pair in pairs], dtype).values,
        )
        for side in ("chosen", "rejected")
    }
    return dataclasses.replace(plain, policy=PairLogProbs(**policy))


def random_pair(rng: random.Random, longest: int = 40) -> dict:
    """Log-probabilities from -1e-8 to -20, a reference near the policy, a margin in half of the pairs."""
    lengths = {"chosen": rng.randint(1, longest), "rejected": rng.randint(1, longest)}
    pair: dict = {"margin": rng.choice([0.0, rng.uniform(-3, 3)])}
    for side, length in lengths.items():
        tokens = random_tokens(rng, length)
        pair[f"policy {side}"] = tokens
        pair[f"reference {side}"] = nearby(rng, tokens)
        pair[f"squares {side}"] = [max(2 * token, -11.0) * rng.random() for token in tokens]
    return pair


def flat_pair(*values: float, **options: float) -> dict:
    """A pair whose tokens have one log-probability on each side, and one log sum p^2."""
    pair = loss_cases.flat_pair(*values, **options)
    return pair | {
        f"squares {side}": [1.5 * max(token, -11.0) for token in pair[f"policy {side}"]]
        for side in ("chosen", "rejected")
    }


def exact_score(log_ratio: mpmath.mpf, divergence: str, alpha: float) -> mpmath.mpf:
    """f'(u) of Wang et al. 2023, table 1, at u = e^D, less f'(1); `alpha` is 1 less the paper's."""
    u = mpmath.exp(log_ratio)
    if divergence == "reverse_kl":
        return mpmath.log(u)
    if divergence == "forward_kl":
        return 1 - 1 / u
    if divergence == "js":
        return mpmath.log(2 * u / (1 + u))
    paper_alpha = 1 - mpmath.mpf(alpha)
    return (1 - u**-paper_alpha) / paper_alpha


@mpmath.workdps(50)
def exact_weight(pair: dict) -> mpmath.mpf:
    """Both responses' geometric means of p / sum p^2, multiplied."""
    weight = mpmath.mpf(1)
    for side in ("chosen", "rejected"):
        tokens, squares = pair[f"policy {side}"], pair[f"squares {side}"]
        weight *= mpmath.exp((mpmath.fsum(tokens) - mpmath.fsum(squares)) / len(tokens))
    return weight


@mpmath.workdps(50)
def exact_loss(
    pair: dict,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    ld_alpha: float = 1.0,
    wpo: bool = False,
) -> mpmath.mpf:
    """(1 - eps) log(1 + e^-z) + eps log(1 + e^z), weighed under WPO; z is the difference of scores less the margin."""
    shared = min(len(pair["policy chosen"]), len(pair["policy rejected"]))

    def log_ratio(side: str) -> mpmath.mpf:
        ratios = [
            mpmath.mpf(p) - mpmath.mpf(q)
            for p, q in zip(pair[f"policy {side}"], pair[f"reference {side}"], strict=True)
        ]
        return mpmath.fsum(ratios[:shared]) + mpmath.mpf(ld_alpha) * mpmath.fsum(ratios[shared:])

    chosen, rejected = (exact_score(log_ratio(side), divergence, alpha) for side in ("chosen", "rejected"))
    z = mpmath.mpf(beta) * (chosen - rejected) - mpmath.mpf(pair["margin"])
    eps = mpmath.mpf(label_smoothing)
    loss = (1 - eps) * mpmath.log1p(mpmath.exp(-z)) + eps * mpmath.log1p(mpmath.exp(z))
    return loss * exact_weight(pair) if wpo else loss


def dpo(pairs: list[dict], beta: float = 0.1, dtype: torch.dtype = torch.float64, **options: object) -> LossOutput:
    return build(DpoOptions(beta=beta, **options))(paired(pairs, dtype))


@each_variant
def test_dpo_is_its_equation_on_1000_random_pairs(options):
    rng = random.Random(1)
    for beta in (0.01, 0.1, 0.5, 2.0):
        pairs = [random_pair(rng, longest=16) for _ in range(250)]
        for loss, pair in zip(dpo(pairs, beta, **options).losses.tolist(), pairs, strict=True):
            exact = exact_loss(pair, beta, **options)
            # Below 1e-300 no float64 holds six digits.
            assert abs(mpmath.mpf(loss) - exact) <= 1e-6 * exact + mpmath.mpf("1e-300")


def test_dpo_keeps_its_tail_in_float32():
    # -log sigmoid(60) = exp(-60) to 27 digits; computed as log(1 + exp(-60)) it would be 0 and so would its gradient.
    loss = dpo([flat_pair(chosen=-1.0, rejected=-601.0)], beta=0.1, dtype=torch.float32).losses.item()
    assert loss == pytest.approx(math.exp(-60), rel=1e-5, abs=0)


WITHOUT_WPO = {name: options for name, options in VARIANTS.items() if "wpo" not in options}


@pytest.mark.parametrize("options", WITHOUT_WPO.values(), ids=WITHOUT_WPO.keys())
def test_dpo_gradient_is_the_finite_difference(options):
    rng = random.Random(2)
    inputs = paired([random_pair(rng, longest=6) for _ in range(12)])
    function = build(DpoOptions(beta=0.3, **options))

    sides = (inputs.policy.chosen.values, inputs.policy.rejected.values)
    assert torch.autograd.gradcheck(
        functools.partial(losses_at, function, inputs), sides, eps=1e-6, rtol=1e-4, atol=1e-9
    )


@each_variant
def test_dpo_gradient_is_the_finite_difference_on_1000_random_pairs(options):
    # Each pair's loss depends on its own tokens alone, so one random direction for all gives 1000 derivatives. WPO's
    # weight is a constant to the gradient, so it is taken from the oracle rather than moved.
    rng = random.Random(7)
    pairs = [random_pair(rng, longest=20) for _ in range(1000)]
    inputs = paired(pairs)
    build(DpoOptions(beta=0.3, **options))(inputs).losses.sum().backward()
    function = build(DpoOptions(beta=0.3, **options | {"wpo": False}))
    weight = torch.tensor([float(exact_weight(pair)) if options.get("wpo") else 1.0 for pair in pairs])
    derivatives, differences = directional_derivatives(function, inputs, step=1e-5)
    torch.testing.assert_close(derivatives, weight.double() * differences, rtol=1e-4, atol=1e-7)


def test_dpo_wpo_weight_has_no_gradient():
    # Were it part of the gradient, so would be log p of the weight: d(w L) = w dL + L dw.
    inputs = {wpo: paired([flat_pair(-1.0, -3.0)]) for wpo in (False, True)}
    for wpo, each in inputs.items():
        build(DpoOptions(wpo=wpo))(each).losses.sum().backward()
    plain, weighed = (each.policy.chosen.values.grad.item() for each in inputs.values())
    # log p - log sum p^2 is -1 + 1.5 and -3 + 4.5
    assert weighed == pytest.approx(plain * math.exp(0.5 + 1.5), rel=1e-12)
    (record,) = qpref_losses()
    assert [record.detaches(DpoOptions(wpo=wpo)) for wpo in inputs] == [False, True]


EXTREMES = extreme_pairs(flat_pair) + extreme_margins(flat_pair)
# One token against many, so that LD-DPO has a tail
EXTREMES += [
    many | {side: one[side] for side in many if "chosen" in side}
    for one, many in itertools.product(EXTREMES[0:250:50], EXTREMES[1:250:50])
]


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def extremes(request):
    return paired(EXTREMES, request.param)


@each_variant
def test_dpo_is_finite_with_a_finite_gradient_at_extremes(extremes, options):
    losses = build(DpoOptions(beta=0.1, **options))(extremes).losses
    assert all_finite(losses, extremes)


@pytest.mark.parametrize("options", [{"divergence": "forward_kl"}, {"divergence": "alpha", "alpha": 3.0}])
def test_dpo_caps_the_argument_of_exp_at_80(options):
    # forward_kl: D = -1e4 of the chosen gives 1 - e^80 for 1 - e^10000; alpha 3: D = 1e4 gives (e^80 - 1) / 2.
    forward = options["divergence"] == "forward_kl"
    pair = flat_pair(-1e4, -1.0) if forward else flat_pair(-1.0, -1e4, reference=-1e4)
    reward = dpo([pair], beta=1.0, **options).metrics["rewards/chosen"].item()
    assert reward == pytest.approx(-math.exp(80) if forward else math.exp(80) / 2, rel=1e-12)


@pytest.mark.parametrize(("margin", "loss"), [(1e4, 1e4), (-1e4, 0.0)])
def test_dpo_of_an_extreme_margin_is_the_margin_or_nothing(margin, loss):
    # log(1 + exp(m)) is m for m = 1e4, and exp(-1e4), which no float64 holds, for m = -1e4.
    assert dpo([flat_pair(-1.0, -1.0, margin=margin)]).losses.item() == loss


def test_dpo_subtracts_the_rows_margin_from_the_reward_margin():
    # h = (-1 - -1) - (-3 - -1) = 2; -log sigmoid(0.5 * 2 - 0.25) = log(1 + exp(-0.75))
    loss = dpo([flat_pair(chosen=-1.0, rejected=-3.0, margin=0.25)], beta=0.5).losses.item()
    assert loss == pytest.approx(math.log(1 + math.exp(-0.75)), rel=1e-12)


def test_dpo_smoothing_takes_a_share_of_the_labels_as_swapped():
    # z = 0.5 * 2 = 1: 0.75 log(1 + e^-1) + 0.25 log(1 + e)
    loss = dpo([flat_pair(-1.0, -3.0)], beta=0.5, label_smoothing=0.25).losses.item()
    assert loss == pytest.approx(0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.e), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "ratio", "score"),
    [
        ({"divergence": "forward_kl"}, 2.0, 0.5),  # 1 - 1/2
        ({"divergence": "js"}, 3.0, math.log(1.5)),  # log(2 * 3 / (1 + 3))
        ({"divergence": "alpha"}, 4.0, 1.0),  # (4^-0.5 - 1) / -0.5
        ({"divergence": "alpha", "alpha": 0.0}, 2.0, 0.5),  # the forward KL
        ({"divergence": "alpha", "alpha": 2.0}, 3.0, 2.0),  # the chi-squared: 3 - 1
    ],
)
def test_dpo_divergence_scores_the_probability_ratio(options, ratio, score):
    # chosen has `ratio` times the reference's probability, rejected the same: z = 2 score
    output = dpo([flat_pair(-5.0 + math.log(ratio), -5.0, reference=-5.0)], beta=2.0, **options)
    rewards = [output.metrics[f"rewards/{name}"].item() for name in ("chosen", "rejected", "margins")]
    assert rewards == pytest.approx([2 * score, 0.0, 2 * score], rel=1e-12)
    assert output.losses.item() == pytest.approx(math.log(1 + math.exp(-2 * score)), rel=1e-12)


def test_dpo_ld_alpha_weighs_the_tokens_beyond_the_shorter_response():
    # chosen: 3 tokens, 1 nat up each, of which 1 is shared: 1 + 0.25 * 2; rejected: no change. Then the other way.
    longer = flat_pair(-1.0, -2.0, reference=-2.0, tokens=3)
    longer |= {key: value[:1] for key, value in longer.items() if "rejected" in key}
    swapped = {
        key.replace("chosen", "-").replace("rejected", "chosen").replace("-", "rejected"): value
        for key, value in longer.items()
    }
    margins = dpo([longer, swapped], beta=0.5, ld_alpha=0.25).metrics["rewards/margins"].tolist()
    assert margins == [0.5 * 1.5, -0.5 * 1.5]


def test_dpo_ld_alpha_1_is_plain_dpo():
    rng = random.Random(8)
    pairs = [random_pair(rng) for _ in range(50)]
    assert dpo(pairs, ld_alpha=1.0).losses.tolist() == pytest.approx(dpo(pairs).losses.tolist(), rel=1e-12)


def test_dpo_wpo_weighs_by_both_responses_probabilities():
    # chosen: log p -1 and -2, log sum p^2 -0.5 and -1, mean -0.75; rejected: -3 + 1.5; e^-2.25 in all; z = 0
    pair = {
        "policy chosen": [-1.0, -2.0],
        "squares chosen": [-0.5, -1.0],
        "reference chosen": [-1.0, -2.0],
        "policy rejected": [-3.0],
        "squares rejected": [-1.5],
        "reference rejected": [-3.0],
        "margin": 0.0,
    }
    assert dpo([pair], wpo=True).losses.item() == pytest.approx(math.exp(-2.25) * math.log(2), rel=1e-12)


def test_dpo_sums_over_tokens():
    # Twice the tokens, each with the same log-ratio, are twice the log-ratio: h = 2 becomes 4.
    once, twice = dpo([flat_pair(-1.0, -3.0, tokens=1), flat_pair(-1.0, -3.0, tokens=2)], beta=0.5).losses.tolist()
    assert (once, twice) == pytest.approx((math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2))), rel=1e-12)


@each_variant
def test_dpo_of_a_pair_does_not_depend_on_its_batch(options):
    rng = random.Random(3)
    pairs = [random_pair(rng) for _ in range(32)]
    together = dpo(pairs, dtype=torch.float32, **options).losses.tolist()
    alone = [dpo([pair], dtype=torch.float32, **options).losses.item() for pair in pairs]
    assert together == alone


def test_dpo_keeps_the_order_of_the_batch():
    rng = random.Random(4)
    pairs = [random_pair(rng) for _ in range(32)]
    assert dpo(pairs[::-1]).losses.tolist() == dpo(pairs).losses.tolist()[::-1]


@each_variant
def test_dpo_of_a_pair_survives_a_neighbour_that_is_not_a_number(options):
    good, bad = flat_pair(-1.0, -3.0), flat_pair(math.nan, -3.0)
    assert dpo([bad, good, bad], **options).losses[1].item() == dpo([good], **options).losses.item()


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
        gradient = inputs.policy.chosen.values.grad.item()
        assert gradient == pytest.approx(-beta / (1 + math.exp(2 * beta)), rel=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("options", WITHOUT_WPO.values(), ids=WITHOUT_WPO.keys())
def test_dpo_starts_at_log_2_whatever_beta(beta, options):
    (record,) = qpref_losses()
    rng = random.Random(5)
    pair = untrained(random_pair(rng))
    loss = dpo([pair], beta, **options).losses.item()
    assert [loss, record.starts_at(DpoOptions(beta=beta, **options))] == pytest.approx([math.log(2)] * 2, rel=1e-12)


def test_dpo_with_wpo_starts_at_no_constant():
    (record,) = qpref_losses()
    assert record.starts_at(DpoOptions(wpo=True)) is None


@pytest.mark.parametrize(("wpo", "needs"), [(False, {"reference"}), (True, {"reference", "log_sum_squares"})])
def test_dpo_asks_for_the_reference_and_for_wpo_the_sums_of_squares(wpo, needs):
    (record,) = qpref_losses()
    assert record.needs_of(DpoOptions(wpo=wpo)) == needs


def test_dpo_variants_cover_every_option_but_beta():
    (record,) = qpref_losses()
    assert all(DpoOptions.model_validate(variant) for variant in record.variants)
    assert set().union(*record.variants) == set(DpoOptions.model_fields) - {"beta"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"beta": 0.0}, "greater than 0"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"label_smoothing": -0.1}, "greater than or equal to 0"),
        ({"divergence": "kl"}, "reverse_kl"),
        ({"divergence": "alpha", "alpha": 1.0}, 'divergence = "reverse_kl"'),
        ({"divergence": "alpha", "alpha": 1.009}, "0.01 or more away from 1"),
        ({"divergence": "js", "alpha": 0.3}, 'goes with divergence = "alpha", not "js"'),
        ({"alpha": 0.3}, 'goes with divergence = "alpha", not "reverse_kl"'),
        ({"ld_alpha": 1.1}, "less than or equal to 1"),
        ({"ld_alpha": -0.1}, "greater than or equal to 0"),
        ({"wpo": "yes"}, "valid boolean"),
    ],
)
def test_dpo_refuses_options_out_of_range(options, problem):
    with pytest.raises(ValidationError, match=problem):
        DpoOptions.model_validate(options)


def test_dpo_takes_the_default_alpha_with_any_divergence():
    # A scheduled option has the model read back all of its own values.
    assert DpoOptions.model_validate(DpoOptions(divergence="js").model_dump()).alpha == 0.5
