"""Tokens of a step's examples on the ranks that they are dealt to, for planning several GPUs."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from qpref.data.deal import deal
from qpref.data.pack import num_fed_tokens
from qpref.memory.stream import Lengths
from qpref.records import Source, TokenizedExample

SIMULATED_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealing:
    """Fed tokens of a step's examples on the ranks, averaged over steps: of the fullest rank, and of the mean one."""

    fullest: float
    mean: float

    @property
    def imbalance(self) -> float:
        return self.fullest / self.mean

    @classmethod
    def of(cls, lengths: Sequence[Lengths], shared: bool, batch_size: int, ranks: int) -> Dealing:
        """Deal random steps as training does, but by example: whole micro-batches add at most a sixteenth."""
        draw = random.Random(0)
        num_steps = SIMULATED_STEPS if len(set(map(_key, lengths))) > 1 else 1
        steps = [draw.choices(lengths, k=batch_size) for _ in range(num_steps)]
        fullest = mean = 0.0
        for step in steps:
            examples = [_example(number, each) for number, each in enumerate(step)]
            loads = [sum(num_fed_tokens(examples[index], shared) for index in share)
                     for share in deal(examples, ranks, shared)]  # fmt: skip
            fullest += max(loads) / num_steps
            mean += sum(loads) / ranks / num_steps
        return cls(fullest=fullest, mean=mean)


def _key(lengths: Lengths) -> tuple[int, ...]:
    return (lengths[0], *lengths[1])


def _example(number: int, lengths: Lengths) -> TokenizedExample:
    """Make an example of these lengths, with a prompt of its own."""
    prompt, responses = lengths
    branches = tuple(array("i", bytes(4 * size)) for size in responses)
    return TokenizedExample(
        prompt=array("i", [number]) * prompt,
        branches=branches,
        truncated=(False,) * len(branches),
        weight=1.0,
        margin=0.0,
        source=Source(path="", line=number),
    )
