"""Losses that are wrong in one way each, and losses that only look odd: the rules tell them apart.

Each wrong one computes and trains without an error; what it learns, or reports, isn't what its author meant.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from qpref.hooks import (
    Field,
    ListLoss,
    Options,
    PairedLoss,
    UnpairedLoss,
    list_reward_metrics,
    reward_metrics,
    unpaired_reward_metrics,
)
from qpref.records import LossOutput
from qpref.testing import PREREQUISITES, assert_conforms, check_loss
from qpref.testing.advice import ADVICE, advice_on
from qpref.testing.rules import RULES

LOSSES: dict[str, tuple[str, PairedLoss | ListLoss | UnpairedLoss]] = {}
"""Name -> the rule that has to name it, and the record."""
SOUND: dict[str, PairedLoss | ListLoss | UnpairedLoss] = {}
LABELS = ("chosen", "rejected")


class Beta(Options):
    """The option of all of them."""

    beta: float = Field(default=0.1, gt=0, description="reward per nat")


class Scored(Beta):
    """A weight for the column that the rows have."""

    share: float = Field(default=0.5, ge=0, description="weight of the column")


def paired(function, **changes):
    record = {"options": Beta, "summary": "a loss on pairs", "build": lambda options: lambda i: function(options, i)}
    return PairedLoss(**{"name": function.__name__} | record | changes)


def unpaired(function, **changes):
    record = {
        "options": Beta,
        "summary": "a loss on completions",
        "build": lambda options: lambda i: function(options, i),
    }
    return UnpairedLoss(**{"name": function.__name__} | record | changes)


def listed(function, **changes):
    record = {"options": Beta, "summary": "a loss on lists", "build": lambda options: lambda i: function(options, i)}
    return ListLoss(**{"name": function.__name__} | record | changes)


def wrong(rule, make=paired, **changes):
    """Register a wrong loss under the rule that has to name it."""

    def register(function):
        LOSSES[function.__name__] = (rule, make(function, **changes))
        return function

    return register


def sound(make=paired, **changes):
    def register(function):
        SOUND[function.__name__] = make(function, **changes)
        return function

    return register


def rewards(options, inputs):
    policy, reference = inputs.policy, inputs.reference
    return [options.beta * (getattr(policy, side).total - getattr(reference, side).total) for side in LABELS]


def output(losses, chosen, rejected):
    return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected))


def dpo(options, inputs, change=lambda losses: losses):
    chosen, rejected = rewards(options, inputs)
    return output(change(-logsigmoid(chosen - rejected - inputs.margin)), chosen, rejected)


@wrong("direction")
def sides_exchanged(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-logsigmoid(rejected - chosen - inputs.margin), chosen, rejected)


@wrong("direction")
def a_term_with_the_wrong_sign(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-logsigmoid(chosen + rejected - inputs.margin), chosen, rejected)


@wrong("direction")
def a_mean_with_the_wrong_sign(options, inputs):
    chosen, rejected = (options.beta * getattr(inputs.policy, side).mean for side in LABELS)
    return output(-logsigmoid(chosen + rejected - inputs.margin), chosen, rejected)


LOSSES["a_mean_with_the_wrong_sign"] = ("direction", paired(a_mean_with_the_wrong_sign, needs=frozenset()))


@wrong("direction")
def minus_forgotten(options, inputs):
    return dpo(options, inputs, lambda losses: 5 - losses)


@wrong("direction")
def rejected_left_out(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-logsigmoid(chosen - inputs.margin), chosen, rejected)


@wrong("direction")
def policy_of_the_chosen_side_for_both(options, inputs):
    chosen, rejected = rewards(options, inputs)
    second = options.beta * (inputs.policy.chosen.total - inputs.reference.rejected.total)
    return output(-logsigmoid(chosen - 0.5 * second - inputs.margin), chosen, rejected)


def completion_reward(options, inputs):
    return options.beta * (inputs.policy.total - inputs.reference.total)


def ranked_first(options, inputs):
    """The best response of each list against the others."""
    rewards_of_all = options.beta * (inputs.policy.total - inputs.reference.total)
    losses = [
        -(each + margin * (ranks > 1)).log_softmax(0)[ranks == 1].mean()
        for each, ranks, margin in zip(
            inputs.by_list(rewards_of_all), inputs.by_list(inputs.ranks), inputs.margin, strict=True
        )
    ]
    return LossOutput(losses=torch.stack(losses), metrics=list_reward_metrics(rewards_of_all, inputs))


@wrong("direction", unpaired)
def label_unused(options, inputs):
    reward = completion_reward(options, inputs)
    return LossOutput(losses=(-reward).sigmoid(), metrics=unpaired_reward_metrics(reward, inputs.desirable))


@wrong("direction", unpaired)
def label_inverted(options, inputs):
    reward = completion_reward(options, inputs)
    losses = reward.where(inputs.desirable, -reward).sigmoid()
    return LossOutput(losses=losses, metrics=unpaired_reward_metrics(reward, inputs.desirable))


@wrong("direction", unpaired)
def undesirable_left_out(options, inputs):
    reward = completion_reward(options, inputs)
    losses = (-reward).where(inputs.desirable, 0.0 * reward).sigmoid()
    return LossOutput(losses=losses, metrics=unpaired_reward_metrics(reward, inputs.desirable))


@wrong("reward")
def rewards_exchanged(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-logsigmoid(chosen - rejected - inputs.margin), rejected, chosen)


@wrong("reward")
def rewards_negated(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-logsigmoid(chosen - rejected - inputs.margin), -chosen, -rejected)


@wrong("reward")
def rewards_of_the_reference(options, inputs):
    chosen, rejected = rewards(options, inputs)
    own = [getattr(inputs.reference, side).total for side in LABELS]
    return output(-logsigmoid(chosen - rejected - inputs.margin), *own)


@wrong("reward", unpaired)
def reward_negated(options, inputs):
    reward = completion_reward(options, inputs)
    losses = (-reward).where(inputs.desirable, reward).sigmoid()
    return LossOutput(losses=losses, metrics=unpaired_reward_metrics(-reward, inputs.desirable))


@wrong("margin")
def margin_left_out(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-logsigmoid(chosen - rejected), chosen, rejected)


@wrong("margin")
def margin_added(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-logsigmoid(chosen - rejected + inputs.margin), chosen, rejected)


@wrong("margin", ignores=frozenset({"margin"}))
def margin_used_though_ignored(options, inputs):
    return dpo(options, inputs)


def by_token(options, inputs, keep):
    """Rewards of the tokens that `keep` leaves of each response."""
    sides = []
    for side in LABELS:
        policy, reference = getattr(inputs.policy, side), getattr(inputs.reference, side)
        ratios = (policy.values - reference.values).split(policy.lengths)
        sides.append(options.beta * torch.stack([keep(ratio).sum() for ratio in ratios]))
    return output(-logsigmoid(sides[0] - sides[1] - inputs.margin), *sides)


@wrong("every token")
def last_token_left_out(options, inputs):
    return by_token(options, inputs, lambda ratio: ratio[:-1])


@wrong("every token")
def first_token_left_out(options, inputs):
    return by_token(options, inputs, lambda ratio: ratio[1:])


@wrong("every token")
def second_token_left_out(options, inputs):
    return by_token(options, inputs, lambda ratio: torch.cat([ratio[:1], ratio[2:]]))


@wrong("every token")
def two_tokens_at_most(options, inputs):
    return by_token(options, inputs, lambda ratio: ratio[:2])


@wrong("device")
def weights_on_the_cpu(options, inputs):
    return dpo(options, inputs, lambda losses: losses * torch.ones(len(losses), dtype=losses.dtype))


@wrong("device")
def mask_on_the_cpu(options, inputs):
    return dpo(options, inputs, lambda losses: losses * (torch.arange(len(losses)) >= 0))


@wrong("device")
def device_by_name(options, inputs):
    return dpo(options, inputs, lambda losses: losses * torch.full((1,), 1.0, dtype=losses.dtype, device="cpu"))


@wrong("device")
def moved_to_the_cpu(options, inputs):
    return dpo(options, inputs, lambda losses: losses * losses.detach().cpu().sign())


@wrong("device")
def moved_to_the_cpu_by_name(options, inputs):
    return dpo(options, inputs, lambda losses: losses * losses.detach().to("cpu").sign())


@wrong("device")
def weights_by_a_constructor(options, inputs):
    return dpo(options, inputs, lambda losses: losses * torch.DoubleTensor([1.0]))


@wrong("device")
def weights_by_the_oldest_constructor(options, inputs):
    return dpo(options, inputs, lambda losses: losses * torch.Tensor([1.0]).to(losses.dtype))


@wrong("device")
def memory_of_numpy(options, inputs):
    return dpo(options, inputs, lambda losses: losses * torch.from_numpy(np.ones(1)).to(losses.dtype))


def made_while_building(options):
    scale = torch.tensor([options.beta], dtype=torch.float64)

    def loss(inputs):
        return dpo(options, inputs, lambda losses: losses * scale.to(losses.dtype))

    return loss


LOSSES["made_while_building"] = ("device", replace(paired(made_while_building), build=made_while_building))


@wrong("one value per example")
def mean_of_the_batch(options, inputs):
    return dpo(options, inputs, lambda losses: losses.mean())


@wrong("one value per example")
def sum_of_the_batch(options, inputs):
    return dpo(options, inputs, lambda losses: losses.sum())


@wrong("one value per example")
def a_column(options, inputs):
    return dpo(options, inputs, lambda losses: losses[:, None])


@wrong("one value per example")
def one_value_per_token(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-(inputs.policy.chosen.values - inputs.reference.chosen.values), chosen, rejected)


@wrong("one value per example")
def policy_detached(options, inputs):
    return dpo(options, inputs, lambda losses: losses.detach())


@wrong("gradient", detaches=lambda options: True)
def detached_but_for_a_zero(options, inputs):
    """Declaring `detaches` doesn't hide that nothing is learned."""
    return dpo(options, inputs, lambda losses: losses.detach() + 0 * losses)


