"""The one place that decides tokens per micro-batch and recomputed layers: at the start, and when memory runs out.

At the start: predict on the real data, try the longest examples once on the loaded policy, correct the prediction.
When memory runs out: halve the micro-batch; once it is a single example, recompute all layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from qpref.attention.register import BLOCKS, KERNELS
from qpref.data.pack import num_fed_tokens, pack, split_by_tokens, split_indices
from qpref.errors import DeviceMemoryError
from qpref.memory.demand import Demand, Workload
from qpref.memory.fit import Fit, fit_memory
from qpref.memory.parts import GIB
from qpref.memory.probe import Probe, corrected, measure_bytes
from qpref.memory.setup import Setup
from qpref.memory.shape import model_shape
from qpref.memory.stream import Lengths, Stream
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.out_of_memory import attempt
from qpref.policy.policy import Policy
from qpref.recipe.sections import Recipe
from qpref.records import TokenizedExample

log = logging.getLogger("qpref")

T = TypeVar("T")
Parts = Sequence[Sequence[int]]
"""Micro-batches, by the indices of their examples."""


def choose_sizes(policy: Policy, recipe: Recipe, base: Path, examples: Sequence[TokenizedExample], limit: int) -> int:
    """Return the tokens per micro-batch, and set the policy's recomputed layers, where the recipe leaves them `auto`.

    Args:
        base: the base model's folder.
        limit: bytes that the whole run may fill, weights included.

    Raises:
        DeviceMemoryError: not even the longest example fits.
    """
    requested = recipe.train.tokens_per_microbatch, recipe.train.gradient_checkpointing
    if "auto" not in requested:
        return int(requested[0])
    demand = demand_of(policy, recipe, base, examples)
    fit = fit_memory(demand, limit)
    if not fit.fits:
        log.warning("memory: %.2f GiB predicted, %.2f GiB available; %s", fit.memory.total / GIB, limit / GIB,
                    ", ".join(fit.advice))  # fmt: skip
    policy.recompute_layers(fit.recomputed_layers)
    budget, probe = _probe(policy, examples, fit)
    if probe is not None:
        demand = corrected(demand, probe)
        fit = fit_memory(demand, limit)
        policy.recompute_layers(fit.recomputed_layers)
        budget = fit.tokens_per_microbatch
    predicted = demand.peak(budget, policy.recomputed_layers).total
    log.info("memory: %d tokens per micro-batch, %d of %d layers recomputed; %.2f of %.2f GiB predicted", budget,
             policy.recomputed_layers, policy.num_layers, predicted / GIB, limit / GIB)  # fmt: skip
    return budget


def demand_of(policy: Policy, recipe: Recipe, base: Path, examples: Sequence[TokenizedExample]) -> Demand:
    """Read the demand of a loaded policy on its real data.

    Raises:
        PolicyError: the base's shape cannot be read.
    """
    shape = replace(model_shape(recipe.model, recipe.adapter, str(base)), shares_prompts=policy.shares_prompts)
    setup = Setup.of(recipe, "cuda" if policy.device.type == "cuda" else "cpu", shape)
    workload = Workload.of(map(lengths_of, examples), recipe.train.batch_size, policy.shares_prompts)
    path = policy.attention  # the one that the first batch's check has left
    num_shards = 1 if policy.shards is None else policy.shards.world.size
    setup = replace(setup, in_blocks=path == BLOCKS, has_flash=path in KERNELS, num_shards=num_shards)
    return Demand.of(recipe, shape, setup, workload)


def lengths_of(example: TokenizedExample) -> Lengths:
    """Length of an example's prompt, and those of its responses."""
    return len(example.prompt), [len(branch) for branch in example.branches]


def _probe(policy: Policy, examples: Sequence[TokenizedExample], fit: Fit) -> tuple[int, Probe | None]:
    """Try the longest examples, up to the predicted budget; returns the budget that they ran within.

    No probe is returned where memory ran out on the way: it wouldn't measure the predicted settings.
    """
    budget = fit.tokens_per_microbatch
    longest = sorted(examples, key=lambda example: -num_fed_tokens(example, policy.shares_prompts))
    while True:
        members = _within(longest, budget, policy.shares_prompts)
        measured = _try(policy, members)
        if measured is not None:
            break
        budget = shrink_microbatch(policy, members, budget)
    if budget < fit.tokens_per_microbatch or policy.recomputed_layers != fit.recomputed_layers:
        return budget, None
    stream = Stream.of(map(lengths_of, members), policy.shares_prompts)
    return budget, Probe(stream=stream, recomputed_layers=policy.recomputed_layers, measured_bytes=measured)


