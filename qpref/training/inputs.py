"""A loss's inputs from scores, and the metrics that the core adds to its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from qpref.hooks.lists import best_and_rest
from qpref.policy.logprobs import pair_logprobs
from qpref.records import ListInputs, LossOutput, PairedInputs, TokenizedExample, TokenLogProbs, UnpairedInputs
from qpref.staging import to_device

Inputs = PairedInputs | ListInputs | UnpairedInputs


class Labelled(Protocol):
    """Examples and what a loss has to know of them beside their scores: a micro-batch, or rows of a whole step."""

    @property
    def examples(self) -> tuple[TokenizedExample, ...]: ...

    @property
    def margin(self) -> Tensor: ...

    @property
    def columns(self) -> Mapping[str, Tensor]: ...


def paired_inputs(
    batch: Labelled, scores: TokenLogProbs, reference: TokenLogProbs | None, prompts: bool
) -> PairedInputs:
    """Lay out the inputs of a paired loss.

    Args:
        scores: the policy's, of both branches of each example, then of the prompts where `prompts` is set.
        reference: the same of the reference, without prompts.
    """
    return PairedInputs(
        policy=pair_logprobs(scores, prompts),
        reference=None if reference is None else pair_logprobs(reference),
        margin=batch.margin,
        columns=batch.columns,
    )


def list_inputs(
    batch: Labelled, scores: TokenLogProbs, reference: TokenLogProbs | None, needs_scores: bool
) -> ListInputs:
    """Lay out the inputs of a list loss.

    Args:
        scores: the policy's, of all branches of each example.
        reference: the same of the reference.
    """
    ranks = torch.tensor([rank for example in batch.examples for rank in example.ranks])
    of_rows = torch.tensor([score for example in batch.examples for score in example.scores])
    ranks, of_rows = to_device([ranks, of_rows], scores.values.device)
    return ListInputs(
        policy=scores,
        reference=reference,
        sizes=tuple(len(example.branches) for example in batch.examples),
        ranks=ranks,
        scores=of_rows if needs_scores else None,
        margin=batch.margin,
        columns=batch.columns,
    )


@dataclass(frozen=True, slots=True)
class Mismatched:
    """Scores of mismatched completions under policy and reference."""

    policy: TokenLogProbs
    reference: TokenLogProbs | None


def unpaired_inputs(
    batch: Labelled,
    scores: TokenLogProbs,
    reference: TokenLogProbs | None,
    class_counts: tuple[int, int],
    mismatched: Mismatched | None,
) -> UnpairedInputs:
    """Lay out the inputs of an unpaired loss.

    Args:
        scores: the policy's, of each example's completion.
        reference: the same of the reference.
        class_counts: desirable and undesirable training examples.
        mismatched: of the partners of these examples, or of the whole step's; None where the loss doesn't need them.
    """
    labels = [bool(example.label) for example in batch.examples]
    return UnpairedInputs(
        policy=scores,
        reference=reference,
        mismatched_policy=None if mismatched is None else _detached(mismatched.policy),
        mismatched_reference=None if mismatched is None else mismatched.reference,
        desirable=to_device([torch.tensor(labels)], scores.values.device)[0],
        class_counts=class_counts,
        columns=batch.columns,
    )


def _detached(scores: TokenLogProbs) -> TokenLogProbs:
    return replace(scores, values=scores.values.detach())


def with_tokens(
    scores: TokenLogProbs, examples: Sequence[TokenizedExample], num_branches: int | None, prompts: bool
) -> TokenLogProbs:
    """Add the ids of the scored tokens, and which of them count.

    Args:
        scores: of the first `num_branches` branches of each example (None: all), then of the prompts where `prompts`
            is set.
    """
    tokens: list[int] = []
    counts: list[bool] = []
    for example in examples:
        for index, (branch, scored) in enumerate(zip(example.branches[:num_branches], example.scored, strict=False)):
            tokens += [branch[token] for token in scored]
            counts += [not example.masks or bool(example.masks[index][token]) for token in scored]
    if prompts:
        in_prompts = [token for example in examples for token in example.prompt[1:]]
        tokens, counts = tokens + in_prompts, counts + [True] * len(in_prompts)
    ids, mask = to_device([torch.tensor(tokens), torch.tensor(counts)], scores.values.device)
    return replace(scores, tokens=ids, mask=mask)


def example_metrics(inputs: Inputs, output: LossOutput) -> Mapping[str, Tensor]:
    """Return [N] metrics of a batch: the losses' own and the core's, NaN where undefined."""
    if isinstance(inputs, ListInputs):
        chosen, rejected = best_and_rest(inputs.policy.total.detach(), inputs)
    elif isinstance(inputs, PairedInputs):
        chosen, rejected = inputs.policy.chosen.total.detach(), inputs.policy.rejected.total.detach()
    else:
        totals = inputs.policy.total.detach()
        undefined = torch.full_like(totals, torch.nan)
        chosen = totals.where(inputs.desirable, undefined)
        rejected = totals.where(~inputs.desirable, undefined)
    return {"loss": output.losses.detach(), **output.metrics, "logps/chosen": chosen, "logps/rejected": rejected}


def tensors_of(value: object) -> list[Tensor]:
    """Collect the floating-point tensors in nested records."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    names = getattr(type(value), "__dataclass_fields__", ())
    return [tensor for name in names for tensor in tensors_of(getattr(value, name))]
