"""Bytes that grow with a micro-batch: activations, the backward pass of one layer, and the scoring of responses.

Symbols in comments and docstrings, each for one token and layer: H hidden width, Q and K width of all queries and of
all keys, I width inside the MLP, b bytes of a number in the recipe's dtype.
"""

from __future__ import annotations

import math

from qpref.attention.segments import CACHED_MASKS, KEPT_KEYS, QUERY_BLOCK
from qpref.attention.varlen import MAX_WIDTH
from qpref.dropout import HASHED_NUMBERS
from qpref.memory.experts import Experts
from qpref.memory.setup import Setup
from qpref.memory.shape import Layer, Linear, ModelShape
from qpref.memory.stream import Stream
from qpref.policy.matmul import WIDENED_ROWS
from qpref.policy.vocabulary import MAX_ROWS, SHARED_ROWS, TILE_ELEMENTS


def activation_bytes(shape: ModelShape, setup: Setup, stream: Stream, recomputed: int) -> int:
    """Count what autograd keeps for the backward pass when the first `recomputed` layers are recomputed.

    The first layer counts like the others, although it keeps less where nothing before its MLP has an adapter.
    """
    kept = shape.layers[recomputed:]
    total = sum(_layer_bytes(layer, shape, setup, stream) for layer in kept)
    total += recomputed * setup.dtype_bytes * shape.hidden * stream.tokens
    fused = shape.layers[0].fuses_norms
    total += _norm_bytes((shape.hidden, 1), setup, fused) * stream.tokens  # the final one
    if recomputed == 0 and not fused:
        total -= _norm_bytes((shape.hidden, 1), setup, fused) * stream.tokens  # the embeddings have no gradient
    if kept:
        total += setup.dtype_bytes * shape.rotary * stream.tokens
    return int(total + stream.scored_tokens * _head_row_bytes(shape, setup))


def _head_row_bytes(shape: ModelShape, setup: Setup) -> int:
    """Bytes of a scored position: hidden state's gradient, index, and what a head with an adapter keeps."""
    own = setup.dtype_bytes * shape.hidden + 8
    return own + (shape.head_rank and (setup.dtype_bytes + 4) * shape.hidden + 4 * (3 * shape.head_rank + 1))


def _layer_bytes(layer: Layer, shape: ModelShape, setup: Setup, stream: Stream) -> float:
    """Bytes that autograd keeps of one layer that isn't recomputed."""
    b, linears = setup.dtype_bytes, layer.linears
    adapted = [linear for linear in linears if linear.rank]
    numbers = sum(linear.rank for linear in adapted)  # the low-rank products
    if not layer.reads_norms:
        for part in (True, False):
            readers = {linear.inputs for linear in adapted if linear.in_attention == part and linear.reads_residual}
            numbers += max(readers, default=0)  # layers that read the same input share one copy
    writers = [linear for linear in adapted if not linear.reads_residual]
    # Flash attention's result is itself the output projection's input; a fused MLP recomputes down's.
    for linear in writers:
        is_recomputed = _is_flash(shape, setup) if linear.in_attention else layer.fuses_mlp
        numbers += 0 if is_recomputed else linear.inputs
    numbers += _mlp_numbers(layer) + (layer.experts.kept_numbers(shape.hidden) if layer.experts else 0)
    # A and B in the recipe's dtype; in float32 an A that isn't joined with others is the parameter itself.
    copied = [linear for linear in adapted if b < 4 or linear.reads_residual]
    copies = b * sum(linear.rank * linear.inputs for linear in copied)
    copies += b * sum(linear.rank * linear.outputs for linear in adapted)
    total = b * numbers * stream.tokens + copies + _attention_bytes(shape, setup, stream)
    return total + sum(_norm_bytes(norm, setup, layer.fuses_norms) for norm in layer.norms) * stream.tokens


def _norm_bytes(norm: tuple[int, int], setup: Setup, fused: bool) -> int:
    """Bytes a token: the norm's input, float32 where it isn't fused, and a float32 of each group."""
    size, groups = norm
    return (setup.dtype_bytes if fused else 4) * size + 4 * groups


def _mlp_numbers(layer: Layer) -> int:
    """Count what the MLP keeps of gate, activated gate, up and their product, I each: a fused one gate and up; another
    one all that activation and product need."""
    linears = [linear for linear in layer.linears if not linear.in_attention]
    outer = sum(linear.outputs for linear in linears if linear.reads_residual)
    inner = max((linear.inputs for linear in linears if not linear.reads_residual), default=0)
    return outer + inner if outer > inner and not layer.fuses_mlp else outer


def _is_flash(shape: ModelShape, setup: Setup) -> bool:
    """Return whether all segments go through one call of a variable-length kernel."""
    width = shape.query_width // shape.heads
    can = setup.has_flash and width % 8 == 0 and width <= MAX_WIDTH
    shares = shape.shares_prompts and not shape.plain_attention
    return setup.device == "cuda" and setup.dtype_bytes == 2 and shares and can


def _is_segmented(shape: ModelShape, setup: Setup) -> bool:
    """Return whether attention is one call of torch's scaled dot product for each segment."""
    return shape.shares_prompts and not (shape.plain_attention or setup.in_blocks or _is_flash(shape, setup))


