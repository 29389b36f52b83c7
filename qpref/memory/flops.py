"""What a step takes in floating-point operations, by arithmetic on a model's shape."""

from __future__ import annotations

from qpref.memory.costs import Stream
from qpref.memory.shape import ModelShape


def forward_flops(shape: ModelShape, stream: Stream, adapted: bool = True) -> float:
    """Of one pass forward, the head included: 2 a weight and token (Kaplan et al. 2020, section 2.1), and attention."""
    return _blocks_flops(shape, stream) + (_lora_flops(shape, stream) if adapted else 0) + _head_flops(shape, stream)


def step_flops(shape: ModelShape, stream: Stream, recomputed: float = 0.0, references: float = 0.0) -> float:
    """Of one pass forward and backward through a frozen base with adapters.

    Args:
        recomputed: share of the layers that is computed again.
        references: passes of the adapter-off reference that are charged to it.
    """
    blocks, lora, head = _blocks_flops(shape, stream), _lora_flops(shape, stream), _head_flops(shape, stream)
    backward = 2 * shape.matmul_parameters * stream.tokens + 2.5 * _attention_flops(shape, stream)
    # The head's slope is computed in the forward pass: two products, none in the backward pass.
    own = blocks * (1 + recomputed) + backward + lora * (3 + recomputed) + 2 * head
    return own + references * forward_flops(shape, stream, adapted=False)


def _blocks_flops(shape: ModelShape, stream: Stream) -> float:
    return 2 * shape.matmul_parameters * stream.tokens + _attention_flops(shape, stream)


def _attention_flops(shape: ModelShape, stream: Stream) -> float:
    return 4 * shape.query * shape.num_layers * stream.attended


def _lora_flops(shape: ModelShape, stream: Stream) -> float:
    return 2 * sum(shape.adapter_sizes) * stream.tokens


def _head_flops(shape: ModelShape, stream: Stream) -> float:
    return 2 * shape.vocabulary * shape.hidden * stream.scored
