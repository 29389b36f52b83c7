"""Demand of a run for memory, as a function of tokens per micro-batch and recomputed layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qpref.memory.costs import peak_memory
from qpref.memory.parts import MemoryParts
from qpref.memory.setup import Setup
from qpref.memory.shape import ModelShape
from qpref.memory.stream import Lengths, Stream
from qpref.policy.load import recomputed_layers
from qpref.recipe.sections import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths of the training data, reduced to what memory and work depend on.

    Attributes:
        longest_lengths: lengths of the longest example.
        longest: stream of the longest example alone.
        typical: stream of all examples.
        step_tokens: fed tokens of an average optimizer step.
    """

    longest_lengths: Lengths
    longest: Stream
    typical: Stream
    step_tokens: int

    @classmethod
    def of(cls, examples: Iterable[Lengths], batch_size: int, shared: bool = True) -> Workload:
        """Summarize the lengths of at least one example."""
        examples = list(examples)
        longest = max(examples, key=lambda example: Stream.of([example], shared).tokens)
        typical = Stream.of(examples, shared)
        return cls(
            longest_lengths=longest,
            longest=Stream.of([longest], shared),
            typical=typical,
            step_tokens=math.ceil(typical.tokens / len(examples) * batch_size),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A run's memory for any choice of tokens per micro-batch and recomputed layers.

    Attributes:
        fixed_tokens: the recipe's tokens per micro-batch; None for `auto`.
        fixed_layers: the recipe's number of recomputed layers; None for `auto`.
        correction: factor, from a probe, on every part that grows with tokens.
    """

    shape: ModelShape
    setup: Setup
    workload: Workload
    fixed_tokens: int | None = None
    fixed_layers: int | None = None
    correction: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe, shape: ModelShape, setup: Setup, workload: Workload) -> Demand:
        tokens, layers = recipe.train.tokens_per_microbatch, recipe.train.gradient_checkpointing
        return cls(
            shape=shape,
            setup=setup,
            workload=workload,
            fixed_tokens=None if isinstance(tokens, str) else tokens,
            fixed_layers=None if isinstance(layers, str) else recomputed_layers(layers, shape.num_layers),
        )

    def peak(self, tokens: int, layers: int) -> MemoryParts:
        """Predict the peak with micro-batches of `tokens`; a longer example has a micro-batch of its own."""
        streams = [self.workload.typical.scaled_to(tokens), self.workload.longest]
        peaks = [peak_memory(self.shape, self.setup, stream, layers) for stream in streams]
        return _corrected(max(peaks, key=lambda parts: parts.total), self.correction)

    @property
    def layer_counts(self) -> Sequence[int]:
        """Numbers of recomputed layers to choose from, fewest first."""
        return range(self.shape.num_layers + 1) if self.fixed_layers is None else [self.fixed_layers]

    def smallest(self) -> tuple[int, int]:
        """Return the tokens per micro-batch and recomputed layers that need least memory.

        Usually that isn't all layers: the last layer's activations are needed as soon as the backward pass begins, so
        recomputing it saves nothing.
        """
        tokens = self.fixed_tokens or math.ceil(self.workload.longest.tokens)
        return tokens, min(self.layer_counts, key=lambda layers: self.peak(tokens, layers).total)


def _corrected(parts: MemoryParts, factor: float) -> MemoryParts:
    return replace(
        parts,
        activations=int(parts.activations * factor),
        live=int(parts.live * factor),
        head_tile=int(parts.head_tile * factor),
    )
