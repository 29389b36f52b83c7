"""Frozen experts in 4 bits: packed weights, and the function that a layer's experts are computed by.

transformers keeps the experts of a layer in one 3-D parameter for each projection, which bitsandbytes passes over. Here
each expert's matrix is quantized to NF4 by itself. A pass dequantizes one expert's matrix after the other, for its
tokens, and the backward pass does so again; nothing dense is kept. Activation, gating and biases are the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IMPLEMENTATION = "qpref_nf4"
"""Name in transformers' registry of functions that compute experts."""
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the 3-D parameters of modules that take part in that registry; one without a gate has `up_proj`."""
BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one under double quantization; bitsandbytes' own."""


class PackedExperts(nn.Module):
    """One projection of all experts of a layer in NF4.

    Attributes:
        packed: [experts, ceil(numel / 2)] uint8, two weights a byte.
        scales: [experts, blocks] float32; under double quantization uint8, padded to whole blocks of scales.
        scales_of_scales, offsets: [experts, blocks of scales] and [experts, 1] float32; None for float32 scales.
        size: rows and columns of an expert's matrix, as the model stores it.
        dtype: of the dequantized weights.
    """

    def __init__(self, weights: Tensor, double_quantization: bool) -> None:
        """Quantize [experts, rows, columns] weights on their device; a CPU keeps the scales unpacked, in float32."""
        super().__init__()
        self.size, self.dtype = tuple(weights.shape[1:]), weights.dtype
        packed, states = zip(*_quantized(weights, double_quantization), strict=True)
        self.packed = _frozen(torch.stack([each.flatten() for each in packed]))
        self.code, self.scale_code = states[0].code, None
        self.scales_of_scales, self.offsets = None, None
        scales = torch.stack([state.absmax for state in states])
        if double_quantization:
            padding = -scales.shape[1] % SCALE_BLOCK
            scales = nn.functional.pad(scales, (0, padding))
            self.scale_code = states[0].state2.code
            self.scales_of_scales = _frozen(torch.stack([state.state2.absmax for state in states]))
            self.offsets = _frozen(torch.stack([state.offset.reshape(1) for state in states]))
        self.scales = _frozen(scales)
        if double_quantization and not keeps_scales(weights.device):
            self.scales = _frozen(self._float32_scales()[:, : scales.shape[1] - padding].contiguous())
            self.scales_of_scales, self.offsets = None, None

    @property
    def num_experts(self) -> int:
        return len(self.packed)

    @property
    def num_weights(self) -> int:
        return self.num_experts * math.prod(self.size)

    def dense(self, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield each expert with tokens, and its dequantized matrix."""
        scales = self._float32_scales()
        for expert, count in enumerate(counts):
            if count:
                state = QuantState(
                    absmax=scales[expert],
                    shape=torch.Size(self.size),
                    code=self.code,
                    blocksize=BLOCK,
                    quant_type="nf4",
                    dtype=self.dtype,
                )
                yield expert, dequantize_4bit(self.packed[expert].unsqueeze(1), state)

    def _float32_scales(self) -> Tensor:
        """[experts, blocks or more] float32 scales."""
        if self.scales_of_scales is None:
            return self.scales
        second = QuantState(
            absmax=self.scales_of_scales.flatten(), code=self.scale_code, blocksize=SCALE_BLOCK, dtype=torch.float32
        )
        first = dequantize_blockwise(self.scales.flatten(), second)
        unpacked: Tensor = first.view(self.scales.shape) + self.offsets
        return unpacked


def keeps_scales(device: torch.device) -> bool:
    """Return whether scales stay in 8 bits under double quantization; a CPU would unpack them in every pass."""
    return device.type != "cpu"


def is_experts(module: nn.Module) -> bool:
    """Return whether a module's experts are fused parameters, computed by a function of transformers' registry."""
    described = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    return described and all(name in module._parameters for name in projections_of(module))


def projections_of(module: Any) -> tuple[str, str]:
    """Names of the two projections of a module with fused experts."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def packed_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are packed, as in the plain model."""
    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, PackedExperts)
    ]


