"""The work that a training step cannot avoid, and how long a machine needs for it.

Counted are multiplications and additions of matrix products, two a multiply-add; the rest of a step (norms, softmax,
casts, the optimizer) counts as nothing, and so shows up as distance from the limit. Names are those of the papers on
transformer FLOPs: H and I are the widths of the hidden and the inner layer, Q and K those of all query and all key
heads, L layers, V the vocabulary, r LoRA's rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.shapes import Shape

NF4_BYTES = 0.516
"""Of one weight: 4 bits, an 8-bit scale for each 64 of them, and the scales' own scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one pass through the model has to compute.

    Attributes:
        tokens: positions that go through the blocks.
        attended: pairs of a position and one that it sees.
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
    """A prompt once, and responses that each see it and themselves."""
    return Work(
        tokens=prompt + sum(responses),
        attended=prompt**2 / 2 + sum(response * prompt + response**2 / 2 for response in responses),
        head_rows=sum(responses),
    )


def row_work(rows: Sequence[tuple[int, int]], compacts_head: bool = True) -> Work:
    """A row of prompt and response each, padded to the longest; the head on the responses, or on all but the last."""
    width = max(prompt + response for prompt, response in rows)
    scored = sum(response for _, response in rows)
    return Work(
        tokens=width * len(rows),
        attended=len(rows) * width**2 / 2,
        head_rows=scored if compacts_head else len(rows) * (width - 1),
    )


def block_weights(shape: Shape) -> int:
    """N, the weights of all blocks' matrices: L (2 H Q + 2 H K + 3 H I)."""
    return shape.num_hidden_layers * sum(rows * columns for rows, columns in shape.linear_sizes().values())


def adapter_widths(shape: Shape) -> int:
    """sio, the sum of inputs and outputs of all adapted matrices; times the rank it is LoRA's number of weights."""
    return shape.num_hidden_layers * sum(rows + columns for rows, columns in shape.linear_sizes().values())


def attention_flops(shape: Shape, work: Work) -> float:
    """A = 4 Q L att: scores, and the weighted sum of values."""
    return 4 * shape.query_width * shape.num_hidden_layers * work.attended


def head_flops(shape: Shape, work: Work) -> float:
    """2 V H rows: one product with the vocabulary."""
    return 2 * shape.vocab_size * shape.hidden_size * work.head_rows


def adapter_flops(shape: Shape, work: Work, rank: int) -> float:
    """2 r sio T: LoRA's two products, once through."""
    return 2 * rank * adapter_widths(shape) * work.tokens


def block_flops(shape: Shape, work: Work) -> float:
    """fwd = 2 N T + A: the blocks once through, without adapters."""
    return 2 * block_weights(shape) * work.tokens + attention_flops(shape, work)


def forward_flops(shape: Shape, work: Work, rank: int = 0) -> float:
    """A pass without a graph: a reference (rank 0), or the policy."""
    return block_flops(shape, work) + adapter_flops(shape, work, rank) + head_flops(shape, work)


def training_flops(shape: Shape, work: Work, rank: int, recomputed: float = 0.0, head_products: int = 3) -> float:
    """Forward and backward: fwd (1 + g) + 2 N T + 2.5 A + lora (3 + g) + 3 head.

    The base is frozen, so its backward pass is one product a matrix; attention's is five for its forward's two.

    Args:
        recomputed: g, the share of layers whose activations are computed again.
        head_products: products with the vocabulary: 3 where the backward pass computes the logits again.
    """
    return (
        block_flops(shape, work) * (1 + recomputed)
        + 2 * block_weights(shape) * work.tokens
        + 2.5 * attention_flops(shape, work)
        + adapter_flops(shape, work, rank) * (3 + recomputed)
        + head_products * head_flops(shape, work)
    )


def weight_bytes(shape: Shape, passes: float) -> float:
    """Bytes that move for the 4-bit weights: read, and written once as 16 bits, in each pass."""
    return passes * (NF4_BYTES + 2) * block_weights(shape)


def activation_bytes(shape: Shape, tokens: float, recomputed: float = 0.0) -> float:
    """What the graph keeps, 16 bits a number: T (g L H 2 + (1 - g) L s), and one layer at work.

    s = 2 (2 H + 2 Q + 2 K + 2 I) is a token's share of one layer.
    """
    layers = shape.num_hidden_layers
    widths = shape.hidden_size + shape.query_width + shape.key_width + shape.intermediate_size
    per_layer = 2 * 2 * widths
    kept = recomputed * layers * shape.hidden_size * 2 + (1 - recomputed) * layers * per_layer
    return tokens * (kept + per_layer)


def peak_bytes(
    shape: Shape, tokens: float, rank: int, recomputed: float = 0.0, adapter_bytes: int = 12, tile_bytes: float = 2**24
) -> float:
    """The least peak above the loaded model: activations, LoRA's gradients and optimizer, and the largest scratch.

    Args:
        adapter_bytes: for each of LoRA's weights: gradient and two moments, in the adapter's type.
        tile_bytes: logits that exist at a time.
    """
    largest = max(rows * columns for rows, columns in shape.linear_sizes().values())
    state = adapter_bytes * rank * adapter_widths(shape)
    return activation_bytes(shape, tokens, recomputed) + state + max(tile_bytes, 2 * largest)


def least_seconds(flops: float, moved_bytes: float, flops_per_second: float, bytes_per_second: float) -> float:
    """The limit: products at the machine's measured peak, or weights at its measured bandwidth, whichever is slower."""
    return max(flops / flops_per_second, moved_bytes / bytes_per_second)
