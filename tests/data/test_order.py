"""Order of training: every example once an epoch, the same for the same seed, as many steps as the recipe says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from qpref.data.order import step_order, steps_per_epoch, total_steps
from qpref.recipe.sections import TrainSection


@pytest.mark.parametrize(("examples", "batch"), [(12, 4), (13, 4), (3, 3), (5, 1), (1000, 7)])
def test_each_epoch_trains_on_every_example_once(examples, batch):
    steps = steps_per_epoch(examples, batch)
    for epoch in (0, 1, 5):
        order = [step_order(examples, batch, 0, epoch * steps + step) for step in range(steps)]
        assert Counter(place for places in order for place in places) == Counter(range(examples))


def test_all_steps_but_an_epochs_last_are_full():
    lengths = [len(step_order(13, 4, 0, step)) for step in range(8)]
    assert lengths == [4, 4, 4, 1, 4, 4, 4, 1]


def test_order_is_a_pure_function_of_its_arguments():
    before = [step_order(50, 8, 3, step) for step in range(21)]
    torch.manual_seed(99)
    assert [step_order(50, 8, 3, step) for step in reversed(range(21))] == before[::-1]


def test_order_changes_with_the_epoch_and_the_seed():
    orders = [tuple(step_order(50, 50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_total_steps_are_those_of_the_epochs_or_max_steps_if_less():
    # ceil(13 / 4) = 4 steps an epoch
    totals = [total_steps(TrainSection(epochs=3, batch_size=4, max_steps=limit), 13) for limit in (None, 5, 12, 100)]
    assert totals == [12, 5, 12, 12]
