"""Sizes of a layer's fused experts, of which a token passes a few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

USED_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k")
"""Names that configs have for a token's number of experts."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Fused experts of a decoder layer.

    Attributes:
        count: experts of the layer.
        used: experts of a token.
        numels: weights of each of an expert's matrices.
        outputs: numbers that the first matrix gives for a token and expert: gate and up, or up alone.
        inner: numbers that the last matrix reads.
        ranks: of the adapters of an expert's matrices; 0 for none.
        packed: NF4 packs them; false in a base that is stored in 4 bits, where they stay in the recipe's dtype.
    """

    count: int
    used: int
    numels: tuple[int, ...]
    outputs: int
    inner: int
    ranks: tuple[int, int] = (0, 0)
    packed: bool = True

    @property
    def num_weights(self) -> int:
        return self.count * sum(self.numels)

    @property
    def adapter_sizes(self) -> list[tuple[int, int]]:
        """Numbers of an expert's A and B, for each matrix with an adapter."""
        widths = (self.numels[0] // self.outputs, self.outputs), (self.inner, self.numels[1] // self.inner)
        return [
            (rank * inputs, rank * outputs) for rank, (inputs, outputs) in zip(self.ranks, widths, strict=True) if rank
        ]

    @property
    def adapter_weights(self) -> int:
        """Weights of the adapters of all experts."""
        return self.count * sum(map(sum, self.adapter_sizes))

    def with_rank(self, limit: int) -> Experts:
        """Lower the adapters to a rank."""
        first, last = self.ranks
        return replace(self, ranks=(min(first, limit), min(last, limit)))

    def kept_numbers(self, hidden: int) -> int:
        """Count what autograd keeps for a token: of each of its experts the first product, the activated gate, and the
        result, which the router's weights multiply; for adapters what they read, and the low-rank products."""
        of_expert = self.outputs + self.inner + hidden + sum(self.ranks) + (self.inner if self.ranks[1] else 0)
        return self.used * of_expert + (hidden if self.ranks[0] else 0)


def read_experts(layer: Any, config: Any, ranks: Mapping[str, int], packed: bool) -> Experts | None:
    """Read the fused experts of a decoder layer; None where it has none that NF4 packs or that have an adapter.

    Args:
        config: of the text model.
        ranks: of adapters, by the parameters' names within the layer.
        packed: whether NF4 packs them.
    """
    from qpref.policy.experts import fused_experts, projections_of

    name, found = next(iter(fused_experts(layer).items()), ("", None))
    if found is None:
        return None
    names = projections_of(found)
    first_rank, last_rank = (ranks.get(f"{name}.{projection}", 0) for projection in names)
    if not packed and not first_rank + last_rank:
        return None
    first, last = (getattr(found, projection) for projection in names)
    outputs, inner = (2, 1) if found.is_transposed else (1, 2)
    used = next((int(value) for name in USED_EXPERTS if (value := getattr(config, name, None))), 1)
    numels = tuple(weight[0].numel() for weight in (first, last))
    ranks_of_both = (first_rank, last_rank)
    return Experts(first.shape[0], used, numels, first.shape[outputs], last.shape[inner], ranks_of_both, packed)
