"""The losses `kto` and `apo_zero_unpaired` against their papers' equations, in 50-digit arithmetic of its own."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import mpmath
import pytest
import torch
from loss_cases import exact_total, nudged, random_tokens, scores
from pydantic import ValidationError

from qpref.hooks.types import UnpairedLoss
from qpref.records import LossOutput, UnpairedInputs
from qpref_plugins.loss_kto import class_weights, qpref_losses

SIDES = ("policy", "reference", "mismatched_policy", "mismatched_reference")
BETAS = (0.01, 0.1, 0.5, 2.0)
LOSSES = ("kto", "apo_zero_unpaired")


def record(name: str) -> UnpairedLoss:
    (found,) = (loss for loss in qpref_losses() if loss.name == name)
    return found


def unpaired(
    examples: list[dict], dtype: torch.dtype = torch.float64, class_counts: tuple[int, int] = (1, 1)
) -> UnpairedInputs:
    """Inputs from one dict an example: a list of token log-probabilities for each of SIDES, and the label."""
    sides = {side: scores([example[side] for example in examples], dtype) for side in SIDES}
    sides["policy"].values.requires_grad_()
    desirable = torch.tensor([example["label"] for example in examples])
    return UnpairedInputs(**sides, desirable=desirable, class_counts=class_counts)


def random_example(rng: random.Random, longest: int = 40, drift: float = 0.0) -> dict:
    """Log-probabilities from -1e-8 to -20, a reference near the policy; drift sets where kl lies."""
    example: dict = {"label": rng.random() < 0.5}
    for prefix, off in (("", 0.0), ("mismatched_", drift)):
        tokens = random_tokens(rng, rng.randint(1, longest))
        example[f"{prefix}policy"] = tokens
        example[f"{prefix}reference"] = [min(0.0, token - off + rng.gauss(0, 0.3)) for token in tokens]
    return example


def flat_example(
    label: bool, policy: float, reference: float = -1.0, mismatched: float = -1.0, tokens: int = 1
) -> dict:
    """An example whose tokens have one log-probability on each side; the mismatched reference has the reference's."""
    values = (policy, reference, mismatched, reference)
    return {side: [value] * tokens for side, value in zip(SIDES, values, strict=True)} | {"label": label}


def one_minus_sigmoid(x: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(x))


@mpmath.workdps(50)
def exact_kl(examples: list[dict]) -> mpmath.mpf:
    ratios = [exact_total(row["mismatched_policy"]) - exact_total(row["mismatched_reference"]) for row in examples]
    return max(mpmath.mpf(0), mpmath.fsum(ratios) / len(ratios))


@mpmath.workdps(50)
def exact_losses(
    name: str, examples: list[dict], beta: float, weights: tuple[Fraction, Fraction] = (Fraction(1), Fraction(1))
) -> list[mpmath.mpf]:
    """The two lines of eq. 7 of the KTO paper, lambda - v; kl = 0 makes them those of unpaired APO-zero."""
    kl = exact_kl(examples) if name == "kto" else mpmath.mpf(0)
    losses = []
    for example in examples:
        reward = exact_total(example["policy"]) - exact_total(example["reference"])
        factor = weights[0 if example["label"] else 1]
        distance = reward - kl if example["label"] else kl - reward
        exact_factor = mpmath.mpf(factor.numerator) / factor.denominator
        losses.append(exact_factor * one_minus_sigmoid(mpmath.mpf(beta) * distance))
    return losses


def compute(name: str, inputs: UnpairedInputs, **options) -> LossOutput:
    loss = record(name)
    return loss.build(loss.options(**options))(inputs)


def worst(losses: torch.Tensor, exact: list[mpmath.mpf]) -> float:
    with mpmath.workdps(50):
        return max(float(abs(mpmath.mpf(loss) / one - 1)) for loss, one in zip(losses.tolist(), exact, strict=True))


