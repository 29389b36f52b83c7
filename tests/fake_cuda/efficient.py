"""torch's choice of the memory-efficient attention kernel, which a CPU build makes for no device but the CPU.

Without it a fake GPU computes scaled dot products as two matrix products and keeps all scores, which no GPU does.
"""

from __future__ import annotations

from typing import Any

import torch

ALIGNMENT = 8
"""Numbers that torch pads an attention bias's rows to."""


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """As `scaled_dot_product_attention` on a GPU of any capability (aten/src/ATen/native/transformers/attention.cpp):
    a boolean mask becomes an additive one in the queries' dtype, with padded rows, which autograd keeps. Grouped keys
    and values are repeated: only the flash kernel reads them as they are, so this is the most that a GPU takes."""
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    bias = None
    if attn_mask is not None:
        rows, keys = attn_mask.shape[-2:]
        bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        bias.masked_fill_(attn_mask.logical_not(), float("-inf"))
        if keys % ALIGNMENT:
            bias = torch.nn.functional.pad(bias, (0, -keys % ALIGNMENT))[..., :keys]
        bias = bias.expand(*query.shape[:2], rows, keys)
    needs_grad = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
    )[0]
