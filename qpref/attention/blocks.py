"""Shared-prompt attention for x86 CPUs with bf16 units: plain matrix products over blocks of queries.

torch's fused kernel for CPUs is slow in bf16, and in float32 reaches a quarter of the bf16 units' speed. Here a block's
scores are one product, accumulated and kept in float32; the softmax is rounded to bf16 once, as flash kernels on GPUs
round it, and the products with it run on the bf16 units. The query heads that share a key head are rows of one matrix,
so keys and values are never repeated. A block computes the keys up to its own last one, so little of the causal
triangle's other half is computed. The softmax of short segments is kept for the backward pass, that of long ones is
computed again: it grows with the square of the length.
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
    """Whether this machine's CPU multiplies bf16 in hardware, so that this is the faster way."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def attend(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], scaling: float | None, window: int | None
) -> Tensor:
    """[1, heads, T, width] queries and [1, key-value heads, T, width] keys and values -> [1, T, heads, width]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    streams = [states[0].transpose(0, 1) for states in (query, key, value)]
    with torch.autocast("cpu", enabled=False):  # it would make the scores bf16 again
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
        num_heads, wide = key.shape[1], torch.float32
        rows, keys = _heads_first(query, num_heads, wide).mul_(scale), _heads_first(key, num_heads, wide).squeeze(2)
        values = _heads_first(value, num_heads).squeeze(2)
        attended, kept = [], []
        for segment in segments(groups):
            seen, told = _gathered(keys, segment), _gathered(values, segment)
            for block in segment.blocks(window):
                shares = _shares(_of(rows, block), seen[:, block.keys], block, window, query.dtype)
                attended.append(torch.bmm(shares, told[:, block.keys]))
                if segment.keeps and any(ctx.needs_input_grad):
                    kept.append(shares)
                del shares
        ctx.save_for_backward(query, key, value, *kept)
        ctx.groups, ctx.scale, ctx.window = groups, scale, window
        return _heads_last(attended, len(query))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        num_heads, remaining = key.shape[1], iter(kept)
        rows, above = _heads_first(query, num_heads), _heads_first(gradients[0], num_heads)
        keys, values = _heads_first(key, num_heads).squeeze(2), _heads_first(value, num_heads).squeeze(2)
        of_query: list[Tensor] = []
        of_key, of_value = (torch.empty_like(states, dtype=torch.float32) for states in (keys, values))
        for segment in segments(ctx.groups):
            slopes = _Slopes(_gathered(keys, segment), _gathered(values, segment))
            blocks = [(block, next(remaining) if segment.keeps else None) for block in segment.blocks(ctx.window)]
            of_blocks = []
            for block, shares in reversed(blocks):
                own = _of(rows, block)
                if shares is None:
                    wide = own.float() * ctx.scale
                    shares = _shares(wide, slopes.keys[:, block.keys].float(), block, ctx.window, query.dtype)
                of_blocks.append(slopes.of(block, own, _of(above, block), shares))
            of_query += reversed(of_blocks)
            _scatter(of_key, slopes.of_keys, segment)
            _scatter(of_value, slopes.of_values, segment)
        of_key.mul_(ctx.scale)
        return (
            _heads_last(of_query, len(query)).mul_(ctx.scale),
            of_key.transpose(0, 1).to(key.dtype),
            of_value.transpose(0, 1).to(value.dtype),
            None,
            None,
            None,
        )


class _Slopes:
    """Gradients of a segment, summed over its blocks.

    Attributes:
        keys, values: [key-value heads, keys, width] of the segment.
        of_keys, of_values: the same of their gradients, float32.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.of_keys = self.of_values = keys.new_empty(0)

    def of(self, block: Block, rows: Tensor, above: Tensor, shares: Tensor) -> Tensor:
        """[key-value heads, rows, width] gradient of the block's scaled queries, by that of its result, `above`."""
        self.of_values = self._added(self.of_values, torch.bmm(shares.transpose(1, 2), above), block)
        of_shares = torch.bmm(above, self.values[:, block.keys].transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        self.of_keys = self._added(self.of_keys, torch.bmm(of_scores.transpose(1, 2), rows), block)
        return torch.bmm(of_scores, self.keys[:, block.keys])

    def _added(self, total: Tensor, part: Tensor, block: Block) -> Tensor:
        num_keys = self.keys.shape[1]
        if not total.numel():
            if part.shape[1] == num_keys:  # as where a segment's last block comes first
                return part.float()
            total = part.new_zeros(len(part), num_keys, part.shape[2], dtype=torch.float32)
        total[:, block.keys] += part
        return total


def _heads_first(states: Tensor, num_heads: int, dtype: torch.dtype | None = None) -> Tensor:
    """[T, heads, width] -> [key-value heads, T, heads for each, width], in one piece."""
    grouped = states.reshape(len(states), num_heads, -1, states.shape[-1]).transpose(0, 1)
    return torch.empty(grouped.shape, dtype=dtype or states.dtype).copy_(grouped)


def _of(grouped: Tensor, block: Block) -> Tensor:
    """[key-value heads, queries x heads for each, width] of a block."""
    return grouped[:, block.queries].flatten(1, 2)


def _heads_last(blocks: Sequence[Tensor], num_tokens: int) -> Tensor:
    """The way back from all blocks of a stream: [T, heads, width]."""
    joined = torch.cat(list(blocks), dim=1)
    grouped = joined.view(len(joined), num_tokens, -1, joined.shape[2])
    return grouped.transpose(0, 1).reshape(num_tokens, -1, joined.shape[2])


def _gathered(states: Tensor, segment: Segment) -> Tensor:
    """[key-value heads, keys, width] of a segment."""
    spans = [states[:, span] for span in segment.spans]
    return spans[0] if len(spans) == 1 else torch.cat(spans, dim=1)


def _scatter(total: Tensor, slopes: Tensor, segment: Segment) -> None:
    """Put what `_gathered` has as gradient where it belongs in that of the stream, [key-value heads, T, width]: a
    prompt, which comes before its branches, collects that of all of them."""
    start = 0
    for span in segment.spans:
        part = slopes[:, start : start + span.stop - span.start]
        if span == segment.queries:
            total[:, span] = part
        else:
            total[:, span] += part
        start += part.shape[1]


def _shares(rows: Tensor, keys: Tensor, block: Block, window: int | None, dtype: torch.dtype) -> Tensor:
    """[key-value heads, rows, keys] how each query shares its attention: from float32 keys and queries, scaled ones,
    and rounded once."""
    scores = torch.bmm(rows, keys.transpose(1, 2))
    num_queries = block.queries.stop - block.queries.start
    by_query = scores.view(len(scores), num_queries, -1, scores.shape[2])
    own = block.own - block.keys.start
    by_query[..., own + 1 :] += _later()[:num_queries, :, : num_queries - 1]
    if window is not None and (oldest := own - window + 1) + num_queries > 1:  # oldest is never above 0
        before = oldest + num_queries
        by_query[:, -oldest:, :, : before - 1] += _earlier()[:before, :, : before - 1]
    del by_query  # with it, and the name taken over, there are never more than two such matrices
    scores = scores.softmax(-1)
    return scores.to(dtype)


@lru_cache(maxsize=1)
def _later() -> Tensor:
    """[queries, 1, keys] to add to scores: hides key j from query i where j >= i."""
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).triu_()[:, None]


@lru_cache(maxsize=1)
def _earlier() -> Tensor:
    """The same, where j < i."""
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).tril_(-1)[:, None]