@wrong("gradient")
def chosen_detached(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-logsigmoid(chosen.detach() - rejected - inputs.margin), chosen, rejected)


@wrong("independence")
def mean_for_everybody(options, inputs):
    return dpo(options, inputs, lambda losses: losses.mean().expand(len(losses)))


@wrong("independence")
def batch_normalized(options, inputs):
    chosen, rejected = rewards(options, inputs)
    gap = chosen - rejected
    return output(-logsigmoid(gap - gap.mean().detach() - inputs.margin), chosen, rejected)


@wrong("independence")
def padded(options, inputs):
    """The mean over the padded length: short responses weigh less beside long ones."""
    sides = []
    for side in LABELS:
        policy, reference = getattr(inputs.policy, side), getattr(inputs.reference, side)
        sides.append(pad_sequence((policy.values - reference.values).split(policy.lengths)).mean(0))
    return output(-logsigmoid(sides[0] - sides[1] - inputs.margin), *sides)


@wrong("dtype")
def cast_to_float32(options, inputs):
    return dpo(options, inputs, lambda losses: losses.float())


@wrong("finite")
def log_of_a_sigmoid(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-(chosen - rejected - inputs.margin).sigmoid().log(), chosen, rejected)


@wrong("finite", scope="step", detaches=lambda options: True)
def deviation_of_a_single_example(options, inputs):
    """The variance of one example is 0 / 0."""
    chosen, rejected = rewards(options, inputs)
    gap = chosen - rejected
    spread = (gap - gap.mean()).square().sum().detach() / (len(gap) - 1)
    return output(-logsigmoid(gap / (0.1 + spread) - inputs.margin), chosen, rejected)


