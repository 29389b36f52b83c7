"""A conclusion claims what an interval has on one side, and nothing on few pairs."""

from __future__ import annotations

import pytest

from qpref.evaluation.comparison import ComparedModel
from qpref.evaluation.conclusion import conclusions, lead_keys
from qpref.evaluation.statistics import Estimate
from qpref.evaluation.summary import Summary


def model(name="run", pairs=50, differences=None, **metrics):
    """A model with estimates given as (value, low, high), keys with `_` for `/`."""

    def of(value, low, high):
        return Estimate(value=value, low=low, high=high, pairs=pairs)

    def estimates(found):
        return {key.replace("_", "/", 1): of(*numbers) for key, numbers in (found or {}).items()}

    summary = Summary(metrics=estimates(metrics), buckets={}, differences=estimates(differences))
    return ComparedModel(name=name, kind="run", reference=name, overlap=None, summary=summary)


@pytest.mark.parametrize(
    ("accuracy", "drift", "sentence"),
    [
        ((0.8, 0.7, 0.9), (-3.2, -5.0, -1.0),
         "run: right on 80% of 50 pairs by reward margin (70% to 90%), and its chosen answers became less likely "
         "(-3.2 nats)"),
        ((0.8, 0.7, 0.9), (1.5, 0.5, 2.0),
         "run: right on 80% of 50 pairs by reward margin (70% to 90%), and its chosen answers became likelier "
         "(+1.5 nats)"),
        ((0.8, 0.7, 0.9), (0.5, -0.5, 2.0),
         "run: right on 80% of 50 pairs by reward margin (70% to 90%), without a measurable change of its chosen "
         "answers' likelihood"),
        ((0.55, 0.45, 0.65), (1.5, 0.5, 2.0),
         "run: right on 55% of 50 pairs by reward margin (45% to 65%): these pairs don't tell it from chance"),
        ((0.2, 0.1, 0.3), (1.5, 0.5, 2.0),
         "run: right on 20% of 50 pairs by reward margin (10% to 30%): it prefers the rejected answers"),
    ],
)  # fmt: skip
def test_a_sentence_follows_the_intervals(accuracy, drift, sentence):
    assert conclusions([model(rewards_accuracies=accuracy, drift_chosen=drift)]) == [sentence]


def test_without_a_reference_the_log_probability_decides():
    (sentence,) = conclusions([model("base", logps_accuracies=(0.7, 0.6, 0.8))])
    assert sentence == "base: right on 70% of 50 pairs by log-probability (60% to 80%)"


@pytest.mark.parametrize("pairs", [1, 10, 19])
def test_few_pairs_say_nothing_however_clear_they_look(pairs):
    clear = model(pairs=pairs, rewards_accuracies=(1.0, 1.0, 1.0), drift_chosen=(2.0, 1.0, 3.0))
    other = model(
        "other", pairs=pairs, rewards_accuracies=(0.0, 0.0, 0.0), differences={"rewards_accuracies": (-1, -1, -1)}
    )
    assert conclusions([clear, other]) == []


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        ((0.05, 0.01, 0.09), "b is right more often than a: +5 points (+1 to +9)"),
        ((-0.05, -0.09, -0.01), "b is right less often than a: -5 points (-9 to -1)"),
        ((0.02, -0.01, 0.05), "b and a don't differ significantly in how often they are right: +2 points (-1 to +5)"),
    ],
)
def test_a_difference_is_claimed_where_its_interval_leaves_out_zero(difference, sentence):
    numbers = (0.7, 0.6, 0.8)
    other = model("b", rewards_accuracies=numbers, differences={"rewards_accuracies": difference})
    models = [model("a", rewards_accuracies=numbers), other]
    assert conclusions(models)[-1] == sentence


def test_three_rows_lead_with_a_reference_and_without():
    numbers = (0.7, 0.6, 0.8)
    trained = model(rewards_accuracies=numbers, logps_accuracies=numbers, drift_chosen=numbers, logps_chosen=numbers,
                    kl=numbers)  # fmt: skip
    assert lead_keys([trained]) == ["rewards/accuracies", "drift/chosen", "kl"]
    assert lead_keys([model(logps_accuracies=numbers, logps_chosen=numbers)]) == ["logps/accuracies", "logps/chosen"]