def cached_mask_bytes(shape: ModelShape, setup: Setup, stream: Stream) -> int:
    """Count the boolean masks that stay cached from step to step, each taken for the average branch's."""
    if not _is_segmented(shape, setup):
        return 0
    return int(CACHED_MASKS * stream.masked_scores / max(1, stream.branches))


def _attention_bytes(shape: ModelShape, setup: Setup, stream: Stream) -> float:
    q, k, tokens = shape.query_width, shape.key_width, stream.tokens
    if shape.plain_attention and shape.shares_prompts:
        # Queries; a copy of keys and values for each segment.
        return setup.dtype_bytes * (q * tokens + 2 * k * (stream.prompt_tokens + stream.branch_keys))
    if shape.plain_attention:
        # Queries, repeated keys and values; every score after tanh, as softmax in float32, and as softmax in b bytes.
        scores = shape.heads * stream.row_scores * (2 * setup.dtype_bytes + (4 if setup.dtype_bytes < 4 else 0))
        return 3 * setup.dtype_bytes * q * tokens + scores
    log_sums = 4 * shape.heads * tokens
    if not shape.shares_prompts:
        return setup.dtype_bytes * (4 * q * tokens + stream.row_scores) + log_sums
    if setup.in_blocks:  # queries, keys, values, the softmax
        return setup.dtype_bytes * ((q + 2 * k) * tokens + shape.heads * stream.kept_scores)
    if _is_flash(shape, setup):  # queries, gathered keys and values, the result
        return setup.dtype_bytes * (2 * q * tokens + 2 * k * (stream.prompt_tokens + stream.branch_keys)) + log_sums
    # Segment by segment: queries, repeated keys and values, the result; a copy of keys and values for each branch.
    slides = shape.window is not None and stream.longest_prompt > shape.window
    masks = stream.masked_scores + (stream.prompt_scores if slides else 0)
    return _segment_dtype_bytes(setup) * (4 * q * tokens + 2 * q * stream.branch_keys + masks) + log_sums


def _segment_dtype_bytes(setup: Setup) -> int:
    """Bytes of a number where attention runs segment by segment: a CPU computes it in float32."""
    return 4 if setup.device == "cpu" else setup.dtype_bytes


def live_bytes(shape: ModelShape, setup: Setup, stream: Stream, recomputed: int) -> int:
    """Count gradients and temporaries of the costliest layer, less what the backward pass has freed before it.

    The last layers are the ones that keep their activations, so these are freed by the time that a recomputed layer
    holds its own: a recomputed layer's activations count only where all layers are recomputed.
    """
    inner = max(linear.inputs for linear in shape.linears) * stream.tokens
    hidden, matrix = shape.hidden * stream.tokens, largest_matrix(shape)
    weight = setup.dtype_bytes * matrix + (_widened_bytes(shape, setup, stream) if setup.widens_products else 0)
    hashes = 4 * min(HASHED_NUMBERS, inner)
    if all(layer.fuses_mlp for layer in shape.layers):
        # The activated gate, its product with up and the product's gradient, beside a dequantized weight or, with
        # dropout, the gradient before its mask; and the MLP's input and its output's gradient.
        dropped = setup.dtype_bytes * inner + hashes if setup.dropout else 0
        linear = setup.dtype_bytes * (3 * inner + 2 * hidden) + max(weight, dropped)
    else:
        # An input's gradient beside a dequantized weight, or the gradients of gate and up beside their product's,
        # whose own input is freed. Dropout takes two more numbers per number of the input.
        dropped = setup.dtype_bytes * 3 * inner + hashes if setup.dropout else setup.dtype_bytes * inner
        linear = setup.dtype_bytes * (inner + hidden) + max(weight, dropped)
    of_experts = [_experts_live(each, shape, setup, stream) for each in shape.experts]
    total: float = max([linear, *of_experts])
    if shape.plain_attention and shape.shares_prompts:
        # A block's scores, capped scores, their exponentials and both gradients, in float32.
        total = max(total, 5 * 4 * shape.heads * min(QUERY_BLOCK, stream.longest_keys) * stream.longest_keys)
    elif setup.in_blocks and shape.shares_prompts:
        total = max(total, _block_bytes(shape, setup, stream))
    if _is_flash(shape, setup):
        total = max(total, _flash_backward_bytes(shape, setup, stream))
    if recomputed == shape.num_layers:
        total += max(_layer_bytes(layer, shape, setup, stream) for layer in shape.layers)
    freed = (
        _norm_bytes((shape.hidden, 1), setup, shape.layers[0].fuses_norms) * stream.tokens
        + setup.dtype_bytes * shape.hidden * stream.scored_tokens
    )
    return max(0, int(total - freed))


def _widened_bytes(shape: ModelShape, setup: Setup, stream: Stream) -> int:
    """Bytes of the float32 copies in the costliest product: a weight, and a block of rows with those that it is added
    to and the result. Adapters' gradients copy the layer's input whole, while the gradient of the input isn't there."""
    rows = min(WIDENED_ROWS, math.ceil(stream.tokens))
    products = [4 * (each.numel + rows * (2 * max(_sides(each)) + min(_sides(each)))) for each in shape.linears]
    widest = max(max(_sides(each)) for each in shape.linears)
    return max(*products, math.ceil((4 - setup.dtype_bytes) * widest * stream.tokens))


