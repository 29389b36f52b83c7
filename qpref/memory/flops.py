"""Floating-point operations of a step, by arithmetic on a model's shape."""

from __future__ import annotations

from qpref.memory.shape import ModelShape
from qpref.memory.stream import Stream


def forward_flops(shape: ModelShape, stream: Stream, adapted: bool = True) -> float:
    """Count a forward pass, head included: 2 per weight and token (Kaplan et al. 2020, section 2.1), and attention."""
    return _blocks_flops(shape, stream) + (_lora_flops(shape, stream) if adapted else 0) + _head_flops(shape, stream)


def step_flops(shape: ModelShape, stream: Stream, recomputed: float = 0.0, references: float = 0.0) -> float:
    """Count a forward and backward pass through a frozen base with adapters.

    Args:
        recomputed: share of the layers that are recomputed, 0 to 1.
        references: forward passes of the adapter-off reference to add.
    """
    blocks, lora, head = _blocks_flops(shape, stream), _lora_flops(shape, stream), _head_flops(shape, stream)
    backward = 2 * shape.matmul_parameters * stream.tokens + 2.5 * _attention_flops(shape, stream)
    # The head's gradient is computed in the forward pass: two products there, none in the backward pass.
    own = blocks * (1 + recomputed) + backward + lora * (3 + recomputed) + 2 * head
    return own + references * forward_flops(shape, stream, adapted=False)


def _blocks_flops(shape: ModelShape, stream: Stream) -> float:
    return 2 * shape.matmul_parameters * stream.tokens + _attention_flops(shape, stream)


def _attention_flops(shape: ModelShape, stream: Stream) -> float:
    return 4 * shape.query_width * shape.num_layers * stream.attended_scores


def _lora_flops(shape: ModelShape, stream: Stream) -> float:
    return 2 * shape.adapter_weights_of_token * stream.tokens


def _head_flops(shape: ModelShape, stream: Stream) -> float:
    return 2 * shape.vocabulary * shape.hidden * stream.scored_tokens