@pytest.mark.parametrize("drift", [-0.05, 0.0, 0.05])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_its_papers_equation_on_1000_random_examples(name, drift):
    rng = random.Random(1)
    apart = []
    for beta, step in itertools.product(BETAS, (1, 2, 32, 215)):
        examples = [random_example(rng, drift=drift) for _ in range(step)]
        losses = compute(name, unpaired(examples), beta=beta).losses
        apart.append(worst(losses, exact_losses(name, examples, beta)))
    assert max(apart) <= 1e-6


@pytest.mark.parametrize(
    ("options", "class_counts", "weights"),
    [
        ({}, (300, 100), (Fraction(1), Fraction(3))),
        ({}, (100, 700), (Fraction(7), Fraction(1))),
        ({"desirable_weight": 2.0}, (300, 100), (Fraction(2), Fraction(6))),
        ({"undesirable_weight": 2.0}, (300, 100), (Fraction(2, 3), Fraction(2))),
        ({"desirable_weight": 4.0, "undesirable_weight": 0.5}, (300, 100), (Fraction(4), Fraction(1, 2))),
        ({"desirable_weight": 1.0, "undesirable_weight": 1.0}, (300, 100), (Fraction(1), Fraction(1))),
    ],
)
def test_kto_weighs_1000_random_examples_by_their_class(options, class_counts, weights):
    rng = random.Random(2)
    examples = [random_example(rng, drift=0.02) for _ in range(1000)]
    losses = compute("kto", unpaired(examples, class_counts=class_counts), **options).losses
    assert worst(losses, exact_losses("kto", examples, 0.1, weights)) <= 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_central_difference_on_1000_random_examples(name):
    # kl has no gradient, so an example depends on its own tokens alone: nudging all tokens number k takes 1000 slopes.
    rng = random.Random(3)
    examples = []
    for _ in range(1000):
        example = {side: [rng.uniform(-3, 0) for _ in range(3)] for side in SIDES}
        examples.append(example | {"label": rng.random() < 0.5})
    options = {"beta": 0.7} | ({"undesirable_weight": 1.5} if name == "kto" else {})
    inputs = unpaired(examples, class_counts=(2, 3))
    compute(name, inputs, **options).losses.sum().backward()
    for place in range(3):
        up, down = (
            [row | {"policy": nudged(row["policy"], place, step)} for row in examples] for step in (1e-6, -1e-6)
        )
        up, down = (compute(name, unpaired(rows, class_counts=(2, 3)), **options).losses for rows in (up, down))
        measured = ((up - down) / 2e-6).detach()
        torch.testing.assert_close(inputs.policy.values.grad.view(1000, 3)[:, place], measured, rtol=1e-4, atol=1e-8)


