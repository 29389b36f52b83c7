"""The gradient of one optimizer step, accumulated over micro-batches and over the processes of a run.

Every process knows all examples of the step, and computes those that it is dealt. What runs out of memory is repeated
there in smaller micro-batches: the same examples, the same divisor. Between processes there is one message for the
gradients, and before it one for the scores where a loss sees the whole step; no process waits for another within.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from qpref.distributed.world import World
from qpref.errors import DeviceMemoryError
from qpref.hooks.loss_state import State
from qpref.memory.tune import Parts, in_microbatches
from qpref.policy.out_of_memory import fits, out_of_memory_as
from qpref.records import PackedBatch, TokenizedExample
from qpref.training.gradient_sum import sum_gradients
from qpref.training.inputs import Inputs, example_metrics
from qpref.training.scoring import Scorer, Scores
from qpref.training.whole_batch import Values, WholeBatch, mismatched_values, values_of

T = TypeVar("T")

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
        examples: of the whole step, the same in every process.
        share: indices of those that this process computes.
        world: the run's processes.
    """

    scorer: Scorer
    scaler: torch.amp.GradScaler
    examples: Sequence[TokenizedExample]
    share: Sequence[int]
    world: World

    def members(self, indices: Sequence[int]) -> list[TokenizedExample]:
        return [self.examples[index] for index in indices]


@dataclass(frozen=True, slots=True)
class MicroBatchResult:
    """Outcome of one backward pass.

    Attributes:
        metrics: name -> [examples].
        nonfinite: [losses] bool, as `Objective.not_finite`.
        state: of the losses after the step, where they see the whole step and keep one.
    """

    metrics: Mapping[str, Tensor]
    nonfinite: Tensor
    state: State


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of a step's backward passes; the gradient itself is in the parameters.

    Attributes:
        parts: of each micro-batch of this process. A loss that sees the whole step has one, and its metrics only in the
            first process.
        budget: tokens per micro-batch that this process's memory sufficed for.
        nonfinite: [losses] bool: which of them made a value that isn't finite of log-probabilities that are, in any
            process.
        state: of the losses after the step, the same in all processes; empty where they keep none.
    """

    parts: list[MicroBatchResult]
    budget: int
    nonfinite: Tensor
    state: State


def compute_gradient(step: Step, budget: int) -> StepResult:
    """Accumulate the gradient of the step's weighted losses, summed and divided once by the number of examples.

    All processes end up with the same gradient, to the bit.

    Args:
        budget: tokens per micro-batch of this process to begin with.

    Raises:
        DeviceMemoryError: one example is too large for the memory, with every layer recomputed.
    """
    scorer = step.scorer
    with scorer.sharing_references(step.world, step.examples):
        if scorer.objective.sees_whole_steps:
            results, budget = _backward_whole_step(step, budget)
        elif scorer.objective.sees_steps_mismatched:
            results, budget = _backward_after_partners(step, budget)
        else:
            results, budget = _in_microbatches(
                step,
                budget,
                lambda parts: [_backward_part(step, part) for part in step.world.noted(parts, "micro-batch")],
            )
        nonfinite = _sum_over_processes(step, results)
    state = results[0].state if results else {}
    if state:  # every process has computed it; on unlike devices the last bits may differ
        state = step.world.share_tensors(state, "the losses' state")
    return StepResult(results, budget, nonfinite, state)


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


def _in_microbatches(step: Step, budget: int, work: Callable[[Parts], T]) -> tuple[T, int]:
    """Do this process's part of the work, as `qpref.memory.tune.in_microbatches`."""
    return in_microbatches(step.scorer.policy, step.examples, step.share, budget, work)


def _backward_part(step: Step, part: Sequence[int]) -> MicroBatchResult:
    batch, inputs = step.scorer.inputs(step.members(part))
    return _backward(step, inputs, batch.weight)