@wrong("finite", scope="step", detaches=lambda options: True)
def deviation_of_equal_examples(options, inputs):
    chosen, rejected = rewards(options, inputs)
    gap = chosen - rejected
    return output(-logsigmoid(gap / gap.detach().std(correction=0) - inputs.margin), chosen, rejected)


@wrong("finite")
def share_of_equal_rewards(options, inputs):
    chosen, rejected = rewards(options, inputs)
    share = (chosen - rejected) / (chosen.abs() + rejected.abs())
    return output(-logsigmoid(share - inputs.margin), chosen, rejected)


@wrong("no state")
def margin_changed_in_place(options, inputs):
    found = dpo(options, inputs)
    inputs.margin.add_(0.01)
    return found


@wrong("no state")
def policy_changed_in_place(options, inputs):
    with torch.no_grad():
        inputs.policy.chosen.values.mul_(1.001)
    return dpo(options, inputs)


CALLS = []


@wrong("no state")
def a_counter(options, inputs):
    CALLS.append(1)
    return dpo(options, inputs, lambda losses: losses * (1 + 0.01 * len(CALLS)))


class Bare(Options):
    """An option without a description."""

    beta: float = 0.1


@wrong("record", options=Bare)
def undescribed(options, inputs):
    return dpo(options, inputs)


