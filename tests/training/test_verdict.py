"""The verdict says what the held-out pairs show, and nothing that they don't."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_example

import qpref
from qpref.recipe.sections import AdapterSection, Recipe, TrainSection
from qpref.training import checkpoint
from qpref.training.adapter_change import LEAST_CHANGE, better_rate, idle_rate_warning, largest_change
from qpref.training.heldout_scores import HeldoutScores
from qpref.training.verdict import judge

COUNT = 32


def examples_of(count: int = COUNT, label: bool | None = None):
    lengths = (8, 5, 5) if label is None else (8, 5)
    return [replace(make_example(line, *lengths), label=label) for line in range(count)]


def scores(step: int, chosen: torch.Tensor, rejected: torch.Tensor) -> HeldoutScores:
    return HeldoutScores(step=step, chosen=chosen, rejected=rejected)


def noise(seed: int, size: float, count: int = COUNT) -> torch.Tensor:
    return size * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def judged(chosen: torch.Tensor, rejected: torch.Tensor, start: torch.Tensor | None = None, **changes):
    """The verdict on changes of the log-probabilities, from `start` as the margins before."""
    count = len(chosen)
    start = torch.full((count,), -1.0) if start is None else start
    before = scores(0, -50 + start, torch.full((count,), -50.0))
    after = scores(9, before.chosen + chosen, before.rejected + rejected)
    arguments = {"examples": examples_of(count), "before": before, "after": after, "step": 9, "advice": "raise it"}
    return judge(**(arguments | changes))


def test_pairs_that_turned_right_make_it_better():
    start = torch.cat([torch.full((6,), -1.0), torch.full((26,), 1.0)])
    verdict = judged(0.02 * noise(1, 1.0), -4 + noise(2, 0.1), start)
    assert verdict.outcome == "better"
    assert verdict.sentence.startswith(
        "held-out accuracy 0.81 → 1.00 of 32 pairs by log-probability (95 % interval +0.02 to +0.34), margin"
    )
    assert verdict.sentence.endswith("chosen answers kept their likelihood")
    assert (verdict.accuracy.before, verdict.accuracy.after) == (26 / 32, 1.0)
    assert verdict.margin.value == pytest.approx(4.0, abs=0.1)
    assert verdict.margin_grew == 1.0


def test_verdict_says_that_chosen_answers_became_less_likely():
    verdict = judged(-5 + noise(1, 0.5), -9 + noise(2, 0.5))
    assert verdict.outcome == "better"
    assert "chosen answers became less likely (-5." in verdict.sentence


def test_change_under_the_noise_is_none():
    verdict = judged(noise(1, 0.5), noise(2, 0.5))
    assert verdict.outcome == "unchanged"
    assert verdict.sentence.startswith("no measurable change: held-out accuracy 0.")
    assert verdict.sentence.endswith("raise it")


def test_certain_change_that_is_too_small_to_matter_is_none():
    """Every margin grew by 0.01 nats: sure, and of no use."""
    assert judged(torch.full((COUNT,), 0.01), torch.zeros(COUNT)).outcome == "unchanged"
    assert judged(torch.full((COUNT,), 0.2), torch.zeros(COUNT)).outcome == "better"


def test_large_changes_without_direction_ask_for_data_and_not_for_a_rate():
    change, start = noise(1, 5.0, COUNT // 2), noise(2, 3.0, COUNT // 2)
    verdict = judged(torch.cat([change, -change]), torch.zeros(COUNT), torch.cat([start, -start]))
    assert verdict.outcome == "unchanged"
    assert "raise it" not in verdict.sentence
    assert "cleaner pairs" in verdict.sentence


def test_margins_that_fell_make_it_worse():
    verdict = judged(-3 + noise(1, 0.5), noise(2, 0.5), torch.full((COUNT,), 1.0))
    assert verdict.outcome == "worse"
    assert verdict.sentence.startswith("worse than before training: held-out accuracy 1.00 → 0.00")


def test_accuracy_and_margin_in_opposite_directions_are_mixed():
    """24 pairs lose their small lead, 8 win a large one."""
    change = torch.cat([torch.full((24,), -1.0), torch.full((8,), 40.0)])
    assert judged(change + noise(1, 0.01), torch.zeros(COUNT), torch.full((COUNT,), 0.5)).outcome == "mixed"


def test_few_prompts_make_no_claim():
    verdict = judged(torch.full((8,), 5.0), torch.zeros(8))
    assert verdict.outcome == "unknown"
    measured, _, why = verdict.sentence.partition(": ")
    assert measured == "held-out accuracy 0.00 → 1.00 of 8 pairs by log-probability"
    assert why == "too few prompts to say more (8, of 20 at least)"


def test_many_pairs_of_few_prompts_make_no_claim():
    of_four = [replace(each, prompt=examples_of()[index % 4].prompt) for index, each in enumerate(examples_of())]
    verdict = judged(torch.full((COUNT,), 5.0), torch.zeros(COUNT), examples=of_four)
    assert (verdict.outcome, verdict.pairs, verdict.prompts) == ("unknown", 32, 4)


def test_one_pair_has_no_interval():
    found = judged(torch.full((1,), 5.0), torch.zeros(1)).as_json()
    assert (found["margin"], found["pairs"]) == ({"value": 5.0, "low": None, "high": None}, 1)


def test_pairs_without_finite_scores_are_left_out():
    chosen = torch.full((COUNT,), 5.0)
    chosen[3] = -torch.inf
    verdict = judged(chosen, torch.zeros(COUNT))
    assert (verdict.pairs, verdict.margin.value) == (COUNT - 1, 5.0)
    assert judged(torch.full((COUNT,), torch.nan), torch.zeros(COUNT)).outcome == "unknown"


def test_scores_of_another_step_are_not_the_results():
    verdict = judged(torch.full((COUNT,), 5.0), torch.zeros(COUNT), step=6)
    assert (verdict.outcome, verdict.accuracy) == ("unknown", None)


def test_scores_from_the_middle_of_a_run_are_not_its_start():
    """As of a run that resumed from a checkpoint without them."""
    late = scores(3, torch.zeros(COUNT), torch.zeros(COUNT))
    verdict = judged(torch.full((COUNT,), 5.0), torch.zeros(COUNT), before=late)
    assert (verdict.outcome, verdict.accuracy) == ("unknown", None)


def test_without_held_out_data_the_verdict_says_so():
    verdict = judge([], None, None, 9, "")
    assert verdict.outcome == "unknown"
    assert "heldout_share" in verdict.sentence


def completions(count: int, desirable: float, undesirable: float):
    """Desirable and undesirable completions of prompts of their own, and the verdict on their changes."""
    labels = [index % 2 == 0 for index in range(count)]
    examples = [replace(make_example(line, 8, 5), label=label) for line, label in enumerate(labels)]
    is_good = torch.tensor(labels)
    undefined = torch.full((count,), torch.nan)
    start, change = torch.full((count,), -50.0), torch.where(is_good, desirable, undesirable) + noise(3, 0.2, count)
    before = scores(0, start.where(is_good, undefined), start.where(~is_good, undefined))
    after = scores(9, (start + change).where(is_good, undefined), (start + change).where(~is_good, undefined))
    return judge(examples, before, after, 9, "raise it")


def test_single_completions_are_judged_by_their_classes():
    verdict = completions(40, 1.0, -2.0)
    assert (verdict.outcome, verdict.accuracy, verdict.pairs) == ("better", None, 40)
    assert verdict.margin.value == pytest.approx(3.0, abs=0.2)
    assert "desirable answers became likelier (+1." in verdict.sentence
    assert completions(40, -2.0, 1.0).outcome == "worse"
    assert completions(40, 0.0, 0.0).outcome == "unchanged"


def test_completions_of_one_pair_are_compared_with_each_other():
    good = examples_of(24, label=True)
    bad = [replace(each, label=False) for each in examples_of(24, label=True)]
    undefined = torch.full((24,), torch.nan)
    start = torch.full((24,), -50.0)
    before = scores(0, torch.cat([start, undefined]), torch.cat([undefined, start + 1]))
    after = scores(9, torch.cat([start + 3, undefined]), torch.cat([undefined, start]))
    verdict = judge([*good, *bad], before, after, 9, "")
    assert (verdict.outcome, verdict.pairs) == ("better", 24)
    assert verdict.margin.value == pytest.approx(4.0)
    assert (verdict.accuracy.before, verdict.accuracy.after) == (0.0, 1.0)


def test_no_number_is_a_negative_zero():
    verdict = judged(torch.full((COUNT,), -0.001), torch.zeros(COUNT))
    assert "margin +0.0 nats (+0.0 to +0.0)" in verdict.sentence


def test_margins_that_moved_within_the_noise_are_not_said_to_be_up():
    """A margin that moved by 2 nats up or down at random, then one that moved by 2 nats up."""
    signs = torch.tensor([1.0, -1.0] * (COUNT // 2))
    within, beyond = (judged(change, torch.zeros(COUNT)).sentence for change in (2 * signs, torch.full((COUNT,), 2.0)))
    assert "margin +0.0 nats (" in within
    assert "up in" not in within
    assert "and up in 100% of them" in beyond


# The change that a learning rate allows.


def train_of(**changes) -> TrainSection:
    return TrainSection.model_validate({"schedule": "constant", "warmup_ratio": 0.0} | changes)


def test_largest_change_is_that_of_adam_steps_in_one_direction():
    """Sign steps on B, as AdamW takes under a gradient that keeps its sign, and the layer's output after them."""
    torch.manual_seed(0)
    adapter = AdapterSection(rank=16, alpha=32)
    size, steps, rate = 1024, 50, 1e-4
    bound = 1 / size**0.5
    a = torch.empty(16, size).uniform_(-bound, bound)
    inputs = torch.randn(400, size)
    changes = []
    for each in inputs:
        b = torch.zeros(16)
        for _ in range(steps):
            b += rate * (a @ each).sign()  # the direction that raises this output fastest
        changes.append(float(32 / 16 * b @ (a @ each)))
    mean = sum(changes) / len(changes)
    assert largest_change(adapter, train_of(learning_rate=rate), steps) == pytest.approx(mean, rel=0.05)


