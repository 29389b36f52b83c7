"""List losses against the papers' arithmetic, an enumeration of all rankings, and the pairwise losses."""

from __future__ import annotations

import itertools
import math
import random

import mpmath
import pytest
import torch
from loss_cases import paired, random_tokens, scores

from qpref.hooks.lists import best_and_rest, list_reward_metrics, ordered_share
from qpref.records import ListInputs
from qpref.testing import check_loss
from qpref_plugins.loss_dpo import qpref_losses as dpo_losses
from qpref_plugins.loss_lists import qpref_losses

RECORDS = {record.name: record for record in qpref_losses()}
CASES = 1000


def lists_of(cases: list[dict], dtype: torch.dtype = torch.float64) -> ListInputs:
    """Inputs from one dict a list: `policy` and `reference` tokens, `ranks`, `margin` and `scores`."""
    policy, reference = (scores([one for case in cases for one in case[of]], dtype) for of in ("policy", "reference"))
    policy.values.requires_grad_()
    return ListInputs(
        policy=policy,
        reference=reference,
        sizes=tuple(len(case["ranks"]) for case in cases),
        ranks=torch.tensor([rank for case in cases for rank in case["ranks"]]),
        scores=torch.tensor([score for case in cases for score in case["scores"]], dtype=dtype),
        margin=torch.tensor([case["margin"] for case in cases], dtype=dtype),
    )


def random_case(rng: random.Random) -> dict:
    """2 to 6 responses of which some tie, the best first."""
    grades = sorted((rng.randint(0, 5) for _ in range(rng.randint(2, 6))), reverse=True)
    if len(set(grades)) == 1:
        grades[0] += 1
    policy = [random_tokens(rng, rng.randint(1, 12)) for _ in grades]
    return {
        "policy": policy,
        "reference": [[min(0.0, token + rng.gauss(0, 0.5)) for token in tokens] for tokens in policy],
        "ranks": [1 + sum(other > grade for other in grades) for grade in grades],
        "scores": [grade / 5 for grade in grades],
        "margin": rng.choice([0.0, rng.uniform(-1, 1)]),
    }


def run(name: str, cases: list[dict], dtype: torch.dtype = torch.float64, **options: object) -> torch.Tensor:
    record = RECORDS[name]
    return record.build(record.options(**options))(lists_of(cases, dtype)).losses


def rewards_of(case: dict, beta: float) -> list[mpmath.mpf]:
    sums = [[mpmath.fsum(map(mpmath.mpf, tokens)) for tokens in case[of]] for of in ("policy", "reference")]
    return [beta * (ours - theirs) for ours, theirs in zip(*sums, strict=True)]


def plackett_luce_by_hand(case: dict, beta: float) -> mpmath.mpf:
    s, total = rewards_of(case, beta), mpmath.mpf(0)
    for i, rank in enumerate(case["ranks"]):
        rivals = [s[j] for j, other in enumerate(case["ranks"]) if other > rank]
        own = mpmath.exp(s[i] - case["margin"])
        total -= mpmath.log(own / (own + mpmath.fsum(map(mpmath.exp, rivals)))) if rivals else 0
    return total


def lipo_by_hand(case: dict, beta: float, gain: str) -> mpmath.mpf:
    s, ranks, total = rewards_of(case, beta), case["ranks"], mpmath.mpf(0)
    size = len(s)
    wins = [
        (sum(other > rank for other in ranks) + 0.5 * (sum(other == rank for other in ranks) - 1)) / (size - 1)
        for rank in ranks
    ]
    labels = wins if gain == "wins" else case["scores"]
    position = {index: place for place, index in enumerate(sorted(range(size), key=lambda i: -s[i]), start=1)}
    for i, j in itertools.permutations(range(size), 2):
        if ranks[i] < ranks[j]:
            gained = abs(mpmath.mpf(2) ** labels[i] - mpmath.mpf(2) ** labels[j])
            discounted = abs(1 / mpmath.log(1 + position[i]) - 1 / mpmath.log(1 + position[j]))
            total += gained * discounted * mpmath.log(1 + mpmath.exp(-(s[i] - s[j] - case["margin"])))
    return total


def assert_close(found: torch.Tensor, expected: list[mpmath.mpf]) -> None:
    wanted = torch.tensor([float(value) for value in expected], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-6, atol=1e-12)


def test_plackett_luce_is_the_likelihood_of_a_thousand_random_rankings():
    rng = random.Random(1)
    cases = [random_case(rng) for _ in range(CASES)]
    assert_close(run("plackett_luce", cases, beta=0.3), [plackett_luce_by_hand(case, 0.3) for case in cases])


@pytest.mark.parametrize("gain", ["wins", "scores"])
def test_lipo_weighs_the_pairs_of_a_thousand_random_rankings(gain):
    rng = random.Random(2)
    cases = [random_case(rng) for _ in range(CASES)]
    assert_close(run("lipo", cases, beta=0.3, gain=gain), [lipo_by_hand(case, 0.3, gain) for case in cases])


def test_probabilities_of_all_rankings_of_four_responses_add_up_to_one():
    responses = [([-1.0, -2.5], [-1.5, -1.0]), ([-0.3], [-1.1]), ([-4.0], [-2.0]), ([-2.0, -0.1], [-2.0, -0.7])]
    cases = [
        {
            "policy": [policy for policy, _ in order],
            "reference": [reference for _, reference in order],
            "ranks": [1, 2, 3, 4],
            "scores": [0.0] * 4,
            "margin": 0.0,
        }
        for order in itertools.permutations(responses)
    ]
    assert run("plackett_luce", cases, beta=0.7).neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


