"""A loss's state from step to step: changed by steps that are taken and by nothing else, and resumed to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

import qpref
from qpref.errors import CheckpointError, PluginError
from qpref.hooks import Options, PairedLoss, reward_metrics
from qpref.hooks.loss_state import initial_problem, joined, of_loss, refuse_other_state, state_of, written_problem
from qpref.records import LossOutput
from qpref.testing import assert_conforms

ADAPTER = Path("adapter") / "adapter_model.safetensors"
KEEP = 0.5
Fault = Callable[[int], None]


def moving(fault: Fault = lambda call: None, name: str = "moving", start: float = 0.25) -> PairedLoss:
    """A loss against a moving average of the step's mean margin.

    Args:
        fault: called with the number of the call with gradients, from 1.
    """
    calls = [0]

    def build(options):
        def moving(inputs):
            if torch.is_grad_enabled():
                calls[0] += 1
                fault(calls[0])
            policy, reference = inputs.policy, inputs.reference
            chosen = policy.chosen.total - reference.chosen.total
            rejected = policy.rejected.total - reference.rejected.total
            margins, mean = chosen - rejected - inputs.margin, inputs.state["mean"]
            after = KEEP * mean + (1 - KEEP) * margins.detach().mean()
            metrics = reward_metrics(chosen, rejected) | {f"{name}/mean": mean.expand(len(margins))}
            return LossOutput(losses=-logsigmoid(margins - mean), metrics=metrics, state={"mean": after})

        return moving

    return PairedLoss(name=name, summary="a moving mean", options=Options, build=build, scope="step",
                      detaches=lambda options: True, state={"mean": start})  # fmt: skip


def train(recipe: dict, folder: Path, record: PairedLoss, **how: Any) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run."""
    qpref.train(recipe, output=folder, plugins=[record], **how)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def recipe(make_recipe) -> dict[str, dict[str, object]]:
    """6 steps of 4 pairs in micro-batches of one pair, each with a row, an evaluation and a checkpoint."""
    each_step = {f"train.{name}": 1 for name in ("log_every", "eval_every", "save_every", "tokens_per_microbatch")}
    return make_recipe(each_step | {"train.epochs": 2}) | {"loss": {"name": "moving"}}


def test_each_step_reads_what_the_step_before_has_written_and_evaluation_reads_the_same(recipe, tmp_path):
    rows = train(recipe, tmp_path / "run", moving())
    expected = 0.25
    for row in rows:
        if row["split"] == "eval":
            assert row["eval_moving/mean"] == pytest.approx(expected, rel=1e-5)
        else:
            assert row["moving/mean"] == pytest.approx(expected, rel=1e-5)
            expected = KEEP * expected + (1 - KEEP) * row["rewards/margins"]
    assert len(rows) == 6 + 7
    assert len({row["moving/mean"] for row in rows if row["split"] == "train"}) == 6


def test_a_step_that_runs_out_of_memory_begins_with_the_same_state_when_repeated(recipe, tmp_path):
    def full_at_third(call: int) -> None:
        if call == 4:  # the first call is that of the checks at the start or of step 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    recipe["train"]["tokens_per_microbatch"] = 400
    plain, short = (train(recipe, tmp_path / str(at), moving(fault)) for at, fault in enumerate([int, full_at_third]))
    means = [[row["moving/mean"] for row in rows if row["split"] == "train"] for rows in (plain, short)]
    assert means[1] == pytest.approx(means[0], rel=1e-5)
    assert len(set(means[0])) == 6


