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
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from qpref.attention.determinism import distinct_indices, is_deterministic
from qpref.attention.errors import CannotShareError
from qpref.records import Group

MAX_WIDTH = 256
"""Numbers in a head's query that flash kernels take at most."""


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
    assert (queries[-1], keys[-1]) == (len(own), len(index))  # the kernels read as far as the last end
    on_device = partial(torch.tensor, device=device)
    return KeyLayout(
        index=on_device(index),
        own=on_device(own),
        shared=tuple((on_device(tokens), on_device(copied)) for tokens, copied in copies if tokens),
        query_ends=on_device(queries, dtype=torch.int32),
        key_ends=on_device(keys, dtype=torch.int32),
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
            with distinct_indices():
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
    streams = [states.squeeze(0).transpose(0, 1) for states in (query, key, value)]
    keys, values = (_Gather.apply(states, layout) for states in streams[1:])  # type: ignore[no-untyped-call]
    return kernel(streams[0], keys, values, layout, scaling, window)[None]


def torch_kernel(
    query: Tensor, key: Tensor, value: Tensor, layout: KeyLayout, scale: float | None, window: int | None
) -> Tensor:
    """Call torch's own kernel (torch.nn.attention.varlen)."""
    from torch.nn.attention.varlen import varlen_attn

    query = query.contiguous()
    _check_call(query, key, value, layout, width_multiple=8)
    # torch 2.11 accepts fewer key-value heads than heads without an option for it.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    result: Any = varlen_attn(
        query,
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

    query = query.contiguous()
    _check_call(query, key, value, layout, width_multiple=1)  # flash-attn pads the others
    result: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        layout.query_ends,
        layout.key_ends,
        layout.longest_query,
        layout.longest_keys,
        softmax_scale=scale,
        causal=True,
        window_size=_window(window),
        deterministic=is_deterministic(),
    )
    return result


def _check_call(query: Tensor, key: Tensor, value: Tensor, layout: KeyLayout, width_multiple: int) -> None:
    """Check the arguments of a flash kernel, without a launch or a wait (`mha_varlen_fwd` in torch and flash-attn).

    Raises:
        CannotShareError: the card or the model's attention doesn't suit the kernel.
    """
    width = query.shape[-1]
    if query.is_cuda:
        major, minor = torch.cuda.get_device_capability(query.device)
        if major < 8:
            raise CannotShareError(f"flash attention needs compute capability 8.0, and this GPU has {major}.{minor}")
        if query.dtype not in (torch.bfloat16, torch.float16):
            raise CannotShareError(f"flash attention takes 16-bit numbers, and this model's queries are {query.dtype}")
    if width > MAX_WIDTH or width % width_multiple:
        raise CannotShareError(
            f"flash attention takes heads of up to {MAX_WIDTH} numbers, a multiple of {width_multiple}; "
            f"this model's have {width}"
        )
    if value.shape != key.shape or key.shape[-1] != width:
        raise CannotShareError(f"its keys are {key.shape[-1]} wide, its values {value.shape[-1]}, its queries {width}")
    if not query.dtype == key.dtype == value.dtype:
        raise CannotShareError(f"its queries, keys and values are {query.dtype}, {key.dtype} and {value.dtype}")
    for ends in (layout.query_ends, layout.key_ends):
        assert ends.dtype == torch.int32
        assert ends.device == query.device
        assert ends.is_contiguous()
    for states, num_tokens in ((query, layout.own.numel()), (key, layout.index.numel()), (value, layout.index.numel())):
        assert states.is_contiguous()
        assert states.device == query.device
        assert len(states) == num_tokens  # the last end, which only the device knows
    assert 0 < layout.longest_query <= layout.longest_keys


def _window(window: int | None) -> tuple[int, int]:
    """Convert transformers' window, which counts the query's own token, to the kernels' tokens left and right of it."""
    return (-1, 0) if window is None else (window - 1, 0)
