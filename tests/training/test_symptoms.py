"""Each symptom is warned of where it is, once, and nowhere in a healthy run."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_example

import qpref
from qpref.records import MetricRow
from qpref.training.heldout_scores import HeldoutScores
from qpref.training.length_bias import LengthGroups
from qpref.training.symptoms import RULES, History, Watch

LN_2 = math.log(2)
STEPS = 60


def watch_of(**changes) -> Watch:
    facts = {"start": LN_2, "num_heldout": 400, "length_error": 0.05, "total_steps": STEPS}
    return Watch(History(**(facts | changes)))


def row(step: int, split: str = "train", **values: float) -> MetricRow:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return MetricRow(step=step, split=split, values=named, tokens=0, seconds=0.0)


def healthy(step: int, noise: random.Random) -> dict[str, float]:
    """A run that learns: margins grow to 2, the rejected rewards fall, the chosen ones stay."""
    done = step / STEPS
    margin = 2 * done + noise.gauss(0, 0.2 * done)
    return {
        "loss": math.log1p(math.exp(-margin)),
        "rewards__margins": margin,
        "rewards__accuracies": min(1.0, 0.5 + 0.4 * done + noise.gauss(0, 0.05)),
        "rewards__chosen": noise.gauss(0, 0.05),
        "rewards__rejected": -margin,
        "grad_norm": 2.0 - done + noise.gauss(0, 0.1),
        "learning_rate": 1e-5,
    }


def found_in(changes, watch: Watch | None = None, steps: int = STEPS) -> list[str]:
    """Rules that warn of a healthy run with changed values; `changes` maps a step's share of the run to them."""
    watch, noise = watch or watch_of(), random.Random(0)
    for step in range(1, steps + 1):
        watch.look(row(step, **(healthy(step, noise) | changes(step / STEPS, noise))))
    return [each["rule"] for each in watch.found]


def test_healthy_run_has_no_symptom():
    assert found_in(lambda done, noise: {}) == []


def test_gradient_of_zero():
    assert found_in(lambda done, noise: {"grad_norm": 0.0 if done > 0.5 else 1.0}) == ["zero_gradient"]


def test_single_batches_without_a_gradient_are_no_symptom():
    """As under a hinge, where a batch may be beyond the margin."""
    watch, noise = watch_of(), random.Random(0)
    for step in range(1, STEPS + 1):
        watch.look(row(step, **(healthy(step, noise) | ({"grad_norm": 0.0} if step % 3 else {}))))
    assert watch.found == []


def flat(done: float, noise: random.Random) -> dict[str, float]:
    margin = noise.gauss(0, 0.002)
    return {
        "loss": LN_2 - margin / 2,
        "rewards__margins": margin,
        "rewards__accuracies": 0.5 + noise.gauss(0, 0.1),
        "rewards__chosen": noise.gauss(0, 0.002),
        "rewards__rejected": -margin,
    }


def test_loss_that_stays_at_its_start():
    assert found_in(flat) == ["stuck_loss"]


def test_start_is_the_losss_own_and_not_ln_2():
    def at_five(done, noise):
        return flat(done, noise) | {"loss": 5.0 + noise.gauss(0, 0.002)}

    assert found_in(at_five, watch_of(start=5.0)) == ["stuck_loss"]
    assert found_in(at_five, watch_of(start=None)) == []
    assert found_in(at_five) == []  # with margins in its rows it starts elsewhere


def test_loss_is_not_stuck_while_the_rate_warms_up():
    assert found_in(lambda done, noise: flat(done, noise) | {"learning_rate": 1e-5 * done}) == []


def test_loss_may_take_a_quarter_of_the_run_to_leave_its_start():
    watch = watch_of(total_steps=4 * STEPS + 4)
    assert found_in(flat, watch) == []


def test_chosen_log_probabilities_that_fall():
    def displaced(done, noise):
        chosen = -3 * done + noise.gauss(0, 0.1)
        return {"rewards__chosen": chosen, "rewards__rejected": chosen - 2 * done}

    assert found_in(displaced) == ["chosen_falls"]


def test_chosen_rewards_may_fall_a_little_of_what_rejected_ones_do():
    def usual(done, noise):
        return {"rewards__chosen": -0.5 * done + noise.gauss(0, 0.02), "rewards__rejected": -6 * done}

    assert found_in(usual) == []


def test_margins_that_are_saturated():
    def saturated(done, noise):
        return {"rewards__accuracies": 1.0, "grad_norm": 2.0 * math.exp(-9 * done)}

    assert found_in(saturated) == ["saturated_margins"]
    assert found_in(lambda done, noise: {"grad_norm": 2.0 * math.exp(-9 * done)}) == []  # the rate may be the reason


def test_accuracy_that_falls_along_with_the_loss():
    assert found_in(lambda done, noise: {"rewards__accuracies": 0.8 - 0.3 * done}) == ["falling_accuracy"]


