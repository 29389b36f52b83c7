"""Matrix products whose results aren't rounded to 16 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

WIDENED_ROWS = 512
"""Rows of a factor that are copied to float32 at a time where a CPU has no bf16 units."""


def float32_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices of any 16-bit dtype, accumulating and returning float32 (float64 for float64).

    A GPU rounds a float32 `left` to the dtype of `right`, as autocast does.
    """
    if right.dtype in (torch.float32, torch.float64):
        return left.to(right.dtype) @ right
    if right.device.type == "cuda":
        return float32_mm(left.to(right.dtype), right)
    with bf16_products(right.dtype == torch.bfloat16 == left.dtype):
        return left.float() @ right.float()


def float32_mm(left: Tensor, right: Tensor) -> Tensor:
    """Multiply [m, k] and [k, n] matrices of one 16-bit dtype on a GPU, accumulating and returning float32."""
    assert left.dtype == right.dtype
    assert left.dtype in (torch.bfloat16, torch.float16)
    assert left.device == right.device
    return torch.mm(left, right, out_dtype=torch.float32)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices of one dtype; a 16-bit result is accumulated in float32 and rounded once.

    A CPU without bf16 units (AVX2 alone) takes many times as long for bf16 as for float32, so it multiplies in float32,
    a block of rows at a time.
    """
    if not widens_products(left.dtype, left.device.type):
        return left @ right
    result, wide = left.new_empty(len(left), right.shape[1]), right.float()
    for rows in _blocks(left):
        result[rows] = left[rows].float() @ wide
    return result


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a `product` to `total` in place; both are summed in float32 and rounded once."""
    if not widens_products(left.dtype, left.device.type):
        total.addmm_(left, right)
        return
    wide = right.float()
    for rows in _blocks(left):
        total[rows] = torch.addmm(total[rows].float(), left[rows].float(), wide)


def widens_products(dtype: torch.dtype, device: str) -> bool:
    """Return whether `product` copies its factors to float32: the right one whole, the left one in blocks."""
    return dtype == torch.bfloat16 and device == "cpu" and not _has_bf16_units()


def _blocks(matrix: Tensor) -> Iterator[slice]:
    return (slice(start, start + WIDENED_ROWS) for start in range(0, len(matrix), WIDENED_ROWS))


@cache
def _has_bf16_units() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_packed(packed: Tensor, state: Any) -> None:
    """Assert what bitsandbytes takes for granted of a 4-bit weight and its `quant_state`: it reads both by address."""
    scales = [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
    for tensor in (packed, state.code, *scales):
        assert tensor.device == packed.device
        assert tensor.is_contiguous()
    assert state.absmax.dtype == (torch.uint8 if state.nested else torch.float32)
    assert packed.numel() * packed.element_size() * 2 >= math.prod(state.shape)  # two weights a byte
    assert state.absmax.numel() * state.blocksize >= math.prod(state.shape)


def sum_in_float32() -> None:
    """Let cuBLAS add the partial sums of 16-bit products in float32, for the whole process.

    By default it may add those of a split product, such as a long input times a small A matrix, in 16 bits; the result
    would be rounded more than once. Nothing restores the setting: a backward pass runs wherever autograd runs it.
    """
    for dtype in ("fp16", "bf16"):
        setattr(torch.backends.cuda.matmul, f"allow_{dtype}_reduced_precision_reduction", False)


@contextmanager
def bf16_products(exact: bool) -> Iterator[None]:
    """Let a CPU multiply float32 matrices on its bf16 units; `exact` where both hold bf16 numbers, so nothing is lost.

    On a CPU whose bf16 units take no float32 matrices (AMX does) this is still faster: it selects oneDNN's code, not
    MKL's.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # missing in torch's own stubs
    before = matmul.fp32_precision
    if exact:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def unpack_scales(state: Any) -> None:
    """Keep a 4-bit weight's scales in float32, with the values that double quantization gave them.

    On a CPU, unpacking them in each pass takes a third of the time of unpacking the weight, and half a bit a weight
    costs less there than on a GPU.
    """
    from bitsandbytes.functional import dequantize_blockwise

    if state.nested:
        state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        state.nested, state.state2, state.offset = False, None, None
