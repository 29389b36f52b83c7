"""The rules of the loss contract. Each is a function that raises `BrokenRule` with the values that it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from qpref.hooks import ListLoss, PairedLoss, UnpairedLoss
from qpref.hooks.types import IGNORABLE, Loss, Scope
from qpref.testing.calls import BrokenRule, Built, LossInputs, NotApplicable, attempt, declared_needs
from qpref.testing.device_rule import check_device
from qpref.testing.examples import Draws, Scores, untrained
from qpref.testing.finite_rule import check_finite
from qpref.testing.gradients import FrozenDetached, central_differences
from qpref.testing.learning_rules import check_direction, check_every_token, check_margin, check_reward, ignored
from qpref.testing.list_rule import check_lists
from qpref.testing.outputs import listed, metric, metrics_of, same, tensors
from qpref.testing.reference_rule import check_reference
from qpref.testing.state_rule import state_rule
from qpref.testing.step_rule import check_scale
from qpref.testing.used_rule import check_used_needs


def _record(record: Loss, options: Any) -> None:
    """Require a known kind of record, with a summary and a description of each option."""
    if not isinstance(record, PairedLoss | ListLoss | UnpairedLoss):
        raise BrokenRule(f"is a {type(record).__name__}, not a PairedLoss, ListLoss or UnpairedLoss")
    if not isinstance(record.summary, str) or len(record.summary.splitlines()) != 1:
        raise BrokenRule("its summary is not one line")
    fields = record.options.model_fields
    bare = [name for name, field in fields.items() if not (field.description or "").strip()]
    if bare:
        raise BrokenRule(f"no description of the option {', '.join(bare)}")
    scope = attempt("scope", record.scope_of, options)
    if scope not in get_args(Scope):
        raise BrokenRule(f"its scope is {scope!r}, not one of {', '.join(map(repr, get_args(Scope)))}")
    if scope == "mismatched" and "mismatched" not in declared_needs(record, options):
        raise BrokenRule("its scope is 'mismatched', which it doesn't need")
    columns = attempt("columns", record.columns_of, options)
    if isinstance(columns, str) or not all(isinstance(name, str) and name for name in columns):
        raise BrokenRule(f"its columns are {columns!r}, not a tuple of names")
    if unknown := sorted(map(str, ignored(record, options) - IGNORABLE)):
        raise BrokenRule(f"declares that it ignores {', '.join(unknown)}; that can be {', '.join(sorted(IGNORABLE))}")
    if taken := {"name", "weight"} & set(fields):
        raise BrokenRule(f"its option {min(taken)} is the recipe's own key")


def _needs(record: Loss, options: Any) -> None:
    """Require needs that exist for this kind of loss, and no use of undeclared ones."""
    needs = declared_needs(record, options)
    known = record.may_need
    unknown = sorted(map(str, needs - known))
    if unknown:
        raise BrokenRule(f"declares {', '.join(unknown)}; this kind of loss may need {', '.join(sorted(known))}")
    examples = Draws().examples(4)
    try:
        built = Built(record, options)
        built(built.given(examples, needs=known))
    except BrokenRule:
        return  # it fails even with all inputs: "one value per example" reports that
    try:
        built(built.given(examples))
    except BrokenRule as error:
        raise BrokenRule(f"uses inputs that it doesn't declare: {error}") from error


def _one_value_per_example(record: Loss, options: Any) -> None:
    """Require [N] losses with gradient for N examples."""
    built = Built(record, options)
    for count in (1, 2, 5):
        try:
            built(built.given(Draws().examples(count)))
        except BrokenRule as error:
            raise BrokenRule(f"{count} example{'s' if count > 1 else ''}: {error}") from error


def _gradient(record: Loss, options: Any) -> None:
    """Compare automatic differentiation with central differences, within 1e-4; detached values stay fixed."""
    detaches = _detaches(record, options)
    built = Built(record, options)
    moves = False
    for seed in (1, 2):
        given = built.given(Draws(seed).examples(4), class_counts=(30, 20))
        weights = torch.tensor([1.0, 0.7, 1.3, 0.9], dtype=torch.float64)
        losses, gradients = built.gradient(given, weights)
        function = FrozenDetached(built, given, weights, detaches)
        allowed = 1e-8 * max(1.0, float(losses.abs().sum()))
        for (name, leaf), exact in zip(given.leaves.items(), gradients, strict=True):
            estimate = central_differences(function, leaf)
            moves |= bool(exact.any())
            off = (exact - estimate).abs() - 1e-4 * torch.maximum(exact.abs(), estimate.abs()) - allowed
            worst = int(off.argmax())
            if not off[worst] <= 0:
                raise BrokenRule(
                    f"in a token of the {name}: gradient {exact[worst]:.6g}, finite difference {estimate[worst]:.6g}"
                    + ("" if detaches else "; a loss that detaches something on purpose says so in 'detaches'")
                )
    if not moves:
        raise BrokenRule("the gradient of every random example is 0: it trains nothing")


def _detaches(record: Loss, options: Any) -> bool:
    return record.detaches is not None and bool(attempt("detaches", record.detaches, options))


def _dtype(record: Loss, options: Any) -> None:
    """Require losses and rewards in the dtype of the inputs, at its precision."""
    built = Built(record, options)
    for dtype in (torch.float32, torch.float64):
        output = built(built.given(Draws().examples(8), dtype=dtype))
        for name, value in {"losses": output.losses, **tensors(output.metrics)}.items():
            if value.dtype != dtype and name.startswith(("losses", "rewards/")):
                raise BrokenRule(f"{name} of {dtype} inputs are {value.dtype}")
    rewards = {name: output.metrics[name] for name in REWARDS if name in output.metrics}
    for name, value in {"losses": output.losses.detach(), **rewards}.items():
        defined = value[~value.isnan()]
        if torch.equal(defined, defined.float().double()) and not torch.equal(defined, defined.round()):
            raise BrokenRule(f"{name} of float64 inputs have the precision of float32: it casts on the way")


REWARDS = ("rewards/chosen", "rewards/rejected")


def _independence(record: Loss, options: Any) -> None:
    """Require independence from other examples or, in a wider scope, from the order of what it may depend on."""
    built = Built(record, options)
    examples = Draws().examples(6)
    together = built.values(examples)
    order = [4, 2, 0, 5, 1, 3]
    permuted = built.values([examples[index] for index in order])
    # A sum over the step is taken in a different order.
    if not same(permuted, together[order], 1e-12 if record.scope_of(options) == "example" else 1e-9):
        raise BrokenRule(f"in another order, {listed(together[order])} become {listed(permuted)}")
    scope = record.scope_of(options)
    if scope == "step":
        return
    given = [built.given([example]) for example in examples]
    if scope == "mismatched":
        given = [_with_mismatched_of(each, built.given(examples)) for each in given]
    alone = torch.cat([built(each).losses.detach() for each in given])
    if not same(alone, together, 1e-12):
        raise BrokenRule(
            f"each alone, {listed(together)} become {listed(alone)}; if that is meant, its scope is 'step'"
        )


def _with_mismatched_of(given: LossInputs, step: LossInputs) -> LossInputs:
    """Give a loss the mismatched completions of a whole step, as the core does in scope "mismatched"."""
    named = {name: getattr(step.inputs, name) for name in ("mismatched_policy", "mismatched_reference")}
    return replace(given, inputs=replace(given.inputs, **named))


def _no_state(record: Loss, options: Any) -> None:
    """Require equal values for equal inputs, and inputs left unmodified."""
    built = Built(record, options)
    given, other = built.given(Draws().examples(5)), built.given(Draws(9).examples(4))
    tensors = _all_tensors(given.inputs)
    before = [tensor.detach().clone() for tensor in tensors]
    first = built(given).losses.detach()
    if not all(map(torch.equal, tensors, before)):
        raise BrokenRule("it changes its inputs in place")
    built(other)
    for called, function in (("again", built), ("rebuilt", Built(record, options))):
        second = function(given).losses.detach()
        if not torch.equal(first, second):
            raise BrokenRule(f"called {called}, {listed(first)} become {listed(second)}")
    quiet = built.given(Draws().examples(5))
    for leaf in quiet.leaves.values():
        leaf.requires_grad_(False)
    with torch.no_grad():
        evaluated = built(quiet).losses
    if not same(evaluated, first, 1e-12):
        raise BrokenRule(f"in an evaluation, without gradients, {listed(first)} become {listed(evaluated)}")


def _all_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for one in value.values() for tensor in _all_tensors(one)]
    names = getattr(type(value), "__dataclass_fields__", ())
    return [tensor for name in names for tensor in _all_tensors(getattr(value, name))]


def _start(record: Loss, options: Any) -> None:
    """Require the loss that `starts_at` declares while policy and reference are the same."""
    declared = None if record.starts_at is None else attempt("starts_at", record.starts_at, options)
    if declared is None:
        raise NotApplicable("it doesn't declare where it starts" + _undeclared_start(record, options))
    declared = attempt("starts_at", float, declared)
    values = _starting_values(record, options)
    if not same(values, torch.full_like(values, declared), 1e-9):
        raise BrokenRule(f"declares {declared:.10g}, and starts at {listed(values)}")


def _undeclared_start(record: Loss, options: Any) -> str:
    """Say where a loss with a reference starts, if it is a constant: declared, every run would check it."""
    if "reference" not in declared_needs(record, options):
        return ""
    values = _starting_values(record, options)
    if not same(values, values[:1].expand_as(values), 1e-9):
        return ", which is no constant"
    return f": starts_at = {values[0]:.10g} would be checked in every run"


def _starting_values(record: Loss, options: Any) -> Tensor:
    """Return [6] losses while policy and reference are the same and no row has a margin."""
    examples = [
        replace(example, margin=0.0, first=untrained(example.first), second=untrained(example.second))
        for example in Draws().examples(6)
    ]
    return Built(record, options).values(examples)


def _log_ratios(record: Loss, options: Any) -> None:
    """Require that shifting policy and reference alike changes nothing."""
    if not record.log_ratios_only:
        raise NotApplicable("it doesn't declare log_ratios_only")
    built = Built(record, options)
    examples = Draws().examples(6)
    shifted = [replace(example, first=_shifted(example.first), second=_shifted(example.second)) for example in examples]
    before, after = built.values(examples), built.values(shifted)
    if not same(after, before, 1e-9):
        raise BrokenRule(f"policy and reference shifted alike, {listed(before)} become {listed(after)}")


def _shifted(scores: Scores) -> Scores:
    shift = torch.linspace(-0.3, -1.7, len(scores.policy), dtype=torch.float64)
    return replace(scores, policy=scores.policy + shift, reference=scores.reference + shift)


def _swap(record: Loss, options: Any) -> None:
    """Require that exchanging chosen and rejected exchanges their rewards."""
    if not isinstance(record, PairedLoss):
        raise NotApplicable("it isn't paired")
    if record.scope_of(options) == "step" and _detaches(record, options):
        raise NotApplicable("what it detaches of the step may depend on which response is which")
    built = Built(record, options)
    examples = Draws().examples(6)
    rewards = metrics_of(built, examples)
    exchanged = metrics_of(built, [replace(one, first=one.second, second=one.first) for one in examples])
    for name, other in (("rewards/chosen", "rewards/rejected"), ("rewards/rejected", "rewards/chosen")):
        before, after = metric(rewards, name), metric(exchanged, other)
        if not same(after, before, 1e-9):
            raise BrokenRule(f"{name} of {listed(before)} become {other} of {listed(after)}")


def _metrics(record: Loss, options: Any) -> None:
    """Require the usual reward metrics: consistent, one detached value per example."""
    built = Built(record, options)
    examples = Draws().examples(6)
    metrics = metrics_of(built, examples)
    for name, value in metrics.items():
        if value.shape != (len(examples),):
            raise BrokenRule(f"{name} has the shape {tuple(value.shape)}, not ({len(examples)},)")
        if value.requires_grad:
            raise BrokenRule(f"{name} is not detached")
    chosen, rejected = metric(metrics, "rewards/chosen"), metric(metrics, "rewards/rejected")
    if not built.paired:
        desirable = torch.tensor([example.desirable for example in examples])
        if not (torch.equal(chosen.isnan(), ~desirable) and torch.equal(rejected.isnan(), desirable)):
            raise BrokenRule("rewards/chosen has to be NaN where undesirable alone, rewards/rejected where desirable")
        return
    margins, accuracies = metric(metrics, "rewards/margins"), metric(metrics, "rewards/accuracies")
    if not same(margins, chosen - rejected, 1e-9):
        raise BrokenRule(
            f"rewards/margins are {listed(margins)}, not chosen less rejected, {listed(chosen - rejected)}"
        )
    expected = (chosen > rejected) + 0.5 * (chosen == rejected)
    if not same(accuracies, expected, 1e-9):
        raise BrokenRule(f"rewards/accuracies are {listed(accuracies)}, not {listed(expected)}")


RULES: Mapping[str, Callable[[Loss, Any], None]] = {
    "record": _record,
    "needs": _needs,
    "one value per example": _one_value_per_example,
    "used needs": check_used_needs,
    "dtype": _dtype,
    "gradient": _gradient,
    "finite": check_finite,
    "independence": _independence,
    "scale": check_scale,
    "no state": _no_state,
    "state": state_rule,
    "start": _start,
    "direction": check_direction,
    "reference": check_reference,
    "reward": check_reward,
    "margin": check_margin,
    "every token": check_every_token,
    "device": check_device,
    "log ratios": _log_ratios,
    "swap": _swap,
    "metrics": _metrics,
    "lists": check_lists,
}
"""Rule -> a function of the record and its parsed options that raises `BrokenRule`, or `NotApplicable`, or nothing."""


PREREQUISITES = ("record", "needs", "one value per example")
"""Rules that must hold for the others to be meaningful."""
