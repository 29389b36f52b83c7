"""The layout of the packed stream that a model is computing, for the layers that depend on it.

It reaches them as context, not as a keyword: some families don't pass keywords on to their layers, and others refuse
those that they don't know.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass, field

import torch

from qpref.attention.fork import Fork
from qpref.attention.prompts import PromptStates
from qpref.records import Group


@dataclass(slots=True, eq=False)
class Layout:
    """Layout of a stream, and what is kept of its prompts.

    Attributes:
        groups: prompts and branches, in the stream's order.
        prompts: carries the prompts' states from one pass to another; None where there is one pass alone.
    """

    groups: tuple[Group, ...]
    prompts: PromptStates | None = None
    _fork: Fork | None = field(default=None, init=False)

    def fork(self, device: torch.device) -> Fork:
        """Lay out the stream as rows; its layers share the result."""
        if self._fork is None:
            continued = self.prompts is not None and self.prompts.are_computed
            self._fork = Fork.of(self.groups, device, continued=continued)
        return self._fork


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


def current() -> Layout | None:
    """Return the layout of the stream that is being computed; None where whole rows are."""
    return _current.get()


class laid_out:
    """Context of a pass over a stream, or of its repetition; for any number of uses."""

    def __init__(self, layout: Layout | None) -> None:
        self._layout = layout
        self._tokens: list[Token[Layout | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_current.set(self._layout))

    def __exit__(self, *error: object) -> None:
        _current.reset(self._tokens.pop())
