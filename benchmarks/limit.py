"""The minimum work of a training step, and the time that a machine needs for it.

Counted are the FLOPs of matrix products, two per multiply-add; the rest of a step (norms, softmax, casts, optimizer)
counts as zero, and so shows up as distance from the limit. Symbols follow the papers on transformer FLOPs: H and I are
the hidden and intermediate sizes, Q and K the total widths of query and key heads, L the number of layers, V the
vocabulary size, r LoRA's rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.shapes import Shape

NF4_BYTES = 0.516
"""Bytes per weight: 4 bits, an 8-bit scale for each 64 weights, and the scales' own scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Work of one pass through the model.

    Attributes:
        tokens: positions that go through the layers.
        attended: pairs of a query and a key position.
        head_rows: positions that go through the output head.
    """

    tokens: float
    attended: float
    head_rows: float

    def __add__(self, other: Work) -> Work:
        return Work(
            tokens=self.tokens + other.tokens,
            attended=self.attended + other.attended,
            head_rows=self.head_rows + other.head_rows,
        )


def shared_work(prompt: int, responses: Sequence[int]) -> Work:
    """Count the work of a prompt computed once, and responses that each attend to it and to themselves."""
    return Work(
        tokens=prompt + sum(responses),
        attended=prompt**2 / 2 + sum(response * prompt + response**2 / 2 for response in responses),
        head_rows=sum(responses),
    )


def row_work(rows: Sequence[tuple[int, int]], compacts_head: bool = True) -> Work:
    """Count the work of rows of prompt and response, padded to the longest.

    Args:
        compacts_head: the head runs on response tokens only, not on every position.
    """
    width = max(prompt + response for prompt, response in rows)
    scored = sum(response for _, response in rows)
    return Work(
        tokens=width * len(rows),
        attended=len(rows) * width**2 / 2,
        head_rows=scored if compacts_head else len(rows) * (width - 1),
    )


def block_weights(shape: Shape) -> int:
    """Count N, the weights of all layers' matrices: L (2 H Q + 2 H K + 3 H I)."""
    return shape.num_hidden_layers * sum(rows * columns for rows, columns in shape.linear_sizes().values())


def adapter_widths(shape: Shape) -> int:
    """Sum sio, the inputs and outputs of all adapted matrices; r sio is LoRA's number of weights."""
    return shape.num_hidden_layers * sum(rows + columns for rows, columns in shape.linear_sizes().values())


def attention_flops(shape: Shape, work: Work) -> float:
    """Count A = 4 Q L att: attention scores, and the weighted sum of values."""
    return 4 * shape.query_width * shape.num_hidden_layers * work.attended


def head_flops(shape: Shape, work: Work) -> float:
    """Count 2 V H rows: one product with the vocabulary."""
    return 2 * shape.vocab_size * shape.hidden_size * work.head_rows


def adapter_flops(shape: Shape, work: Work, rank: int) -> float:
    """Count 2 r sio T: LoRA's two products in one pass."""
    return 2 * rank * adapter_widths(shape) * work.tokens


def block_flops(shape: Shape, work: Work) -> float:
    """Count fwd = 2 N T + A: one forward pass through the layers, without adapters."""
    return 2 * block_weights(shape) * work.tokens + attention_flops(shape, work)


def forward_flops(shape: Shape, work: Work, rank: int = 0) -> float:
    """Count a forward pass without gradients: of a reference (rank 0), or of the policy."""
    return block_flops(shape, work) + adapter_flops(shape, work, rank) + head_flops(shape, work)


def training_flops(shape: Shape, work: Work, rank: int, recomputed: float = 0.0, head_products: int = 3) -> float:
    """Count a forward and backward pass: fwd (1 + g) + 2 N T + 2.5 A + lora (3 + g) + 3 head.

    The base is frozen, so its backward pass is one product per matrix; attention's backward has five products to its
    forward's two.

    Args:
        recomputed: g, the share of layers with activation checkpointing.
        head_products: products with the vocabulary: 3 where the backward pass recomputes the logits.
    """
    return (
        block_flops(shape, work) * (1 + recomputed)
        + 2 * block_weights(shape) * work.tokens
        + 2.5 * attention_flops(shape, work)
        + adapter_flops(shape, work, rank) * (3 + recomputed)
        + head_products * head_flops(shape, work)
    )


def weight_bytes(shape: Shape, passes: float) -> float:
    """Count the bytes moved for 4-bit weights: in each pass read once, and written once in 16 bits."""
    return passes * (NF4_BYTES + 2) * block_weights(shape)


def activation_bytes(shape: Shape, tokens: float, recomputed: float = 0.0) -> float:
    """Count the bytes that autograd saves, in 16 bits: T (g L H 2 + (1 - g) L s), plus one layer in progress.

    s = 2 (2 H + 2 Q + 2 K + 2 I) is the bytes per token in one layer.
    """
    layers = shape.num_hidden_layers
    widths = shape.hidden_size + shape.query_width + shape.key_width + shape.intermediate_size
    per_layer = 2 * 2 * widths
    kept = recomputed * layers * shape.hidden_size * 2 + (1 - recomputed) * layers * per_layer
    return tokens * (kept + per_layer)


def peak_bytes(
    shape: Shape, tokens: float, rank: int, recomputed: float = 0.0, adapter_bytes: int = 12, tile_bytes: float = 2**24
) -> float:
    """Bound from below the peak above the loaded model: activations, LoRA's gradients and optimizer state, scratch.

    Args:
        adapter_bytes: bytes per LoRA weight: gradient and two moments, in the adapter's dtype.
        tile_bytes: logits in memory at a time.
    """
    largest = max(rows * columns for rows, columns in shape.linear_sizes().values())
    state = adapter_bytes * rank * adapter_widths(shape)
    return activation_bytes(shape, tokens, recomputed) + state + max(tile_bytes, 2 * largest)


def least_seconds(flops: float, moved_bytes: float, flops_per_second: float, bytes_per_second: float) -> float:
    """Bound the time from below: FLOPs at the measured peak, or bytes at the measured bandwidth, the slower one."""
    return max(flops / flops_per_second, moved_bytes / bytes_per_second)
