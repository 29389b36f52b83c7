"""Calls a loss as the core calls it; any failure breaks the rule being checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qpref.hooks import ListLoss, PairedLoss
from qpref.hooks.border import described, is_interrupt
from qpref.hooks.loss_state import state_of, written_problem
from qpref.hooks.process_state import ProcessState
from qpref.hooks.types import Loss
from qpref.records import EXTRAS, ListInputs, LossOutput, PairedInputs, PairLogProbs, TokenLogProbs, UnpairedInputs
from qpref.testing.examples import Example, Ranked, Scores


class BrokenRule(AssertionError):
    """A violation of the loss contract."""


class NotApplicable(Exception):
    """The reason why a rule doesn't apply to a loss under these options."""


def _tokens(pieces: Sequence[Tensor], dtype: torch.dtype) -> TokenLogProbs:
    return TokenLogProbs(values=torch.cat(list(pieces)).to(dtype), lengths=tuple(map(len, pieces)))


def list_of_scores(
    responses: Sequence[Scores], dtype: torch.dtype, needs: frozenset[str]
) -> tuple[TokenLogProbs, TokenLogProbs]:
    """Return the log-probabilities of responses under policy and reference."""
    return _of_policy(responses, dtype, needs), _tokens([each.reference for each in responses], dtype)


def _of_policy(side: Sequence[Scores], dtype: torch.dtype, needs: frozenset[str]) -> TokenLogProbs:
    """Return the policy's log-probabilities with what else the loss needs of each token."""
    scores = _tokens([each.policy for each in side], dtype)
    names = {*(name for name in EXTRAS if name in needs), *(("tokens", "mask") if "tokens" in needs else ())}
    more: dict[str, Any] = {name: torch.cat([getattr(each, name) for each in side]) for name in names}
    more |= {name: each.to(dtype) for name, each in more.items() if each.is_floating_point()}
    return replace(scores, **more)


@dataclass(frozen=True, slots=True)
class LossInputs:
    """A loss's inputs, as the core would make them, and the tensors to differentiate with respect to, by name."""

    inputs: Any
    leaves: Mapping[str, Tensor]


def columns_of(examples: Sequence[Example | Ranked], names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return [N] numbers of the examples by column."""
    return {
        name: torch.tensor([one.numbers[index % len(one.numbers)] for one in examples], dtype=dtype)
        for index, name in enumerate(names)
    }


def _paired(examples: Sequence[Example], needs: frozenset[str], dtype: torch.dtype) -> LossInputs:
    policy, reference = [], []
    for side in ([example.first for example in examples], [example.second for example in examples]):
        policy.append(_of_policy(side, dtype, needs))
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
    return LossInputs(inputs, leaves)


def _lists_of_two(pairs: PairedInputs, needs: frozenset[str]) -> ListInputs:
    """Lay pairs out as lists of two, in new tensors for each call: finite differences change the pairs' tensors."""
    count, dtype = len(pairs.margin), pairs.margin.dtype
    return ListInputs(
        policy=_interleaved(pairs.policy),
        reference=None if pairs.reference is None else _interleaved(pairs.reference),
        sizes=(2,) * count,
        ranks=torch.tensor([1, 2] * count),
        scores=torch.tensor([1.0, 0.0] * count, dtype=dtype) if "scores" in needs else None,
        margin=pairs.margin,
        columns=pairs.columns,
        state=pairs.state,
    )


def _interleaved(pairs: PairLogProbs) -> TokenLogProbs:
    """Return chosen, rejected, chosen, rejected ... of the pairs."""
    sides = (pairs.chosen, pairs.rejected)
    lengths = [length for both in zip(*(side.lengths for side in sides), strict=True) for length in both]
    names = pairs.chosen.by_token().keys()
    rows = {
        name: zip(*(getattr(side, name).split(list(side.lengths)) for side in sides), strict=True) for name in names
    }
    fields: dict[str, Any] = {
        name: torch.cat([row for both in pieces for row in both]) for name, pieces in rows.items()
    }
    return TokenLogProbs(lengths=tuple(lengths), **fields)


def _unpaired(
    examples: Sequence[Example], needs: frozenset[str], dtype: torch.dtype, class_counts: tuple[int, int]
) -> LossInputs:
    own, other = [example.first for example in examples], [example.second for example in examples]
    policy = _of_policy(own, dtype, needs)
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
    return LossInputs(inputs, {"completion": policy.values})


class Built:
    """A loss with its options set, called as the core calls it."""

    def __init__(self, record: Loss, options: Any) -> None:
        self.paired = isinstance(record, PairedLoss | ListLoss)
        self._listed = isinstance(record, ListLoss)
        self.needs = declared_needs(record, options)
        self.columns = attempt("columns", lambda: tuple(record.columns_of(options)))
        self._initial = attempt("state", record.state_of, options)
        self._function = attempt("build", record.build, options)

    def given(
        self,
        examples: Sequence[Example],
        dtype: torch.dtype = torch.float64,
        class_counts: tuple[int, int] = (8, 8),
        needs: frozenset[str] | None = None,
    ) -> LossInputs:
        needs = self.needs if needs is None else needs
        given = _paired(examples, needs, dtype) if self.paired else _unpaired(examples, needs, dtype, class_counts)
        columns = columns_of(examples, self.columns, dtype)
        return replace(given, inputs=replace(given.inputs, columns=columns, state=self.state(dtype)))

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return its state before the first step."""
        return state_of(self._initial, {}, torch.empty(0, dtype=dtype))

    def __call__(self, given: LossInputs) -> LossOutput:
        num_examples = len(given.inputs.margin if self.paired else given.inputs.desirable)
        output = attempt("the loss", self._function, self.laid_out(given).inputs)
        if not isinstance(output, LossOutput):
            raise BrokenRule(f"returns {type(output).__name__}, not LossOutput")
        if not isinstance(output.losses, Tensor) or output.losses.shape != (num_examples,):
            shape = tuple(output.losses.shape) if isinstance(output.losses, Tensor) else type(output.losses).__name__
            raise BrokenRule(f"returns losses of shape {shape}, not ({num_examples},)")
        if torch.is_grad_enabled() and not output.losses.requires_grad:
            raise BrokenRule("returns losses without a gradient")
        if problem := written_problem(given.inputs.state, output.state):
            raise BrokenRule(problem)
        return output

    def laid_out(self, given: LossInputs) -> LossInputs:
        """Return inputs of the kind that the loss takes: pairs as lists of two for a list loss."""
        if self._listed and isinstance(given.inputs, PairedInputs):
            return replace(given, inputs=_lists_of_two(given.inputs, self.needs))
        return given

    def values(self, examples: Sequence[Example]) -> Tensor:
        """Return the [N] losses of the examples."""
        return self(self.given(examples)).losses.detach()

    def gradient(self, given: LossInputs, weights: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the [N] losses and the gradient of their weighted sum with respect to each leaf."""
        losses = self(given).losses
        leaves = list(given.leaves.values())
        gradients = attempt(
            "its gradient",
            torch.autograd.grad,
            (losses * weights).sum(),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
        return losses.detach(), gradients


def attempt(what: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a plugin's function; any exception breaks the rule."""
    before = ProcessState.now()
    try:
        result = function(*arguments, **named)
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise BrokenRule(f"{what} raised {described(error)}") from error
    finally:
        changed = before.restore()
    if changed:
        raise BrokenRule(f"{what} changed {', '.join(changed)}")
    return result


def declared_needs(record: Loss, options: Any) -> frozenset[str]:
    needs: frozenset[str] = attempt("needs", lambda: frozenset(record.needs_of(options)))
    return needs
