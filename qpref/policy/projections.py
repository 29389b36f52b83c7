"""Frozen linear layers that read the same input, with their LoRA adapters: values and gradients by hand.

The low-rank products of the layers are one product: their A matrices are stacked. The base's product is accumulated
onto the adapter's output, so the sum is rounded once (see `lora`). A weight in 4 bits is dequantized once in each
direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qpref.dropout import TokenDropout
from qpref.policy.matmul import add_product, float32_mm, product


@dataclass(frozen=True, slots=True)
class Projections:
    """The layers' frozen parts, and the settings of their adapters.

    Attributes:
        bases: linear layers [in] -> [out_i].
        ranks: of their adapters; 0 for none.
        scalings: factor of each adapter's output.
        dropout: on the adapters' input, the same for all of them; None for none.
    """

    bases: tuple[Any, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout: TokenDropout | None = None

    def cast(self, adapters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Cast float32 adapters for a pass: [A_1, B_1, A_2, ...] -> the A stacked [sum of ranks, in], and each scaled
        B [out_i, rank_i]; nothing for layers without an adapter."""
        if not adapters:
            return ()
        scaled = [(b * scaling).to(dtype) for b, scaling in zip(adapters[1::2], self._adapted_scalings, strict=True)]
        return _joined(adapters[::2], 0).to(dtype), *scaled

    def values(self, x: Tensor, cast: Sequence[Tensor], bits: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Compute the layers' outputs [T, out_i] of x [T, in], and the adapters' low-rank products [T, sum of ranks].

        Args:
            cast: adapters as `cast` returns them.
            bits: of the tokens, as `draw` returns them.
        """
        low = product(self._dropped(x, bits), cast[0].t()) if cast else x.new_empty(0)
        parts, scaled = iter(low.split(self._adapted_ranks, 1) if cast else ()), iter(cast[1:])
        outputs = []
        for base, rank in zip(self.bases, self.ranks, strict=True):
            start = product(next(parts), next(scaled).t()) if rank else x.new_zeros(len(x), base.out_features)
            outputs.append(_onto(start, x, base))
        return outputs, low

    def gradients(
        self,
        x: Tensor,
        low: Tensor,
        cast: Sequence[Tensor],
        bits: Tensor | None,
        incoming: Sequence[Tensor],
        needs_x: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Compute the gradients of x [T, in] and of A and B of each adapter, given those of the outputs [T, out_i]."""
        low_grad, of_adapters = low, []
        if cast:
            adapted = [gradient for gradient, rank in zip(incoming, self.ranks, strict=True) if rank]
            low_grad = _joined([product(gradient, b) for gradient, b in zip(adapted, cast[1:], strict=True)], 1)
            of_adapters = self._adapter_gradients(x, low, low_grad, adapted, bits)
        if not needs_x:
            return None, of_adapters
        x_grad = self._dropped(product(low_grad, cast[0]), bits, in_place=True) if cast else torch.zeros_like(x)
        for gradient, base in zip(incoming, self.bases, strict=True):
            add_product(x_grad, gradient, dense_weight(base, x.dtype))
        return x_grad, of_adapters

    def _adapter_gradients(
        self, x: Tensor, low: Tensor, low_grad: Tensor, incoming: Sequence[Tensor], bits: Tensor | None
    ) -> list[Tensor]:
        of_a = float32_product(low_grad.t(), self._dropped(x, bits)).split(self._adapted_ranks)
        of_b = [
            float32_product(gradient.t(), part).mul_(scaling)
            for gradient, part, scaling in zip(
                incoming, low.split(self._adapted_ranks, 1), self._adapted_scalings, strict=True
            )
        ]
        return [gradient for pair in zip(of_a, of_b, strict=True) for gradient in pair]

    @property
    def num_tensors(self) -> int:
        """Tensors of the adapters: A and B of each."""
        return 2 * len(self._adapted_ranks)

    @property
    def _adapted_ranks(self) -> list[int]:
        return [rank for rank in self.ranks if rank]

    @property
    def _adapted_scalings(self) -> list[float]:
        return [scaling for scaling, rank in zip(self.scalings, self.ranks, strict=True) if rank]

    def draw(self, x: Tensor) -> Tensor | None:
        """[T, 2] random bits of the tokens of x [..., in], of which dropout's mask is made wherever it is needed; None
        without dropout."""
        return None if self.dropout is None else self.dropout.bits_of(x)

    def _dropped(self, x: Tensor, bits: Tensor | None, *, in_place: bool = False) -> Tensor:
        return x if self.dropout is None or bits is None else self.dropout.drop(x, bits, in_place=in_place)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _onto(start: Tensor, x: Tensor, base: Any) -> Tensor:
    """Compute start [T, out] + x [T, in] W^T + bias in place; a 16-bit sum is accumulated in float32 and rounded once.

    The bias comes last: added first, the rounding of a large bias would swallow a small start.
    """
    add_product(start, x, dense_weight(base, x.dtype).t())
    return start if base.bias is None else start.add_(base.bias)


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply for the gradient of float32 weights, not rounded to 16 bits on a GPU (a CPU has no such product)."""
    if left.device.type == "cuda" and left.dtype != torch.float32:
        return float32_mm(left, right)
    return product(left, right)


def dense_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the layer's [out, in] weight as it takes part in products, dequantized where it is 4-bit."""
    layer: Any = base
    dense: Tensor = layer.weight
    if isinstance(base, Linear4bit):
        dense = dequantize_4bit(layer.weight, layer.weight.quant_state)
    return dense.to(dtype)


def compute_dtype(base: nn.Module, x: Tensor) -> torch.dtype:
    """Return the dtype of the layer's product: autocast's where it is on, else the base's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    weight: Any = base
    own: torch.dtype | None = weight.compute_dtype if isinstance(base, Linear4bit) else weight.weight.dtype
    return own or x.dtype
