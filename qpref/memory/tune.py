"""Settles what the recipe leaves to the memory, on the loaded policy and the real data: predict, try once, correct.

What is predicted for the settings in force is kept in run.json, for `qpref report` to hold what happened against it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qpref.attention.register import BLOCKS
from qpref.data.pack import num_fed_tokens, pack
from qpref.errors import PolicyError
from qpref.memory.costs import GIB, Setup, Stream
from qpref.memory.fit import Fit, Probe, Settings, Workload, choose, corrected, measure, needed
from qpref.memory.flops import step_flops
from qpref.memory.shape import ModelShape, model_shape
from qpref.memory.shrink import shrink_microbatch
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.recipe.sections import Recipe
from qpref.records import TokenizedExample

log = logging.getLogger("qpref")


def settle(policy: Policy, recipe: Recipe, base: Path, examples: Sequence[TokenizedExample], limit: int) -> int:
    """The tokens per micro-batch; sets how many layers the policy checkpoints, where the recipe leaves that open.

    Args:
        base: the base model's folder.
        limit: bytes that the whole run may fill, the weights among them.

    Raises:
        DeviceMemoryError: not even the longest example fits.
    """
    asked = recipe.train.tokens_per_microbatch, recipe.train.gradient_checkpointing
    if "auto" not in asked:
        return int(asked[0])
    shape, settings, data = _planned(policy, recipe, base, examples)
    fit = choose(shape, settings, limit, data)
    if not fit.fits:
        log.warning("memory: %.2f GiB are predicted and %.2f GiB are there; %s", fit.memory.total / GIB, limit / GIB,
                    ", ".join(fit.advice))  # fmt: skip
    policy.recompute_layers(fit.recomputed_layers)
    budget, probe = _probe(policy, examples, fit)
    if probe is not None:
        fit = corrected(shape, settings, limit, data, probe)
        policy.recompute_layers(fit.recomputed_layers)
        budget = fit.tokens_per_microbatch
    log.info("memory: %d tokens per micro-batch, %d of %d layers checkpointed; %.2f of %.2f GiB predicted", budget,
             policy.recomputed_layers, policy.num_layers, fit.memory.total / GIB, limit / GIB)  # fmt: skip
    return budget


def forecast(
    policy: Policy, recipe: Recipe, base: Path, examples: Sequence[TokenizedExample], budget: int
) -> dict[str, Any] | None:
    """What `qpref plan` says of the settings in force, as JSON data; sizes in bytes, before any probe corrects them.

    None for a base whose shape cannot be read, which trains where the recipe leaves nothing to the memory.
    """
    try:
        shape, settings, data = _planned(policy, recipe, base, examples)
    except PolicyError:
        return None
    layers = policy.recomputed_layers
    memory = needed(shape, settings, data, budget, layers)
    step = data.typical.of_tokens(data.step_tokens)
    return {
        "memory": asdict(memory) | {"reserve": memory.reserve, "total": memory.total},
        "tokens_per_step": data.step_tokens,
        "flops_per_step": step_flops(shape, step, layers / shape.num_layers),
    }


def _planned(
    policy: Policy, recipe: Recipe, base: Path, examples: Sequence[TokenizedExample]
) -> tuple[ModelShape, Settings, Workload]:
    shape = replace(model_shape(recipe.model, recipe.adapter, str(base)), shares_prompts=policy.shares_prompts)
    setup = Setup.of(recipe, "cuda" if policy.device.type == "cuda" else "cpu", shape)
    settings = Settings.of(recipe, replace(setup, in_blocks=policy.attention == BLOCKS), shape)
    return shape, settings, Workload.of(map(_lengths, examples), recipe.train.batch_size, policy.shares_prompts)


def _lengths(example: TokenizedExample) -> tuple[int, list[int]]:
    return len(example.prompt), [len(branch) for branch in example.branches]


def _probe(policy: Policy, examples: Sequence[TokenizedExample], fit: Fit) -> tuple[int, Probe | None]:
    """Try the longest examples, up to the predicted budget. No probe where they fit a smaller budget alone."""
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
    stream = Stream.of(map(_lengths, members), policy.shares_prompts)
    return budget, Probe(stream=stream, checkpointed=policy.recomputed_layers, measured=measured)


def _try(policy: Policy, members: Sequence[TokenizedExample]) -> int | None:
    """Bytes that a forward and backward pass over the examples takes; None where there are not so many."""
    batch = pack(members, policy.device)
    policy.model.train()
    try:
        return measure(lambda: completion_logprobs(policy, batch).values.sum().backward(), policy.device)
    except torch.OutOfMemoryError:
        return None
    finally:
        policy.model.zero_grad(set_to_none=True)


def _within(longest: Sequence[TokenizedExample], budget: int, shared: bool) -> list[TokenizedExample]:
    """The first examples, at least one, as long as they stay within the budget."""
    members, used = [longest[0]], num_fed_tokens(longest[0], shared)
    for example in longest[1:]:
        used += num_fed_tokens(example, shared)
        if used > budget:
            break
        members.append(example)
    return members