def unpacked_weights(model: nn.Module, inside: Collection[str]) -> int:
    """Count the weights of experts that stay as they are in the files: matrices that aren't a linear layer's.

    Args:
        inside: names of the modules to count in.
    """
    found: dict[int, int] = {}
    for name, module in model.named_modules():
        if name not in inside or isinstance(module, PackedExperts | nn.Linear | nn.Embedding | nn.modules.conv._ConvNd):
            continue
        for own, weight in module.named_parameters(recurse=False):
            is_matrix = weight.dim() > 1 and weight.is_floating_point() and "bias" not in own
            if is_matrix and "expert" in f"{name}.{own} {type(module).__name__}".lower():
                found[id(weight)] = weight.numel()
    return sum(found.values())


def through_nf4(weights: Tensor, double_quantization: bool) -> Tensor:
    """Round [experts, rows, columns] weights to NF4 and back, expert by expert, in their dtype."""
    rounded = torch.empty_like(weights)
    for expert, (packed, state) in enumerate(_quantized(weights, double_quantization)):
        rounded[expert] = dequantize_4bit(packed, state)
    return rounded


def compute_packed(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute a layer's experts from packed weights, with one wait for the device; a function of the registry.

    Args:
        module: with a PackedExperts for each projection.
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, k] experts of each token; a number beyond the last expert's adds nothing.
        top_k_weights: [tokens, k] their weights.

    Returns:
        [tokens, hidden] in the dtype of the hidden states.
    """
    up, down = (getattr(module, name) for name in projections_of(module))
    k, experts = top_k_index.shape[-1], top_k_index.flatten()
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=up.num_experts)[: up.num_experts].tolist()
    order = order[: sum(counts)]
    experts = experts[order]

    inner = _product(hidden_states[order // k], up, counts, module, f"{projections_of(module)[0]}_bias", experts)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _product(inner, down, counts, module, "down_proj_bias", experts)
    if getattr(module, "has_post_expert_norm", False):
        outer = module.post_expert_norm(outer)
    weighted = outer * top_k_weights.flatten()[order].unsqueeze(1)
    rows: Tensor = _Placed.apply(weighted, order, top_k_index.numel())  # type: ignore[no-untyped-call]
    return rows.view(-1, k, rows.shape[1]).sum(1).to(hidden_states.dtype)


def _product(
    x: Tensor, packed: PackedExperts, counts: Sequence[int], module: Any, bias: str, experts: Tensor
) -> Tensor:
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    y: Tensor = _GroupedProduct.apply(x.to(dtype), packed, counts, module.is_transposed)  # type: ignore[no-untyped-call]
    return y + getattr(module, bias)[experts].to(dtype) if module.has_bias else y


class _Placed(torch.autograd.Function):
    """Rows [n, width] at distinct places [n] of a zero [count, width]; torch's index_copy keeps the rows for its
    backward pass, which only needs their places."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(count, rows.shape[1]).index_copy_(0, places, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> Any:
        return incoming.index_select(0, *ctx.saved_tensors), None, None


class _GroupedProduct(torch.autograd.Function):
    """[tokens, in] -> [tokens, out], the tokens sorted by expert; the frozen weights need no input kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedExperts, counts: Sequence[int], is_transposed: bool) -> Tensor:
        ctx.packed, ctx.counts, ctx.is_transposed = packed, counts, is_transposed
        return _multiply(x, packed, counts, is_transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> Any:
        return _multiply(incoming, ctx.packed, ctx.counts, not ctx.is_transposed), None, None, None


def _multiply(x: Tensor, packed: PackedExperts, counts: Sequence[int], plain: bool) -> Tensor:
    """Multiply each expert's rows of x with its matrix as it is, or else with its transpose."""
    y = x.new_empty(len(x), packed.size[1 if plain else 0])
    rows = iter(zip(x.split(list(counts)), y.split(list(counts)), strict=True))
    parts = list(rows)
    for expert, matrix in packed.dense(counts):
        source, target = parts[expert]
        dense = matrix.to(x.dtype)
        target.copy_(source @ (dense if plain else dense.t()))
    return y


def _quantized(weights: Tensor, double_quantization: bool) -> Iterator[tuple[Tensor, Any]]:
    for matrix in weights:
        yield quantize_4bit(matrix.contiguous(), compress_statistics=double_quantization, quant_type="nf4")


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
