"""Bytes of a training step, by arithmetic on a model's shape: weights, adapters, optimizer state, and the peak of all.

These are the bytes that this package's code keeps, tensor by tensor; the tests count the same on real models.
"""

from __future__ import annotations

import math

from qpref.memory.activations import activation_bytes, cached_mask_bytes, head_bytes, live_bytes
from qpref.memory.parts import LIBRARY_BYTES, MemoryParts
from qpref.memory.setup import Setup
from qpref.memory.shape import ModelShape
from qpref.memory.stream import Stream

NF4_BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one under double quantization (Dettmers et al. 2023, section 3)."""
CODE_BYTES, SCALE_CODE_BYTES = 16 * 4, 256 * 4 + 4
"""Per quantized matrix: its table of 16 numbers; for quantized scales a table of 256 and an offset."""
PAGED_FROM, EIGHT_BIT_FROM, STATE_BLOCK = 100_000, 4096, 256
"""bitsandbytes: smallest matrix whose state is paged, or kept in 8 bit; numbers of 8-bit state per scale."""


def peak_memory(shape: ModelShape, setup: Setup, stream: Stream, recomputed: int) -> MemoryParts:
    """Predict a step's peak: `stream` is its largest micro-batch, the first `recomputed` layers are recomputed."""
    return MemoryParts(
        weights=weight_bytes(shape, setup),
        adapters=adapter_bytes(shape, setup),
        optimizer=optimizer_bytes(shape, setup.optimizer),
        activations=activation_bytes(shape, setup, stream, recomputed),
        live=live_bytes(shape, setup, stream, recomputed),
        head_tile=head_bytes(shape, setup, stream),
        fixed_reserve=LIBRARY_BYTES[setup.device] + cached_mask_bytes(shape, setup, stream),
    )


def weight_bytes(shape: ModelShape, setup: Setup) -> int:
    """Count the base as bitsandbytes stores it; embeddings, head, norms and biases stay in the recipe's dtype."""
    unquantized = shape.embeddings + shape.other_parameters
    linears = sum(_matrix_bytes(linear.numel, setup) for linear in shape.linears if linear.packed)
    packed = [each for each in shape.experts if each.packed]
    experts = sum(each.count * _matrix_bytes(numel, setup) for each in packed for numel in each.numels)
    unquantized += sum(linear.numel for linear in shape.linears if not linear.packed)
    unquantized += sum(each.num_weights for each in shape.experts if not each.packed)
    return linears + experts + setup.dtype_bytes * unquantized


def _matrix_bytes(numel: int, setup: Setup) -> int:
    if setup.double_quantization is None:
        return numel * setup.dtype_bytes
    blocks = math.ceil(numel / NF4_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / SCALE_BLOCK) + SCALE_CODE_BYTES
    return math.ceil(numel / 2) + CODE_BYTES + (scales if setup.double_quantization else 4 * blocks)


def adapter_bytes(shape: ModelShape, setup: Setup) -> int:
    """Count float32 weights and gradients, and the weights of a frozen start adapter."""
    return sum(shape.adapter_sizes) * (12 if setup.has_start else 8)


def optimizer_bytes(shape: ModelShape, optimizer: str) -> int:
    """Count the state that cannot leave the device: a paged optimizer keeps that of small matrices there."""
    paged = optimizer.startswith("paged")
    total = 0
    for size in shape.adapter_sizes:
        if optimizer.endswith("8bit") and size >= EIGHT_BIT_FROM:
            scales = 2 * 4 * math.ceil(size / STATE_BLOCK)
            total += scales + (0 if paged and size >= PAGED_FROM else 2 * size)
        elif not (paged and size >= PAGED_FROM):
            total += 8 * size
    return total
