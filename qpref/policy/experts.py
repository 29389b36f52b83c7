"""Fused experts of a model: which modules have them, and their weights in 4 bits.

transformers keeps the experts of a layer in one 3-D parameter for each projection, which bitsandbytes passes over. Here
each expert's matrix is quantized to NF4 by itself, and dequantized alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit
from torch import Tensor, nn

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

    @property
    def stand_in(self) -> Tensor:
        """[experts, rows, columns] with the dtype and the device of the dequantized weights, but one number in memory:
        for PEFT, which reads no more of a weight that it adapts."""
        return torch.zeros((), dtype=self.dtype, device=self.packed.device).expand(self.num_experts, *self.size)

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
    """Return whether a module's experts are fused, packed or not, and computed by a function of transformers'
    registry."""
    described = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    return described and all(name in {**module._parameters, **module._modules} for name in projections_of(module))


def projections_of(module: Any) -> tuple[str, str]:
    """Names of the two projections of a module with fused experts, in the order in which it has them."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def fused_experts(model: nn.Module) -> dict[str, Any]:
    """Find the modules with fused experts, by name."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def packed_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are packed, as in the plain model."""
    return [
        name.removeprefix("base_model.model.").replace(".base_layer", "")
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


def _quantized(weights: Tensor, double_quantization: bool) -> Iterator[tuple[Tensor, Any]]:
    for matrix in weights:
        yield quantize_4bit(matrix.contiguous(), compress_statistics=double_quantization, quant_type="nf4")


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
