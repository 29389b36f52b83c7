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
from qpref.policy.out_of_memory import attempt, fits
from qpref.records import PackedBatch, TokenizedExample, TokenLogProbs
from qpref.training import optim
from qpref.training.inputs import Inputs, example_metrics, joined_inputs
from qpref.training.scoring import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step, complete but for the size of its micro-batches.

    Attributes:
        scaler: fp16's loss scaling; passes everything through in other dtypes.
        index: optimizer steps before this one.
        seed: the run's seed, from which the step's dropout follows.
    """

    scorer: Scorer
    scaler: torch.amp.GradScaler
    index: int
    seed: int
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
    raise DeviceMemoryError(
        "the device ran out of memory for the optimizer's state",
        'set [train] optimizer = "adamw_8bit", or lower [adapter] rank; `qpref plan` shows what each saves',
    )


def _try_gradient(step: Step, budget: int) -> list[MicroBatchResult] | None:
    """Compute the gradient in micro-batches of `budget` tokens; None, and no gradient, if memory runs out."""
    policy = step.scorer.policy
    parts = split_by_tokens(step.examples, budget, policy.shares_prompts)

    def accumulate() -> list[MicroBatchResult]:
        policy.model.zero_grad(set_to_none=True)  # of a try that failed
        if step.scorer.objective.sees_whole_steps and len(parts) > 1:
            return [_backward_whole_step(step, parts)]
        return [_backward_part(step, members) for members in parts]

    results = attempt(accumulate)
    if results is None:
        policy.model.zero_grad(set_to_none=True)
    return results


def _backward_part(step: Step, members: Sequence[TokenizedExample]) -> MicroBatchResult:
    batch, inputs = step.scorer.inputs(members)
    return _backward(step, inputs, batch.weight)


def _backward_whole_step(step: Step, parts: Sequence[Sequence[TokenizedExample]]) -> MicroBatchResult:
    """Backpropagate a loss that sees all examples at once, one micro-batch in memory at a time.

    Every micro-batch is scored without a graph; the loss of the whole step gives the gradient of each token's
    log-probability; each micro-batch is then scored a second time, under the same dropout, and those gradients are
    passed back through it (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
    section 3).
    """
    scorer = step.scorer
    batches = [scorer.pack(members) for members in parts]
    mismatched = [scorer.mismatched(members) for members in parts]
    references = [scorer.reference(batch) for batch in batches]
    with torch.no_grad():
        leaves = [_score_microbatch(step, batch, index) for index, batch in enumerate(batches)]
    for leaf in leaves:
        leaf.values.requires_grad_()
    scored = zip(batches, leaves, references, mismatched, strict=True)
    inputs = joined_inputs([scorer.objective.inputs(*each) for each in scored])
    result = _backward(step, inputs, torch.cat([batch.weight for batch in batches]))
    for index, (batch, leaf) in enumerate(zip(batches, leaves, strict=True)):
        _score_microbatch(step, batch, index).values.backward(leaf.values.grad)
    return result


def _score_microbatch(step: Step, batch: PackedBatch, index: int) -> TokenLogProbs:
    """Score a micro-batch under the policy, with the same dropout at every call."""
    optim.seed_step(step.seed, step.index, index)
    return step.scorer.policy_scores(batch)


def _backward(step: Step, inputs: Inputs, weight: Tensor) -> MicroBatchResult:
    objective = step.scorer.objective
    output = objective(inputs)
    total = (output.losses * weight).sum() / len(step.examples)
    step.scaler.scale(total).backward()
    return MicroBatchResult(example_metrics(inputs, output), objective.not_finite(inputs, output))
