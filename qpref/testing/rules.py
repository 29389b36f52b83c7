"""The rules of the loss contract. Each is a function that raises `BrokenRule` with the values that it found."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from qpref.hooks import PairedLoss, UnpairedLoss
from qpref.hooks.metric_names import name_problem
from qpref.hooks.types import Loss, Scope
from qpref.testing.calls import BrokenRule, Built, LossInputs, NotApplicable, attempt, declared_needs
from qpref.testing.examples import Draws, Example, Scores, extreme_completions, extreme_pairs
from qpref.testing.gradients import FrozenDetached, central_differences
from qpref.testing.state_rule import state_rule


def _record(record: Loss, options: Any) -> None:
    """Require a known kind of record, with a summary and a description of each option."""
    if not isinstance(record, PairedLoss | UnpairedLoss):
        raise BrokenRule(f"is a {type(record).__name__}, not a PairedLoss or an UnpairedLoss")
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
    detaches = record.detaches is not None and bool(attempt("detaches", record.detaches, options))
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


def _dtype(record: Loss, options: Any) -> None:
    """Require losses and rewards in the dtype of the inputs, at its precision."""
    built = Built(record, options)
    for dtype in (torch.float32, torch.float64):
        output = built(built.given(Draws().examples(8), dtype=dtype))
        for name, value in {"losses": output.losses, **_tensors(output.metrics)}.items():
            if value.dtype != dtype and name.startswith(("losses", "rewards/")):
                raise BrokenRule(f"{name} of {dtype} inputs are {value.dtype}")
    losses = output.losses.detach()
    if torch.equal(losses, losses.float().double()) and not torch.equal(losses, losses.round()):
        raise BrokenRule("float64 inputs give values of float32 precision: it casts on the way")


def _finite(record: Loss, options: Any) -> None:
    """Require finite values and gradients wherever a policy can get to, in float32 and float64."""
    built = Built(record, options)
    batches = extreme_pairs() if built.paired else extreme_completions("mismatched" in built.needs)
    for dtype, examples in itertools.product((torch.float32, torch.float64), batches):
        given = built.given(examples, dtype=dtype)
        losses, gradients = built.gradient(given, torch.ones(len(examples), dtype=dtype))
        if not losses.isfinite().all():
            example = examples[int((~losses.isfinite()).nonzero()[0])]
            raise BrokenRule(f"{losses[~losses.isfinite()][0]} in {_name(dtype)} at {example}")
        for (name, _), gradient in zip(given.leaves.items(), gradients, strict=True):
            if not gradient.isfinite().all():
                raise BrokenRule(
                    f"gradient {gradient[~gradient.isfinite()][0]} in {_name(dtype)} at "
                    f"{_owner(examples, name, int((~gradient.isfinite()).nonzero()[0]))}"
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _owner(examples: Sequence[Example], leaf: str, index: int) -> Example:
    """Return the example that a token of a leaf belongs to."""
    for example in examples:
        tokens = {"rejected": example.second.policy, "prompt": example.prompt}.get(leaf, example.first.policy)
        if index < len(tokens):
            return example
        index -= len(tokens)
    raise IndexError(index)


def _independence(record: Loss, options: Any) -> None:
    """Require independence from other examples or, in a wider scope, from the order of what it may depend on."""
    built = Built(record, options)
    examples = Draws().examples(6)
    together = built.values(examples)
    order = [4, 2, 0, 5, 1, 3]
    permuted = built.values([examples[index] for index in order])
    # A sum over the step is taken in a different order.
    if not _same(permuted, together[order], 1e-12 if record.scope_of(options) == "example" else 1e-9):
        raise BrokenRule(f"in another order, {_list(together[order])} become {_list(permuted)}")
    scope = record.scope_of(options)
    if scope == "step":
        return
    given = [built.given([example]) for example in examples]
    if scope == "mismatched":
        given = [_with_mismatched_of(each, built.given(examples)) for each in given]
    alone = torch.cat([built(each).losses.detach() for each in given])
    if not _same(alone, together, 1e-12):
        raise BrokenRule(f"each alone, {_list(together)} become {_list(alone)}; if that is meant, its scope is 'step'")


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
            raise BrokenRule(f"called {called}, {_list(first)} become {_list(second)}")


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
        raise NotApplicable("it doesn't declare where it starts")
    declared = attempt("starts_at", float, declared)
    examples = [
        replace(example, margin=0.0, first=_untrained(example.first), second=_untrained(example.second))
        for example in Draws().examples(6)
    ]
    values = Built(record, options).values(examples)
    if not _same(values, torch.full_like(values, declared), 1e-9):
        raise BrokenRule(f"declares {declared:.10g}, and starts at {_list(values)}")


def _untrained(scores: Scores) -> Scores:
    return replace(scores, reference=scores.policy)


def _direction(record: Loss, options: Any) -> None:
    """Require a gradient that raises chosen against rejected, or a completion by its label, from the reference on.

    A loss with a flipped sign trains as smoothly as the right one, and its own rewards may follow it.
    """
    built = Built(record, options)
    examples = [
        replace(example, margin=0.0, first=_untrained(example.first), second=_untrained(example.second))
        for example in Draws().examples(6)
    ]
    raised = [replace(one, first=replace(one.first, policy=0.9 * one.first.policy)) for one in examples]
    before, after = _metrics_of(built, examples), _metrics_of(built, raised)
    for name in ("rewards/chosen", "rewards/rejected") if not built.paired else ("rewards/chosen",):
        if bool((_metric(after, name) < _metric(before, name)).any()):
            raise BrokenRule(f"{name} falls where the response becomes more probable")
    if not record.is_monotone:
        raise NotApplicable("it declares that it isn't monotone")
    given = built.given(examples)
    _, (first, *rest) = built.gradient(given, torch.ones(len(examples), dtype=torch.float64))
    slopes = [float(part.sum()) for part in first.split([len(one.first.policy) for one in examples])]
    if built.paired:
        others = rest[0].split([len(one.second.policy) for one in examples])
        slopes = [slope - float(other.sum()) for slope, other in zip(slopes, others, strict=True)]
    for slope, example in zip(slopes, examples, strict=True):
        if slope * (1 if built.paired or example.desirable else -1) > 0:
            wanted = "chosen against rejected" if built.paired else "the completion as its label says"
            raise BrokenRule(f"where policy and reference are the same, its gradient doesn't raise {wanted}: {example}")


def _log_ratios(record: Loss, options: Any) -> None:
    """Require that shifting policy and reference alike changes nothing."""
    if not record.log_ratios_only:
        raise NotApplicable("it doesn't declare log_ratios_only")
    built = Built(record, options)
    examples = Draws().examples(6)
    shifted = [replace(example, first=_shifted(example.first), second=_shifted(example.second)) for example in examples]
    before, after = built.values(examples), built.values(shifted)
    if not _same(after, before, 1e-9):
        raise BrokenRule(f"policy and reference shifted alike, {_list(before)} become {_list(after)}")


def _shifted(scores: Scores) -> Scores:
    shift = torch.linspace(-0.3, -1.7, len(scores.policy), dtype=torch.float64)
    return replace(scores, policy=scores.policy + shift, reference=scores.reference + shift)


def _swap(record: Loss, options: Any) -> None:
    """Require that exchanging chosen and rejected exchanges their rewards."""
    if not isinstance(record, PairedLoss):
        raise NotApplicable("it isn't paired")
    built = Built(record, options)
    examples = Draws().examples(6)
    rewards = _metrics_of(built, examples)
    exchanged = _metrics_of(built, [replace(one, first=one.second, second=one.first) for one in examples])
    for name, other in (("rewards/chosen", "rewards/rejected"), ("rewards/rejected", "rewards/chosen")):
        before, after = _metric(rewards, name), _metric(exchanged, other)
        if not _same(after, before, 1e-9):
            raise BrokenRule(f"{name} of {_list(before)} become {other} of {_list(after)}")


def _metrics(record: Loss, options: Any) -> None:
    """Require the usual reward metrics: consistent, one detached value per example."""
    built = Built(record, options)
    examples = Draws().examples(6)
    metrics = _metrics_of(built, examples)
    for name, value in metrics.items():
        if value.shape != (len(examples),):
            raise BrokenRule(f"{name} has the shape {tuple(value.shape)}, not ({len(examples)},)")
        if value.requires_grad:
            raise BrokenRule(f"{name} is not detached")
    chosen, rejected = _metric(metrics, "rewards/chosen"), _metric(metrics, "rewards/rejected")
    if not built.paired:
        desirable = torch.tensor([example.desirable for example in examples])
        if not (torch.equal(chosen.isnan(), ~desirable) and torch.equal(rejected.isnan(), desirable)):
            raise BrokenRule("rewards/chosen has to be NaN where undesirable alone, rewards/rejected where desirable")
        return
    margins, accuracies = _metric(metrics, "rewards/margins"), _metric(metrics, "rewards/accuracies")
    if not _same(margins, chosen - rejected, 1e-9):
        raise BrokenRule(f"rewards/margins are {_list(margins)}, not chosen less rejected, {_list(chosen - rejected)}")
    expected = (chosen > rejected) + 0.5 * (chosen == rejected)
    if not _same(accuracies, expected, 1e-9):
        raise BrokenRule(f"rewards/accuracies are {_list(accuracies)}, not {_list(expected)}")


def _metrics_of(built: Built, examples: Sequence[Example]) -> dict[str, Tensor]:
    return _tensors(built(built.given(examples)).metrics)


def _metric(metrics: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in metrics:
        raise BrokenRule(f"no metric {name}")
    return metrics[name]


def _tensors(metrics: Any) -> dict[str, Tensor]:
    if not isinstance(metrics, Mapping):
        raise BrokenRule(f"returns metrics as {type(metrics).__name__}, not by name")
    for name, value in metrics.items():
        if problem := name_problem(name):
            raise BrokenRule(f"returns a metric that {problem}")
        if not isinstance(value, Tensor):
            raise BrokenRule(f"returns the metric {name} as {type(value).__name__}, not a tensor")
    return dict(metrics)


def _same(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return actual.shape == expected.shape and torch.allclose(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance
    )


def _list(values: Tensor) -> str:
    return ", ".join(f"{value:.10g}" for value in values.flatten().tolist())


RULES: Mapping[str, Callable[[Loss, Any], None]] = {
    "record": _record,
    "needs": _needs,
    "one value per example": _one_value_per_example,
    "dtype": _dtype,
    "gradient": _gradient,
    "finite": _finite,
    "independence": _independence,
    "no state": _no_state,
    "state": state_rule,
    "start": _start,
    "direction": _direction,
    "log ratios": _log_ratios,
    "swap": _swap,
    "metrics": _metrics,
}
"""Rule -> a function of the record and its parsed options that raises `BrokenRule`, or `NotApplicable`, or nothing."""


PREREQUISITES = ("record", "needs", "one value per example")
"""Rules that must hold for the others to be meaningful."""
