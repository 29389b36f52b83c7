"""Shared-prompt attention as one variable-length flash call a layer, for GPUs.

Each segment of the stream (a prompt, or a branch) is a sequence of its own to the kernel. The keys and values of a
prompt are gathered before those of each of its branches; the kernel's causal mask is aligned to the end of both, so a
branch's token sees the prompt and the branch up to itself.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qpref.records import Group
from qpref.staging import to_device


@dataclass(frozen=True, slots=True)
class KeyLayout:
    """The gathered keys, K in total, that the segments of a stream see, in the form of variable-length kernels.

    Attributes:
        index: [K] int64, the stream's index of each gathered key.
        own: [T] int64, each stream token's index among the gathered keys, in its own segment.
        shared: for each further copy of prompts, the stream indices of their tokens and the gathered indices of the
            copies; within one pair of tensors no index occurs twice.
        query_ends, key_ends: [segments + 1] int32, cumulative lengths from 0 on.
        longest_query, longest_keys: tokens of the longest segment, and of the longest with its prompt.
    """

    index: Tensor
    own: Tensor
    shared: tuple[tuple[Tensor, Tensor], ...]
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_keys: int


@lru_cache(maxsize=8)
def key_layout(groups: Sequence[Group], device: torch.device) -> KeyLayout:
    """Lay out the keys of a stream; cached, since every layer of the model requests the same."""
    index: list[int] = []
    own: list[int] = []
    copies: list[tuple[list[int], list[int]]] = []
    queries, keys = [0], [0]
    for group in groups:
        prompt = range(group.start, group.start + group.prompt)
        own.extend(range(len(index), len(index) + group.prompt))
        index.extend(prompt)
        queries.append(queries[-1] + group.prompt)
        keys.append(len(index))
        start = prompt.stop
        for branch, length in enumerate(group.branches):
            if not length:
                continue
            while len(copies) <= branch:
                copies.append(([], []))
            copies[branch][0].extend(prompt)
            copies[branch][1].extend(range(len(index), len(index) + group.prompt))
            index.extend(prompt)
            own.extend(range(len(index), len(index) + length))
            index.extend(range(start, start + length))
            queries.append(queries[-1] + length)
            keys.append(len(index))
            start += length
    ends = [torch.tensor(each, dtype=torch.int32) for each in (queries, keys)]
    indices = [torch.tensor(each) for each in (index, own, *(part for pair in copies if pair[0] for part in pair))]
    query_ends, key_ends, index_there, own_there, *shared = to_device([*ends, *indices], device)
    return KeyLayout(
        index=index_there,
        own=own_there,
        shared=tuple(zip(shared[::2], shared[1::2], strict=True)),
        query_ends=query_ends,
        key_ends=key_ends,
        longest_query=max(stop - start for start, stop in itertools.pairwise(queries)),
        longest_keys=max(stop - start for start, stop in itertools.pairwise(keys)),
    )


class _Gather(torch.autograd.Function):
    """states [T, ...] -> [K, ...]. The backward pass adds the gradients of a prompt's copies in float32 and in a fixed
    order; that of index_select adds them atomically in 16 bits."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layout: KeyLayout) -> Tensor:
        ctx.layout = layout
        return states.index_select(0, layout.index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), layout = gradients, ctx.layout
        total = gradient.index_select(0, layout.own).to(torch.promote_types(gradient.dtype, torch.float32))
        for tokens, copied in layout.shared:
            total.index_add_(0, tokens, gradient.index_select(0, copied).to(total.dtype))
        return total.to(gradient.dtype), None


Kernel = Callable[[Tensor, Tensor, Tensor, KeyLayout, float | None, int | None], Tensor]
"""query [T, heads, width], gathered key and value [K, key-value heads, width], layout, scale, window -> [T, heads,
width]."""


def attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[Group],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """[1, heads, T, width] queries and [1, key-value heads, T, width] keys and values -> [1, T, heads, width]."""
    layout = key_layout(groups, query.device)
    streams = [states[0].transpose(0, 1) for states in (query, key, value)]
    keys, values = (_Gather.apply(states, layout) for states in streams[1:])  # type: ignore[no-untyped-call]
    return kernel(streams[0], keys, values, layout, scaling, window)[None]


def torch_kernel(
    query: Tensor, key: Tensor, value: Tensor, layout: KeyLayout, scale: float | None, window: int | None
) -> Tensor:
    """Call torch's own kernel (torch.nn.attention.varlen)."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 accepts fewer key-value heads than heads without an option for it.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    result: Any = varlen_attn(
        query.contiguous(),
        key,
        value,
        layout.query_ends,
        layout.key_ends,
        layout.longest_query,
        layout.longest_keys,
        scale=scale,
        window_size=_window(window),
        **grouped,
    )
    attended: Tensor = result
    return attended


def flash_attn_kernel(
    query: Tensor, key: Tensor, value: Tensor, layout: KeyLayout, scale: float | None, window: int | None
) -> Tensor:
    """Call the kernel of the flash-attn distribution (Dao 2023, "FlashAttention-2")."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    result: Tensor = flash_attn_varlen_func(
        query.contiguous(),
        key,
        value,
        layout.query_ends,
        layout.key_ends,
        layout.longest_query,
        layout.longest_keys,
        softmax_scale=scale,
        causal=True,
        window_size=_window(window),
    )
    return result


def _window(window: int | None) -> tuple[int, int]:
    """Convert transformers' window, which counts the query's own token, to the kernels' tokens left and right of it."""
    return (-1, 0) if window is None else (window - 1, 0)
