"""The weight of a loss in a sum: fixed, or on a schedule from the first step to the last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qpref
from qpref.errors import RecipeError
from qpref.recipe.resolve import make_plan
from qpref.training.objective import Objective

RAMP = {"start": 0.0, "end": 0.5, "schedule": "linear"}
BASE = {"model": {"base": "x"}, "data": {"train": "y.jsonl"}}


def plan_of(*weights: object):
    names = ("dpo", "sft", "hinge")
    losses = [{"name": name, "weight": weight} for name, weight in zip(names, weights, strict=False)]
    return make_plan(BASE | {"loss": losses})


def test_a_weight_goes_from_its_start_to_its_end():
    objective = Objective.of(plan_of(1.0, RAMP, RAMP | {"start": 2.0, "schedule": "cosine"}).losses)
    assert objective.weights == (1.0, 0.0, 2.0)
    assert objective.at(0.25).weights == pytest.approx((1.0, 0.125, 2.0 - 1.5 * (1 - 0.5**0.5) / 2))
    assert objective.at(1.0).weights == (1.0, 0.5, 0.5)
    assert objective.at(0.25).at(1.0).weights == (1.0, 0.5, 0.5)


def test_a_resolved_recipe_has_the_schedule_and_resolves_to_itself():
    plan = plan_of(1.0, RAMP)
    assert [loss.get("weight") for loss in plan.document["loss"]] == [None, RAMP]
    assert make_plan(plan.document).fingerprint == plan.fingerprint != plan_of(1.0, 0.5).fingerprint


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ((1.0, 0), "[loss.1] weight: expected greater than 0, got 0"),
        (
            (1.0, RAMP | {"end": 0.0}),
            "[loss.1] weight: a weight is at least 0 at both ends of its schedule, and above 0",
        ),
        ((1.0, RAMP | {"start": -1.0}), "[loss.1] weight: a weight is at least 0 at both ends of its schedule"),
        ((1.0, {"start": 1.0}), "[loss.1] weight: expected a number, got {'start': 1.0}"),
        ((RAMP, RAMP), "[loss] weight: 0 for all losses at one end of the run"),
    ],
)
def test_weights_that_leave_nothing_to_learn_are_refused(weights, problem):
    with pytest.raises(RecipeError) as error:
        plan_of(*weights)
    assert problem in str(error.value)


def test_each_step_of_a_run_has_the_weight_of_its_progress(make_recipe, tmp_path: Path):
    """The run's own values of the two losses add up to its loss by the weights that it logs."""
    recipe = make_recipe({"train.max_steps": 3, "train.log_every": 1})
    recipe["loss"] = [{"name": "dpo"}, {"name": "sft", "weight": RAMP}]  # type: ignore[assignment]
    qpref.train(recipe, output=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    assert [row["option/sft.weight"] for row in rows] == pytest.approx([0.0, 0.25, 0.5])
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss/dpo"] + row["option/sft.weight"] * row["loss/sft"], rel=1e-5)
