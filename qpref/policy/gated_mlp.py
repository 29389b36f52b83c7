"""A gated MLP, down(act(gate(x)) * up(x)), as one autograd function (Shazeer 2020, "GLU Variants Improve Transformer").

Of the four [T, intermediate] matrices that autograd keeps, it keeps the outputs of gate and up; the activated gate and
the product, which is the input of down, are a few elementwise operations away from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from qpref.policy.lora import is_hooked, kept_input, projections_of, restored_input, shaped_as
from qpref.policy.norms import Source, source_of
from qpref.policy.projections import Projections


@dataclass(frozen=True, slots=True)
class _Layers:
    """The frozen parts of an MLP.

    Attributes:
        inner: gate and up.
        outer: down.
        activation: elementwise.
    """

    inner: Projections
    outer: Projections
    activation: Callable[[Tensor], Tensor]


class _GatedMLP(torch.autograd.Function):
    """x [..., hidden], the adapters of gate, up and down -> [..., hidden]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: _Layers, source: Source | None, *adapters: Tensor) -> Tensor:
        inner, outer, flat = layers.inner, layers.outer, x.reshape(-1, x.shape[-1])
        bits = inner.draw(x), outer.draw(x)
        with torch.autocast(x.device.type, enabled=False):
            inner_cast = inner.cast(adapters[: inner.num_tensors], x.dtype)
            outer_cast = outer.cast(adapters[inner.num_tensors :], x.dtype)
            (gate, up), inner_low = inner.values(flat, inner_cast, bits[0])
            product = layers.activation(gate) * up
            (result,), outer_low = outer.values(product, outer_cast, bits[1])
        if any(ctx.needs_input_grad):
            kept, ctx.recompute = kept_input(flat, source)
            ctx.save_for_backward(*kept, gate, up, inner_low, outer_low, *inner_cast, *outer_cast)
            ctx.layers, ctx.bits, ctx.shape, ctx.num_inner = layers, bits, x.shape, len(inner_cast)
        return shaped_as(result, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, (gate, up, inner_low, outer_low, *cast) = restored_input(ctx.saved_tensors, ctx.recompute, ctx.shape[-1])
        inner, outer, activation = ctx.layers.inner, ctx.layers.outer, ctx.layers.activation
        incoming = gradients[0].reshape(-1, gradients[0].shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                leaf = gate.detach().requires_grad_()
                activated = activation(leaf)
            product_grad, of_outer = outer.gradients(
                activated.detach() * up, outer_low, cast[ctx.num_inner :], ctx.bits[1], [incoming], True
            )
            up_grad, edge = product_grad * activated.detach(), get_gradient_edge(activated)
            del activated
            (gate_grad,) = torch.autograd.grad(edge, leaf, product_grad.mul_(up))
            del product_grad
            x_grad, of_inner = inner.gradients(
                x, inner_low, cast[: ctx.num_inner], ctx.bits[0], [gate_grad, up_grad], ctx.needs_input_grad[0]
            )
        return None if x_grad is None else x_grad.view(ctx.shape), None, None, *of_inner, *of_outer


class GatedMLP(nn.Module):
    """A family's MLP with another forward pass, which falls back to the family's where a layer's pass isn't covered."""

    CHILDREN = ("gate_proj", "up_proj", "down_proj", "act_fn")

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self._modules = own._modules  # the same dict: a child that is replaced is so in both
        self._own = (own,)  # in a tuple, so that its layers have one name alone
        self.training = own.training

    def train(self, mode: bool = True) -> GatedMLP:
        self._own[0].training = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self
        inner, outer = projections_of([layers.gate_proj, layers.up_proj], x), projections_of([layers.down_proj], x)
        if inner is None or outer is None or inner[2] != outer[2] or is_hooked(layers.act_fn):
            result: Tensor = self._own[0](x)
            return result
        x = x.to(inner[2])
        parts = _Layers(inner[0], outer[0], layers.act_fn)
        computed: Tensor = _GatedMLP.apply(x, parts, source_of(x), *inner[1], *outer[1])  # type: ignore[no-untyped-call]
        return computed
