"""The gradient of one optimizer step, accumulated over micro-batches.

A step that runs out of memory is repeated in smaller micro-batches: the same examples, the same divisor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpref.data.pack import split_by_tokens
from qpref.errors import DeviceMemoryError
from qpref.memory.tune import shrink_microbatch
from qpref.policy.out_of_memory import attempt, fits, out_of_memory_as
from qpref.records import TokenizedExample
from qpref.training.inputs import Inputs, example_metrics, joined_inputs, joined_mismatched
from qpref.training.scoring import Scorer

NO_MEMORY_FOR_STATE = (
    "the device ran out of memory for the optimizer's state",
    'set [train] optimizer = "adamw_8bit", or lower [adapter] rank; `qpref plan` shows what each saves; continue with '
    "--resume where checkpoints exist",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step, complete but for the size of its micro-batches.

    Attributes:
        scaler: fp16's loss scaling; passes everything through in other dtypes.
    """

    scorer: Scorer
    scaler: torch.amp.GradScaler
    examples: Sequence[TokenizedExample]


@dataclass(frozen=True, slots=True)
class MicroBatchResult:
    """Outcome of one backward pass.

    Attributes:
        metrics: name -> [examples].
        nonfinite: [losses] bool, as `Objective.not_finite`.
    """

    metrics: Mapping[str, Tensor]
    nonfinite: Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of a step's backward passes; the gradient itself is in the parameters.

    Attributes:
        parts: of each micro-batch; one for a loss that sees the whole step.
        budget: tokens per micro-batch that the memory sufficed for.
    """

    parts: list[MicroBatchResult]
    budget: int

    @property
    def nonfinite(self) -> Tensor:
        """[losses] bool: which of them made a value that isn't finite of log-probabilities that are."""
        return torch.stack([part.nonfinite for part in self.parts]).any(0)


def compute_gradient(step: Step, budget: int) -> StepResult:
    """Accumulate the gradient of the step's weighted losses, summed and divided once by the number of examples.

    Args:
        budget: tokens per micro-batch to begin with.

    Raises:
        DeviceMemoryError: one example is too large for the memory, with every layer recomputed.
    """
    while (parts := _try_gradient(step, budget)) is None:
        budget = shrink_microbatch(step.scorer.policy, step.examples, budget)
    return StepResult(parts, budget)


def apply_gradient(scaler: torch.amp.GradScaler, optimizer: Any) -> None:
    """Let the optimizer update its parameters; its first step, which allocates its state, may be tried twice.

    Parameters that a step has updated before memory ran out are restored, so the second try is the same step.

    Raises:
        DeviceMemoryError: the state doesn't fit.
    """
    if optimizer.state:
        with out_of_memory_as(*NO_MEMORY_FOR_STATE):
            scaler.step(optimizer)
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    for _ in range(2):
        if fits(lambda: scaler.step(optimizer)):
            return
        optimizer.state.clear()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
    raise DeviceMemoryError(*NO_MEMORY_FOR_STATE)


def _try_gradient(step: Step, budget: int) -> list[MicroBatchResult] | None:
    """Compute the gradient in micro-batches of `budget` tokens; None, and no gradient, if memory runs out."""
    policy = step.scorer.policy
    parts = split_by_tokens(step.examples, budget, policy.shares_prompts)

    def accumulate() -> list[MicroBatchResult]:
        policy.model.zero_grad(set_to_none=True)  # of a try that failed
        if len(parts) > 1 and step.scorer.objective.sees_whole_steps:
            return [_backward_whole_step(step, parts)]
        if len(parts) > 1 and step.scorer.objective.sees_steps_mismatched:
            return _backward_after_partners(step, parts)
        return [_backward_part(step, members) for members in parts]

    results = attempt(accumulate)
    if results is None:
        policy.model.zero_grad(set_to_none=True)
    return results


def _backward_part(step: Step, members: Sequence[TokenizedExample]) -> MicroBatchResult:
    batch, inputs = step.scorer.inputs(members)
    return _backward(step, inputs, batch.weight)


def _backward_after_partners(step: Step, parts: Sequence[Sequence[TokenizedExample]]) -> list[MicroBatchResult]:
    """Backpropagate a loss of which an example depends on the whole step through the mismatched partners alone.

    These have no gradient, so all of them are scored first; then each micro-batch is, once.
    """
    scorer = step.scorer
    mismatched = joined_mismatched([scorer.mismatched(members) for members in parts])
    results = []
    for members in parts:
        batch = scorer.pack(members)
        reference = scorer.reference(batch)
        inputs = scorer.objective.inputs(batch, scorer.policy_scores(batch), reference, mismatched)
        results.append(_backward(step, inputs, batch.weight))
    return results


def _backward_whole_step(step: Step, parts: Sequence[Sequence[TokenizedExample]]) -> MicroBatchResult:
    """Backpropagate a loss that sees all examples at once, one micro-batch in memory at a time.

    Every micro-batch is scored without a graph, with its mismatched partners if the loss needs them; the loss of the
    whole step gives the gradient of each token's log-probability; each micro-batch is then scored a second time, under
    the same dropout, and those gradients are passed back through it (Gao et al. 2021, "Scaling Deep Contrastive
    Learning Batch Size under Memory Limited Setup", section 3).
    """
    scorer = step.scorer
    batches = [scorer.pack(members) for members in parts]
    scored = []
    for members, batch in zip(parts, batches, strict=True):
        with torch.no_grad():
            scored.append(scorer.scores(members, batch))
    for each in scored:
        each.policy.values.requires_grad_()
    inputs = joined_inputs([scorer.lay_out(*each) for each in zip(batches, scored, strict=True)])
    result = _backward(step, inputs, torch.cat([batch.weight for batch in batches]))
    for batch, each in zip(batches, scored, strict=True):
        scorer.policy_scores(batch).values.backward(each.policy.values.grad)
    return result


def _backward(step: Step, inputs: Inputs, weight: Tensor) -> MicroBatchResult:
    objective = step.scorer.objective
    output = objective(inputs)
    total = (output.losses * weight).sum() / len(step.examples)
    step.scaler.scale(total).backward()
    return MicroBatchResult(example_metrics(inputs, output), objective.not_finite(inputs, output))
