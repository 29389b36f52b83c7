"""Alignment via optimal transport against the paper's formulas, in float64 that shares no code with the plugin."""

from __future__ import annotations

import functools
import itertools
import math
import random

import pydantic
import pytest
import torch
from loss_cases import all_finite, extremes, flat_pair, paired, random_tokens, runner, smoothed, untrained

from qpref_plugins.loss_aot import qpref_losses

WHO, KINDS = ("policy", "reference"), ("chosen", "rejected")
RECORDS = {record.name: record for record in qpref_losses()}


def random_pair(rng: random.Random, longest: int = 12) -> dict:
    """Log-probabilities from -1e-8 to -20, a reference that ranks otherwise, a margin in half of the pairs."""
    pair: dict = {"margin": rng.choice([0.0, rng.uniform(-3, 3)])}
    for side in ("chosen", "rejected"):
        tokens = random_tokens(rng, rng.randint(1, longest))
        pair[f"policy {side}"] = tokens
        pair[f"reference {side}"] = [token * rng.uniform(0, 2) for token in tokens]
    return pair


run = runner(RECORDS)


def total(pair: dict, side: str) -> float:
    return math.fsum(pair[side])


def samples(name: str, pairs: list[dict]) -> tuple[list[float], list[float]]:
    """The two samples of one step that are sorted, in the rows' order."""
    if name == "aot":
        return tuple([total(pair, f"{who} chosen") - total(pair, f"{who} rejected") for pair in pairs] for who in WHO)
    return tuple([total(pair, f"policy {side}") - total(pair, f"reference {side}") for pair in pairs] for side in KINDS)


def exact_losses(name: str, pairs: list[dict], beta: float, label_smoothing: float = 0.0) -> list[float]:
    """The loss of each pair of one step: the k-th smallest of one sample against the k-th smallest of the other."""
    upper, lower = samples(name, pairs)
    losses = [math.nan] * len(pairs)
    for place, row in enumerate(sorted(range(len(pairs)), key=upper.__getitem__)):
        x = beta * (upper[row] - sorted(lower)[place]) - pairs[row]["margin"]
        losses[row] = smoothed(x, label_smoothing)
    return losses


CASES = [
    (name, {"beta": beta, "label_smoothing": label_smoothing})
    for name, beta, label_smoothing in itertools.product(("aot", "aot_unpaired"), (0.1, 1.0), (0.0, 0.2))
]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))


@every_case
def test_aot_is_its_formula_on_1000_random_pairs(name, options):
    rng = random.Random(1)
    for size in [1, 2, 3, 7, 8, 15, 64, 100, 800]:
        pairs = [random_pair(rng) for _ in range(size)]
        exact = exact_losses(name, pairs, **options)
        assert run(name, pairs, **options).losses.tolist() == pytest.approx(exact, rel=1e-6, abs=0)


@every_case
def test_aot_gradient_is_the_finite_difference_on_1000_random_pairs(name, options):
    rng = random.Random(2)
    for _ in range(200):
        # With weights, so that a value at another row's place shows.
        pairs, weights = random_step(rng, name), [rng.uniform(0.5, 2) for _ in range(5)]
        weighted_loss = functools.partial(exact_sum, name, options, weights)
        inputs = paired(pairs)
        losses = RECORDS[name].build(RECORDS[name].options(**options))(inputs).losses
        (losses * losses.new_tensor(weights)).sum().backward()
        for side in KINDS:
            scored = getattr(inputs.policy, side)
            for row, gradient in enumerate(scored.values.grad.split(list(scored.lengths))):
                token = rng.randrange(len(gradient))
                estimate = finite_difference(weighted_loss, pairs, row, f"policy {side}", token)
                assert gradient[token].item() == pytest.approx(estimate, rel=1e-5, abs=1e-8)


def random_step(rng: random.Random, name: str, size: int = 5) -> list[dict]:
    """Pairs whose ranks stay the same under a small change: where two swap, the weighted loss has a jump."""
    while True:
        pairs = [random_pair(rng, longest=5) for _ in range(size)]
        if all(b - a > 1e-3 for sample in samples(name, pairs) for a, b in itertools.pairwise(sorted(sample))):
            return pairs


def exact_sum(name: str, options: dict, weights: list[float], pairs: list[dict]) -> float:
    return math.fsum(weight * loss for weight, loss in zip(weights, exact_losses(name, pairs, **options), strict=True))


def finite_difference(function, pairs: list[dict], row: int, side: str, token: int, step: float = 1e-5) -> float:
    """The central difference of a function of a step's pairs in one token of one pair."""
    values = []
    for moved in (step, -step):
        tokens = [*pairs[row][side]]
        tokens[token] += moved
        values.append(function([*pairs[:row], pairs[row] | {side: tokens}, *pairs[row + 1 :]]))
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_case
def test_aot_is_finite_with_a_finite_gradient_at_extremes(name, options, dtype):
    inputs = extremes(dtype)
    record = RECORDS[name]
    losses = record.build(record.options(**options))(inputs).losses
    assert all_finite(losses, inputs)
    assert losses.dtype == dtype


def test_aot_by_hand():
    # c - r: 5, 1, 3; c0 - r0: 2, 4, 0. Sorted: 1 3 5 less 0 2 4, so 1 everywhere.
    pairs = [step_pair(chosen=5.0, reference_chosen=2.0), step_pair(1.0, 4.0), step_pair(3.0, 0.0)]
    losses = run("aot", pairs, beta=1.0).losses.tolist()
    assert losses == pytest.approx([math.log(1 + math.exp(-1))] * 3, rel=1e-12)


