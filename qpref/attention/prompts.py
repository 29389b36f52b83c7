"""States of prompts, kept from a pass over one stream for further branches of the same prompts.

A mismatched completion has no gradient, so it isn't part of the stream that has one: its rows would cost a backward
pass. It is scored after that stream, in a pass over its own tokens alone, whose layers continue from the
prompts' states of the first pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qpref.records import Group

States = Mapping[tuple[str, int], Tensor]
"""A layer's states by kind and index, a row for each prompt."""


class PromptStates(Protocol):
    """A layer's part in one of the two passes.

    Attributes:
        are_computed: the prompts aren't part of this pass.
    """

    are_computed: bool

    def complete(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Complete the queries, keys and values [1, heads, T, width] of an attention layer to those of a stream."""

    def own_rows(self, attended: Tensor) -> Tensor:
        """Select the rows of the layer's own tokens from the stream's result [1, T, heads, width]."""

    def ends(self, module: Any, states: States) -> States:
        """Return the states of a layer at the prompts' ends, given those that this pass has computed (none, where the
        prompts are computed)."""


class KeptPrompts:
    """Keeps each layer's keys and values of a stream's prompts during the pass over it.

    Attributes:
        at: [P] int64, stream indices of the prompts' tokens.
        states: attention layer -> keys and values [1, key-value heads, P, width], and layer with a state -> its States;
            None after the pass, so that layers which are recomputed in the backward pass keep none.
    """

    are_computed = False

    def __init__(self, at: Tensor) -> None:
        self.at = at
        self.states: dict[Any, Any] | None = {}

    def complete(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.states is not None:
            self.states[module] = key.detach().index_select(2, self.at), value.detach().index_select(2, self.at)
        return query, key, value

    def own_rows(self, attended: Tensor) -> Tensor:
        return attended

    def ends(self, module: Any, states: States) -> States:
        if self.states is not None:
            self.states[module] = {key: state.detach() for key, state in states.items()}
        return states

    def take(self) -> dict[Any, Any]:
        """Return the states and keep no more."""
        states, self.states = self.states, None
        assert states is not None
        return states


class ContinuedPrompts:
    """Completes a pass over branches alone with the prompts that another pass has kept.

    Queries of prompts are zeros: their rows are computed, which costs little beside the linear layers that they skip,
    and dropped.

    Attributes:
        order: [T] int64, index of each of the stream's tokens in (prompts, branches).
        own: [B] int64, stream indices of the branches' tokens.
        states: as `KeptPrompts.states`; each layer's are freed once it has used them.
    """

    are_computed = True

    def __init__(self, order: Tensor, own: Tensor, states: dict[Any, Any]) -> None:
        self.order, self.own, self.states = order, own, states

    def complete(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.states.pop(module)
        blank = query.new_zeros(*query.shape[:2], keys.shape[2], query.shape[3])
        parts = ((blank, query), (keys, key), (values, value))
        whole = [torch.cat([first.to(second.dtype), second], dim=2) for first, second in parts]
        query, key, value = (states.index_select(2, self.order) for states in whole)
        return query, key, value

    def own_rows(self, attended: Tensor) -> Tensor:
        return attended.index_select(1, self.own)

    def ends(self, module: Any, states: States) -> States:
        kept: States = self.states.pop(module)
        return kept


def spans(groups: Sequence[Group]) -> tuple[list[int], list[int]]:
    """List the stream indices of the prompts' tokens, and those of the branches'."""
    prompts: list[int] = []
    branches: list[int] = []
    for group in groups:
        first = group.start + group.prompt
        prompts.extend(range(group.start, first))
        branches.extend(range(first, first + sum(group.branches)))
    return prompts, branches
