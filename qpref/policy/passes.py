"""Passes through a base that processes share, kept in step: what one process gathers, all have to gather with it.

Before a process begins a pass it tells the others, and hears what they begin. Where they differ, all do one of these
first: a process that has no such pass of its own joins the others' collectives with nothing. So processes may have
different numbers of passes, or of different kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

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


@dataclass(slots=True, kw_only=True)
class Passes:
    """Passes of this process and of those that it shares a base with.

    Attributes:
        join: takes part in the others' pass of a kind, with nothing of its own; for SCORES, with their wishes.
    """

    world: World
    join: Callable[[Pass, tuple[bool, bool]], None]

    def begin(self, kind: Pass, wishes: tuple[bool, bool] = (False, False)) -> tuple[bool, bool]:
        """Begin a pass together with all processes, after any that others have to finish before.

        Args:
            wishes: for SCORES, whether gradients are needed, and sums of squares.

        Returns:
            Wishes of all processes together.
        """
        while True:
            begun = self.world.exchange([int(kind), *wishes], "the next pass")
            first = Pass(max(each[0] for each in begun))
            needs_grad, needs_squares = (any(each[index] for each in begun if each[0] == first) for index in (1, 2))
            if first == kind:
                return needs_grad, needs_squares
            self.join(first, (needs_grad, needs_squares))

    def finish(self) -> None:
        """Join the passes of all processes that have more of them, until every process is here."""
        self.begin(Pass.NONE)
