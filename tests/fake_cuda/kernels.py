"""What kernels refuse on a real GPU: on fake tensors they take dtypes, widths and layouts that they can't compute.

Each check raises the RuntimeError that the kernel itself would raise, from what a launch sees: dtypes, shapes,
strides.
Sources: ATen's checks in `mha_varlen_fwd`, `addmm_out_cuda_impl` and `index_add_cuda` (torch 2.13), and the launchers
in bitsandbytes' backends/cuda/ops.py (0.50).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)


def refuse(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], capability: tuple[int, int]) -> None:
    """Refuse a launch that a GPU of this compute capability would refuse.

    Args:
        name: the operator's, as in its schema, with its overload: "aten::mm.dtype".
    """
    if name in ATTENTION:
        _require(capability >= (8, 0), "FlashAttention only supports Ampere GPUs or newer.")
    if check := CHECKS.get(name):
        check(*args, **kwargs)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _varlen(query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, *rest: Any) -> None:
    states, ends = (query, key, value), (query_ends, key_ends)
    _require(query.dtype in HALVES, "FlashAttention only support fp16 and bf16 data type")
    _require(len({each.dtype for each in states}) == 1, "query, key and value must have the same dtype")
    _require(all(each.dtype == torch.int32 for each in ends), "cu_seqlens_q must have dtype int32")
    _require(all(each.stride(-1) == 1 for each in states), "Input tensor must have contiguous last dimension")
    _require(all(each.is_contiguous() for each in ends), "cu_seqlens_q must be contiguous")
    width = query.shape[-1]
    _require(width <= 256, "FlashAttention forward only supports head dimension at most 256")
    _require(width % 8 == 0, "head_size must be a multiple of 8, this is ensured by padding!")
    _require(key.shape == value.shape and key.shape[-1] == width, "k must have shape (total_k, num_heads_k, head_size)")
    _require(query.shape[1] % key.shape[1] == 0, "Number of heads in key/value must divide number of heads in query")


def _varlen_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *rest: Any) -> None:
    _varlen(query, key, value, *rest[1:])
    _require(grad.dtype == out.dtype == query.dtype, "query and dout must have the same dtype")
    _require(grad.stride(-1) == 1, "dout tensor must have contiguous last dimension")


def _mm(left: Tensor, right: Tensor) -> None:
    same = left.dtype == right.dtype
    _require(same, f"expected mat1 and mat2 to have the same dtype, but got: {left.dtype} != {right.dtype}")


def _mm_into(left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    _mm(left, right)
    known = dtype == left.dtype or (dtype == torch.float32 and left.dtype in HALVES)
    _require(known, "out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")


def _addmm(start: Tensor, left: Tensor, right: Tensor, **factors: Any) -> None:
    _mm(left, right)
    _require(start.dtype == left.dtype, "self and mat2 must have the same dtype")


def _index_add(start: Tensor, dim: int, index: Tensor, source: Tensor, **factors: Any) -> None:
    _require(start.dtype == source.dtype, "index_add_(): self and source expected to have the same dtype")
    _require(index.dtype in (torch.int32, torch.int64), "index_add_(): Expected dtype int32/int64 for index")


def _index_select(states: Tensor, dim: int, index: Tensor) -> None:
    _require(index.dtype in (torch.int32, torch.int64), "index_select(): Expected dtype int32 or int64 for index")


def _gather(states: Tensor, dim: int, index: Tensor, **flags: Any) -> None:
    _require(index.dtype == torch.int64, "gather(): Expected dtype int64 for index")


def _grouped_mm(left: Tensor, right: Tensor, offs: Tensor | None = None, *rest: Any, **options: Any) -> None:
    _require(left.dtype == right.dtype and left.dtype in FLOATS, "Expected both matrices in one floating-point dtype")
    _require(offs is None or offs.dtype == torch.int32, "Offsets have to be int32")


def _dequantize(packed: Tensor, absmax: Tensor, blocksize: int, kind: str, shape: Any, dtype: torch.dtype) -> None:
    _require(packed.is_contiguous() and absmax.is_contiguous(), "bitsandbytes reads packed weights by their address")
    _require(absmax.dtype == torch.float32, f"absmax must be float32, got {absmax.dtype}")
    _require(dtype in FLOATS, f"Blockwise 4bit dequantization only supports 16/32-bit floats, but got {dtype}")


def _dequantize_8bit(states: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> None:
    _require(states.dtype == torch.uint8, f"A must be uint8, got {states.dtype}")
    _require(states.is_contiguous() and code.dtype == torch.float32, "states have to be contiguous, their code float32")
    _require(dtype in FLOATS, f"Blockwise dequantization only supports 16/32-bit floats, but got {dtype}")


def _gemv(x: Tensor, packed: Tensor, shape: Any, absmax: Tensor, code: Tensor, blocksize: int) -> None:
    _require(x.numel() == x.shape[-1], "'A' must be a vector with leading dimensions of 1")
    _require(x.dtype in FLOATS and absmax.dtype == torch.float32, f"A must be a 16/32-bit float, got {x.dtype}")


def _optimizer(name: str, grad: Tensor, parameter: Tensor, first: Tensor, *rest: Any, **options: Any) -> None:
    _require(grad.dtype == parameter.dtype, f"p and g have to be in one dtype, got {parameter.dtype} and {grad.dtype}")
    tensors = (grad, parameter, first)
    _require(all(each.is_contiguous() for each in tensors), "bitsandbytes updates parameters by their address")


def _fused_adamw(parameters: Any, grads: Any, *moments: Any, **options: Any) -> None:
    for tensors in zip(parameters, grads, *moments[:2], strict=True):
        _require(len({each.dtype for each in tensors}) == 1, "params, grads and moments must have same dtype")
        _require(len({each.stride() for each in tensors}) == 1, "params, grads and moments must have same strides")


ATTENTION = ("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward")
CHECKS: dict[str, Callable[..., None]] = {
    "torch_attn::_varlen_attn": _varlen,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
    "aten::mm": _mm,
    "aten::mm.dtype": _mm_into,
    "aten::addmm": _addmm,
    "aten::addmm_": _addmm,
    "aten::index_add": _index_add,
    "aten::index_add_": _index_add,
    "aten::index_select": _index_select,
    "aten::gather": _gather,
    "aten::_grouped_mm": _grouped_mm,
    "bitsandbytes::dequantize_4bit": _dequantize,
    "bitsandbytes::dequantize_blockwise": _dequantize_8bit,
    "bitsandbytes::gemv_4bit": _gemv,
    "bitsandbytes::optimizer_update_8bit_blockwise": _optimizer,
    "bitsandbytes::optimizer_update_32bit": _optimizer,
    "aten::_fused_adamw_": _fused_adamw,
}
