"""Each rule of the conformance list catches a loss that breaks it, and a sound loss passes all of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, UnpairedLoss, reward_metrics, unpaired_reward_metrics
from qpref.hooks.types import Loss
from qpref.records import LossOutput
from qpref.testing import PREREQUISITES, RULES, assert_conforms, check_loss
from qpref_plugins.loss_lists import qpref_losses as list_losses


class SoundOptions(Options):
    """Options of a sound loss."""

    beta: float = Field(default=0.1, gt=0, description="The scale of the rewards.")


def paired_rewards(inputs, beta=0.1):
    policy, reference = inputs.policy, inputs.reference
    return (
        beta * (policy.chosen.total - reference.chosen.total),
        beta * (policy.rejected.total - reference.rejected.total),
    )


def build_paired(options):
    def sound(inputs):
        chosen, rejected = paired_rewards(inputs, options.beta)
        return LossOutput(
            losses=-logsigmoid(chosen - rejected - inputs.margin), metrics=reward_metrics(chosen, rejected)
        )

    return sound


def unpaired_rewards(inputs, beta=0.1):
    return beta * (inputs.policy.total - inputs.reference.total)


def build_unpaired(options):
    def sound(inputs):
        rewards = unpaired_rewards(inputs, options.beta)
        kl = options.beta * (inputs.mismatched_policy.mean - inputs.mismatched_reference.mean).mean().clamp(min=0)
        losses = 1 - torch.sigmoid((rewards - kl) * (2 * inputs.desirable.to(rewards.dtype) - 1))
        return LossOutput(losses=losses, metrics=unpaired_reward_metrics(rewards, inputs.desirable))

    return sound


PAIRED = PairedLoss(
    name="sound",
    summary="a sound loss",
    options=SoundOptions,
    build=build_paired,
    starts_at=lambda options: math.log(2),
    log_ratios_only=True,
    variants=({"beta": 0.5}, {"beta": 2.0}),
)
LISTED = next(record for record in list_losses() if record.name == "plackett_luce")
UNPAIRED = UnpairedLoss(
    name="sound",
    summary="a sound loss",
    options=SoundOptions,
    build=build_unpaired,
    needs=frozenset({"reference", "mismatched"}),
    scope="step",
    starts_at=lambda options: 0.5,
    log_ratios_only=True,
    variants=({"beta": 0.5},),
)

OF_STEPS_MISMATCHED = replace(UNPAIRED, scope="mismatched")


def with_losses(sound, change):
    """The sound loss with `change(losses, inputs)` in place of its losses."""

    def build(options):
        function = sound.build(options)

        def changed(inputs):
            output = function(inputs)
            return LossOutput(losses=change(output.losses, inputs), metrics=output.metrics)

        return changed

    return replace(sound, build=build)


def with_metrics(sound, change):
    """The sound loss with `change(metrics, losses)` in place of its metrics."""

    def build(options):
        function = sound.build(options)

        def changed(inputs):
            output = function(inputs)
            return LossOutput(losses=output.losses, metrics=change(dict(output.metrics), output.losses))

        return changed

    return replace(sound, build=build)


def with_inputs(sound, change):
    """The sound loss on changed inputs: what it computes is smooth, finite and of the right shape."""
    return replace(sound, build=lambda options: lambda inputs: sound.build(options)(change(inputs)))


def exchanged(pair):
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen)


def without_the_first_tokens(inputs):
    """Hold the first token of each response at its value."""

    def held(scores):
        parts = [torch.cat([part[:1].detach(), part[1:]]) for part in scores.values.split(scores.lengths)]
        return replace(scores, values=torch.cat(parts))

    policy = inputs.policy
    return replace(inputs, policy=replace(policy, chosen=held(policy.chosen), rejected=held(policy.rejected)))


def raising(*_):
    raise KeyError("temperature")


class Undescribed(SoundOptions):
    tau: float = 1.0


class Demanding(SoundOptions):
    tau: float = Field(description="Without a default.")


class CountedCalls:
    def __init__(self):
        self.calls = itertools.count(1)

    def __call__(self, losses, inputs):
        return losses + next(self.calls)


def wrong_gradient(losses, inputs):
    changed = losses * 1.0
    if changed.requires_grad:
        changed.register_hook(lambda gradient: 1.01 * gradient)
    return changed


def spoilt_in_place(losses, inputs):
    inputs.reference.values.mul_(1.0001) if hasattr(inputs.reference, "values") else inputs.margin.add_(1)
    return losses


def naive(losses, inputs):
    return -torch.log(torch.sigmoid(-losses.expm1().log()))


def own_rewards(inputs):
    return inputs.policy.chosen.total if hasattr(inputs.policy, "chosen") else inputs.policy.total


def blind_to_class(options):
    def blind(inputs):
        rewards = unpaired_rewards(inputs)
        metrics = unpaired_reward_metrics(rewards, inputs.desirable)
        return LossOutput(losses=torch.where(inputs.desirable, 0.5, 0.25) - rewards, metrics=metrics)

    return blind


def lopsided(metrics, losses):
    return reward_metrics(metrics["rewards/chosen"], 0.5 * metrics["rewards/rejected"])


BOTH = {
    "record": [
        lambda sound: replace(sound, summary=""),
        lambda sound: replace(sound, summary="two\nlines"),
        lambda sound: replace(sound, options=Undescribed),
        lambda sound: replace(sound, options=dict),
        lambda sound: replace(sound, options=Demanding, variants=()),
        lambda sound: replace(sound, variants=[{"bta": 1.0}]),
        lambda sound: replace(sound, scope="batch"),
    ],
    "needs": [
        lambda sound: replace(sound, needs=frozenset()),
        lambda sound: replace(sound, needs=frozenset({"reference", "mismatched", "prompt"})),
        lambda sound: replace(sound, needs=frozenset({"hidden_states"})),
        lambda sound: replace(sound, needs=raising),
    ],
    "one value per example": [
        lambda sound: with_losses(sound, lambda losses, inputs: losses.mean()),
        lambda sound: with_losses(sound, lambda losses, inputs: losses.squeeze()),
        lambda sound: with_losses(sound, lambda losses, inputs: losses.detach()),
        lambda sound: with_losses(sound, lambda losses, inputs: losses.tolist()),
        lambda sound: with_losses(sound, raising),
        lambda sound: replace(sound, build=raising),
        lambda sound: replace(sound, build=lambda options: lambda inputs: None),
    ],
    "dtype": [
        lambda sound: with_losses(sound, lambda losses, inputs: losses.double()),
        lambda sound: with_metrics(sound, lambda metrics, losses: metrics | {"rewards/chosen": losses.detach().half()}),
        lambda sound: with_losses(sound, lambda losses, inputs: losses.float().to(losses.dtype)),
    ],
    "gradient": [
        lambda sound: with_losses(sound, wrong_gradient),
        lambda sound: replace(with_losses(sound, wrong_gradient), detaches=lambda options: True),
        lambda sound: with_losses(sound, lambda losses, inputs: losses * losses.detach()),
        lambda sound: with_losses(sound, lambda losses, inputs: 0 * losses + 1),
        lambda sound: replace(sound, detaches=raising),
    ],
    "finite": [
        lambda sound: with_losses(sound, naive),
        lambda sound: with_losses(sound, lambda losses, inputs: losses + torch.log(-own_rewards(inputs))),
        # The value is finite, the gradient of the branch not taken isn't.
        lambda sound: with_losses(
            sound,
            lambda losses, inputs: losses + torch.where(losses < 1e9, 0.0, torch.log(-own_rewards(inputs))),
        ),
    ],
    "no state": [
        lambda sound: with_losses(sound, CountedCalls()),
        lambda sound: with_losses(sound, spoilt_in_place),
        lambda sound: with_losses(sound, lambda losses, inputs: losses + torch.rand(1)),
    ],
    "state": [lambda sound: replace(sound, scope="step", state={"mean": 0.0})],
    "start": [
        lambda sound: replace(sound, starts_at=lambda options: 1.0),
        lambda sound: replace(sound, starts_at=raising),
        lambda sound: replace(sound, starts_at=lambda options: "one"),
    ],
    "log ratios": [
        lambda sound: with_losses(sound, lambda losses, inputs: losses + 1e-3 * own_rewards(inputs)),
    ],
    "metrics": [
        lambda sound: with_metrics(sound, lambda metrics, losses: metrics | {"extra": losses}),
        lambda sound: with_metrics(sound, lambda metrics, losses: metrics | {"extra": losses.detach().mean()}),
        lambda sound: with_metrics(sound, lambda metrics, losses: metrics | {"extra": 1.0}),
        lambda sound: with_metrics(sound, lambda metrics, losses: list(metrics)),
        lambda sound: with_metrics(sound, lambda metrics, losses: {"rewards/chosen": metrics["rewards/chosen"]}),
        lambda sound: with_metrics(
            sound, lambda metrics, losses: {name: value.nan_to_num(0.5) * 2 + 1 for name, value in metrics.items()}
        ),
    ],
}
ONE_KIND = [
    (
        "direction",
        lambda: with_inputs(
            PAIRED,
            lambda inputs: replace(inputs, policy=exchanged(inputs.policy), reference=exchanged(inputs.reference)),
        ),
    ),
    ("direction", lambda: with_inputs(UNPAIRED, lambda inputs: replace(inputs, desirable=~inputs.desirable))),
    ("direction", lambda: with_losses(PAIRED, lambda losses, inputs: 2 * math.log(2) - losses)),
    ("direction", lambda: with_losses(UNPAIRED, lambda losses, inputs: 1 - losses)),
    ("reward", lambda: with_metrics(PAIRED, lambda metrics, losses: {n: -v for n, v in metrics.items()})),
    ("used needs", lambda: replace(PAIRED, needs=frozenset({"reference", "prompt"}))),
    ("margin", lambda: with_inputs(PAIRED, lambda inputs: replace(inputs, margin=0 * inputs.margin))),
    ("every token", lambda: with_inputs(PAIRED, without_the_first_tokens)),
    ("device", lambda: with_losses(PAIRED, lambda losses, inputs: losses * torch.ones(1, dtype=losses.dtype))),
    ("record", lambda: Loss(name="x", summary="of no kind", options=SoundOptions, build=build_paired)),
    ("independence", lambda: with_losses(PAIRED, lambda losses, inputs: losses - losses.mean())),
    ("independence", lambda: with_losses(PAIRED, lambda losses, inputs: losses * torch.arange(1, len(losses) + 1))),
    ("record", lambda: replace(PAIRED, scope="mismatched")),
    ("independence", lambda: replace(UNPAIRED, scope="example")),
    ("independence", lambda: with_losses(OF_STEPS_MISMATCHED, lambda losses, inputs: losses - losses.mean())),
    ("independence", lambda: with_losses(UNPAIRED, lambda losses, inputs: losses.sort().values)),
    ("scale", lambda: with_losses(replace(PAIRED, scope="step"), lambda losses, inputs: losses / len(losses))),
    (
        "reference",
        lambda: with_inputs(PAIRED, lambda inputs: replace(inputs, reference=exchanged(inputs.reference))),
    ),
    ("start", lambda: replace(UNPAIRED, build=blind_to_class)),
    ("swap", lambda: with_metrics(PAIRED, lopsided)),
    ("lists", lambda: with_losses(LISTED, lambda losses, inputs: -losses)),
]
BROKEN = [
    *(
        pytest.param(rule, lambda spoil=spoil, sound=sound: spoil(sound), id=f"{rule}-{kind}-{number}")
        for rule, spoils in BOTH.items()
        for number, spoil in enumerate(spoils)
        for kind, sound in (("paired", PAIRED), ("unpaired", UNPAIRED))
    ),
    *(pytest.param(rule, make, id=f"{rule}-{number}") for number, (rule, make) in enumerate(ONE_KIND)),
]


def broken_rules(record, *rules):
    return {result.rule for result in check_loss(record, *rules) if result.status == "broken"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "record",
    [PAIRED, UNPAIRED, LISTED, OF_STEPS_MISMATCHED],
    ids=["paired", "unpaired", "listed", "of the step's mismatched"],
)
def test_a_sound_loss_keeps_each_rule(record, rule):
    assert_conforms(record, rule)


@pytest.mark.parametrize(("rule", "make"), BROKEN)
def test_a_loss_that_breaks_a_rule_is_caught_under_its_name(rule, make):
    assert rule in broken_rules(make(), *PREREQUISITES, rule)


def test_every_rule_has_a_loss_that_breaks_it():
    assert {*BOTH, *(rule for rule, _ in ONE_KIND)} == set(RULES)


def test_every_table_of_options_is_checked():
    tables = {str(dict(result.options)) for result in check_loss(PAIRED)}
    assert tables == {"{}", "{'beta': 0.5}", "{'beta': 2.0}"}


def test_a_variant_alone_can_break_a_rule():
    def build(options):
        sharp = options.beta == 2.0
        return with_losses(
            PAIRED, (lambda losses, inputs: losses.float()) if sharp else (lambda losses, _: losses)
        ).build(options)

    broken = [result for result in check_loss(replace(PAIRED, build=build)) if result.status == "broken"]
    assert {str(dict(result.options)) for result in broken} == {"{'beta': 2.0}"}


def test_options_without_a_default_are_taken_from_the_variants():
    record = replace(PAIRED, options=Demanding, variants=({"tau": 2.0},))
    results = [result for result in check_loss(record) if result.status != "skipped"]
    assert {(str(dict(result.options)), result.status) for result in results} == {("{'tau': 2.0}", "passed")}


def test_where_a_loss_starts_may_depend_on_its_options():
    class Shifted(SoundOptions):
        shift: Literal["none", "learned"] = Field(default="none", description="No constant where learned.")

    record = replace(
        PAIRED,
        options=Shifted,
        starts_at=lambda options: math.log(2) if options.shift == "none" else None,
        variants=({"shift": "learned"},),
    )
    results = check_loss(record, "start")
    assert [(dict(result.options), result.status) for result in results] == [
        ({}, "passed"),
        ({"shift": "learned"}, "skipped"),
    ]


def without_gradient(losses):
    with torch.no_grad():
        return losses.exp()


@pytest.mark.parametrize(
    "weight",
    [
        lambda losses: losses.detach().exp(),
        lambda losses: losses.data.exp(),
        lambda losses: without_gradient(losses),
        lambda losses: losses.mean().exp().item(),
    ],
    ids=["detach", "data", "no_grad", "item"],
)
@pytest.mark.parametrize("sound", [PAIRED, UNPAIRED], ids=["paired", "unpaired"])
def test_a_detached_weight_is_found_and_is_held_still_where_the_record_declares_it(sound, weight):
    record = with_losses(sound, lambda losses, inputs: losses * weight(losses))
    assert broken_rules(record, "gradient") == {"gradient"}
    assert broken_rules(replace(record, detaches=lambda options: True), "gradient") == set()


def test_what_a_loss_raises_is_in_the_message():
    (result, *_) = check_loss(with_losses(PAIRED, raising), "one value per example")
    assert result.message == "1 example: the loss raised KeyError: 'temperature'"


def test_a_loss_that_cannot_be_called_is_not_blamed_under_every_rule():
    record = with_losses(PAIRED, raising)
    assert broken_rules(record) == {"one value per example"}


def test_a_cast_on_the_way_spoils_the_finite_differences_too():
    record = with_losses(PAIRED, lambda losses, inputs: losses.float().to(losses.dtype))
    assert broken_rules(record) >= {"dtype", "gradient"}


def test_the_assertion_names_every_broken_rule():
    record = replace(with_losses(PAIRED, wrong_gradient), starts_at=lambda options: 1.0, variants=())
    with pytest.raises(AssertionError, match=r"loss 'sound' breaks its contract\n  gradient .*\n    .*\n  start .*"):
        assert_conforms(record)


def test_the_example_of_the_docstring_runs():
    import qpref.testing

    lines = [line for line in qpref.testing.__doc__.splitlines() if line.startswith("    ")]
    source = "\n".join(line[4:] for line in lines).replace("from acme_losses import qpref_losses", "")
    namespace = {"qpref_losses": lambda: [PAIRED]}
    exec(source, namespace)
    namespace["test_loss_conforms"](PAIRED, "gradient")
    with pytest.raises(AssertionError):
        namespace["test_loss_conforms"](with_losses(PAIRED, wrong_gradient), "gradient")


def build_masked(options):
    def masked(inputs):
        sides = []
        for policy, reference in zip(
            (inputs.policy.chosen, inputs.policy.rejected),
            (inputs.reference.chosen, inputs.reference.rejected),
            strict=True,
        ):
            assert policy.tokens.shape == policy.mask.shape == policy.entropy.shape == policy.values.shape
            assert policy.tokens.dtype == torch.int64
            assert policy.mask.dtype == torch.bool
            assert all(part.any() for part in policy.mask.split(list(policy.lengths)))
            weights = policy.mask / (1 + policy.entropy) / (1 + policy.tokens)
            sides.append(replace(policy, values=weights * (policy.values - reference.values)).total)
        return LossOutput(losses=-logsigmoid(sides[0] - sides[1] - inputs.margin), metrics=reward_metrics(*sides))

    return masked


def test_a_loss_of_tokens_masks_and_entropies_is_checked_with_them():
    record = replace(PAIRED, build=build_masked, needs=frozenset({"reference", "tokens", "entropy"}))
    assert_conforms(record)
    for missing in ("tokens", "entropy"):
        with pytest.raises(AssertionError, match="uses inputs that it doesn't declare"):
            assert_conforms(replace(record, needs=record.needs - {missing}), "needs")