EXTREMES = [
    flat_example(label, policy, reference, mismatched, tokens)
    for policy, reference, mismatched in itertools.product((0.0, -1e-8, -1e-3, -1.0, -1e4), repeat=3)
    for tokens in (1, 4096)
    for label in (True, False)
    if tokens == 1 or mismatched == -1.0
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_is_finite_with_a_finite_gradient_at_extremes(dtype, name):
    # All at once, and each in a step of its own, so that kl itself is extreme.
    steps = [EXTREMES] + [[example] for example in EXTREMES]
    for step in steps:
        inputs = unpaired(step, dtype, class_counts=(10**6, 1))
        losses = compute(name, inputs).losses
        losses.sum().backward()
        assert losses.isfinite().all()
        assert inputs.policy.values.grad.isfinite().all()


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_step_of_one_class_is_finite_and_exact(name, label):
    rng = random.Random(4)
    examples = [random_example(rng, drift=0.05) | {"label": label} for _ in range(50)]
    inputs = unpaired(examples, class_counts=(50, 0) if label else (0, 50))
    losses = compute(name, inputs).losses
    losses.sum().backward()
    assert inputs.policy.values.grad.isfinite().all()
    assert worst(losses, exact_losses(name, examples, 0.1)) <= 1e-6


def test_kto_by_hand():
    # kl = max(0, ((-1 - -3) + (-3 - -3)) / 2) = 1; D = 3 and 2. Desirable: 1 - sigmoid(0.5 (3 - 1)) = 1 / (1 + e),
    # undesirable: 1 - sigmoid(0.5 (1 - 2)) = 1 / (1 + e^-0.5); balanced counts.
    examples = [flat_example(True, 0.0, -3.0, -1.0), flat_example(False, -1.0, -3.0, -3.0)]
    output = compute("kto", unpaired(examples), beta=0.5)
    assert output.losses.tolist() == pytest.approx([1 / (1 + math.e), 1 / (1 + math.exp(-0.5))], rel=1e-12)
    assert output.metrics["kl"].tolist() == [1.0, 1.0]
    assert output.metrics["rewards/chosen"].tolist() == pytest.approx([1.5, math.nan], nan_ok=True)
    assert output.metrics["rewards/rejected"].tolist() == pytest.approx([math.nan, 1.0], nan_ok=True)


def test_kto_clamps_the_mean_of_the_step_and_not_each_example():
    # Mismatched log-ratios 3 and -1: the mean is 1, the mean of the clamped would be 1.5; -3 and 1: 0.
    for mismatched, kl in (((3.0, -1.0), 1.0), ((-3.0, 1.0), 0.0)):
        examples = [flat_example(True, -5.0, -5.0, -5.0 + ratio) for ratio in mismatched]
        output = compute("kto", unpaired(examples), beta=0.5)
        assert output.metrics["kl"].tolist() == [kl, kl]
        assert output.losses.tolist() == pytest.approx([1 / (1 + math.exp(-0.5 * kl))] * 2, rel=1e-12)


def test_kto_sends_no_gradient_through_kl():
    inputs = unpaired([flat_example(True, -1.0, -2.0, -1.0)])
    assert inputs.mismatched_policy is not None
    inputs.mismatched_policy.values.requires_grad_()
    compute("kto", inputs).losses.sum().backward()
    assert inputs.mismatched_policy.values.grad is None


def test_apo_zero_unpaired_by_hand():
    # D = log 3 and log 3, beta 1: 1 - 3/4 and 3/4.
    examples = [flat_example(label, -1.0, -1.0 - math.log(3)) for label in (True, False)]
    assert compute("apo_zero_unpaired", unpaired(examples), beta=1.0).losses.tolist() == pytest.approx([0.25, 0.75])


def test_apo_zero_unpaired_needs_no_mismatched_completions():
    inputs = unpaired([flat_example(True, -1.0)])
    bare = UnpairedInputs(
        policy=inputs.policy, reference=inputs.reference, desirable=inputs.desirable, class_counts=(1, 0)
    )
    assert compute("apo_zero_unpaired", bare).losses.tolist() == [0.5]


def test_kto_keeps_its_tail_in_float32():
    # 1 - sigmoid(60) = exp(-60) to 26 digits; computed as a difference it would be 0 and so would its gradient.
    examples = [flat_example(True, -1.0, -601.0, -601.0)]
    loss = compute("kto", unpaired(examples, torch.float32), beta=0.1).losses.item()
    assert loss == pytest.approx(math.exp(-60), rel=1e-5, abs=0)


@pytest.mark.parametrize("class_counts", [(1, 1), (3, 1), (1, 3), (10, 13), (13, 10), (9999, 7), (7, 9999)])
@pytest.mark.parametrize("given", [{}, {"desirable_weight": 1.7}, {"undesirable_weight": 0.3}])
def test_weights_that_are_left_out_follow_equation_8(class_counts, given):
    weights = class_weights(record("kto").options(**given), class_counts)
    ratio = weights[0] * class_counts[0] / (weights[1] * class_counts[1])
    assert 1 - 1e-12 <= ratio <= 4 / 3
    assert all(weight in weights for weight in given.values())


@pytest.mark.parametrize(
    ("class_counts", "weights"),
    [((5, 5), (1, 1)), ((6, 2), (1, 3)), ((2, 6), (3, 1)), ((5, 0), (1, 1)), ((0, 5), (1, 1))],
)
def test_only_the_rarer_class_weighs_more_than_1(class_counts, weights):
    assert class_weights(record("kto").options(), class_counts) == weights


def test_given_weights_stay_as_they_are():
    options = record("kto").options(desirable_weight=5.0, undesirable_weight=0.1)
    assert class_weights(options, (100, 1)) == (5.0, 0.1)


@pytest.mark.parametrize("class_counts", [(5, 0), (0, 5)])
def test_given_weight_stays_where_a_class_has_no_example(class_counts):
    assert class_weights(record("kto").options(desirable_weight=5.0), class_counts) == (5.0, 1.0)
    assert class_weights(record("kto").options(undesirable_weight=5.0), class_counts) == (1.0, 5.0)


@pytest.mark.parametrize(
    ("name", "options", "start"),
    [
        ("kto", {}, 0.5),
        ("kto", {"desirable_weight": 3.0, "undesirable_weight": 3.0}, 1.5),
        ("apo_zero_unpaired", {}, 0.5),
        ("apo_zero_unpaired", {"beta": 2.0}, 0.5),
    ],
)
def test_loss_starts_where_its_record_says(name, options, start):
    rng = random.Random(5)
    examples = [random_example(rng) for _ in range(20)]
    for example, side in itertools.product(examples, ("", "mismatched_")):
        example[f"{side}reference"] = example[f"{side}policy"]
    assert record(name).starts_at(record(name).options(**options)) == start
    assert compute(name, unpaired(examples), **options).losses.tolist() == pytest.approx([start] * 20, rel=1e-12)


@pytest.mark.parametrize("weights", [{"desirable_weight": 2.0}, {"desirable_weight": 2.0, "undesirable_weight": 1.0}])
def test_kto_starts_at_no_constant_where_its_weights_differ(weights):
    assert record("kto").starts_at(record("kto").options(**weights)) is None


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_blind_to_a_shift_of_policy_and_reference(name):
    assert record(name).log_ratios_only
    rng = random.Random(6)
    examples = [random_example(rng, drift=0.05) for _ in range(50)]
    shifted = [
        {side: [token - 2.0 for token in row[side]] for side in SIDES} | {"label": row["label"]} for row in examples
    ]
    torch.testing.assert_close(
        compute(name, unpaired(shifted)).losses, compute(name, unpaired(examples)).losses, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", LOSSES)
def test_loss_keeps_the_order_of_the_step(name):
    rng = random.Random(7)
    examples = [random_example(rng, drift=0.05) for _ in range(32)]
    forward, backward = (compute(name, unpaired(rows)).losses.tolist() for rows in (examples, examples[::-1]))
    assert forward == pytest.approx(backward[::-1], rel=1e-12)


def test_apo_zero_unpaired_of_an_example_does_not_depend_on_its_batch():
    rng = random.Random(8)
    examples = [random_example(rng) for _ in range(32)]
    together = compute("apo_zero_unpaired", unpaired(examples, torch.float32)).losses.tolist()
    alone = [compute("apo_zero_unpaired", unpaired([row], torch.float32)).losses.item() for row in examples]
    assert together == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_one_value_an_example_in_the_dtype_of_its_inputs(name, dtype):
    output = compute(name, unpaired([flat_example(True, -1.0), flat_example(False, -2.0)], dtype, (3, 1)))
    assert output.losses.shape == (2,)
    assert output.losses.requires_grad
    assert {output.losses.dtype} | {value.dtype for value in output.metrics.values()} == {dtype}
    assert {value.shape for value in output.metrics.values()} == {(2,)}
    assert not any(value.requires_grad for value in output.metrics.values())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"beta": beta}) for name in LOSSES for beta in (0.0, -0.1, math.inf)),
        *(("kto", {weight: value}) for weight in ("desirable_weight", "undesirable_weight") for value in (0.0, -1.0)),
        ("apo_zero_unpaired", {"desirable_weight": 1.0}),
        ("kto", {"desirable_weight": "balanced"}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValidationError):
        record(name).options.model_validate(options)


def test_records_say_what_the_losses_need():
    assert (record("kto").needs, record("kto").scope) == ({"reference", "mismatched"}, "mismatched")
    unpaired_apo = record("apo_zero_unpaired")
    assert (unpaired_apo.needs, unpaired_apo.scope) == ({"reference"}, "example")
    for loss in qpref_losses():
        assert loss.formula
        assert loss.paper
        assert all(loss.options.model_validate(variant) for variant in loss.variants)
