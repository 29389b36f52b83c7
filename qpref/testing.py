"""What every loss has to hold, for the tests of whoever writes one; `qpref losses check` runs the same list.

    import pytest
    from qpref.testing import RULES, assert_conforms
    from acme_losses import qpref_losses

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("record", list(qpref_losses()), ids=lambda record: record.name)
    def test_loss_conforms(record, rule):
        assert_conforms(record, rule)

Each rule is checked with the loss's default options and with every table of its `variants`. The inputs are made here,
the same each time, in float64 unless a rule says otherwise; nothing but the record is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qpref.hooks import Options, PairedLoss, UnpairedLoss
from qpref.hooks.types import Loss
from qpref.records import LossOutput, PairedInputs, PairLogProbs, TokenLogProbs, UnpairedInputs

__all__ = ["RULES", "BrokenRule", "NotApplicable", "Result", "assert_conforms", "check_loss", "options_tables"]

STEP = 1e-6
"""Of the central differences: float64 leaves them nine digits or so."""
LEVELS = (0.0, -1e-8, -1.0, -1e4)
"""Log-probabilities of a token at which value and gradient have to be finite."""
LONGEST = 4096


class BrokenRule(AssertionError):
    """What a loss does that its contract rules out."""


class NotApplicable(Exception):
    """Why a rule says nothing about a loss with these options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of one rule with one table of options; `message` is empty where it holds."""

    rule: str
    options: Mapping[str, object]
    status: Literal["passed", "broken", "skipped"]
    message: str = ""


def check_loss(record: Loss, *rules: str) -> list[Result]:
    """Check the named rules, or all: a result for each table of options and rule.

    Where a loss cannot be called as the core calls it, the other rules are skipped.
    """
    chosen = rules or tuple(RULES)
    if not (isinstance(record.options, type) and issubclass(record.options, Options)):
        message = f"its options are {record.options!r}, not a qpref.hooks.Options"
        return [Result(rule="record", options={}, status="broken", message=message)]
    results = []
    for table in options_tables(record):
        try:
            options = record.options.model_validate(table)
        except ValueError as error:
            message = f"refuses these options itself: {' '.join(str(error).split())}"
            results.append(Result(rule="record", options=table, status="broken", message=message))
            continue
        results += _check_with(record, options, table, chosen)
    return results


def _check_with(record: Loss, options: Any, table: Mapping[str, object], rules: Iterable[str]) -> list[Result]:
    results: list[Result] = []
    blocked = ""
    for rule in rules:
        if blocked:
            results.append(Result(rule=rule, options=table, status="skipped", message=f"'{blocked}' is broken"))
            continue
        try:
            RULES[rule](record, options)
        except BrokenRule as error:
            results.append(Result(rule=rule, options=table, status="broken", message=str(error)))
            blocked = rule if rule in PREREQUISITES else ""
        except NotApplicable as error:
            results.append(Result(rule=rule, options=table, status="skipped", message=str(error)))
        else:
            results.append(Result(rule=rule, options=table, status="passed"))
    return results


def assert_conforms(record: Loss, *rules: str) -> None:
    """Raise an AssertionError that names every rule, of these or of all, that the loss breaks."""
    broken = [result for result in check_loss(record, *rules) if result.status == "broken"]
    lines = [f"  {result.rule} (options {dict(result.options)}): {result.message}" for result in broken]
    if broken:
        raise BrokenRule("\n".join([f"loss '{record.name}' breaks its contract", *lines]))


def options_tables(record: Loss) -> list[Mapping[str, object]]:
    """What a loss is checked with: its defaults, unless an option without one needs a variant, and its variants."""
    complete = not any(field.is_required() for field in record.options.model_fields.values())
    return [*([{}] if complete or not record.variants else []), *record.variants]


# Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scores:
    """Log-probabilities of one sequence's tokens."""

    policy: Tensor
    reference: Tensor
    log_sum_squares: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Example:
    """A pair: first is chosen, second rejected. A single completion: first is its own, second the mismatched one."""

    first: _Scores
    second: _Scores
    prompt: Tensor
    margin: float = 0.0
    desirable: bool = True

    def __str__(self) -> str:
        sides = [
            f"{side.policy[0]:g} (reference {side.reference[0]:g}, {len(side.policy)} tokens)"
            for side in (self.first, self.second)
        ]
        label = "desirable" if self.desirable else "undesirable"
        return f"log-probabilities {sides[0]} and {sides[1]}, margin {self.margin:g}, {label}"


