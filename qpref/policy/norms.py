"""RMSNorm as one autograd function that keeps its 16-bit input, where transformers' operations keep it in float32.

The normed states are a few cheap operations away from that input, which the residual stream's norm keeps in any case.
So the functions that read them (see `lora`, `gated_mlp`) keep none of their own: they take the `Source` with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Formula:
    """A family's order of operations, from which the rounding follows.

    Attributes:
        weight_offset: added to the weight in float32 (Gemma's is 1).
        rounds_first: round the normalized states to the input's dtype before the weight is multiplied on.
    """

    weight_offset: float
    rounds_first: bool

    def scale(self, weight: Tensor) -> Tensor:
        """[width] float32 factor of the normalized states."""
        return weight.float() + self.weight_offset if self.weight_offset else weight.float()

    def apply(self, states: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
        """Norm states [..., width], given the inverse of their root mean square [..., 1] in float32."""
        normalized = states * inverse
        if self.rounds_first:
            return weight * normalized.to(states.dtype)
        return (normalized * self.scale(weight)).to(states.dtype)


Recompute = Callable[[Tensor, Tensor], Tensor]

FORMULAS = (Formula(0.0, True), Formula(1.0, False), Formula(0.0, False))
"""Of Llama, Mistral and Qwen; of Gemma; of OLMo 2."""


@dataclass(frozen=True, slots=True)
class Source:
    """Tensors and function that normed states are recomputed from.

    Attributes:
        states: [..., width] input of the norm.
        inverse: [..., 1] float32, one over its root mean square.
        recompute: makes the normed states of the two; it holds neither, so a graph may keep it under activation
            checkpointing.
        version: of the normed states when they were made.
    """

    states: Tensor
    inverse: Tensor
    recompute: Recompute
    version: int


def source_of(states: Tensor) -> Source | None:
    """Return what the states were normed from, if a norm of this module made them and a gradient will ask for them;
    None as well where they were changed in place since."""
    source: Source | None = getattr(states, "norm_source", None)
    return source if source is not None and source.version == states._version else None


class _RMSNorm(torch.autograd.Function):
    """states [..., width], weight [width] -> normed states and the inverse root mean square [..., 1] (Zhang and
    Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float, formula: Formula) -> tuple[Tensor, Tensor]:
        inverse = torch.rsqrt(states.float().pow(2).mean(-1, keepdim=True) + epsilon)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(states, inverse)
            ctx.weight, ctx.formula = weight, formula
        ctx.mark_non_differentiable(inverse)
        ctx.set_materialize_grads(False)
        return formula.apply(states, inverse, weight), inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradients[0] is None:
            return None, None, None, None
        states, inverse = ctx.saved_tensors
        gradient = gradients[0] * ctx.formula.scale(ctx.weight)
        normalized = states * inverse
        along = (gradient * normalized).mean(-1, keepdim=True)
        return gradient.addcmul_(normalized, along, value=-1).mul_(inverse).to(states.dtype), None, None, None


class RMSNorm(nn.Module):
    """A frozen norm with the weight of the family's own."""

    EPSILONS = ("variance_epsilon", "eps")
    """Names that families give the number added to the mean square."""

    def __init__(self, own: Any, formula: Formula) -> None:
        super().__init__()
        self.weight, self.formula = own.weight, formula
        self.epsilon: float = next(vars(own)[name] for name in self.EPSILONS if name in vars(own))

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed: Tensor
        normed, inverse = _RMSNorm.apply(hidden_states, self.weight, self.epsilon, self.formula)  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled():
            recompute = partial(self.formula.apply, weight=self.weight)
            source = Source(hidden_states.detach(), inverse, recompute, normed._version)
            normed.norm_source = source  # type: ignore[attr-defined]
        return normed
