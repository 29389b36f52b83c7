"""Products of rows with the matrix of each row's expert, frozen weights and LoRA adapter as one autograd function.

Weights in 4 bits are dequantized one expert at a time, in the forward pass and again in the backward pass, so nothing
dense is kept. The frozen weight's product is accumulated onto the adapter's, so their sum is rounded once (see `lora`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qpref.policy.experts import PackedExperts
from qpref.policy.matmul import add_product, product
from qpref.policy.projections import float32_product


@dataclass(frozen=True, slots=True)
class Routing:
    """Rows of the products: one for each token and expert of it, sorted by expert.

    Attributes:
        order: [rows] indices into the flattened [tokens, k] choices.
        experts: [rows] expert of each row.
        counts: rows of each expert.
        k: experts of a token.
        num_tokens: tokens, also those without a row.
    """

    order: Tensor
    experts: Tensor
    counts: list[int]
    k: int
    num_tokens: int

    @classmethod
    def of(cls, top_k_index: Tensor, num_experts: int) -> Routing:
        """Sort [tokens, k] choices, with one wait for the device; numbers beyond the last expert's have no row."""
        experts = top_k_index.flatten()
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=num_experts)[:num_experts].tolist()
        order = order[: sum(counts)]
        return cls(order, experts[order], counts, top_k_index.shape[-1], len(top_k_index))

    def rows(self, tokens: Tensor) -> Tensor:
        """Repeat [tokens, width] for each expert of a token: [rows, width]."""
        return tokens.index_select(0, self.order // self.k)

    def summed(self, rows: Tensor) -> Tensor:
        """Sum [rows, width] over each token's experts: [tokens, width]; in a fixed order, unlike a GPU's index_add."""
        placed = rows.new_zeros(self.num_tokens * self.k, rows.shape[1]).index_copy_(0, self.order, rows)
        return placed.view(self.num_tokens, self.k, rows.shape[1]).sum(1)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split [rows, width] by expert."""
        parts: tuple[Tensor, ...] = rows.split(self.counts)
        return parts


@dataclass(frozen=True, slots=True)
class ExpertAdapter:
    """A LoRA adapter of each expert of a projection.

    Attributes:
        a: [experts * rank, in] float32, in PEFT's order: all ranks of an expert, then the next expert.
        b: [out, rank * experts] float32, in PEFT's order: all experts of a rank, then the next rank.
        scaling: factor on B A.
    """

    a: Tensor
    b: Tensor
    scaling: float

    def factors(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """A and B by expert: [experts, rank, in] and [experts, out, rank], as views."""
        by_rank = self.b.view(len(self.b), -1, num_experts)
        return self.a.view(num_experts, -1, self.a.shape[1]), by_rank.permute(2, 0, 1)

    def cast(self, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cast A, and B with the scaling in it, for a pass."""
        a, b = self.factors(num_experts)
        return a.to(dtype), (b * self.scaling).to(dtype).contiguous()


@dataclass(frozen=True, slots=True)
class GroupedProjection:
    """A projection of all experts of a layer.

    Attributes:
        weights: packed, or [experts, rows, columns].
        is_transposed: an expert's matrix is stored as [in, out].
        adapter: None where it is off or there is none.
    """

    weights: PackedExperts | Tensor
    is_transposed: bool
    adapter: ExpertAdapter | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """Experts, outputs and inputs."""
        weights = self.weights
        shape = (weights.num_experts, *weights.size) if isinstance(weights, PackedExperts) else weights.shape
        count, rows, columns = shape
        return (count, columns, rows) if self.is_transposed else (count, rows, columns)

    def dense(self, counts: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Yield each expert with rows, and its matrix [out, in]."""
        if isinstance(self.weights, PackedExperts):
            weights = self.weights.dense(counts)
        else:
            weights = ((expert, matrix) for expert, matrix in enumerate(self.weights) if counts[expert])
        for expert, matrix in weights:
            yield expert, (matrix.t() if self.is_transposed else matrix).to(dtype)

    def of_tokens(self, tokens: Tensor, routing: Routing) -> Tensor:
        """[tokens, in] -> [rows, out]: each token times the matrices of its experts."""
        return self._apply(tokens, routing, is_routed=False)

    def of_rows(self, rows: Tensor, routing: Routing) -> Tensor:
        """[rows, in] -> [rows, out]."""
        return self._apply(rows, routing, is_routed=True)

    def _apply(self, x: Tensor, routing: Routing, is_routed: bool) -> Tensor:
        a, b = (None, None) if self.adapter is None else (self.adapter.a, self.adapter.b)
        result: Tensor = _GroupedProduct.apply(x, a, b, self, routing, is_routed)  # type: ignore[no-untyped-call]
        return result


class _GroupedProduct(torch.autograd.Function):
    """base(x) + scaling * x A^T B^T, by expert (Hu et al. 2021, eq. 3). The frozen weights need nothing kept for the
    backward pass; an adapter needs x as it is given, not a copy for each expert, and [rows, rank]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, projection: GroupedProjection, routing: Routing,
        is_routed: bool,
    ) -> Tensor:  # fmt: skip
        ctx.projection, ctx.routing, ctx.is_routed = projection, routing, is_routed
        num_experts, outputs, _ = projection.size
        rows = x if is_routed else routing.rows(x)
        y = rows.new_zeros(len(rows), outputs)
        with torch.autocast(x.device.type, enabled=False):
            if projection.adapter is not None:
                low = _low_rank_onto(y, rows, projection.adapter.cast(num_experts, x.dtype), routing)
                ctx.save_for_backward(x, low)
            parts, targets = routing.split(rows), routing.split(y)
            for expert, matrix in projection.dense(routing.counts, x.dtype):
                add_product(targets[expert], parts[expert], matrix.t())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> Any:
        projection, routing = ctx.projection, ctx.routing
        grad = incoming.new_zeros(len(incoming), projection.size[2])
        of_adapter: tuple[Tensor | None, Tensor | None] = None, None
        with torch.autocast(incoming.device.type, enabled=False):
            if projection.adapter is not None:
                x, low = ctx.saved_tensors
                rows = x if ctx.is_routed else routing.rows(x)
                of_adapter = _adapter_gradients(grad, rows, low, incoming, projection, routing)
                del x, rows
            if ctx.needs_input_grad[0]:
                parts, targets = routing.split(incoming), routing.split(grad)
                for expert, matrix in projection.dense(routing.counts, incoming.dtype):
                    add_product(targets[expert], parts[expert], matrix)
        return grad if ctx.is_routed else routing.summed(grad), *of_adapter, None, None, None


def _low_rank_onto(y: Tensor, rows: Tensor, cast: tuple[Tensor, Tensor], routing: Routing) -> Tensor:
    """Add the adapters' products to y [rows, out]; returns the low-rank ones [rows, rank]."""
    a, b = cast
    low = rows.new_empty(len(rows), a.shape[1])
    for expert, (x, target, part) in enumerate(zip(*map(routing.split, (rows, y, low)), strict=True)):
        if len(x):
            part.copy_(product(x, a[expert].t()))
            add_product(target, part, b[expert].t())
    return low


def _adapter_gradients(
    grad: Tensor, rows: Tensor, low: Tensor, incoming: Tensor, projection: GroupedProjection, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the rows through the adapters to grad [rows, in]; returns those of A and B, in PEFT's
    order."""
    adapter, (num_experts, outputs, inputs) = projection.adapter, projection.size
    assert adapter is not None
    a, b = adapter.cast(num_experts, rows.dtype)
    of_a = a.new_zeros(a.shape, dtype=torch.float32)
    of_b = b.new_zeros(b.shape, dtype=torch.float32)
    parts = zip(*map(routing.split, (rows, low, incoming, grad)), strict=True)
    for expert, (x, part, gradient, target) in enumerate(parts):
        if len(x):
            low_grad = product(gradient, b[expert])
            add_product(target, low_grad, a[expert])
            of_a[expert] = float32_product(low_grad.t(), x)
            of_b[expert] = float32_product(gradient.t(), part).mul_(adapter.scaling)
    return of_a.view(-1, inputs), of_b.permute(1, 2, 0).reshape(outputs, -1)