def _try(policy: Policy, members: Sequence[TokenizedExample]) -> int | None:
    """Measure a forward and backward pass over the examples, in bytes; None if memory runs out."""
    batch = pack(members, policy.device)
    policy.model.train()

    def measure() -> int:
        return measure_bytes(lambda: completion_logprobs(policy, batch).values.sum().backward(), policy.device)

    try:
        return attempt(measure)
    finally:
        policy.model.zero_grad(set_to_none=True)


def _within(longest: Sequence[TokenizedExample], budget: int, shared: bool) -> list[TokenizedExample]:
    """Take examples from the front while they stay within the budget, at least one."""
    members, used = [longest[0]], num_fed_tokens(longest[0], shared)
    for example in longest[1:]:
        used += num_fed_tokens(example, shared)
        if used > budget:
            break
        members.append(example)
    return members


def in_microbatches(
    policy: Policy, examples: Sequence[TokenizedExample], share: Sequence[int], budget: int, work: Callable[[Parts], T]
) -> tuple[T, int]:
    """Do work on some of the examples in micro-batches of `budget` tokens, or of fewer once memory runs out.

    A try that failed leaves no gradient behind, neither for the next one nor beside an error.

    Args:
        share: indices of these examples.
        work: takes the micro-batches.

    Returns:
        The work's result, and the tokens per micro-batch that the memory sufficed for.

    Raises:
        DeviceMemoryError: one example is too large for the memory.
    """
    own = [examples[index] for index in share]

    def tried() -> T:
        _clear_gradients(policy)
        return work(parts)

    while True:
        parts = [[share[index] for index in part] for part in split_indices(own, budget, policy.shares_prompts)]
        result = attempt(tried)
        if result is not None:
            return result, budget
        _clear_gradients(policy)
        budget = shrink_microbatch(policy, own, budget)


def _clear_gradients(policy: Policy) -> None:
    if torch.is_grad_enabled():
        policy.model.zero_grad(set_to_none=True)


def shrink_microbatch(policy: Policy, examples: Sequence[TokenizedExample], budget: int) -> int:
    """Return the tokens per micro-batch to repeat the examples with, after `budget` tokens ran out of memory.

    Once the largest micro-batch is a single example, all layers are recomputed instead, in training mode.

    Raises:
        DeviceMemoryError: nothing is left to shrink, or processes share the base.
    """
    policy.refuse_repeating(
        f"with {budget} tokens per micro-batch",
        f"set [train] tokens_per_microbatch to {budget // 2} or less, or [train] gradient_checkpointing = true; "
        "continue with --resume where checkpoints exist",
    )
    smaller = smaller_budget(examples, budget, policy.shares_prompts)
    if smaller is not None:
        log.warning("out of memory: %d tokens per micro-batch instead of %d; the step is repeated", smaller, budget)
        return smaller
    if policy.model.training and policy.recomputed_layers < policy.num_layers:
        log.warning("out of memory: all layers are recomputed from here on; the step is repeated")
        policy.recompute_layers(policy.num_layers)
        return budget
    longest = max((num_fed_tokens(example, policy.shares_prompts) for example in examples), default=0)
    raise DeviceMemoryError(
        f"the device ran out of memory on one example of {longest} tokens",
        "lower [data] max_length or [adapter] rank, take an 8-bit or paged [train] optimizer, or a smaller base; "
        "`qpref plan` shows what each saves; continue with --resume where checkpoints exist",
    )


def smaller_budget(examples: Sequence[TokenizedExample], budget: int, shared: bool) -> int | None:
    """Halve the budget until the largest micro-batch gets smaller; None where that is a single example already."""

    def largest(limit: int) -> int:
        parts = split_by_tokens(examples, limit, shared)
        return max((sum(num_fed_tokens(member, shared) for member in part) for part in parts), default=0)

    before = largest(budget)
    if before == max((num_fed_tokens(example, shared) for example in examples), default=0):
        return None
    while largest(budget) == before:
        budget //= 2
    return budget
