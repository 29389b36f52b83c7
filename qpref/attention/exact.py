"""Attention and its gradients in float32 by their formulas: what a 16-bit kernel is judged by.

A kernel's error alone says little. Where a head puts nearly all of its attention on one key (a sink), the gradient of
its queries is a small difference of large numbers, and rounding these to 16 bits as every kernel does leaves 15 to
100 % of error in it. So the same formulas are computed with that rounding too: a right kernel is about as far from
float32 as they are, and a wrong one is farther in its result or in some gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.attention.segments import Block, Segment, segments
from qpref.records import Group

MAX_SCORES = 2**22
"""Scores that are computed at once (16 MiB in float32): one block of queries, and as many key heads as fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One layer's attention, and a gradient of its result.

    Attributes:
        query: [1, heads, T, width].
        key, value: [1, key-value heads, T, width].
        scale: factor on query times key.
        window: positions that a token sees, itself included; None for all before it.
        direction: [1, T, heads, width], the gradient of the result.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    groups: Sequence[Group]
    scale: float
    window: int | None
    direction: Tensor


def attention_and_gradients(call: AttentionCall) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the result [1, T, heads, width] and the gradients of query, key and value, all float32.

    Returns:
        Computed in float32 throughout; and with the rounding of a 16-bit kernel in the queries' dtype: that of the
        softmax, of its scores' gradient, and of the result, from which the gradient of each row's sum is taken.
    """
    num_heads = call.key.shape[1]
    exact, rounded = _Sums(call, None), _Sums(call, call.query.dtype)
    for segment in segments(call.groups):
        for block in segment.blocks(call.window):
            scores = (block.queries.stop - block.queries.start) * segment.num_keys * call.query.shape[1] // num_heads
            step = max(1, MAX_SCORES // scores)
            for first in range(0, num_heads, step):
                part = _Part.of(call, segment, block, slice(first, min(first + step, num_heads)))
                exact.add(part)
                rounded.add(part)
    return exact.tensors(), rounded.tensors()


@dataclass(frozen=True, slots=True)
class _Part:
    """A block of queries and some key heads, in float32.

    Attributes:
        rows, incoming: [key heads, query heads of each, queries, width], queries and gradient of the result.
        keys, values: [key heads, 1, keys, width].
        weights, weights_grad: [key heads, query heads of each, queries, keys], the softmax and its gradient.
    """

    segment: Segment
    block: Block
    heads: slice
    rows: Tensor
    incoming: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor
    weights_grad: Tensor

    @classmethod
    def of(cls, call: AttentionCall, segment: Segment, block: Block, heads: slice) -> _Part:
        gathered = (
            torch.cat([states[0, heads, span] for span in segment.spans], 1) for states in (call.key, call.value)
        )
        keys, values = (states[:, None, block.keys].float() for states in gathered)
        rows = call.query[0].unflatten(0, (call.key.shape[1], -1))[heads, :, block.queries].float()
        direction = call.direction[0].transpose(0, 1).unflatten(0, (call.key.shape[1], -1))
        incoming = direction[heads, :, block.queries].float()
        scores = (rows @ keys.transpose(-1, -2)).mul_(call.scale)
        scores.masked_fill_(hidden_keys(block, call.window, scores.device), -torch.inf)
        weights_grad = incoming @ values.transpose(-1, -2)
        return cls(segment, block, heads, rows, incoming, keys, values, scores.softmax(-1), weights_grad)


class _Sums:
    """Result and gradients, summed over parts, float32: [key-value heads, query heads of each, T, width] of queries,
    and [key-value heads, T, width] of keys and values."""

    def __init__(self, call: AttentionCall, rounding: torch.dtype | None) -> None:
        self._rounding, self._scale = rounding, call.scale
        by_query = call.query[0].unflatten(0, (call.key.shape[1], -1)).shape
        self._result, self._query_grad, self._key_grad, self._value_grad = (
            torch.zeros(shape, dtype=torch.float32, device=call.query.device)
            for shape in (by_query, by_query, call.key.shape[1:], call.value.shape[1:])
        )

    def add(self, part: _Part) -> None:
        weights = self._rounded(part.weights)
        result = self._rounded(weights @ part.values)
        of_sum = (part.incoming * result).sum(-1, keepdim=True)
        scores_grad = self._rounded((part.weights_grad - of_sum).mul_(weights))
        queries = part.heads, slice(None), part.block.queries
        self._result[queries] = result
        self._query_grad[queries] = (scores_grad @ part.keys).mul_(self._scale)
        key_grad = (scores_grad.transpose(-1, -2) @ part.rows).sum(1).mul_(self._scale)
        value_grad = (weights.transpose(-1, -2) @ part.incoming).sum(1)
        for there, here in _pieces(part.segment.spans, part.block.keys):
            self._key_grad[part.heads, there] += key_grad[:, here]
            self._value_grad[part.heads, there] += value_grad[:, here]

    def _rounded(self, values: Tensor) -> Tensor:
        return values if self._rounding is None else values.to(self._rounding).float()

    def tensors(self) -> list[Tensor]:
        result, query_grad = (states.flatten(0, 1)[None] for states in (self._result, self._query_grad))
        return [result.transpose(1, 2), query_grad, self._key_grad[None], self._value_grad[None]]


def hidden_keys(block: Block, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys], true where a query doesn't see a key."""
    num_queries = block.queries.stop - block.queries.start
    query = torch.arange(block.own, block.own + num_queries, device=device)[:, None]
    key = torch.arange(block.keys.start, block.keys.stop, device=device)
    hidden = key > query
    return hidden if window is None else hidden | (query - key >= window)


def _pieces(spans: Sequence[slice], keys: slice) -> Iterator[tuple[slice, slice]]:
    """Map a range of a segment's keys to the stream: (indices in the stream, indices in the range)."""
    start = 0
    for span in spans:
        stop = start + span.stop - span.start
        first, last = max(start, keys.start), min(stop, keys.stop)
        if first < last:
            offset = span.start - start
            yield slice(first + offset, last + offset), slice(first - keys.start, last - keys.start)
        start = stop