class _Draws:
    """Random examples, the same at each start: a reference near the policy, responses of 1 to 4 tokens."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def scores(self, num_tokens: int) -> _Scores:
        uniform = torch.rand(num_tokens, dtype=torch.float64, generator=self._generator)
        normal = torch.randn(num_tokens, dtype=torch.float64, generator=self._generator)
        policy = -0.05 - 3 * uniform
        return _Scores(
            policy=policy, reference=(policy + 0.5 * normal).clamp(max=-0.01), log_sum_squares=policy * uniform.flip(0)
        )

    def examples(self, count: int) -> list[_Example]:
        return [
            _Example(
                first=self.scores(1 + number % 3),
                second=self.scores(4 - number % 4),
                prompt=self.scores(1 + number % 2).policy,
                margin=(0.0, 0.7, -0.4)[number % 3],
                desirable=number % 2 == 0,
            )
            for number in range(count)
        ]


def _tokens(pieces: Sequence[Tensor], dtype: torch.dtype, sums: Sequence[Tensor] | None = None) -> TokenLogProbs:
    return TokenLogProbs(
        values=torch.cat(list(pieces)).to(dtype),
        lengths=tuple(map(len, pieces)),
        log_sum_squares=None if sums is None else torch.cat(list(sums)).to(dtype),
    )


@dataclass(frozen=True, slots=True)
class _Given:
    """Inputs as the core would make them of examples, and the tensors that gradients are taken of, by name."""

    inputs: Any
    leaves: Mapping[str, Tensor]


def _paired(examples: Sequence[_Example], needs: frozenset[str], dtype: torch.dtype) -> _Given:
    policy, reference = [], []
    for side in ([example.first for example in examples], [example.second for example in examples]):
        sums = [scores.log_sum_squares for scores in side] if "log_sum_squares" in needs else None
        policy.append(_tokens([scores.policy for scores in side], dtype, sums))
        reference.append(_tokens([scores.reference for scores in side], dtype))
    prompt = _tokens([example.prompt for example in examples], dtype) if "prompt" in needs else None
    leaves = {"chosen": policy[0].values, "rejected": policy[1].values}
    leaves |= {} if prompt is None else {"prompt": prompt.values}
    for leaf in leaves.values():
        leaf.requires_grad_()
    inputs = PairedInputs(
        policy=PairLogProbs(chosen=policy[0], rejected=policy[1], prompt=prompt),
        reference=PairLogProbs(chosen=reference[0], rejected=reference[1]) if "reference" in needs else None,
        margin=torch.tensor([example.margin for example in examples], dtype=dtype),
    )
    return _Given(inputs, leaves)


def _unpaired(
    examples: Sequence[_Example], needs: frozenset[str], dtype: torch.dtype, class_counts: tuple[int, int]
) -> _Given:
    own, other = [example.first for example in examples], [example.second for example in examples]
    sums = [scores.log_sum_squares for scores in own] if "log_sum_squares" in needs else None
    policy = _tokens([scores.policy for scores in own], dtype, sums)
    policy.values.requires_grad_()
    mismatched, reference = "mismatched" in needs, "reference" in needs
    inputs = UnpairedInputs(
        policy=policy,
        reference=_tokens([scores.reference for scores in own], dtype) if reference else None,
        mismatched_policy=_tokens([scores.policy for scores in other], dtype) if mismatched else None,
        mismatched_reference=_tokens([s.reference for s in other], dtype) if mismatched and reference else None,
        desirable=torch.tensor([example.desirable for example in examples]),
        class_counts=class_counts,
    )
    return _Given(inputs, {"completion": policy.values})


class _Built:
    """A loss with its options set, called as the core calls it."""

    def __init__(self, record: Loss, options: Any) -> None:
        self.paired = isinstance(record, PairedLoss)
        self.needs = _declared_needs(record, options)
        self._function = _attempt("build", record.build, options)

    def given(
        self,
        examples: Sequence[_Example],
        dtype: torch.dtype = torch.float64,
        class_counts: tuple[int, int] = (8, 8),
        needs: frozenset[str] | None = None,
    ) -> _Given:
        needs = self.needs if needs is None else needs
        return _paired(examples, needs, dtype) if self.paired else _unpaired(examples, needs, dtype, class_counts)

    def __call__(self, given: _Given) -> LossOutput:
        num_examples = len(given.inputs.margin if self.paired else given.inputs.desirable)
        output = _attempt("the loss", self._function, given.inputs)
        if not isinstance(output, LossOutput):
            raise BrokenRule(f"returns {type(output).__name__}, not LossOutput")
        if not isinstance(output.losses, Tensor) or output.losses.shape != (num_examples,):
            shape = tuple(output.losses.shape) if isinstance(output.losses, Tensor) else type(output.losses).__name__
            raise BrokenRule(f"returns losses of shape {shape}, not ({num_examples},)")
        if torch.is_grad_enabled() and not output.losses.requires_grad:
            raise BrokenRule("returns losses without a gradient")
        return output

    def values(self, examples: Sequence[_Example]) -> Tensor:
        """[N] losses of the examples."""
        return self(self.given(examples)).losses.detach()

    def gradient(self, given: _Given, weights: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[N] losses, and the gradient of their weighted sum in each of the leaves."""
        losses = self(given).losses
        leaves = list(given.leaves.values())
        gradients = _attempt(
            "its gradient",
            torch.autograd.grad,
            (losses * weights).sum(),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
        return losses.detach(), gradients


def _attempt(what: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a foreign function returns; whatever it raises breaks the rule."""
    try:
        return function(*arguments, **named)
    except (Exception, SystemExit) as error:
        raise BrokenRule(f"{what} raised {type(error).__name__}: {error}") from error


def _declared_needs(record: Loss, options: Any) -> frozenset[str]:
    needs: frozenset[str] = _attempt("needs", lambda: frozenset(record.needs_of(options)))
    return needs


def _same(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return actual.shape == expected.shape and torch.allclose(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance
    )


def _list(values: Tensor) -> str:
    return ", ".join(f"{value:.10g}" for value in values.flatten().tolist())


# Rules


def _record(record: Loss, options: Any) -> None:
    """The record is of a kind that the core knows, with a summary and a description of each option."""
    if not isinstance(record, PairedLoss | UnpairedLoss):
        raise BrokenRule(f"is a {type(record).__name__}, not a PairedLoss or an UnpairedLoss")
    if not isinstance(record.summary, str) or len(record.summary.splitlines()) != 1:
        raise BrokenRule("its summary is not one line")
    fields = record.options.model_fields
    bare = [name for name, field in fields.items() if not (field.description or "").strip()]
    if bare:
        raise BrokenRule(f"no description of the option {', '.join(bare)}")
    scope = _attempt("scope", record.scope_of, options)
    if scope not in ("example", "step"):
        raise BrokenRule(f"its scope is {scope!r}, not 'example' or 'step'")
    if taken := {"name", "weight"} & set(fields):
        raise BrokenRule(f"its option {min(taken)} is the recipe's own key")


def _needs(record: Loss, options: Any) -> None:
    """It declares needs that exist for its kind, and does without the others."""
    needs = _declared_needs(record, options)
    known = record.may_need
    unknown = sorted(map(str, needs - known))
    if unknown:
        raise BrokenRule(f"declares {', '.join(unknown)}; this kind of loss may need {', '.join(sorted(known))}")
    examples = _Draws().examples(4)
    try:
        built = _Built(record, options)
        built(built.given(examples, needs=known))
    except BrokenRule:
        return  # it fails with all that there is; "one value per example" says how
    try:
        built(built.given(examples))
    except BrokenRule as error:
        raise BrokenRule(f"cannot do without what it doesn't declare: {error}") from error


def _one_value_per_example(record: Loss, options: Any) -> None:
    """[N] losses with gradient for N examples."""
    built = _Built(record, options)
    for count in (1, 2, 5):
        try:
            built(built.given(_Draws().examples(count)))
        except BrokenRule as error:
            raise BrokenRule(f"{count} example{'s' if count > 1 else ''}: {error}") from error


def _gradient(record: Loss, options: Any) -> None:
    """Automatic differentiation gives what central differences give, within 1e-4; what is detached stays as it is."""
    detaches = record.detaches is not None and bool(_attempt("detaches", record.detaches, options))
    built = _Built(record, options)
    moves = False
    for seed in (1, 2):
        given = built.given(_Draws(seed).examples(4), class_counts=(30, 20))
        weights = torch.tensor([1.0, 0.7, 1.3, 0.9], dtype=torch.float64)
        losses, gradients = built.gradient(given, weights)
        function = _Replayed(built, given, weights, detaches)
        allowed = 1e-8 * max(1.0, float(losses.abs().sum()))
        for (name, leaf), exact in zip(given.leaves.items(), gradients, strict=True):
            estimate = _central_differences(function, leaf)
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


def _central_differences(function: Callable[[], Tensor], leaf: Tensor) -> Tensor:
    estimate = torch.empty_like(leaf, requires_grad=False)
    for place, value in enumerate(leaf.tolist()):
        ends = []
        for end in (value + STEP, value - STEP):
            _put(leaf, place, end)
            ends.append(function())
        _put(leaf, place, value)
        estimate[place] = (ends[0] - ends[1]) / (2 * STEP)
    return estimate


def _put(leaf: Tensor, place: int, value: float) -> None:
    with torch.no_grad():
        leaf[place] = value


class _Replayed:
    """The weighted sum of a loss's values, with what it detaches held as it was when this was made."""

    def __init__(self, built: _Built, given: _Given, weights: Tensor, detaches: bool) -> None:
        self._built, self._given, self._weights = built, given, weights
        self._detached: list[Any] | None = None
        if detaches:
            with _Detached() as recorded:
                self()
            self._detached = recorded.values

    def __call__(self) -> Tensor:
        if self._detached is None:
            return (self._built(self._given).losses * self._weights).sum().detach()
        with _Detached(self._detached):
            losses = self._built(self._given).losses
        return (losses * self._weights).sum().detach()


class _Detached(TorchFunctionMode):
    """Records what is computed without a gradient, or gives back what was recorded, in the same order."""

    WAYS = frozenset((Tensor.detach, Tensor.item, Tensor.tolist, Tensor.data.__get__))  # type: ignore[attr-defined]

    def __init__(self, recorded: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.values: list[Any] = []
        self._recorded = None if recorded is None else iter(recorded)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() and func not in self.WAYS:
            return value
        if self._recorded is not None:
            value = next(self._recorded, value)
        # A copy: what was recorded may be a view of a tensor that moves on.
        self.values.append(value.detach().clone() if isinstance(value, Tensor) else value)
        return value.clone() if isinstance(value, Tensor) else value


def _dtype(record: Loss, options: Any) -> None:
    """Losses and rewards come in the dtype of the inputs, with its precision."""
    built = _Built(record, options)
    for dtype in (torch.float32, torch.float64):
        output = built(built.given(_Draws().examples(8), dtype=dtype))
        for name, value in {"losses": output.losses, **_tensors(output.metrics)}.items():
            if value.dtype != dtype and name.startswith(("losses", "rewards/")):
                raise BrokenRule(f"{name} of {dtype} inputs are {value.dtype}")
    losses = output.losses.detach()
    if torch.equal(losses, losses.float().double()) and not torch.equal(losses, losses.round()):
        raise BrokenRule("the values of float64 inputs have the precision of float32: it casts on the way")


def _tensors(metrics: Any) -> dict[str, Tensor]:
    if not isinstance(metrics, Mapping):
        raise BrokenRule(f"returns metrics as {type(metrics).__name__}, not by name")
    for name, value in metrics.items():
        if not isinstance(value, Tensor):
            raise BrokenRule(f"returns the metric {name} as {type(value).__name__}, not a tensor")
    return dict(metrics)


def _finite(record: Loss, options: Any) -> None:
    """Value and gradient are finite wherever a policy can get to, in float32 and in float64."""
    built = _Built(record, options)
    batches = _extreme_pairs() if built.paired else _extreme_completions("mismatched" in built.needs)
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


def _owner(examples: Sequence[_Example], leaf: str, place: int) -> _Example:
    """The example that a place of a leaf belongs to."""
    for example in examples:
        tokens = {"rejected": example.second.policy, "prompt": example.prompt}.get(leaf, example.first.policy)
        if place < len(tokens):
            return example
        place -= len(tokens)
    raise IndexError(place)


def _level(policy: float, reference: float, num_tokens: int = 1) -> _Scores:
    # A sure token leaves nothing to the rest of the vocabulary; an impossible one leaves it all to a single other.
    sums = -1.5 if policy == -1.0 else 0.0
    values = torch.tensor([policy, reference, sums], dtype=torch.float64)
    return _Scores(
        policy=values[0].repeat(num_tokens),
        reference=values[1].repeat(num_tokens),
        log_sum_squares=values[2].repeat(num_tokens),
    )


def _extreme_pairs() -> list[list[_Example]]:
    margins = itertools.cycle((0.0, 1e4, -1e4))
    lengths = itertools.cycle(((LONGEST, 1), (1, LONGEST), (LONGEST, LONGEST), (LONGEST, 1), (1, LONGEST)))
    short: list[_Example] = []
    long: list[_Example] = []
    for chosen, chosen_reference, rejected, rejected_reference in itertools.product(LEVELS, repeat=4):
        first, second = _level(chosen, chosen_reference), _level(rejected, rejected_reference)
        short.append(_Example(first=first, second=second, prompt=first.policy, margin=next(margins)))
    for (chosen, rejected), reference in itertools.product(itertools.product(LEVELS, repeat=2), (None, -1.0)):
        num_chosen, num_rejected = next(lengths)
        first = _level(chosen, chosen if reference is None else reference, num_chosen)
        second = _level(rejected, rejected if reference is None else reference, num_rejected)
        long.append(_Example(first=first, second=second, prompt=second.policy, margin=next(margins)))
    return [short, long]


def _extreme_completions(mismatched: bool) -> list[list[_Example]]:
    """Batches of both classes and of one; each with one extreme of the mismatched completions, which are averaged."""
    batches: list[list[_Example]] = []
    partners = list(itertools.product(LEVELS, repeat=2)) if mismatched else [(-1.0, -1.0)]
    for levels, classes in itertools.product(partners, ((True, False), (True,), (False,))):
        length = LONGEST if len(batches) % 8 == 0 else 1
        partner = _level(levels[0], levels[1], length)
        batches.append(
            [
                _Example(
                    first=_level(policy, reference, length),
                    second=partner,
                    prompt=partner.policy[:1],
                    desirable=desirable,
                )
                for policy, reference, desirable in itertools.product(LEVELS, LEVELS, classes)
            ]
        )
    return batches


def _independence(record: Loss, options: Any) -> None:
    """An example's loss depends on that example alone, or, in scope "step", not on the examples' order."""
    built = _Built(record, options)
    examples = _Draws().examples(6)
    together = built.values(examples)
    order = [4, 2, 0, 5, 1, 3]
    permuted = built.values([examples[place] for place in order])
    # A sum over the step may be taken in another order.
    if not _same(permuted, together[order], 1e-12 if record.scope_of(options) == "example" else 1e-9):
        raise BrokenRule(f"in another order, {_list(together[order])} become {_list(permuted)}")
    if record.scope_of(options) == "step":
        return
    alone = torch.cat([built.values([example]) for example in examples])
    if not _same(alone, together, 1e-12):
        raise BrokenRule(f"each alone, {_list(together)} become {_list(alone)}; if that is meant, its scope is 'step'")


def _no_state(record: Loss, options: Any) -> None:
    """The same inputs give the same values, and are left as they are."""
    built = _Built(record, options)
    given, other = built.given(_Draws().examples(5)), built.given(_Draws(9).examples(4))
    tensors = _all_tensors(given.inputs)
    before = [tensor.detach().clone() for tensor in tensors]
    first = built(given).losses.detach()
    if not all(map(torch.equal, tensors, before)):
        raise BrokenRule("it changes its inputs in place")
    built(other)
    for called, function in (("again", built), ("built anew", _Built(record, options))):
        second = function(given).losses.detach()
        if not torch.equal(first, second):
            raise BrokenRule(f"called {called}, {_list(first)} become {_list(second)}")


def _all_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    names = getattr(type(value), "__dataclass_fields__", ())
    return [tensor for name in names for tensor in _all_tensors(getattr(value, name))]


def _start(record: Loss, options: Any) -> None:
    """While policy and reference are the same, every loss is what `starts_at` says."""
    declared = None if record.starts_at is None else _attempt("starts_at", record.starts_at, options)
    if declared is None:
        raise NotApplicable("it doesn't declare where it starts")
    declared = _attempt("starts_at", float, declared)
    examples = [
        replace(example, margin=0.0, first=_settled(example.first), second=_settled(example.second))
        for example in _Draws().examples(6)
    ]
    values = _Built(record, options).values(examples)
    if not _same(values, torch.full_like(values, declared), 1e-9):
        raise BrokenRule(f"declares {declared:.10g}, and starts at {_list(values)}")


def _settled(scores: _Scores) -> _Scores:
    return replace(scores, reference=scores.policy)


def _log_ratios(record: Loss, options: Any) -> None:
    """The same shift of policy and reference changes nothing."""
    if not record.log_ratios_only:
        raise NotApplicable("it doesn't declare log_ratios_only")
    built = _Built(record, options)
    examples = _Draws().examples(6)
    shifted = [replace(example, first=_shifted(example.first), second=_shifted(example.second)) for example in examples]
    before, after = built.values(examples), built.values(shifted)
    if not _same(after, before, 1e-9):
        raise BrokenRule(f"policy and reference shifted alike, {_list(before)} become {_list(after)}")


def _shifted(scores: _Scores) -> _Scores:
    shift = torch.linspace(-0.3, -1.7, len(scores.policy), dtype=torch.float64)
    return replace(scores, policy=scores.policy + shift, reference=scores.reference + shift)


def _swap(record: Loss, options: Any) -> None:
    """Exchanging chosen and rejected exchanges their rewards."""
    if not isinstance(record, PairedLoss):
        raise NotApplicable("it isn't paired")
    built = _Built(record, options)
    examples = _Draws().examples(6)
    rewards = _metrics_of(built, examples)
    exchanged = _metrics_of(built, [replace(one, first=one.second, second=one.first) for one in examples])
    for name, other in (("rewards/chosen", "rewards/rejected"), ("rewards/rejected", "rewards/chosen")):
        before, after = _metric(rewards, name), _metric(exchanged, other)
        if not _same(after, before, 1e-9):
            raise BrokenRule(f"{name} of {_list(before)} become {other} of {_list(after)}")


def _metrics_of(built: _Built, examples: Sequence[_Example]) -> dict[str, Tensor]:
    return _tensors(built(built.given(examples)).metrics)


def _metric(metrics: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in metrics:
        raise BrokenRule(f"no metric {name}")
    return metrics[name]


def _metrics(record: Loss, options: Any) -> None:
    """The field's reward metrics, one detached value for each example, that agree with each other."""
    built = _Built(record, options)
    examples = _Draws().examples(6)
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


RULES: Mapping[str, Callable[[Loss, Any], None]] = {
    "record": _record,
    "needs": _needs,
    "one value per example": _one_value_per_example,
    "dtype": _dtype,
    "gradient": _gradient,
    "finite": _finite,
    "independence": _independence,
    "no state": _no_state,
    "start": _start,
    "log ratios": _log_ratios,
    "swap": _swap,
    "metrics": _metrics,
}
"""Rule -> a function of the record and its parsed options that raises `BrokenRule`, or `NotApplicable`, or nothing."""
PREREQUISITES = ("record", "needs", "one value per example")
"""The rules without which the others say nothing."""
