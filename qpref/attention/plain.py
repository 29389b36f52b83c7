"""Shared-prompt attention with capped scores or with sinks, by its formula: float32 matrix products over blocks of
queries, which the backward pass computes again, so that no more than a block's scores exist at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qpref.attention.exact import hidden_keys
from qpref.attention.segments import Block, Segment, segments
from qpref.records import Group


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[Group],
    scaling: float | None,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[1, heads, T, width] queries and [1, key-value heads, T, width] keys and values -> [1, T, heads, width].

    Args:
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        sinks: [heads] scores of a key without a value that every query sees (gpt-oss).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = query[0].unflatten(0, (key.shape[1], -1))
    of_heads = None if sinks is None else sinks.float().view(*rows.shape[:2], 1, 1)
    cut = [(segment, list(segment.blocks(window))) for segment in segments(groups)]
    # Split, not sliced: the gradient of each slice would be as large as the stream.
    pieces = iter(rows.split([_length(block.queries) for _, blocks in cut for block in blocks], dim=2))
    streams = [_by_span(states[0], [segment for segment, _ in cut]) for states in (key, value)]
    attended = []
    for segment, blocks in cut:
        keys, values = (torch.cat([of[span.start, span.stop] for span in segment.spans], dim=1) for of in streams)
        for block in blocks:
            attend_block = partial(_attend_block, block, scale, window, softcap)
            tensors = next(pieces), keys[:, block.keys], values[:, block.keys], of_heads
            attended.append(checkpoint(attend_block, *tensors, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(attended, dim=2).flatten(0, 1).transpose(0, 1)[None].contiguous()


def _length(span: slice) -> int:
    length: int = span.stop - span.start
    return length


def _by_span(states: Tensor, cut: Sequence[Segment]) -> dict[tuple[int, int], Tensor]:
    """Map each segment's own range of the stream to its part of [key-value heads, T, width] states."""
    spans = [segment.queries for segment in cut]
    parts = states.split([_length(span) for span in spans], dim=1)
    return {(span.start, span.stop): part for span, part in zip(spans, parts, strict=True)}


def _attend_block(
    block: Block,
    scale: float,
    window: int | None,
    softcap: float | None,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    """Compute a block's result, [key-value heads, query heads of each, queries, width]."""
    with torch.autocast(rows.device.type, enabled=False):  # it would compute in 16 bits
        scores = (rows.float() * scale) @ keys[:, None].float().transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(hidden_keys(block, window, rows.device), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
        weights = scores.softmax(-1)[..., : keys.shape[1]]
        return (weights @ values[:, None].float()).to(values.dtype)