def test_rslora_has_the_larger_scale():
    plain, stabilized = (AdapterSection(rank=16, alpha=32, rslora=rslora) for rslora in (False, True))
    train = train_of(learning_rate=1e-5)
    assert largest_change(stabilized, train, 10) == pytest.approx(4 * largest_change(plain, train, 10))


def recipe_of(**train) -> Recipe:
    tables = {"model": {"base": "x"}, "data": {"train": "x"}, "loss": {"name": "x"}, "train": train}
    return Recipe.model_validate(tables)


def test_full_fine_tunings_rate_is_warned_of_in_a_short_run():
    warning = idle_rate_warning(recipe_of(learning_rate=5e-7), 50)
    assert "learning_rate = 5e-07 over 50 steps" in warning
    suggested = better_rate(recipe_of(learning_rate=5e-7), 50)
    assert f"to try, learning_rate = {suggested:g}" in warning
    assert idle_rate_warning(recipe_of(learning_rate=suggested), 50) is None


def test_usual_rates_are_not_warned_of():
    assert idle_rate_warning(recipe_of(learning_rate=5e-6), 1000) is None
    assert idle_rate_warning(recipe_of(learning_rate=5e-5), 100) is None
    recipe = recipe_of(learning_rate=5e-7)
    assert largest_change(recipe.adapter, recipe.train, 1000) > LEAST_CHANGE
    assert idle_rate_warning(recipe, 1000) is None