@pytest.mark.parametrize(("count", "symptoms"), [(400, ["falling_accuracy"]), (20, [])])
def test_held_out_accuracy_that_falls_while_the_training_loss_does(count, symptoms):
    """From 0.8 to 0.65: of 400 pairs 5 standard errors, of 20 one."""
    watch, noise = watch_of(num_heldout=count), random.Random(0)
    watch.look(row(0, "eval", **{"eval_rewards/accuracies": 0.99}))  # by log-probability, so no start to fall from
    for step in range(1, STEPS + 1):
        watch.look(row(step, **healthy(step, noise)))
        if step in (30, 60):
            watch.look(row(step, "eval", **{"eval_rewards/accuracies": 0.8 if step == 30 else 0.65}))
    assert [each["rule"] for each in watch.found] == symptoms


@pytest.mark.parametrize(("bias", "symptoms"), [(0.2, ["length_grows"]), (0.1, []), (-0.5, [])])
def test_policy_that_comes_to_prefer_longer_answers(bias, symptoms):
    watch = watch_of()
    watch.look(row(9, "eval", **{"eval_logps/length_bias": bias}))
    assert [each["rule"] for each in watch.found] == symptoms


def test_each_symptom_is_warned_of_once(caplog):
    assert len(found_in(flat)) == 1
    assert len(caplog.records) == 1
    assert caplog.records[0].rule == "stuck_loss"
    assert f"the loss is {LN_2:.3f}"[:-1] in caplog.records[0].getMessage()


def test_resumed_run_warns_of_nothing_a_second_time(caplog):
    """The rows of a run of 40 steps, as metrics.jsonl has them, then 20 more; and a damaged line."""
    first, noise = watch_of(), random.Random(0)
    lines = [b"{damaged", b"[]"]
    for step in range(1, 41):
        values = row(step, **(healthy(step, noise) | flat(0.5, noise))).values
        first.look(MetricRow(step=step, split="train", values=values, tokens=0, seconds=0.0))
        lines.append(json.dumps({"step": step, "split": "train", **values, "tokens": 0, "seconds": None}).encode())
    caplog.clear()
    resumed = watch_of()
    resumed.replay(b"\n".join(lines))
    assert resumed.found == first.found != []
    for step in range(41, 61):
        resumed.look(row(step, **(healthy(step, noise) | flat(0.5, noise))))
    assert not caplog.records


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_section_that_a_rule_names_is_in_the_manual(rule):
    page, _, section = rule.page.partition("#")
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    headings = [line.lstrip("#").strip().lower() for line in text.splitlines() if line.startswith("#")]
    assert section in ["".join(c for c in heading.replace(" ", "-") if c.isalnum() or c == "-") for heading in headings]


# Length bias.


def pairs(*lengths: tuple[int, int]):
    return [make_example(line, 8, *both) for line, both in enumerate(lengths)]


def biased(examples, growth: list[float]) -> float:
    before = HeldoutScores(step=0, chosen=torch.zeros(len(growth)), rejected=torch.zeros(len(growth)))
    after = replace(before, step=9, chosen=torch.tensor(growth))
    return LengthGroups.of(examples).bias(before, after)


def test_length_bias_is_the_difference_of_two_shares():
    examples = pairs((9, 5), (9, 5), (9, 5), (9, 5), (5, 9), (5, 9), (7, 7))
    assert biased(examples, [1, 1, 1, -1, 1, -1, -1]) == pytest.approx(3 / 4 - 1 / 2)
    assert LengthGroups.of(examples).error == pytest.approx(math.sqrt((1 / 4 + 1 / 2) / 4))


def test_length_bias_without_one_of_the_groups_is_unknown():
    groups = LengthGroups.of(pairs((9, 5), (7, 7)))
    assert math.isnan(biased(pairs((9, 5), (7, 7)), [1, 1]))
    assert math.isinf(groups.error)


# A run's own.


def test_run_logs_its_scheduled_options_and_names_its_reference(make_recipe, tmp_path, caplog):
    schedule = {"start": 0.1, "end": 0.3}
    with caplog.at_level("INFO", "qpref"):
        folder = qpref.train(make_recipe({"loss.beta": schedule, "model.device": "cpu"}), output=tmp_path / "run").path
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [each["option/beta"] for each in rows if each["split"] == "train"] == pytest.approx([0.1, 0.2, 0.3])
    assert "reference: the base, with its adapter off" in caplog.messages
    assert json.loads((folder / "run.json").read_text())["reference"] == "the base, with its adapter off"


def test_run_with_a_rate_that_changes_nothing_is_warned_at_its_start(make_recipe, tmp_path, said):
    changes = {"train.learning_rate": 5e-7, "train.max_steps": 1, "model.device": "cpu"}
    folder = qpref.train(make_recipe(changes), output=tmp_path / "run").path
    [warning] = [each for each in said if "learning_rate" in each]
    assert "[train] learning_rate = 5e-07 over 1 steps" in warning
    recorded = json.loads((folder / "result.json").read_text())["warnings"]
    assert recorded == [{"rule": "idle_rate", "step": 0, "message": warning}]
