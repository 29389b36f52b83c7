"""Bytes of a training step, by arithmetic on a model's shape: weights, adapters, optimizer state, and the peak of all.

These are the bytes that this package's code keeps, tensor by tensor; the tests count the same on real models.
"""

from __future__ import annotations

import math

from qpref.memory.activations import activation_bytes, cached_mask_bytes, head_bytes, live_bytes
from qpref.memory.parts import LIBRARY_BYTES, MemoryParts
from qpref.memory.setup import Setup
from qpref.memory.shape import Layer, ModelShape
from qpref.memory.stream import Stream

NF4_BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one under double quantization (Dettmers et al. 2023, section 3)."""
CODE_BYTES, SCALE_CODE_BYTES = 16 * 4, 256 * 4 + 4
"""Per quantized matrix: its table of 16 numbers; for quantized scales a table of 256 and an offset."""
PAGED_FROM, EIGHT_BIT_FROM, STATE_BLOCK = 100_000, 4096, 256
"""bitsandbytes: smallest matrix whose state is paged, or kept in 8 bit; numbers of 8-bit state per scale."""
GATHERED_LAYERS = 3
"""Decoder layers of a shared base whose gathered bytes exist at a time: in the backward pass the weights of one layer,
the message that brings the next one's, and the weights that are copied out of it (torch's FSDP2,
torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, `unshard` and `wait_for_unshard`)."""


def peak_memory(shape: ModelShape, setup: Setup, stream: Stream, recomputed: int) -> MemoryParts:
    """Predict a step's peak: `stream` is its largest micro-batch, the first `recomputed` layers are recomputed."""
    return MemoryParts(
        weights=shard_bytes(shape, setup) + gathered_bytes(shape, setup),
        adapters=adapter_bytes(shape, setup),
        optimizer=optimizer_bytes(shape, setup.optimizer),
        activations=activation_bytes(shape, setup, stream, recomputed),
        live=live_bytes(shape, setup, stream, recomputed),
        head_tile=head_bytes(shape, setup, stream),
        fixed_reserve=LIBRARY_BYTES[setup.device] + cached_mask_bytes(shape, setup, stream),
    )


def weight_bytes(shape: ModelShape, setup: Setup) -> int:
    """Count the base as bitsandbytes stores it; embeddings, head, norms and biases stay in the recipe's dtype."""
    layers = sum(layer_weight_bytes(layer, setup) for layer in shape.layers)
    return layers + setup.dtype_bytes * (shape.embeddings + shape.other_parameters)


def layer_weight_bytes(layer: Layer, setup: Setup) -> int:
    """Count the matrices of a decoder layer, and of its experts where they are counted apart."""
    packed = [linear.numel for linear in layer.linears if linear.packed]
    unpacked = sum(linear.numel for linear in layer.linears if not linear.packed)
    if layer.experts and layer.experts.packed:
        packed += layer.experts.count * list(layer.experts.numels)
    elif layer.experts:
        unpacked += layer.experts.num_weights
    return sum(_matrix_bytes(numel, setup) for numel in packed) + setup.dtype_bytes * unpacked


def shard_bytes(shape: ModelShape, setup: Setup) -> int:
    """Count the part of the base that each rank keeps on its device: all of it, unless ranks share the base.

    Shared are the matrices of the decoder layers and the rows of the head, in equal parts. Norms, biases and routers
    are on every rank; a table of embeddings that isn't the head's stays in the host's memory.
    """
    if setup.num_shards == 1:
        return weight_bytes(shape, setup)
    layers = sum(math.ceil(layer_weight_bytes(layer, setup) / setup.num_shards) for layer in shape.layers)
    head = math.ceil(shape.vocabulary / setup.num_shards) * shape.hidden
    return layers + setup.dtype_bytes * (head + shape.other_parameters)


def gathered_bytes(shape: ModelShape, setup: Setup) -> int:
    """Count the gathered layers of a shared base at their most."""
    if setup.num_shards == 1:
        return 0
    return GATHERED_LAYERS * max(layer_weight_bytes(layer, setup) for layer in shape.layers)


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
