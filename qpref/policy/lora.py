"""Frozen linear layers with LoRA adapters as one autograd function, and PEFT's layers that use it.

PEFT computes them as a chain of operations: it clones the base's result, casts the input to float32 and back, and adds
the scaled low-rank result to the base's product, which is rounded by then. An adapter that has learned little, as usual
at the learning rates of preference training, then vanishes wherever it is below half a step of the 16-bit dtype. Here
the base's product is accumulated onto the low-rank one, so their sum is rounded once (a bias is added after it). Only
the input and one [T, rank] matrix are kept for the backward pass, and the 4-bit weight is dequantized once in each
pass; dropout's mask is computed again (see `qpref.dropout`). The layers are PEFT's own with another forward pass, which
falls back to PEFT for anything that it doesn't cover (several adapters at once, a merged one).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from qpref.dropout import TokenDropout
from qpref.policy.norms import Recompute, Source, source_of
from qpref.policy.projections import Projections, compute_dtype

Covered = tuple[Projections, list[Tensor], torch.dtype]
"""Linear layers of one input, their adapters (A and B of each that has one) and the dtype of the products."""


class Projected(torch.autograd.Function):
    """x [..., in], A [rank, in] and B [out, rank] of each adapter -> outputs [..., out] of linear layers that read the
    same input: base(x) + scaling * dropout(x) A^T B^T (Hu et al. 2021, eq. 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: Projections, source: Source | None, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        flat, bits = x.reshape(-1, x.shape[-1]), projections.draw(x)
        with torch.autocast(x.device.type, enabled=False):
            cast = projections.cast(adapters, x.dtype)
            outputs, low = projections.values(flat, cast, bits)
        if any(ctx.needs_input_grad):
            kept, ctx.recompute = kept_input(flat, source)
            ctx.save_for_backward(*kept, low, *cast)
            ctx.projections, ctx.bits, ctx.shape = projections, bits, x.shape
        return tuple(shaped_as(output, x) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, (low, *cast) = restored_input(ctx.saved_tensors, ctx.recompute, ctx.shape[-1])
        incoming = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        with torch.autocast(x.device.type, enabled=False):
            grad_x, of_adapters = ctx.projections.gradients(x, low, cast, ctx.bits, incoming, ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, *of_adapters


def project(x: Tensor, covered: Covered) -> tuple[Tensor, ...]:
    """Compute the outputs of linear layers that read x, as `projections_of` describes them."""
    projections, adapters, dtype = covered
    x = x.to(dtype)
    outputs: tuple[Tensor, ...] = Projected.apply(x, projections, source_of(x), *adapters)  # type: ignore[no-untyped-call]
    return outputs


def shaped_as(flat: Tensor, x: Tensor) -> Tensor:
    """Give [T, out] the leading dimensions of x, as a tensor that a family may change in place (OLMo's clamp); torch
    refuses that for a view made inside a function."""
    shaped: Tensor = torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], flat.shape[-1]])
    return shaped


def kept_input(flat: Tensor, source: Source | None) -> tuple[tuple[Tensor, ...], Recompute | None]:
    """Return what a function keeps of its input [T, width]: the input, or its source and how to recompute it."""
    return ((flat,), None) if source is None else ((source.states, source.inverse), source.recompute)


def restored_input(
    saved: tuple[Tensor, ...], recompute: Recompute | None, width: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Split saved tensors into the input [T, width] that `kept_input` kept, and the rest."""
    if recompute is None:
        return saved[0], saved[1:]
    return recompute(*saved[:2]).reshape(-1, width), saved[2:]


class _Fused:
    """The forward pass of both layers below.

    Attributes:
        is_decoding: true while answers are generated, see `decoding`.
    """

    is_decoding: ClassVar[bool] = False

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        covered = None if args or keywords else projections_of([self], x, called=True)
        if covered is None:
            result: Tensor = super().forward(x, *args, **keywords)  # type: ignore[misc]
            return result
        return project(x, covered)[0]


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


def projections_of(layers: Sequence[Any], x: Tensor, called: bool = False) -> Covered | None:
    """Describe a pass over linear layers that read the same x, adapted or not.

    Args:
        called: torch has called the layers, and with them any hooks that they have.

    Returns:
        None where a layer's pass is PEFT's or the layer's own.
    """
    bases, ranks, scalings, adapters, dropouts = [], [], [], [], {}
    for layer in layers:
        name, base = None, layer
        if not called and is_hooked(layer):
            return None
        if isinstance(layer, _Fused):
            name, base = _only_adapter(layer), layer.base_layer  # type: ignore[attr-defined]
            if layer.merged or (name is None and not layer.disable_adapters):  # type: ignore[attr-defined]
                return None
        if not _covers(base, x):
            return None
        bases.append(base)
        ranks.append(layer.r[name] if name else 0)
        scalings.append(layer.scaling[name] if name else 0.0)
        if name:
            adapters += [layer.lora_A[name].weight, layer.lora_B[name].weight]
            dropout = layer.lora_dropout[name]
            if dropout.training and isinstance(dropout, nn.Dropout):
                return None
            active = dropout if dropout.training and isinstance(dropout, TokenDropout) else None
            dropouts[active and (active.name, active.p)] = active
    dtypes = {compute_dtype(base, x) for base in bases}
    if len(dropouts) > 1 or len(dtypes) > 1:
        return None
    return Projections(tuple(bases), tuple(ranks), tuple(scalings), *dropouts.values()), adapters, dtypes.pop()


def _only_adapter(layer: Any) -> str | None:
    """Name the single plain adapter that is active on the layer; None where none, several or another kind is."""
    if layer.disable_adapters or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    plain = name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None
    return name if plain and not is_hooked(layer.lora_A[name]) and not is_hooked(layer.lora_B[name]) else None


def is_hooked(layer: nn.Module) -> bool:
    """Return whether a call of the layer does more than the forward pass of its class."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in vars(layer)


def _covers(base: Any, x: Tensor) -> bool:
    """Return whether the fused function computes products with a frozen layer."""
    if type(base).forward not in (nn.Linear.forward, Linear4bit.forward) or is_hooked(base):
        return False
    if isinstance(base, Linear4bit):
        return not (_Fused.is_decoding and x.device.type == "cuda")
    weight: Tensor = base.weight
    return weight.dtype == compute_dtype(base, x)
