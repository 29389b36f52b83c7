"""The function that a layer's fused experts are computed by, with 4-bit weights, LoRA adapters, or both.

transformers has a registry of such functions. This one takes the tokens expert by expert. Activation, gating and biases
are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qpref.policy.experts import projections_of
from qpref.policy.grouped_product import ExpertAdapter, GroupedProjection, Routing

IMPLEMENTATION = "qpref"
"""Name in transformers' registry of functions that compute experts."""
Adapters = Mapping[str, ExpertAdapter | None]
"""Name of a projection -> its adapter; None for one that is off."""


def compute_here(module: Any) -> None:
    """Have transformers compute a module's experts, and those of all modules with its config, by `compute_experts`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, compute_experts)
    module.config._experts_implementation = IMPLEMENTATION


def compute_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapters: Adapters | None = None
) -> Tensor:
    """Compute a layer's experts, with one wait for the device; a function of the registry.

    Args:
        module: with fused experts, packed or not.
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, k] experts of each token; a number beyond the last expert's adds nothing.
        top_k_weights: [tokens, k] their weights.
        adapters: of the projections that have one.

    Returns:
        [tokens, hidden] in the dtype of the hidden states.
    """
    first, last = projections_of(module)
    up, down = (
        GroupedProjection(getattr(module, name), module.is_transposed, (adapters or {}).get(name))
        for name in (first, last)
    )
    routing = Routing.of(top_k_index, up.size[0])
    inner = _biased(up.of_tokens(_cast(hidden_states), routing), module, first, routing)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _biased(down.of_rows(_cast(inner), routing), module, last, routing)
    if getattr(module, "has_post_expert_norm", False):
        outer = module.post_expert_norm(outer)
    weighted = outer * top_k_weights.flatten()[routing.order].unsqueeze(1)
    total: Tensor = _Summed.apply(weighted, routing)  # type: ignore[no-untyped-call]
    return total.to(hidden_states.dtype)


def _cast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _biased(y: Tensor, module: Any, name: str, routing: Routing) -> Tensor:
    return y + getattr(module, f"{name}_bias")[routing.experts].to(y.dtype) if module.has_bias else y


class _Summed(torch.autograd.Function):
    """[rows, width] -> [tokens, width]; torch's index_copy would keep the rows for its backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return routing.summed(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> Any:
        return ctx.routing.rows(incoming), None
