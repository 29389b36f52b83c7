"""Shared-prompt attention for x86 CPUs with bf16 units: plain matrix products over blocks of queries.

torch's fused kernel for CPUs is slow in bf16, and in float32 reaches a quarter of the bf16 units' speed. Here a block's
scores are one product, accumulated and kept in float32; the softmax is rounded to bf16 once, as flash kernels on GPUs
round it, and the products with it run on the bf16 units. The query heads that share a key head are rows of one matrix,
so keys and values are never repeated. A block computes the keys up to its own last one, so little of the causal
triangle's other half is computed. The softmax of short stretches is kept for the backward pass, that of long ones is
computed again: it grows with the square of the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qpref.policy.stretches import QUERY_BLOCK, Block, Stretch, stretches
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
    """softmax(scale Q K^T) V for each stretch, and its gradient (Dao et al. 2022, "FlashAttention", section B.2).

    query [T, heads, width], key and value [T, key-value heads, width] -> [T, heads, width].
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], scale: float, window: int | None
    ) -> Tensor:
        grouped = _grouped(query, key)
        result = query.new_empty(*grouped.shape[:-1], value.shape[-1])
        kept = []
        for stretch in stretches(groups):
            keys, values = _gathered(key, stretch).float().transpose(1, 2), _gathered(value, stretch)
            for block in stretch.blocks(window):
                rows = _rows(grouped, block.queries, torch.float32)
                shares = _shares(rows, keys[:, :, block.keys], block, scale, window, query.dtype)
                result[block.queries] = _unrows(torch.bmm(shares, values[:, block.keys]), grouped)
                if stretch.keeps and any(ctx.needs_input_grad):
                    kept.append(shares)
                del shares
        ctx.save_for_backward(query, key, value, *kept)
        ctx.groups, ctx.scale, ctx.window = groups, scale, window
        return result.view(*query.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grouped, above = _grouped(query, key), _grouped(gradients[0], key)
        of_query = grouped.new_empty(grouped.shape)
        of_key, of_value = (states.new_zeros(states.shape, dtype=torch.float32) for states in (key, value))
        remaining = iter(kept)
        for stretch in stretches(ctx.groups):
            keys, values = _gathered(key, stretch), _gathered(value, stretch)
            key_slopes, value_slopes = (torch.zeros_like(states, dtype=torch.float32) for states in (keys, values))
            wide_keys = None if stretch.keeps else keys.float().transpose(1, 2)
            for block in stretch.blocks(ctx.window):
                rows, slopes = _rows(grouped, block.queries), _rows(above, block.queries)
                if wide_keys is None:
                    shares = next(remaining)
                else:
                    wide = rows.float()
                    shares = _shares(wide, wide_keys[:, :, block.keys], block, ctx.scale, ctx.window, query.dtype)
                value_slopes[:, block.keys] += torch.bmm(shares.transpose(1, 2), slopes).float()
                of_shares = torch.bmm(slopes, values.transpose(1, 2)[:, :, block.keys])
                of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
                del shares, of_shares
                of_query[block.queries] = _unrows(torch.bmm(of_scores, keys[:, block.keys]), grouped)
                key_slopes[:, block.keys] += torch.bmm(of_scores.transpose(1, 2), rows).float()
                del of_scores
            _scatter(of_key, key_slopes, stretch)
            _scatter(of_value, value_slopes, stretch)
        of_query.mul_(ctx.scale)
        of_key.mul_(ctx.scale)
        return of_query.view(query.shape), of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


def _grouped(states: Tensor, key: Tensor) -> Tensor:
    """[T, heads, width] -> [T, key-value heads, heads for each, width]."""
    return states.reshape(len(states), key.shape[1], -1, states.shape[-1])


def _rows(grouped: Tensor, queries: slice, dtype: torch.dtype | None = None) -> Tensor:
    """[key-value heads, queries x heads for each, width] of a block."""
    block = grouped[queries].transpose(0, 1)
    return torch.empty(block.shape, dtype=dtype or grouped.dtype).copy_(block).view(len(block), -1, block.shape[-1])


def _unrows(rows: Tensor, grouped: Tensor) -> Tensor:
    """The way back: [queries, key-value heads, heads for each, width]."""
    return rows.view(len(rows), -1, grouped.shape[2], rows.shape[2]).transpose(0, 1)


def _gathered(states: Tensor, stretch: Stretch) -> Tensor:
    """[key-value heads, keys, width] of a stretch."""
    heads = states.transpose(0, 1)
    return torch.cat([heads[:, span] for span in stretch.spans], dim=1)


def _scatter(total: Tensor, slopes: Tensor, stretch: Stretch) -> None:
    """Add what `_gathered` has as gradient to that of the stream: a prompt collects that of all its branches."""
    start = 0
    for span in stretch.spans:
        stop = start + span.stop - span.start
        total[span] += slopes[:, start:stop].transpose(0, 1)
        start = stop


def _shares(rows: Tensor, keys: Tensor, block: Block, scale: float, window: int | None, dtype: torch.dtype) -> Tensor:
    """[key-value heads, rows, keys] how each query shares its attention; computed in float32, rounded once."""
    scores = torch.bmm(rows * scale, keys)
    num_queries = block.queries.stop - block.queries.start
    by_query = scores.view(len(scores), num_queries, -1, scores.shape[2])
    own = block.own - block.keys.start
    by_query[..., own + 1 :] += _later()[:num_queries, :, : num_queries - 1]
    if window is not None and (oldest := own - window + 1) + num_queries > 1:  # oldest is never above 0
        before = oldest + num_queries
        by_query[:, -oldest:, :, : before - 1] += _earlier()[:before, :, : before - 1]
    scores = scores.softmax(-1)  # the name is taken over, so that there are two such matrices at most
    return scores.to(dtype)


@lru_cache(maxsize=1)
def _later() -> Tensor:
    """[queries, 1, keys] to add to scores: hides key j from query i where j >= i."""
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).triu_()[:, None]


@lru_cache(maxsize=1)
def _earlier() -> Tensor:
    """The same, where j < i."""
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).tril_(-1)[:, None]