def two(rng: random.Random) -> tuple[dict, dict]:
    """A list of two, and the same as a pair."""
    sides = {side: random_tokens(rng, rng.randint(1, 9)) for side in ("chosen", "rejected")}
    reference = {side: [min(0.0, token + rng.gauss(0, 0.4)) for token in tokens] for side, tokens in sides.items()}
    margin = rng.uniform(-1, 1)
    listed = {"policy": list(sides.values()), "reference": list(reference.values()), "margin": margin}
    pair = {f"{of} {side}": tokens for of, each in (("policy", sides), ("reference", reference))
            for side, tokens in each.items()}  # fmt: skip
    return listed | {"ranks": [1, 2], "scores": [1.0, 0.0]}, pair | {"margin": margin}


@pytest.mark.parametrize(("name", "options"), [("plackett_luce", {}), ("lipo", {"weights": "none"})])
def test_a_list_of_two_has_the_loss_and_gradient_of_dpo(name, options):
    rng = random.Random(3)
    lists, pairs = zip(*(two(rng) for _ in range(200)), strict=True)
    record, dpo = RECORDS[name], next(record for record in dpo_losses() if record.name == "dpo")
    ours, theirs = lists_of(list(lists)), paired(list(pairs))
    losses = record.build(record.options(beta=0.4, **options))(ours).losses
    expected = dpo.build(dpo.options(beta=0.4))(theirs).losses
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    losses.sum().backward()
    expected.sum().backward()
    of_lists = ours.policy.values.grad.split(list(ours.policy.lengths))
    for side, grads in ((theirs.policy.chosen, of_lists[0::2]), (theirs.policy.rejected, of_lists[1::2])):
        torch.testing.assert_close(torch.cat(list(grads)), side.values.grad, rtol=1e-12, atol=1e-12)


def test_lipo_without_weights_is_the_sum_of_dpo_over_the_pairs():
    case = random_case(random.Random(4)) | {"margin": 0.3}
    expected = mpmath.mpf(0)
    s = rewards_of(case, 0.2)
    for i, j in itertools.combinations(range(len(s)), 2):
        if case["ranks"][i] < case["ranks"][j]:
            expected += mpmath.log(1 + mpmath.exp(-(s[i] - s[j] - 0.3)))
    assert_close(run("lipo", [case], beta=0.2, weights="none"), [expected])


def test_equal_responses_of_a_list_start_at_the_log_of_their_rankings():
    case = {"policy": [[-1.0]] * 4, "reference": [[-1.0]] * 4, "ranks": [1, 2, 3, 4], "scores": [0.0] * 4, "margin": 0}
    assert run("plackett_luce", [case]).item() == pytest.approx(math.log(24), abs=1e-12)


def test_metrics_of_a_list_are_the_best_the_mean_of_the_rest_and_the_share_of_pairs_in_order():
    tokens = [[-1.0]] * 4
    case = {"policy": tokens, "reference": tokens, "ranks": [1, 2, 2, 4], "scores": [0.0] * 4, "margin": 0.0}
    inputs = lists_of([case, case | {"ranks": [1, 1, 3, 3]}])
    rewards = torch.tensor([2.0, 3.0, -1.0, -1.0, 2.0, 3.0, -1.0, 0.0], dtype=torch.float64)
    found = {name: value.tolist() for name, value in list_reward_metrics(rewards, inputs).items()}
    assert found["rewards/chosen"] == [2.0, 2.5]
    assert found["rewards/rejected"] == [pytest.approx(1 / 3), -0.5]
    assert found["rewards/margins"] == [pytest.approx(2 - 1 / 3), 3.0]
    # Of the first list's five ranked pairs: 1-2 wrong, 1-3, 1-4 and 2-4 right, 3-4 equal.
    assert found["rewards/accuracies"] == [pytest.approx(3.5 / 5), 1.0]
    assert found["list/top1"] == [0.0, 1.0]
    assert best_and_rest(rewards, inputs)[0].tolist() == [2.0, 2.5]
    assert ordered_share(-rewards, inputs).tolist() == [pytest.approx(1.5 / 5), 0.0]


@pytest.mark.parametrize("mistake", ["reversed", "mean over the batch", "first tie alone", "raises the last"])
def test_the_kit_finds_a_list_loss_that_is_wrong(mistake):
    sound = RECORDS["plackett_luce"]

    def build(options):
        right = sound.build(options)

        def wrong(inputs):
            output = right(inputs)
            totals = inputs.by_list(inputs.policy.total)
            losses = {
                "reversed": -output.losses,
                "mean over the batch": output.losses + output.losses.mean(),
                "first tie alone": output.losses - torch.stack([0.1 * (each[0] - each[1]) for each in totals]),
                "raises the last": output.losses
                - torch.stack([2.0 * (each[-1] if len(each) > 2 else 0 * each[0]) for each in totals]),
            }[mistake]
            return type(output)(losses=losses, metrics=output.metrics)

        return wrong

    record = type(sound)(name="wrong", summary="wrong", options=sound.options, build=build)
    assert "lists" in {result.rule for result in check_loss(record) if result.status == "broken"}