@wrong("state", scope="step", state={"mean": 0.0})
def state_that_never_changes(options, inputs):
    return dpo(options, inputs, lambda losses: losses + inputs.state["mean"])


@wrong("record", ignores=frozenset({"margins"}))
def ignores_something_unknown(options, inputs):
    return dpo(options, inputs)


@wrong("needs")
def reads_the_prompt(options, inputs):
    return dpo(options, inputs, lambda losses: losses - 0.1 * inputs.policy.prompt.mean)


@wrong("used needs")
def reference_left_out(options, inputs):
    chosen, rejected = (options.beta * getattr(inputs.policy, side).total for side in LABELS)
    return output(-logsigmoid(chosen - rejected - inputs.margin), chosen, rejected)


@wrong("used needs", needs=frozenset({"reference", "prompt"}))
def prompt_left_out(options, inputs):
    return dpo(options, inputs)


@wrong("start", starts_at=lambda options: 0.5)
def starts_elsewhere(options, inputs):
    return dpo(options, inputs)


@wrong("log ratios", log_ratios_only=True)
def a_term_of_the_policy(options, inputs):
    return dpo(options, inputs, lambda losses: losses - 0.1 * inputs.policy.chosen.mean)


@wrong("log ratios", log_ratios_only=True)
def reference_of_one_side(options, inputs):
    chosen, rejected = options.beta * inputs.policy.chosen.total, rewards(options, inputs)[1]
    return output(-logsigmoid(chosen - rejected - inputs.margin), chosen, rejected)


@wrong("swap")
def rejected_counted_half(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-logsigmoid(chosen - rejected - inputs.margin), chosen, 0.5 * rejected)


def with_metrics(rule, name, change):
    def loss(options, inputs):
        chosen, rejected = rewards(options, inputs)
        losses = -logsigmoid(chosen - rejected - inputs.margin)
        return LossOutput(losses=losses, metrics=reward_metrics(chosen, rejected) | change(chosen, rejected))

    LOSSES[name] = (rule, replace(paired(loss), name=name))


