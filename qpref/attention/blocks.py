"""Shared-prompt attention for x86 CPUs with bf16 units: plain matrix products over blocks of queries.

torch's fused kernel for CPUs is slow in bf16, and in float32 reaches a quarter of the bf16 units' speed. Here a block's
scores are one product, accumulated and kept in float32; the softmax is rounded to bf16 once, as flash kernels on GPUs
round it, and the products with it run on the bf16 units. The query heads that share a key head are rows of one matrix,
so keys and values are never repeated. A block's scores end with its last query's own key, so little of the masked half
of the causal triangle is computed. The softmax is kept for the backward pass in short segments and recomputed in long
ones, since it grows with the square of the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qpref.attention.segments import QUERY_BLOCK, Block, Segment, segments
from qpref.records import Group


def has_bf16_units() -> bool:
    """Return whether this machine's CPU multiplies bf16 in hardware, which makes this path the faster one."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def attend(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], scaling: float | None, window: int | None
) -> Tensor:
    """[1, heads, T, width] queries and [1, key-value heads, T, width] keys and values -> [1, T, heads, width]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    streams = [states.squeeze(0).transpose(0, 1) for states in (query, key, value)]
    with torch.autocast("cpu", enabled=False):  # it would cast the scores back to bf16
        attended: Tensor = _Attend.apply(*streams, groups, scale, window)  # type: ignore[no-untyped-call]
    return attended[None]


class _Attend(torch.autograd.Function):
    """softmax(scale Q K^T) V for each segment, and its gradient (Dao et al. 2022, "FlashAttention", section B.2).

    query [T, heads, width], key and value [T, key-value heads, width] -> [T, heads, width].
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], scale: float, window: int | None
    ) -> Tensor:
        num_heads, fp32 = key.shape[1], torch.float32
        rows, keys = _heads_first(query, num_heads, fp32).mul_(scale), _heads_first(key, num_heads, fp32).squeeze(2)
        values = _heads_first(value, num_heads).squeeze(2)
        attended, kept = [], []
        for segment in segments(groups):
            segment_keys, segment_values = _gather(keys, segment), _gather(values, segment)
            for block in segment.blocks(window):
                weights = _attention_weights(
                    _block_rows(rows, block), segment_keys[:, block.keys], block, window, query.dtype
                )
                attended.append(torch.bmm(weights, segment_values[:, block.keys]))
                if segment.keeps and any(ctx.needs_input_grad):
                    kept.append(weights)
                del weights
        ctx.save_for_backward(query, key, value, *kept)
        ctx.groups, ctx.scale, ctx.window = groups, scale, window
        return _heads_last(attended, len(query))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        num_heads, remaining = key.shape[1], iter(kept)
        rows, incoming = _heads_first(query, num_heads), _heads_first(gradients[0], num_heads)
        keys, values = _heads_first(key, num_heads).squeeze(2), _heads_first(value, num_heads).squeeze(2)
        query_grad: list[Tensor] = []
        key_grad, value_grad = (torch.empty_like(states, dtype=torch.float32) for states in (keys, values))
        for segment in segments(ctx.groups):
            grads = _SegmentGrads(_gather(keys, segment), _gather(values, segment))
            blocks = [(block, next(remaining) if segment.keeps else None) for block in segment.blocks(ctx.window)]
            block_grads = []
            for block, weights in reversed(blocks):
                own = _block_rows(rows, block)
                if weights is None:
                    scaled, block_keys = own.float() * ctx.scale, grads.keys[:, block.keys].float()
                    weights = _attention_weights(scaled, block_keys, block, ctx.window, query.dtype)
                block_grads.append(grads.add(block, own, _block_rows(incoming, block), weights))
            query_grad += reversed(block_grads)
            _scatter(key_grad, grads.keys_grad, segment)
            _scatter(value_grad, grads.values_grad, segment)
        key_grad.mul_(ctx.scale)
        return (
            _heads_last(query_grad, len(query)).mul_(ctx.scale),
            key_grad.transpose(0, 1).to(key.dtype),
            value_grad.transpose(0, 1).to(value.dtype),
            None,
            None,
            None,
        )


