"""The warnings of a comparison, and none where there is nothing to warn of."""

from __future__ import annotations

import numpy as np
import pytest

from qpref.evaluation.comparison import ComparedModel, Comparison
from qpref.evaluation.heldout_pairs import Overlap
from qpref.evaluation.scores import PairScores
from qpref.evaluation.statistics import Bootstrap
from qpref.evaluation.summary import summarize

N = 200


def scores(chosen=2.0, rejected=-2.0, lengths=None):
    """A model that moved chosen and rejected log-probabilities by so much, give or take."""
    random = np.random.default_rng(0)
    reference = random.normal(-100, 20, (N, 2))
    moved = np.stack([np.full(N, chosen), np.full(N, rejected)], 1) + random.normal(0, 0.5, (N, 2))
    lengths = np.full((N, 2), 30) if lengths is None else lengths
    return PairScores(policy=reference + moved, reference=reference, lengths=lengths, kl=np.full(N, 0.1))


def report_of(found, overlap=None, beta=0.1):
    bootstrap = Bootstrap.of([str(number) for number in range(N)], 300, 0)
    (summary,) = summarize([found], beta, bootstrap, ["pairs.jsonl"] * N)
    return Comparison(
        data="pairs.jsonl",
        read=N,
        pairs=N,
        overlapping_left_out=0,
        left_out=(0, ""),
        beta=beta,
        beta_from="given",
        seed=0,
        samples=300,
        dtype=None,
        models=[ComparedModel(name="m", kind="run", reference="m", overlap=overlap, summary=summary)],
    )


def test_a_model_that_raised_what_was_chosen_has_no_warning():
    assert report_of(scores()).warnings() == []


def test_displacement_is_warned_of_with_its_size_and_what_to_try():
    """Both sides fell, the rejected one further: the margin grew, and the chosen responses got less likely."""
    (warning,) = report_of(scores(chosen=-10, rejected=-30)).warnings()
    assert "the chosen responses have become less likely since the start (-10." in warning
    assert "in 100% of the pairs" in warning
    assert "the rejected ones moved by -3" in warning
    assert "likelihood displacement" in warning
    assert "To try: a larger beta" in warning


def test_a_fall_within_chance_is_no_displacement():
    assert report_of(scores(chosen=-0.01)).warnings() == []


def test_saturation_is_warned_of_where_most_gradients_have_vanished():
    """beta 0.1 and a difference of 60 nats: margin 6, where the logistic loss's gradient is 0.0025."""
    found = report_of(scores(chosen=30, rejected=-30))
    assert found.models[0].summary.metrics["saturated"].value == 1.0
    (warning,) = found.warnings()
    assert "100% of the pairs are saturated" in warning


def test_length_bias_is_warned_of():
    """Right where the chosen response is longer, wrong where it is shorter; chosen ones are longer on average."""
    longer = np.arange(N) % 4 > 0
    lengths = np.where(longer[:, None], [60, 30], [30, 60])
    found = scores(lengths=lengths)
    moved = np.where(longer, 3.0, -3.0) + np.random.default_rng(1).normal(0, 2.5, N)
    found = PairScores(
        policy=found.reference + np.stack([moved, np.zeros(N)], 1), reference=found.reference, lengths=lengths, kl=None
    )
    warnings = report_of(found).warnings()
    assert any(
        "length bias: it prefers longer responses more than the labels do; its accuracy by reward margin" in w
        for w in warnings
    )


def test_overlap_is_warned_of():
    (warning,) = report_of(scores(), Overlap(3, 5, frozenset(range(5)))).warnings()
    assert warning.startswith("m: 5 of 200 prompts are in its training data (2 of them up to case and white space)")
    assert "unless they are left out" in warning


def test_pairs_of_several_files_are_told_apart():
    bootstrap = Bootstrap.of([str(number) for number in range(N)], 100, 0)
    files = ["a.jsonl"] * 50 + ["b.jsonl"] * 150
    (summary,) = summarize([scores()], 0.1, bootstrap, files)
    assert {name: bucket["rewards/margins"].pairs for name, bucket in summary.buckets["source"].items()} == {
        "a.jsonl": 50,
        "b.jsonl": 150,
    }


def test_margins_and_shares_are_plain_means():
    found = scores(chosen=1, rejected=-3)
    change = found.policy - found.reference
    metrics = report_of(found, beta=0.2).models[0].summary.metrics
    assert metrics["rewards/margins"].value == pytest.approx(0.2 * (change[:, 0] - change[:, 1]).mean())
    assert metrics["rewards/accuracies"].value == (change[:, 0] > change[:, 1]).mean()
    assert metrics["logps/accuracies"].value == (found.policy[:, 0] > found.policy[:, 1]).mean()
    assert metrics["drift/chosen_fell"].value == (change[:, 0] < 0).mean()
    assert metrics["drift/chosen_per_token"].value == pytest.approx(change[:, 0].sum() / (30 * N))
