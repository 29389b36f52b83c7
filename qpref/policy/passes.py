"""Passes through a base that processes share, kept in step: what one process gathers, all have to gather with it.

Before a process begins a pass it tells the others, and hears what they begin. Where they differ, all do one of these
first: a process that has no such pass of its own joins the others' collectives with nothing. So processes may have
different numbers of passes, or of different kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from qpref.distributed.world import World


class Pass(IntEnum):
    """Kinds of passes; where processes begin different ones, the greatest comes first.

    SCORES are log-probabilities of tokens under the head, LOGITS the model's own pass through it.
    """

    NONE = 0
    BACKWARD = 1
    SCORES = 2
    LOGITS = 3
    DECODER = 4


class Wishes(NamedTuple):
    """Requests of a pass of SCORES: gradients, sums of squares and entropies where needed, and the number of rows."""

    needs_grad: bool = False
    needs_squares: bool = False
    needs_entropy: bool = False
    num_rows: int = 0


NO_WISHES = Wishes()


@dataclass(slots=True, kw_only=True)
class Passes:
    """Passes of this process and of those that it shares a base with.

    Attributes:
        join: takes part in the others' pass of a kind, with nothing of its own; for SCORES, with their wishes.
    """

    world: World
    join: Callable[[Pass, Wishes], None]

    def begin(self, kind: Pass, wishes: Wishes = NO_WISHES) -> Wishes:
        """Begin a pass together with all processes, after any that others have to finish before.

        Returns:
            Wishes of all processes together, and the largest number of rows of one.
        """
        while True:
            begun = self.world.exchange([int(kind), *wishes], "the next pass")
            first = Pass(max(each[0] for each in begun))
            wished = [Wishes(*each) for pass_, *each in begun if pass_ == first]
            together = Wishes(*map(max, zip(*wished, strict=True)))
            if first == kind:
                return together
            self.join(first, together)

    def finish(self) -> None:
        """Join the passes of all processes that have more of them, until every process is here."""
        self.begin(Pass.NONE)
