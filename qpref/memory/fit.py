"""Fit a run into a limit of memory: choose tokens per micro-batch and recomputed layers by prediction.

The recipe's own numbers stand; only what it leaves `auto` is chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from qpref.memory.advice import advice
from qpref.memory.demand import Demand
from qpref.memory.parts import MemoryParts

USEFUL_TOKENS = {"cuda": 4096, "cpu": 1024}
"""Tokens from which a larger micro-batch is hardly faster, so that memory is better spent on keeping activations."""
MOST_TOKENS = {"cuda": 16384, "cpu": 2048}
ROUND_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A choice of tokens per micro-batch and recomputed layers, with the memory that it needs.

    Attributes:
        memory: predicted, at the peak.
        fits: the peak is within the limit.
        advice: changes that would help where it isn't, most effective first.
    """

    tokens_per_microbatch: int
    recomputed_layers: int
    memory: MemoryParts
    fits: bool
    advice: tuple[str, ...] = ()


def fit_memory(demand: Demand, limit_bytes: int) -> Fit:
    """Recompute as few layers as leave memory for a useful micro-batch, then take the largest micro-batch.

    Where even recomputing doesn't leave enough for a useful micro-batch: the largest one that holds the longest
    example. Where that doesn't fit either: the smallest choice, with advice.
    """
    device, longest = demand.setup.device, math.ceil(demand.workload.longest.tokens)
    step_tokens = demand.workload.step_tokens
    useful = demand.fixed_tokens or max(longest, min(USEFUL_TOKENS[device], step_tokens))
    most = demand.fixed_tokens or max(longest, min(MOST_TOKENS[device], step_tokens))

    def fits(tokens: int, layers: int) -> bool:
        return demand.peak(tokens, layers).total <= limit_bytes

    def largest_fit(least: int, layers: int) -> Fit:
        tokens = _largest(least, most, lambda tokens: fits(tokens, layers))
        return Fit(
            tokens_per_microbatch=tokens, recomputed_layers=layers, memory=demand.peak(tokens, layers), fits=True
        )

    for layers in demand.layer_counts:
        if fits(useful, layers):
            return largest_fit(useful, layers)
    tokens, layers = demand.smallest()
    if fits(tokens, layers):
        return largest_fit(tokens, layers)
    return Fit(
        tokens_per_microbatch=tokens,
        recomputed_layers=layers,
        memory=demand.peak(tokens, layers),
        fits=False,
        advice=advice(demand, limit_bytes),
    )


def _largest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """Search the largest number that fits, between `least`, which does, and `most`; rounded down to ROUND_TOKENS."""
    low, high = least, max(least, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    if low >= most:
        return low
    return max(least, low // ROUND_TOKENS * ROUND_TOKENS)