def test_start_adapter_is_not_judged_by_a_new_ones_size():
    recipe = recipe_of(learning_rate=5e-7)
    started = recipe.model_copy(update={"adapter": AdapterSection(start="folder")})
    assert idle_rate_warning(started, 50) is None


# A run's own.


def test_result_json_has_the_verdict(make_recipe, tmp_path):
    folder = qpref.train(make_recipe({"train.max_steps": 2, "model.device": "cpu"}), output=tmp_path / "run").path
    verdict = json.loads((folder / "result.json").read_text())["verdict"]
    assert (verdict["outcome"], verdict["pairs"], verdict["steps"]) == ("unknown", 4, [0, 2])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = (row for row in rows if row["split"] == "eval")
    change = last["eval_logps/chosen"] - first["eval_logps/chosen"]
    assert verdict["chosen"]["value"] == pytest.approx(change, abs=1e-4)
    assert verdict["accuracy"]["before"] == pytest.approx(first["eval_logps/accuracies"])
    assert verdict["accuracy"]["after"] == pytest.approx(last["eval_logps/accuracies"])
    growth = (last["eval_logps/chosen"] - last["eval_logps/rejected"]) - (
        first["eval_logps/chosen"] - first["eval_logps/rejected"]
    )
    assert verdict["margin"]["value"] == pytest.approx(growth, abs=1e-4)


def verdict_in(folder: Path) -> dict[str, object]:
    return json.loads((folder / "result.json").read_text())["verdict"]


def test_resumed_run_has_the_verdict_of_one_that_was_never_killed(make_recipe, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real = checkpoint.save_checkpoint

    def save(*arguments):
        real(*arguments)
        raise Killed

    recipe = make_recipe({"train.max_steps": 3, "train.save_every": 1, "model.device": "cpu"})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(Killed):
            qpref.train(recipe, output=tmp_path / "killed")
    qpref.train(recipe, output=tmp_path / "killed", resume=True)
    assert verdict_in(tmp_path / "killed") == verdict_in(qpref.train(recipe, output=tmp_path / "whole").path)


def test_verdict_is_about_the_best_steps_adapter(make_recipe, tmp_path):
    """The highest loss is asked for here, which is the first step's."""
    best = {"train.best_by": "eval_loss", "train.best_direction": "max", "train.eval_every": 1}
    folder = qpref.train(
        make_recipe({"train.max_steps": 3, "model.device": "cpu"} | best), output=tmp_path / "run"
    ).path
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    chosen = {row["step"]: row["eval_logps/chosen"] for row in rows if row["split"] == "eval"}
    step = json.loads((folder / "result.json").read_text())["adapter_step"]
    assert step < 3
    assert verdict_in(folder)["steps"] == [0, step]
    assert verdict_in(folder)["chosen"]["value"] == pytest.approx(chosen[step] - chosen[0], abs=1e-4)
