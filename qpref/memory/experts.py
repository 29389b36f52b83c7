"""Sizes of a layer's fused experts, of which a token passes a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

USED_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k")
"""Names that configs have for a token's number of experts."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Fused experts of a decoder layer, frozen in 4 bits without an adapter.

    Attributes:
        count: experts of the layer.
        used: experts of a token.
        numels: weights of each of an expert's matrices.
        outputs: numbers that the first matrix gives for a token and expert: gate and up, or up alone.
        inner: numbers that the last matrix reads.
    """

    count: int
    used: int
    numels: tuple[int, ...]
    outputs: int
    inner: int

    @property
    def num_weights(self) -> int:
        return self.count * sum(self.numels)


def read_experts(layer: Any, config: Any) -> Experts | None:
    """Read the fused experts of a decoder layer; None where it has none that NF4 packs.

    Args:
        config: of the text model.
    """
    from qpref.policy.experts import is_experts, projections_of

    found = next((module for module in layer.modules() if is_experts(module)), None)
    if found is None:
        return None
    first, last = (getattr(found, name) for name in projections_of(found))
    outputs, inner = (2, 1) if found.is_transposed else (1, 2)
    used = next((int(value) for name in USED_EXPERTS if (value := getattr(config, name, None))), 1)
    numels = tuple(weight[0].numel() for weight in (first, last))
    return Experts(first.shape[0], used, numels, first.shape[outputs], last.shape[inner])