def test_aot_value_stands_at_the_row_of_its_own_policy_difference():
    # c - r: 5, 1, 3; c0 - r0: 0, 0, 4. Sorted: 1 3 5 less 0 0 4, so row 1 is 1 ahead, row 2 is 3, row 0 is 1.
    pairs = [step_pair(5.0, 0.0), step_pair(1.0, 0.0), step_pair(3.0, 4.0)]
    exact = [math.log(1 + math.exp(-ahead)) for ahead in (1, 1, 3)]
    assert run("aot", pairs, beta=1.0).losses.tolist() == pytest.approx(exact, rel=1e-12)


def test_aot_unpaired_by_hand():
    # Dc: 5, 1; Dr: 0, 4. Sorted: 1 5 less 0 4; with a label smoothing of 0.25
    pairs = [step_pair(5.0, 0.0, rejected=0.0), step_pair(1.0, 0.0, rejected=4.0)]
    exact = 0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.exp(1))
    losses = run("aot_unpaired", pairs, beta=1.0, label_smoothing=0.25).losses.tolist()
    assert losses == pytest.approx([exact, exact], rel=1e-12)


def step_pair(chosen: float, reference_chosen: float, rejected: float = 0.0) -> dict:
    """One-token responses; the arithmetic of a sort is easier on small whole numbers, though no log is above 0."""
    return {
        "policy chosen": [chosen],
        "policy rejected": [rejected],
        "reference chosen": [reference_chosen],
        "reference rejected": [0.0],
        "margin": 0.0,
    }


@pytest.mark.parametrize("name", RECORDS)
def test_aot_of_one_pair_is_dpo(name):
    # h = (-1 - -1) - (-3 - -1) = 2; -log sigmoid(0.5 * 2 - 0.25)
    loss = run(name, [flat_pair(-1.0, -3.0, margin=0.25)], beta=0.5).losses.item()
    assert loss == pytest.approx(math.log(1 + math.exp(-0.75)), rel=1e-12)


@pytest.mark.parametrize("name", RECORDS)
def test_aot_margin_is_that_of_its_own_row(name):
    rng = random.Random(3)
    pairs = [random_pair(rng) | {"margin": 0.0} for _ in range(6)]
    before = run(name, pairs).losses.tolist()
    after = run(name, [*pairs[:2], pairs[2] | {"margin": 1.0}, *pairs[3:]]).losses.tolist()
    assert [row for row in range(6) if before[row] != after[row]] == [2]


@pytest.mark.parametrize("name", RECORDS)
def test_aot_depends_on_the_other_pairs_of_its_step(name):
    rng = random.Random(4)
    pairs = [random_pair(rng) for _ in range(6)]
    assert RECORDS[name].scope == "step"
    assert run(name, pairs).losses.tolist() != [run(name, [pair]).losses.item() for pair in pairs]


@pytest.mark.parametrize("name", RECORDS)
def test_aot_keeps_the_order_of_the_step(name):
    rng = random.Random(5)
    pairs = [random_pair(rng) for _ in range(32)]
    assert run(name, pairs[::-1]).losses.tolist() == pytest.approx(run(name, pairs).losses.tolist()[::-1], rel=1e-14)


@every_case
def test_aot_starts_at_log_2(name, options):
    rng = random.Random(6)
    pairs = [untrained(random_pair(rng)) for _ in range(8)]
    assert run(name, pairs, **options).losses.tolist() == pytest.approx([math.log(2)] * 8, rel=1e-12)
    assert RECORDS[name].starts_at(RECORDS[name].options(**options)) == math.log(2)


def test_aot_unpaired_depends_on_log_ratios_only_and_aot_does_not():
    rng = random.Random(7)
    pairs = [random_pair(rng) for _ in range(20)]
    shifted = [
        pair | {side: [value - shift for value in pair[side]] for side in ("policy chosen", "reference chosen")}
        for shift, pair in enumerate(pairs)
    ]
    for name, record in RECORDS.items():
        same = run(name, shifted).losses.tolist() == pytest.approx(run(name, pairs).losses.tolist(), rel=1e-9)
        assert same == record.log_ratios_only == (name == "aot_unpaired")


@pytest.mark.parametrize("name", RECORDS)
def test_aot_rewards_are_those_of_each_row_and_detached(name):
    # chosen: 3 and 1, rejected: 2 and 4, times beta 0.5
    pairs = [flat_pair(-1.0, -2.0, reference=-4.0), flat_pair(-3.0, 0.0, reference=-4.0)]
    output = run(name, pairs, beta=0.5)
    assert {key: value.tolist() for key, value in output.metrics.items()} == {
        "rewards/chosen": [1.5, 0.5],
        "rewards/rejected": [1.0, 2.0],
        "rewards/margins": [0.5, -1.5],
        "rewards/accuracies": [1.0, 0.0],
    }
    assert not any(value.requires_grad for value in output.metrics.values())


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": -1.0}, {"beta": math.inf}, {"label_smoothing": -0.1}, {"label_smoothing": 0.5}]
)
def test_aot_options_out_of_range_are_refused(name, options):
    with pytest.raises(pydantic.ValidationError):
        RECORDS[name].options(**options)


@pytest.mark.parametrize("name", RECORDS)
def test_aot_record_says_what_it_needs(name):
    record = RECORDS[name]
    assert record.needs_of(record.options()) == {"reference"}
    assert record.formula
    assert record.paper
    assert all(record.options(**variant) for variant in record.variants)
