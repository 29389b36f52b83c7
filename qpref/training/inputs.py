"""A loss's inputs from the scores of one or several micro-batches, and the metrics that the core adds to its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.policy.logprobs import pair_logprobs
from qpref.records import LossOutput, PackedBatch, PairedInputs, PairLogProbs, TokenLogProbs, UnpairedInputs
from qpref.staging import to_device

Inputs = PairedInputs | UnpairedInputs


def paired_inputs(
    batch: PackedBatch, scores: TokenLogProbs, reference: TokenLogProbs | None, prompts: bool
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
    )


@dataclass(frozen=True, slots=True)
class Mismatched:
    """Scores of mismatched completions under policy and reference."""

    policy: TokenLogProbs
    reference: TokenLogProbs | None


def unpaired_inputs(
    batch: PackedBatch,
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
    )


def _detached(scores: TokenLogProbs) -> TokenLogProbs:
    return TokenLogProbs(values=scores.values.detach(), lengths=scores.lengths, log_sum_squares=scores.log_sum_squares)


def joined_mismatched(parts: Sequence[Mismatched]) -> Mismatched:
    """Join the mismatched completions of several micro-batches."""
    return Mismatched(
        policy=_joined([part.policy for part in parts]),
        reference=_joined_or_none([part.reference for part in parts]),
    )


def joined_inputs(parts: Sequence[Inputs]) -> Inputs:
    """Join the inputs of several micro-batches into those of one batch."""
    first = parts[0]
    if isinstance(first, PairedInputs):
        pairs = [part for part in parts if isinstance(part, PairedInputs)]
        references = [part.reference for part in pairs if part.reference is not None]
        return PairedInputs(
            policy=_joined_pairs([part.policy for part in pairs]),
            reference=_joined_pairs(references) if references else None,
            margin=torch.cat([part.margin for part in pairs]),
        )
    singles = [part for part in parts if isinstance(part, UnpairedInputs)]
    return UnpairedInputs(
        policy=_joined([part.policy for part in singles]),
        reference=_joined_or_none([part.reference for part in singles]),
        mismatched_policy=_joined_or_none([part.mismatched_policy for part in singles]),
        mismatched_reference=_joined_or_none([part.mismatched_reference for part in singles]),
        desirable=torch.cat([part.desirable for part in singles]),
        class_counts=first.class_counts,
    )


def _joined_pairs(parts: Sequence[PairLogProbs]) -> PairLogProbs:
    return PairLogProbs(
        chosen=_joined([part.chosen for part in parts]),
        rejected=_joined([part.rejected for part in parts]),
        prompt=_joined_or_none([part.prompt for part in parts]),
    )


def _joined_or_none(parts: Sequence[TokenLogProbs | None]) -> TokenLogProbs | None:
    present = [part for part in parts if part is not None]
    return _joined(present) if present else None


def _joined(parts: Sequence[TokenLogProbs]) -> TokenLogProbs:
    squares = [part.log_sum_squares for part in parts if part.log_sum_squares is not None]
    return TokenLogProbs(
        values=torch.cat([part.values for part in parts]),
        lengths=tuple(length for part in parts for length in part.lengths),
        log_sum_squares=torch.cat(squares) if squares else None,
    )


def example_metrics(inputs: Inputs, output: LossOutput) -> Mapping[str, Tensor]:
    """Return [N] metrics of a batch: the losses' own and the core's, NaN where undefined."""
    if isinstance(inputs, PairedInputs):
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