with_metrics("metrics", "rewards_attached", lambda chosen, rejected: {"rewards/chosen": chosen})
with_metrics(
    "metrics", "a_metric_of_the_batch", lambda chosen, rejected: {"acme/gap": (chosen - rejected).detach().mean()}
)
with_metrics("metrics", "a_metric_too_short", lambda chosen, rejected: {"acme/gap": chosen.detach()[1:]})
with_metrics("metrics", "a_number_for_a_metric", lambda chosen, rejected: {"acme/gap": 1.0})
with_metrics("metrics", "the_columns_step", lambda chosen, rejected: {"step": chosen.detach()})
with_metrics("metrics", "the_columns_loss", lambda chosen, rejected: {"loss": chosen.detach()})
with_metrics(
    "metrics", "accuracy_without_ties", lambda chosen, rejected: {"rewards/accuracies": (chosen < rejected).double()}
)
with_metrics(
    "finite",
    "a_reward_of_equal_ones",
    lambda chosen, rejected: {"rewards/margins": ((chosen - rejected) ** 2 / (chosen - rejected)).detach()},
)


@wrong("scale", scope="step")
def divided_by_the_examples_of_the_step(options, inputs):
    return dpo(options, inputs, lambda losses: losses / len(losses))


@wrong("scale", scope="step")
def sum_for_everybody(options, inputs):
    return dpo(options, inputs, lambda losses: losses.sum().expand(len(losses)))


@wrong("scale", scope="step", detaches=lambda options: True)
def weights_that_sum_to_one(options, inputs):
    return dpo(options, inputs, lambda losses: losses * losses.detach().softmax(0))


@wrong("reference")
def difference_of_references_added(options, inputs):
    chosen, rejected = rewards(options, inputs)
    reference = inputs.reference
    twice = 2 * options.beta * (reference.chosen.total - reference.rejected.total)
    return output(-logsigmoid(chosen - rejected + twice - inputs.margin), chosen, rejected)


@wrong("reference")
def reference_added(options, inputs):
    sides = [options.beta * (getattr(inputs.policy, s).total + getattr(inputs.reference, s).total) for s in LABELS]
    return output(-logsigmoid(sides[0] - sides[1] - inputs.margin), *sides)


@wrong("reference")
def total_less_mean(options, inputs):
    sides = [options.beta * (getattr(inputs.policy, s).total - getattr(inputs.reference, s).mean) for s in LABELS]
    return output(-logsigmoid(sides[0] - sides[1] - inputs.margin), *sides)


@wrong("reference", unpaired)
def reference_added_to_a_completion(options, inputs):
    reward = options.beta * (inputs.policy.total + inputs.reference.total)
    losses = (-reward).where(inputs.desirable, reward).sigmoid()
    return LossOutput(losses=losses, metrics=unpaired_reward_metrics(reward, inputs.desirable))


@wrong("used needs")
def reference_of_the_chosen_side_for_both(options, inputs):
    """It cancels."""
    chosen, rejected = rewards(options, inputs)
    second = options.beta * (inputs.policy.rejected.total - inputs.reference.chosen.total)
    return output(-logsigmoid(chosen - second - inputs.margin), chosen, rejected)


@wrong("used needs", needs=frozenset({"reference", "tokens"}))
def mask_left_out(options, inputs):
    sides = []
    for policy, reference in ((getattr(inputs.policy, side), getattr(inputs.reference, side)) for side in LABELS):
        sides.append(options.beta * policy.sum((policy.tokens >= 0) * (policy.values - reference.values)))
    return output(-logsigmoid(sides[0] - sides[1] - inputs.margin), *sides)


@wrong("used needs", columns=("score_chosen", "score_rejected"))
def second_column_left_out(options, inputs):
    return dpo(options, inputs, lambda losses: losses * inputs.columns["score_chosen"].square())


@wrong("used needs", make=listed, needs=frozenset({"reference", "scores"}))
def scores_left_out(options, inputs):
    return ranked_first(options, inputs)


