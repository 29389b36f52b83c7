"""Shared-prompt attention by a call of torch's scaled dot product for each segment: the path that works everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qpref.attention.segments import CACHED_MASKS, Segment, segments
from qpref.records import Group


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[Group],
    scaling: float | None,
    window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """[1, heads, T, width] queries and [1, key-value heads, T, width] keys and values -> [1, T, heads, width]."""
    dtype = query.dtype
    query, key, value = (_without_cpu_bf16(states) for states in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)

    def attend_segment(segment: Segment) -> Tensor:
        # A mask only where the plain causal triangle isn't the answer.
        parts = [key[:, :, span] for span in segment.spans], [value[:, :, span] for span in segment.spans]
        k, v = (spans[0] if len(spans) == 1 else torch.cat(spans, dim=2) for spans in parts)
        q = query[:, :, segment.queries]
        is_plain = k.shape[2] == q.shape[2] and (window is None or window >= k.shape[2])
        mask = None if is_plain else _causal_mask(q.shape[2], k.shape[2], window, q.device)
        with torch.autocast("cpu", enabled=False):  # it would cast float32 back to bf16
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_plain, scale=scaling
            )

    outputs = torch.cat([attend_segment(segment) for segment in segments(groups)], dim=2)
    return outputs.transpose(1, 2).to(dtype).contiguous()


def _without_cpu_bf16(states: Tensor) -> Tensor:
    """Cast bf16 to float32 on a CPU: its bf16 kernel compiles code for every new pair of lengths and keeps it, 1.7 MB
    each, and is no faster below 1,000 tokens (torch 2.13)."""
    return states.float() if states.device.type == "cpu" and states.dtype == torch.bfloat16 else states


@lru_cache(maxsize=CACHED_MASKS)
def _causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[num_queries, num_keys], true where attended to: the queries are the last of the keys' positions."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)
    seen = key <= query
    return seen if window is None else seen & (query - key < window)