class _SegmentGrads:
    """Gradients of a segment, summed over its blocks.

    Attributes:
        keys, values: [key-value heads, keys, width] of the segment.
        keys_grad, values_grad: their gradients in the same shape, float32; empty before the first block.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.keys_grad = self.values_grad = keys.new_empty(0)

    def add(self, block: Block, rows: Tensor, incoming: Tensor, weights: Tensor) -> Tensor:
        """Add a block's gradients, given the incoming gradient of its result and its attention weights, and return
        that of its scaled queries, [key-value heads, rows, width]."""
        self.values_grad = self._added(self.values_grad, torch.bmm(weights.transpose(1, 2), incoming), block)
        weights_grad = torch.bmm(incoming, self.values[:, block.keys].transpose(1, 2))
        scores_grad = torch.ops.aten._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
        self.keys_grad = self._added(self.keys_grad, torch.bmm(scores_grad.transpose(1, 2), rows), block)
        return torch.bmm(scores_grad, self.keys[:, block.keys])

    def _added(self, total: Tensor, part: Tensor, block: Block) -> Tensor:
        num_keys = self.keys.shape[1]
        if not total.numel():
            if part.shape[1] == num_keys:  # as where a segment's last block comes first
                return part.float()
            total = part.new_zeros(len(part), num_keys, part.shape[2], dtype=torch.float32)
        total[:, block.keys] += part
        return total


def _heads_first(states: Tensor, num_heads: int, dtype: torch.dtype | None = None) -> Tensor:
    """[T, heads, width] -> [key-value heads, T, query heads of each, width], contiguous."""
    grouped = states.reshape(len(states), num_heads, -1, states.shape[-1]).transpose(0, 1)
    return torch.empty(grouped.shape, dtype=dtype or states.dtype).copy_(grouped)


def _block_rows(grouped: Tensor, block: Block) -> Tensor:
    """[key-value heads, queries x query heads of each, width] of a block."""
    return grouped[:, block.queries].flatten(1, 2)


def _heads_last(blocks: Sequence[Tensor], num_tokens: int) -> Tensor:
    """Join the blocks of a stream and undo `_heads_first`: [T, heads, width]."""
    joined = torch.cat(list(blocks), dim=1)
    grouped = joined.view(len(joined), num_tokens, -1, joined.shape[2])
    return grouped.transpose(0, 1).reshape(num_tokens, -1, joined.shape[2])


def _gather(states: Tensor, segment: Segment) -> Tensor:
    """[key-value heads, keys, width] of a segment."""
    spans = [states[:, span] for span in segment.spans]
    return spans[0] if len(spans) == 1 else torch.cat(spans, dim=1)


def _scatter(total: Tensor, grad: Tensor, segment: Segment) -> None:
    """Add the gradient of gathered keys or values to that of the stream, [key-value heads, T, width]: a prompt, which
    comes before its branches, collects the gradients of all of them."""
    start = 0
    for span in segment.spans:
        part = grad[:, start : start + span.stop - span.start]
        if span == segment.queries:
            total[:, span] = part
        else:
            total[:, span] += part
        start += part.shape[1]


def _attention_weights(rows: Tensor, keys: Tensor, block: Block, window: int | None, dtype: torch.dtype) -> Tensor:
    """Compute a block's softmax [key-value heads, rows, keys] from float32 scaled queries and keys, rounded once."""
    scores = torch.bmm(rows, keys.transpose(1, 2))
    num_queries = block.queries.stop - block.queries.start
    by_query = scores.view(len(scores), num_queries, -1, scores.shape[2])
    own = block.own - block.keys.start
    by_query[..., own + 1 :] += _later()[:num_queries, :, : num_queries - 1]
    if window is not None and (oldest := own - window + 1) + num_queries > 1:  # oldest is never above 0
        before = oldest + num_queries
        by_query[:, -oldest:, :, : before - 1] += _earlier()[:before, :, : before - 1]
    del by_query  # so that no more than two such matrices exist at a time
    scores = scores.softmax(-1)
    return scores.to(dtype)


@lru_cache(maxsize=1)
def _later() -> Tensor:
    """[queries, 1, keys] summand of the scores that hides key j from query i where j >= i."""
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).triu_()[:, None]


@lru_cache(maxsize=1)
def _earlier() -> Tensor:
    """[queries, 1, keys] summand of the scores that hides key j from query i where j < i."""
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).tril_(-1)[:, None]
