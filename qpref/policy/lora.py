"""A frozen linear layer and its LoRA adapter as one autograd function.

PEFT computes them as a chain of operations: it clones the base's result, casts the input to float32 and back, and adds
the scaled low-rank result to the base's product, which is rounded by then. An adapter that has learned little, as usual
at the learning rates of preference training, then vanishes wherever it is below half a step of the 16-bit dtype. Here
the base's product is accumulated onto the low-rank one, so their sum is rounded once (a bias is added after it). Only
the input and one [T, rank] matrix are kept for the backward pass, and the 4-bit weight is dequantized once in each
pass. The layers are PEFT's own with another forward pass, which falls back to PEFT for anything that it doesn't cover
(several adapters at once, a merged one).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn


class _AdaptedLinear(torch.autograd.Function):
    """x [..., in], A [rank, in], B [out, rank] -> base(x) + scaling * dropout(x) A^T B^T (Hu et al. 2021, eq. 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: nn.Module, scaling: float, dropout: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            kept = torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
            low = _dropped(flat, kept, dropout) @ a.to(x.dtype).t()
            result = _onto(low @ (b * scaling).to(x.dtype).t(), flat, base)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(flat, low, a, b, kept)
            ctx.base, ctx.scaling, ctx.dropout = base, scaling, dropout
        return result.view(*x.shape[:-1], result.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b, kept = ctx.saved_tensors
        shape = (*gradients[0].shape[:-1], x.shape[-1])
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            grad_low = gradient @ (b * ctx.scaling).to(x.dtype)
            grad_b = _float32_product(gradient.t(), low).mul_(ctx.scaling)
            grad_a = _float32_product(grad_low.t(), _dropped(x, kept, ctx.dropout))
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = _dropped(grad_low @ a.to(x.dtype), kept, ctx.dropout)
                grad_x = grad_x.addmm_(gradient, dense_weight(ctx.base, x.dtype)).view(shape)
        return grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype), None, None, None


def _onto(start: Tensor, x: Tensor, base: Any) -> Tensor:
    """Compute start [T, out] + x [T, in] W^T + bias in place; a 16-bit sum is accumulated in float32 and rounded once.

    The bias comes last: added first, the rounding of a large bias would swallow a small start.
    """
    start.addmm_(x, dense_weight(base, x.dtype).t())
    return start if base.bias is None else start.add_(base.bias)


def _dropped(x: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    """Apply dropout by its mask of kept elements; None for none."""
    return x if kept is None else x * kept / (1 - dropout)


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply for the gradient of float32 weights, not rounded to 16 bits on a GPU (a CPU has no such product)."""
    if left.device.type == "cuda" and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def dense_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the layer's [out, in] weight as it takes part in products, dequantized where it is 4-bit."""
    layer: Any = base
    dense: Tensor = layer.weight
    if isinstance(base, Linear4bit):
        dense = dequantize_4bit(layer.weight, layer.weight.quant_state)
    return dense.to(dtype)


class _Fused:
    """The forward pass of both layers below.

    Attributes:
        is_decoding: true while answers are generated, see `decoding`.
    """

    is_decoding: ClassVar[bool] = False

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        layer: Any = self
        base, name = layer.base_layer, _only_adapter(layer)
        if args or keywords or not _covers(layer, name, x):
            result: Tensor = super().forward(x, *args, **keywords)  # type: ignore[misc]
            return result
        x = x.to(compute_dtype(base, x))
        if name is None:
            return _base_only(x, base)
        dropout = layer.lora_dropout[name]
        adapted: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
            x,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            base,
            layer.scaling[name],
            dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0,
        )
        return adapted


@contextmanager
def decoding() -> Iterator[None]:
    """Let 4-bit layers on a GPU fall back to PEFT while answers are generated, whether their adapter is on or off:
    bitsandbytes has kernels for few rows that read the 4-bit weight directly."""
    _Fused.is_decoding = True
    try:
        yield
    finally:
        _Fused.is_decoding = False


class FusedLinear4bit(_Fused, PeftLinear4bit):  # type: ignore[misc]
    """PEFT's LoRA layer over an NF4 base."""


class FusedLinear(_Fused, PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer over a base that isn't quantized."""


CUSTOM_MODULES = {Linear4bit: FusedLinear4bit, nn.Linear: FusedLinear}
"""The wrapper that PEFT uses for each kind of layer; Linear4bit comes first, since it is an nn.Linear too."""


def _only_adapter(layer: Any) -> str | None:
    """Name the single plain adapter that is active on the layer; None where none, several or another kind is."""
    if layer.disable_adapters or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    plain = name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None
    return name if plain else None


def _covers(layer: Any, name: str | None, x: Tensor) -> bool:
    """Return whether the fused function computes this pass, under this adapter or none; PEFT computes the others."""
    base, with_gradient = layer.base_layer, torch.is_grad_enabled()
    known = type(base).forward in (nn.Linear.forward, Linear4bit.forward)
    if layer.merged or not known or (name is None and not layer.disable_adapters):
        return False
    if name is None and with_gradient:  # bitsandbytes' own function keeps the weight in 4 bits
        return False
    if isinstance(base, Linear4bit):
        return not (_Fused.is_decoding and x.device.type == "cuda")
    weight: Tensor = base.weight
    return weight.dtype == compute_dtype(base, x)


def _base_only(x: Tensor, base: Any) -> Tensor:
    """Compute the base by the same operations as with an adapter, so that an adapter of 0 changes no bit. Without
    gradients."""
    with torch.autocast(x.device.type, enabled=False):
        flat = x.reshape(-1, x.shape[-1])
        return _onto(flat.new_zeros(len(flat), base.out_features), flat, base).view(*x.shape[:-1], base.out_features)


def compute_dtype(base: nn.Module, x: Tensor) -> torch.dtype:
    """Return the dtype of the layer's product: autocast's where it is on, else the base's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    weight: Any = base
    own: torch.dtype | None = weight.compute_dtype if isinstance(base, Linear4bit) else weight.weight.dtype
    return own or x.dtype