@wrong("state", scope="step", state={"mean": 0.0})
def state_that_no_loss_reads(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return replace(dpo(options, inputs), state={"mean": (chosen - rejected).detach().mean()})


@wrong("state", scope="step", state={"mean": 0.0}, detaches=lambda options: True)
def state_in_half_precision(options, inputs):
    mean = inputs.state["mean"] + rewards(options, inputs)[0].detach().mean()
    return replace(dpo(options, inputs, lambda losses: losses + inputs.state["mean"]), state={"mean": mean.half()})


@wrong("no state")
def margin_in_training_alone(options, inputs):
    return dpo(options, inputs, lambda losses: losses if torch.is_grad_enabled() else losses - inputs.margin)


@wrong("no state")
def zero_without_a_gradient(options, inputs):
    return dpo(options, inputs, lambda losses: losses * float(inputs.policy.chosen.values.requires_grad))


WEIGHTS = torch.linspace(0.5, 1.5, 64, dtype=torch.float64)


def weighted_by_a_constant(options, inputs, weights):
    sides = []
    for policy, reference in ((getattr(inputs.policy, side), getattr(inputs.reference, side)) for side in LABELS):
        by_token = torch.cat([weights.repeat(length // 64 + 1)[:length] for length in policy.lengths]).to(
            policy.values.dtype
        )
        sides.append(options.beta * policy.sum(by_token * (policy.values - reference.values)))
    return output(-logsigmoid(sides[0] - sides[1] - inputs.margin), *sides)


@wrong("device")
def constant_of_the_module(options, inputs):
    return weighted_by_a_constant(options, inputs, WEIGHTS)


@wrong("dtype")
def rewards_in_half_precision(options, inputs):
    chosen, rejected = rewards(options, inputs)
    halves = [reward.half().to(reward.dtype) for reward in (chosen, rejected)]
    return output(-logsigmoid(chosen - rejected - inputs.margin), *halves)


@sound()
def tokens_that_weigh_less_and_less(options, inputs):
    return by_token(options, inputs, lambda ratio: ratio * 0.8 ** torch.arange(len(ratio), device=ratio.device))


@sound(scope="step", detaches=lambda options: True)
def beta_by_the_steps_margins(options, inputs):
    raw = [getattr(inputs.policy, side).total - getattr(inputs.reference, side).total for side in LABELS]
    beta = options.beta * (1 + 0.6 * (raw[0] - raw[1]).detach().mean().clamp(-1, 1))
    chosen, rejected = beta * raw[0], beta * raw[1]
    return output(-logsigmoid(chosen - rejected - inputs.margin), chosen, rejected)


@sound(scope="step", detaches=lambda options: True)
def baseline_of_the_step(options, inputs):
    chosen, rejected = rewards(options, inputs)
    baseline = 0.5 * (chosen + rejected).detach().mean()
    losses = -logsigmoid(chosen - baseline - inputs.margin) - logsigmoid(baseline - rejected - inputs.margin)
    return output(losses, chosen, rejected)


@sound(starts_at=lambda options: math.log(2), log_ratios_only=True)
def margin_that_is_scaled(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-logsigmoid(chosen - rejected - 2.5 * inputs.margin), chosen, rejected)


@wrong("lists", make=listed)
def only_the_first_two_of_a_list_compared(options, inputs):
    rewards_of_all = options.beta * (inputs.policy.total - inputs.reference.total)
    firsts = torch.stack([each[0] - each[1] for each in inputs.by_list(rewards_of_all)])
    losses = -logsigmoid(firsts - inputs.margin)
    return LossOutput(losses=losses, metrics=list_reward_metrics(rewards_of_all, inputs))


@sound(needs=frozenset(), ignores=frozenset({"rejected", "margin"}))
def chosen_alone(options, inputs):
    sides = [getattr(inputs.policy, side).mean for side in LABELS]
    return output(-sides[0], *sides)


@sound(detaches=lambda options: True)
def rejected_detached_as_declared(options, inputs):
    chosen, rejected = rewards(options, inputs)
    return output(-logsigmoid(chosen - rejected.detach() - inputs.margin), chosen, rejected)


@sound()
def constants_beside_the_inputs(options, inputs):
    def weighted(losses):
        weights = losses.new_ones(len(losses)) + torch.zeros_like(losses)
        return losses * weights * torch.full((1,), 2.0, dtype=losses.dtype, device=losses.device).to(losses)

    return dpo(options, inputs, weighted)


@sound()
def constant_that_is_moved(options, inputs):
    return weighted_by_a_constant(options, inputs, WEIGHTS.to(inputs.margin.device))


@sound(detaches=lambda options: True)
def reference_in_a_target_alone(options, inputs):
    """Rewards without the reference, which sets how far apart they have to be."""
    chosen, rejected = (options.beta * getattr(inputs.policy, side).mean for side in LABELS)
    target = torch.sub(*rewards(options, inputs)).detach().clamp(-1, 1)
    return output(-logsigmoid(chosen - rejected - target - inputs.margin), chosen, rejected)


@sound(columns=("score",), options=Scored, variants=({"share": 0.0},))
def column_that_an_option_switches_off(options, inputs):
    return dpo(options, inputs, lambda losses: losses + options.share * losses * inputs.columns["score"].square())


@sound(scope="step", detaches=lambda options: True)
def divided_by_the_deviation_of_the_step(options, inputs):
    """A deviation depends a little on the size of the sample."""
    chosen, rejected = rewards(options, inputs)
    gap = chosen - rejected
    spread = (gap - gap.mean()).square().sum().detach() / max(len(gap) - 1, 1)
    return output(-logsigmoid(gap / (0.1 + spread) - inputs.margin), chosen, rejected)


@sound(listed, scope="step", state={"mean": 0.0}, detaches=lambda options: True)
def mean_of_the_steps_of_lists(options, inputs):
    rewards_of_all = options.beta * (inputs.policy.total - inputs.reference.total)
    mean = 0.9 * inputs.state["mean"] + 0.1 * rewards_of_all.detach().mean()
    found = ranked_first(options, inputs)
    return replace(found, losses=found.losses * (1 + mean.square()), state={"mean": mean})


@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_loss_is_named_by_its_rule(name):
    rule, record = LOSSES[name]
    results = [
        result for result in check_loss(record, *dict.fromkeys((*PREREQUISITES, rule))) if result.status == "broken"
    ]
    assert [result.rule for result in results] == [rule]
    assert advice_on(results[0]) == ADVICE[rule]


@pytest.mark.parametrize("name", SOUND)
def test_a_loss_that_only_looks_odd_passes_all_rules(name):
    assert_conforms(SOUND[name])


def test_each_rule_has_advice_and_a_wrong_loss():
    assert set(ADVICE) == set(RULES)
    assert {rule for rule, _ in LOSSES.values()} == set(RULES)


def test_a_start_that_could_be_checked_is_named():
    messages = {result.rule: result.message for result in check_loss(SOUND["constant_that_is_moved"], "start")}
    assert messages == {
        "start": "it doesn't declare where it starts: starts_at = 0.6931471806 would be checked in every run"
    }
    (result,) = check_loss(SOUND["reference_in_a_target_alone"], "start")
    assert result.message == "it doesn't declare where it starts, which is no constant"


def test_swap_is_not_asked_of_a_step_that_detaches():
    results = {result.rule: result.status for result in check_loss(SOUND["beta_by_the_steps_margins"])}
    assert results["swap"] == "skipped"
    assert broken_by(replace(SOUND["beta_by_the_steps_margins"], detaches=None)) >= {"swap"}


def broken_by(record):
    return {result.rule for result in check_loss(record) if result.status == "broken"}


def test_a_loss_may_break_the_direction_where_its_record_says_so():
    record = LOSSES["sides_exchanged"][1]
    assert "direction" not in broken_by(replace(record, is_monotone=False))


def test_the_assertion_says_what_to_change():
    with pytest.raises(AssertionError, match=r"margin .*: a row's margin doesn't change its loss\n    subtract inputs"):
        assert_conforms(LOSSES["margin_left_out"][1])