def _backward_after_partners(step: Step, budget: int) -> tuple[list[MicroBatchResult], int]:
    """Backpropagate a loss of which an example depends on the whole step through the mismatched partners alone.

    These have no gradient, so all of them are scored first; then each micro-batch is, once. A process's only
    micro-batch is scored together with its partners, and keeps its graph until the others' are known.
    """
    scorer, whole = step.scorer, WholeBatch.of(step.scorer, step.examples)
    only: list[tuple[PackedBatch, Scores]] = []

    def score(parts: Parts) -> tuple[Parts, list[Values]]:
        only.clear()
        if len(parts) != 1:
            noted = step.world.noted(parts, "partners of micro-batch")
            return parts, [mismatched_values(scorer.mismatched(step.members(part))) for part in noted]
        batch = scorer.pack(step.members(parts[0]))
        scores = scorer.scores(step.members(parts[0]), batch)
        only.append((batch, scores))
        return parts, [values_of(scores)]

    (parts, values), budget = _in_microbatches(step, budget, score)
    mismatched = whole.collect_mismatched(step.world, scorer.policy, parts, values)

    def backward(parts: Parts) -> list[MicroBatchResult]:
        known = [only.pop()] if only else []
        results = []
        for part in step.world.noted(parts, "micro-batch"):
            batch, scores = known.pop() if known else scorer.without_partners(step.members(part))
            inputs = scorer.lay_out(batch, replace(scores, mismatched=mismatched))
            results.append(_backward(step, inputs, batch.weight))
        return results

    return _in_microbatches(step, budget, backward)


def _backward_whole_step(step: Step, budget: int) -> tuple[list[MicroBatchResult], int]:
    """Backpropagate a loss that sees all examples at once, one micro-batch in memory at a time.

    Every micro-batch is scored without a graph, with its mismatched partners if the loss needs them; the loss of the
    whole step gives the gradient of each token's log-probability; each micro-batch is then scored a second time, under
    the same dropout, and those gradients are passed back through it (Gao et al. 2021, "Scaling Deep Contrastive
    Learning Batch Size under Memory Limited Setup", section 3). A process's only micro-batch keeps its graph instead.
    Every process computes the loss of the whole step, and passes back what belongs to its own examples.
    """
    scorer, whole = step.scorer, WholeBatch.of(step.scorer, step.examples)
    only: list[Tensor] = []

    def score(parts: Parts) -> tuple[Parts, list[PackedBatch], list[Values]]:
        only.clear()
        batches = [scorer.pack(step.members(part)) for part in parts]
        scored = []
        for part, batch in zip(step.world.noted(parts, "scores of micro-batch"), batches, strict=True):
            with torch.set_grad_enabled(len(parts) == 1):
                scored.append(scorer.scores(step.members(part), batch))
        if len(parts) == 1:
            only.append(scored[0].policy.values)
        return parts, batches, [values_of(each) for each in scored]

    (parts, batches, values), budget = _in_microbatches(step, budget, score)
    collected = whole.collect(step.world, scorer.policy, parts, values)

    def backward(repeated: Parts) -> list[MicroBatchResult]:
        known = [only.pop()] if only else []
        leaf = collected["policy"].detach().requires_grad_()
        inputs = scorer.lay_out(whole.rows, whole.scores(collected | {"policy": leaf}))
        result = _backward(step, inputs, whole.rows.weight)
        gradient = leaf.grad
        assert gradient is not None  # the loss has been checked to have one
        packed = batches if repeated == parts else [scorer.pack(step.members(part)) for part in repeated]
        for part, batch in zip(step.world.noted(repeated, "micro-batch"), packed, strict=True):
            own = known.pop() if known else scorer.policy_scores(batch).values
            own.backward(whole.select("policy", gradient, part))
        return [result if step.world.is_first else replace(result, metrics={})]

    return _in_microbatches(step, budget, backward)


def _backward(step: Step, inputs: Inputs, weight: Tensor) -> MicroBatchResult:
    objective = step.scorer.objective
    output = objective(inputs)
    total = (output.losses * weight).sum() / len(step.examples)
    step.scaler.scale(total).backward()
    return MicroBatchResult(example_metrics(inputs, output), objective.not_finite(inputs, output), output.state)


def _sum_over_processes(step: Step, results: Sequence[MicroBatchResult]) -> Tensor:
    """Sum the gradients of all processes; returns [losses] bool, the union of what was not finite in their parts."""
    policy, faults = step.scorer.policy, [result.nonfinite for result in results]
    if not results:  # this process has no example, and `unscale_` refuses a scaler that has scaled nothing
        step.scaler.scale(torch.zeros((), device=policy.device))
        faults = [torch.zeros(len(step.scorer.objective.callers), dtype=torch.bool, device=policy.device)]
    policy.finish_passes()
    return sum_gradients(step.world, list(policy.trained_parameters().values()), torch.stack(faults).any(0))