def test_a_resumed_run_has_the_state_of_its_checkpoint_to_the_bit(recipe, tmp_path):
    def stopped(call: int) -> None:
        if call == 5:
            raise RuntimeError("stopped here")

    rows = train(recipe, tmp_path / "whole", moving())
    with pytest.raises(PluginError, match="stopped here"):
        train(recipe, tmp_path / "cut", moving(stopped))
    cut = train(recipe, tmp_path / "cut", moving(), resume=True)
    assert (tmp_path / "cut" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    timing = {"seconds"}
    assert [{key: row[key] for key in row.keys() - timing} for row in cut] == [
        {key: row[key] for key in row.keys() - timing} for row in rows
    ]


def test_a_checkpoint_is_not_resumed_by_a_loss_that_keeps_another_state():
    saved = {"0.mean": torch.tensor(1.0), "1.sums": torch.zeros(3)}
    refuse_other_state(saved, [{"mean": 0.0}, {"sums": [0.0] * 3, "new": 1.0}], 4)
    for initial in ([{"mean": 0.0}], [{"mean": 0.0}, {"sums": [0.0] * 2}], [{"sums": [0.0] * 3}, {"mean": 0.0}]):
        with pytest.raises(CheckpointError, match=r"step 4: its losses keep "):
            refuse_other_state(saved, initial, 4)


def test_losses_of_a_mixture_keep_their_states_apart(recipe, tmp_path):
    """Both have the same name in their state; each has its own first value, and its own metrics say so."""
    second = moving(name="second", start=-1.5)
    recipe["loss"] = [{"name": "second"}, {"name": "moving", "weight": 0.5}]  # type: ignore[assignment]
    qpref.train(recipe, output=tmp_path / "run", plugins=[moving(), second])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = {"second": -1.5, "moving": 0.25}
    for row in (row for row in rows if row["split"] == "train"):
        assert row["second/mean"] == pytest.approx(expected["second"], rel=1e-5)
        for name in expected:
            expected[name] = KEEP * expected[name] + (1 - KEEP) * row["rewards/margins"]
    states = [{"a": torch.ones(1)}, {"a": torch.zeros(2), "b": torch.ones(())}]
    assert [of_loss(joined(states), position) for position in range(2)] == states


def test_a_state_has_the_dtype_of_the_log_probabilities_and_keeps_what_is_known():
    found = state_of({"mean": 0.5, "sums": (1, 2)}, {"mean": torch.tensor(3.0)}, torch.zeros(1, dtype=torch.float64))
    assert {name: (value.dtype, value.tolist()) for name, value in found.items()} == {
        "mean": (torch.float64, 3.0),
        "sums": (torch.float64, [1.0, 2.0]),
    }


@pytest.mark.parametrize("initial", [{"mean": "0"}, {"mean": float("nan")}, {"mean": [True]}, {1: 0.0}, {"": 0.0}, 0.0])
def test_first_values_are_finite_numbers_by_name(initial):
    assert initial_problem({"mean": 0, "sums": [1.0, 2.0]}) is None
    assert initial_problem(initial)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ({"mode": torch.tensor(1.0)}, "returned 'mode' in its state, which its record doesn't have"),
        ({"mean": torch.ones(1)}, r"returned mean of its state as of shape \(1,\), not of shape \(\)"),
        ({"mean": 1.0}, "returned mean of its state as float"),
        ({"mean": torch.ones((), requires_grad=True)}, "returned mean of its state with a gradient"),
        ([1.0], "returned its state as list"),
        ({"mean": torch.tensor(float("inf"))}, "returned a value that is not finite at step 1"),
    ],
)
def test_a_wrong_state_stops_the_run_and_names_the_loss(recipe, tmp_path, written, problem):
    record = moving()

    def build(options):
        function = record.build(options)
        return lambda inputs: replace(function(inputs), state=written)

    with pytest.raises(PluginError, match=f"loss 'moving' .*{problem}"):
        train(recipe, tmp_path / "run", replace(record, build=build))
    if "finite" not in problem:
        assert written_problem({"mean": torch.tensor(0.0)}, written)


def test_only_a_loss_of_whole_steps_keeps_a_state(recipe, tmp_path):
    with pytest.raises(PluginError, match="has a state and the scope 'example'"):
        train(recipe, tmp_path / "run", replace(moving(), scope="example"))


# The conformance checks.


def with_state(change: Callable[[Any, Any], Any], **fields: Any) -> PairedLoss:
    """The loss with `change(state, inputs)` in place of its state."""
    sound = moving()

    def build(options):
        function = sound.build(options)

        def changed(inputs):
            output = function(inputs)
            return replace(output, state=change(dict(output.state), inputs))

        return changed

    return replace(sound, build=build, **fields)


def test_a_sound_state_keeps_every_rule():
    assert_conforms(moving())


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (with_state(lambda state, inputs: {}), "no step changes mean of its state"),
        (with_state(lambda state, inputs: {"mean": inputs.policy.chosen.total[0].detach()}), "depends on the order"),
        (with_state(lambda state, inputs: {"mean": state["mean"].exp().exp()}), "not finite"),
        (with_state(lambda state, inputs: {"mean": state["mean"] / 0}), "not finite"),
        (with_state(lambda state, inputs: state, scope="example"), "only a loss of scope 'step'"),
        (with_state(lambda state, inputs: state, state={"mean": "x"}), "not with finite numbers"),
        (with_state(lambda state, inputs: {"mode": state["mean"]}), "which its record doesn't have"),
    ],
    ids=["unchanged", "by order", "large", "infinite", "of examples", "text", "unknown"],
)
def test_a_broken_state_breaks_the_rule(record, problem):
    with pytest.raises(AssertionError, match=problem):
        assert_conforms(record, "state")