def _sides(linear: Linear) -> tuple[int, int]:
    return linear.inputs, linear.outputs


def _experts_live(experts: Experts, shape: ModelShape, setup: Setup, stream: Stream) -> float:
    """Bytes in the backward pass of experts: a dequantized matrix, the layer's input and output, and for each expert of
    a token three gradients of the size of its result, or one, and those of gate and up and of their product. Of an
    adapter its copies, and its gradients in float32, B's in two orders."""
    rows = experts.used * max(3 * shape.hidden, shape.hidden + 2 * experts.outputs)
    numbers = max(experts.numels) + stream.tokens * (rows + 2 * shape.hidden)
    b = setup.dtype_bytes
    adapters = max((a * (b + 4) + each * (b + 8) for a, each in experts.adapter_sizes), default=0)
    return b * numbers + experts.count * adapters


def _block_bytes(shape: ModelShape, setup: Setup, stream: Stream) -> float:
    """Peak of attention's backward pass in its largest block, less the MLP's activations, which are freed by then."""
    keys, recomputes = stream.longest_keys, stream.longest_keys > KEPT_KEYS
    scores = shape.heads * min(QUERY_BLOCK, keys) * keys
    # Two matrices of scores, float32 where the softmax is recomputed. Keys, values, and their float32 gradients.
    block: float = scores * (2 * 4 if recomputes else 2 * setup.dtype_bytes) + 2 * shape.key_width * keys * (
        setup.dtype_bytes + 4
    )
    # [T, Q]: queries, gradients of the result and of queries; [T, K]: keys, values, and their float32 gradients.
    numbers = 3 * shape.query_width + 2 * shape.key_width + shape.hidden
    block += stream.tokens * (setup.dtype_bytes * numbers + 2 * 4 * shape.key_width)
    mlp = min(map(_mlp_numbers, shape.layers))
    return block + (4 * shape.key_width * keys if recomputes else 0) - setup.dtype_bytes * mlp * stream.tokens


def _flash_backward_bytes(shape: ModelShape, setup: Setup, stream: Stream) -> float:
    """Peak of a variable-length kernel's backward pass, less the MLP's activations, which are freed by then.

    Its workspaces are invisible to torch's fake tensors, so they are read off the kernel's source: float32 gradients of
    queries and sums of the softmax, each segment padded by 128 rows, and where heads share keys, gradients of keys and
    values for each head (Dao, flash-attention 2, csrc/flash_attn/flash_api.cpp, `mha_varlen_bwd`; torch has a copy).
    Deterministic algorithms take a copy of the first for each multiprocessor that segments times heads leave idle,
    which is not counted: one, but for a lone example.
    """
    q, k, tokens = shape.query_width, shape.key_width, stream.tokens
    keys = stream.prompt_tokens + stream.branch_keys
    rounded = shape.heads * 32 * math.ceil(q / shape.heads / 32)
    workspace: float = 4 * (tokens + 128 * stream.segments) * (rounded + shape.heads)
    if q != k:
        workspace += setup.dtype_bytes * 2 * q * keys
    # Gradients: of the residual stream, the result and queries; of gathered keys and values.
    gradients = setup.dtype_bytes * ((shape.hidden + 2 * q) * tokens + 2 * k * keys)
    mlp = min(map(_mlp_numbers, shape.layers))
    return workspace + gradients - setup.dtype_bytes * mlp * tokens


def largest_matrix(shape: ModelShape) -> int:
    """Count the weights of the largest matrix, which is dequantized while it is multiplied."""
    return max(*(linear.numel for linear in shape.linears), *(max(each.numels) for each in shape.experts))


def head_bytes(shape: ModelShape, setup: Setup, stream: Stream) -> int:
    """Count a tile's logits, softmax and gradient, the head's float32 slice, and the hidden states' gradients.

    Where ranks share the base, each scores the hidden states of all ranks against its own rows of the head, at most
    `SHARED_ROWS` at a time, and keeps its own gradients of those before.
    """
    everybodys = stream.scored_tokens * setup.num_shards
    scored = min(everybodys, max(SHARED_ROWS, stream.scored_tokens))
    kept = 4 * shape.hidden * stream.scored_tokens if scored < everybodys else 0
    rows = max(1, min(MAX_ROWS, math.ceil(scored)))
    columns = max(1, min(math.ceil(shape.vocabulary / setup.num_shards), TILE_ELEMENTS[setup.device] // rows))
    tile = rows * columns * (4 + 4 + setup.dtype_bytes)
    slice_copy = 4 * columns * shape.hidden if setup.device == "cpu" and setup.dtype_bytes < 4 else 0
    sums = 4 * 4 * rows * shape.hidden
    gradients = scored * shape.hidden * (4 + 4 + setup.dtype_bytes)
    return int(tile + slice_copy + sums + gradients + kept)
