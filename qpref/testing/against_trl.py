"""Compares a loss with the installed TRL on random log-probabilities, for `qpref losses check --against trl`.

A loss's record lists the TRL configurations that compute it, with the intended differences (`trl_cases`). A loss
without any is compared by name, if TRL has a loss type of that name.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from qpref.hooks import PairedLoss, TrlCase
from qpref.hooks.types import Loss
from qpref.testing.calls import BrokenRule, Built
from qpref.testing.examples import Draws, Example, Scores
from qpref.testing.trl_trainers import (
    FIRST_ID,
    NotInTrl,
    PairedRow,
    TableModel,
    UnpairedRow,
    config_fields,
    log_sum_squares,
    loss_types,
    make_trainer,
    trl_loss,
)

NUM_BATCHES = 20
LONGEST_RESPONSE = 12
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
"""Largest relative difference of losses and gradients that counts as agreement, by TRL's dtype."""

Status = Literal["agrees", "differs as intended", "differs", "not in TRL"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Largest relative differences over the random batches.

    Attributes:
        loss: of the batch's mean loss.
        gradient: of the gradient with respect to the policy's log-probabilities, relative to its largest component.
    """

    loss: float = 0.0
    gradient: float = 0.0

    @property
    def largest(self) -> float:
        return max(self.loss, self.gradient)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Outcome of one case; `difference` is None where TRL has no such loss, and `message` then says what it lacks."""

    case: TrlCase
    status: Status
    difference: Difference | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class _TokenTable:
    """A batch as token ids, each used once, with the log-probability of each id.

    Attributes:
        rows: token ids.
        policy, reference: [V] float64 nats by token id.
        leaves: leaf of the loss's inputs -> the token ids of its values, in their order.
    """

    rows: Sequence[PairedRow] | Sequence[UnpairedRow]
    policy: Tensor
    reference: Tensor
    leaves: Mapping[str, list[int]]


def compare_with_trl(record: Loss) -> list[Comparison]:
    """Compare a loss with TRL under each of its cases; an empty list where TRL has no such loss.

    Raises:
        RecipeError: TRL is not installed, or fails to import.
        BrokenRule: the loss cannot be called.
    """
    return [_compare(record, case) for case in record.trl_cases or _case_by_name(record)]


def _case_by_name(record: Loss) -> Iterator[TrlCase]:
    """Yield the case of a loss whose name is one of TRL's loss types: its default options that TRL has too."""
    if isinstance(record, PairedLoss):
        trainers = ("DPOTrainer", "CPOTrainer") if "reference" in _needs_by_default(record) else ("CPOTrainer",)
    else:
        trainers = ("KTOTrainer",)
    for trainer in trainers:
        if record.name in loss_types(trainer):
            shared = {
                name: field.default
                for name, field in record.options.model_fields.items()
                if name in config_fields(trainer) and not field.is_required()
            }
            loss_type = [record.name] if trainer == "DPOTrainer" else record.name
            yield TrlCase(trainer=trainer, config=shared | {"loss_type": loss_type})  # type: ignore[arg-type]
            return


def _needs_by_default(record: Loss) -> frozenset[str]:
    try:
        return record.needs_of(record.options())
    except Exception as error:
        raise BrokenRule(f"its default options raised {type(error).__name__}: {error}") from error


def _compare(record: Loss, case: TrlCase) -> Comparison:
    try:
        difference = measure(record, case, case.options)
    except NotInTrl as error:
        return Comparison(case=case, status="not in TRL", message=str(error))
    tolerance = TOLERANCE[case.dtype]
    status: Status = "agrees" if difference.largest <= tolerance else "differs"
    if status == "differs" and case.reason:
        # The reason holds only if TRL computes what the record claims that it does.
        explained = (
            case.same_as is None or measure(record, case, case.same_as, by_micro_batch=True).largest <= tolerance
        )
        status = "differs as intended" if explained else "differs"
    return Comparison(case=case, status=status, difference=difference, message=case.reason)


def measure(record: Loss, case: TrlCase, options: Mapping[str, object], by_micro_batch: bool = False) -> Difference:
    """Measure how far a loss under `options` is from TRL under the case's config, over seeded random batches.

    Args:
        by_micro_batch: call the loss on each of TRL's micro-batches too, instead of on the whole batch.

    Raises:
        NotInTrl: the installed TRL has no such trainer, loss type or option.
        BrokenRule: the loss refuses the options, or cannot be called.
    """
    try:
        built = Built(record, record.options.model_validate(dict(options)))
    except ValueError as error:
        raise BrokenRule(f"refuses the options of its TRL case: {' '.join(str(error).split())}") from error
    trainer = make_trainer(case.trainer, case.config)
    largest = Difference()
    for seed in range(NUM_BATCHES):
        examples = _random_examples(case.num_examples, seed)
        size = case.micro_batch or len(examples)
        parts = [examples[start : start + size] for start in range(0, len(examples), size)]
        table = _tabulate(examples, built.paired)
        trl = _trl_side(trainer, table, size, getattr(torch, case.dtype))
        ours = _our_side(built, parts if by_micro_batch else [examples], table)
        largest = Difference(
            loss=max(largest.loss, _relative(ours[0], trl[0])),
            gradient=max(largest.gradient, _relative(ours[1], trl[1])),
        )
    return largest


def _random_examples(count: int, seed: int) -> list[Example]:
    """Examples without margins: a reference near the policy, responses of 1 to 12 tokens, both labels in turn."""
    draws, rng = Draws(seed), random.Random(seed)
    return [
        Example(
            first=_tabulated(draws.scores(rng.randint(1, LONGEST_RESPONSE))),
            second=_tabulated(draws.scores(rng.randint(1, LONGEST_RESPONSE))),
            prompt=draws.scores(rng.randint(1, 5)).policy,
            desirable=number % 2 == 0,
        )
        for number in range(count)
    ]


def _tabulated(scores: Scores) -> Scores:
    return replace(scores, log_sum_squares=log_sum_squares(scores.policy))


def _tabulate(examples: Sequence[Example], paired: bool) -> _TokenTable:
    policy, reference = [torch.full((FIRST_ID,), -1.0).double()], [torch.full((FIRST_ID,), -1.0).double()]
    num_ids = FIRST_ID

    def ids_of(scores: Tensor, reference_scores: Tensor) -> list[int]:
        nonlocal num_ids
        policy.append(scores)
        reference.append(reference_scores)
        num_ids += len(scores)
        return list(range(num_ids - len(scores), num_ids))

    rows: list[Any] = []
    leaves: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": [], "completion": []}
    for example in examples:
        first_of_prompt = ids_of(torch.tensor([-1.0]).double(), torch.tensor([-1.0]).double())  # nothing predicts it
        prompt = ids_of(example.prompt, example.prompt)
        first = ids_of(example.first.policy, example.first.reference)
        second = ids_of(example.second.policy, example.second.reference)
        sides = (first_of_prompt + prompt, first, second)
        rows.append(PairedRow(*sides) if paired else UnpairedRow(*sides, example.desirable))
        for leaf, ids in (("prompt", prompt), ("chosen", first), ("rejected", second), ("completion", first)):
            leaves[leaf] += ids
    return _TokenTable(rows, torch.cat(policy), torch.cat(reference), leaves)


def _trl_side(trainer: Any, table: _TokenTable, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """TRL's loss, the mean over micro-batches, and its gradient by token id."""
    policy = table.policy.to(dtype).requires_grad_()
    if hasattr(trainer, "ref_model"):
        trainer.ref_model = TableModel(table.reference.to(dtype))
    starts = range(0, len(table.rows), size)
    losses = [trl_loss(trainer, TableModel(policy), table.rows[start : start + size]) for start in starts]
    loss = torch.stack(losses).mean()
    (gradient,) = torch.autograd.grad(loss, policy)
    return loss.detach().double(), gradient.double()


def _our_side(built: Built, parts: Sequence[Sequence[Example]], table: _TokenTable) -> tuple[Tensor, Tensor]:
    """The loss's mean over all examples and its gradient by token id, in float64."""
    losses: list[Tensor] = []
    gradients: dict[str, list[Tensor]] = {}
    num_examples = sum(map(len, parts))
    for part in parts:
        num_desirable = sum(example.desirable for example in part)
        given = built.given(part, class_counts=(num_desirable, len(part) - num_desirable))
        weights = torch.full((len(part),), 1 / num_examples, dtype=torch.float64)
        values, of_leaves = built.gradient(given, weights)
        losses.append(values)
        for leaf, gradient in zip(given.leaves, of_leaves, strict=True):
            gradients.setdefault(leaf, []).append(gradient)
    by_token = torch.zeros_like(table.policy)
    for leaf, pieces in gradients.items():
        by_token[table.leaves[leaf]] = torch.cat(pieces)
    return torch.cat(losses).mean(), by_token


def _relative(ours: Tensor, trl: Tensor) -> float:
    """The largest difference, relative to the largest magnitude of either."""
    scale = float(torch.maximum(ours.abs(), trl.abs()).max())
    off = float((ours - trl).abs().max())
    if not math.isfinite(off):
        return math.inf
    return off / scale if scale else off
