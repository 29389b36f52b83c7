"""What a step takes in memory, by arithmetic on a model's shape: bytes, by part.

Bytes are what the code of this package keeps, tensor by tensor; the tests count the same on real models. A symbol in a
comment or docstring is of one token and layer: H hidden width, Q and K width of all queries and of all keys, I width
inside the MLP, b bytes of a number in the recipe's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from qpref.attention.segments import KEPT_KEYS, QUERY_BLOCK, kept_scores
from qpref.memory.shape import Layer, Linear, ModelShape
from qpref.recipe.sections import Recipe

GIB = 2**30
NF4_BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one under double quantization (Dettmers et al. 2023, section 3)."""
CODE_BYTES, SCALE_CODE_BYTES = 16 * 4, 256 * 4 + 4
"""Each quantized matrix's own table of 16 numbers; of 256, and an offset, for its scales."""
PAGED_FROM, EIGHT_BIT_FROM, STATE_BLOCK = 100_000, 4096, 256
"""bitsandbytes: weights from which a state is paged, or 8 bits wide; numbers of an 8-bit state that share a scale."""
CONTEXT_BYTES, FRAGMENTATION = int(0.6 * GIB), 0.03
"""Assumed: what the device's libraries hold, and the share of memory that an allocator loses between its blocks."""
TILE_ELEMENTS, TILE_ROWS = 2**21, 1024
"""As in `logprobs`, which cannot be imported without torch; a test holds the two together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What the layout of a micro-batch is to costs; sums over its groups, P tokens of prompt and R of a response.

    Attributes:
        tokens: fed: P + sum(R - 1), or the sum of P + R - 1 where prompts aren't shared.
        scored: sum(R).
        prompts: fed tokens that are prompts.
        branch_keys: keys that branches attend to: sum(P + R - 1).
        masked: query-key pairs of which a mask is made: sum((R - 1) (P + R - 1)).
        attended: query-key pairs that attention computes: P^2 / 2 + sum(R P + R^2 / 2).
        kept_scores: those whose softmax is kept where attention runs in blocks; fewer where a window hides some.
        squares: sum((P + R - 1)^2), the scores of whole rows.
        prompt_squares: sum(P^2), of which masks are made in layers whose window is shorter than a prompt.
        longest_prompt: tokens.
        longest_keys: keys that one token attends to, at most.
    """

    tokens: float
    scored: float
    prompts: float
    branch_keys: float
    masked: float
    attended: float
    kept_scores: float
    squares: float
    prompt_squares: float
    longest_prompt: int
    longest_keys: int

    @classmethod
    def of(cls, groups: Iterable[tuple[int, Sequence[int]]], shared: bool = True) -> Stream:
        """The stream of some (prompt, responses), lengths in tokens."""
        groups = list(groups)
        branches = [(prompt, response) for prompt, responses in groups for response in responses]
        prompts = [prompt for prompt, _ in (groups if shared else branches)]
        return cls(
            tokens=sum(prompts) + sum(r - 1 for _, r in branches),
            scored=sum(r for _, r in branches),
            prompts=sum(prompts),
            branch_keys=sum(p + r - 1 for p, r in branches if r > 1),
            masked=sum((r - 1) * (p + r - 1) for p, r in branches),
            attended=sum(p**2 / 2 for p in prompts) + sum(r * p + r**2 / 2 for p, r in branches),
            kept_scores=sum(kept_scores(0, p) for p in prompts) + sum(kept_scores(p, r - 1) for p, r in branches),
            squares=sum((p + r - 1) ** 2 for p, r in branches),
            prompt_squares=sum(p**2 for p in prompts),
            longest_prompt=max(prompts, default=0),
            longest_keys=max([*prompts, *(p + r - 1 for p, r in branches)], default=0),
        )

    def of_tokens(self, tokens: float) -> Stream:
        """A stream of so many tokens that is made of the same groups."""
        factor = tokens / self.tokens
        sums = [part.name for part in fields(self) if not part.name.startswith("longest")]
        return replace(self, **{name: getattr(self, name) * factor for name in sums})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What costs depend on beside the shape and the data.

    Attributes:
        width: bytes of a number that the base computes in.
        double_quantization: None where the base isn't quantized.
        has_start: a frozen copy of a start adapter is kept as the reference.
        in_blocks: attention runs in blocks (see `blocks`), on this machine's CPU.
    """

    device: Literal["cpu", "cuda"]
    width: int = 2
    double_quantization: bool | None = True
    dropout: float = 0.0
    optimizer: str = "adamw"
    has_start: bool = False
    in_blocks: bool = False

    @classmethod
    def of(cls, recipe: Recipe, device: Literal["cpu", "cuda"], shape: ModelShape) -> Setup:
        """A recipe's, on a device. A base that is 4-bit already stays as it is."""
        from qpref.attention.blocks import has_bf16_units

        model = recipe.model
        asked = model.double_quantization if model.quantization == "nf4" else None
        return cls(
            device=device,
            width=4 if model.dtype == "float32" else 2,
            double_quantization=_packs_scales(asked if shape.quantized is None else shape.quantized, device),
            dropout=recipe.adapter.dropout,
            optimizer=recipe.train.optimizer,
            has_start=recipe.adapter.start is not None,
            in_blocks=device == "cpu" and model.dtype == "bf16" and has_bf16_units(),
        )


def _packs_scales(asked: bool | None, device: str) -> bool | None:
    """A CPU holds them unpacked (see `load`)."""
    return asked if device == "cuda" or asked is None else False


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the device at a step's peak, by part.

    Attributes:
        weights: the frozen base.
        adapters: with their gradients.
        optimizer: what of its state stays on the device.
        activations: what autograd keeps for the backward pass.
        live: while the backward pass is in the costliest layer, beyond that.
        head_tile: while responses are scored; over before the backward pass is in a layer, so it may count instead.
        reserve: libraries and fragmentation.
    """

    weights: int
    adapters: int
    optimizer: int
    activations: int
    live: int
    head_tile: int

    @property
    def reserve(self) -> int:
        return CONTEXT_BYTES + int(FRAGMENTATION * self._used)

    @property
    def _used(self) -> int:
        fixed = self.weights + self.adapters + self.optimizer
        return fixed + self.activations + max(self.live, self.head_tile)

    @property
    def total(self) -> int:
        return self._used + self.reserve


def memory(shape: ModelShape, setup: Setup, stream: Stream, checkpointed: int) -> Memory:
    """Bytes at the peak of a step whose largest micro-batch is `stream`, with `checkpointed` layers recomputed."""
    return Memory(
        weights=weight_bytes(shape, setup),
        adapters=adapter_bytes(shape, setup),
        optimizer=optimizer_bytes(shape, setup.optimizer),
        activations=activation_bytes(shape, setup, stream, checkpointed),
        live=live_bytes(shape, setup, stream, checkpointed),
        head_tile=head_bytes(shape, setup, stream),
    )


def weight_bytes(shape: ModelShape, setup: Setup) -> int:
    """The base as bitsandbytes stores it; embeddings, head, norms and biases stay in the recipe's dtype."""
    return sum(_matrix_bytes(linear, setup) for linear in shape.linears) + setup.width * (shape.ends + shape.rest)


def _matrix_bytes(linear: Linear, setup: Setup) -> int:
    if setup.double_quantization is None:
        return linear.numel * setup.width
    blocks = math.ceil(linear.numel / NF4_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / SCALE_BLOCK) + SCALE_CODE_BYTES
    return math.ceil(linear.numel / 2) + CODE_BYTES + (scales if setup.double_quantization else 4 * blocks)


def adapter_bytes(shape: ModelShape, setup: Setup) -> int:
    """float32 weights and gradients."""
    return sum(shape.adapter_sizes) * (12 if setup.has_start else 8)


def optimizer_bytes(shape: ModelShape, optimizer: str) -> int:
    """What of its state cannot leave the device: of the paged ones, that of small matrices alone."""
    paged = optimizer.startswith("paged")
    total = 0
    for size in shape.adapter_sizes:
        if optimizer.endswith("8bit") and size >= EIGHT_BIT_FROM:
            scales = 2 * 4 * math.ceil(size / STATE_BLOCK)
            total += scales + (0 if paged and size >= PAGED_FROM else 2 * size)
        elif not (paged and size >= PAGED_FROM):
            total += 8 * size
    return total


def activation_bytes(shape: ModelShape, setup: Setup, stream: Stream, checkpointed: int) -> int:
    """What autograd keeps of one forward pass whose first `checkpointed` layers are recomputed.

    The first layer counts as the others do; where nothing before its MLP has an adapter, it keeps less.
    """
    kept = shape.layers[checkpointed:]
    total = sum(_layer_bytes(layer, shape, setup, stream) for layer in kept)
    total += checkpointed * setup.width * shape.hidden * stream.tokens
    norm = _norm_bytes((shape.hidden, 1)) * stream.tokens
    total += norm  # the last one
    if checkpointed == 0:
        total -= norm  # the embeddings have no gradient, so the first one needs nothing
    if kept:
        total += setup.width * shape.rotary * stream.tokens
    return int(total + stream.scored * _head_row_bytes(shape, setup))


def _head_row_bytes(shape: ModelShape, setup: Setup) -> int:
    """Of a scored position: its slope and its place; for a head with an adapter, what its gradients need too."""
    own = setup.width * shape.hidden + 8
    return own + (shape.head_rank and (setup.width + 4) * shape.hidden + 4 * (3 * shape.head_rank + 1))


def _layer_bytes(layer: Layer, shape: ModelShape, setup: Setup, stream: Stream) -> float:
    b, linears = setup.width, layer.linears
    adapted = [linear for linear in linears if linear.rank]
    numbers = sum(linear.rank for linear in adapted)  # the low-rank products
    for part in (True, False):
        readers = {linear.inputs for linear in adapted if linear.in_attention == part and linear.reads_residual}
        numbers += max(readers, default=0)  # one input for all that read it
    writers = [linear for linear in adapted if not linear.reads_residual]
    # Flash attention's result is the output projection's input itself.
    numbers += sum(linear.inputs for linear in writers if not (linear.in_attention and _is_flash(shape, setup)))
    numbers += _mlp_numbers([linear for linear in linears if not linear.in_attention])
    total = b * numbers * stream.tokens + _attention_bytes(shape, setup, stream)
    total += sum(_norm_bytes(norm) for norm in layer.norms) * stream.tokens
    if setup.dropout:
        total += sum(linear.inputs for linear in adapted) * stream.tokens
    return total


def _norm_bytes(norm: tuple[int, int]) -> int:
    """A norm's input in float32, and one over its root mean square."""
    return 4 * sum(norm)


def _mlp_numbers(linears: Sequence[Linear]) -> int:
    """What the activation function and its product with the gate keep: gate, activated gate and up, I each."""
    wide = sum(linear.outputs for linear in linears if linear.reads_residual)
    inner = max((linear.inputs for linear in linears if not linear.reads_residual), default=0)
    return wide + inner if wide > inner else wide


def _is_flash(shape: ModelShape, setup: Setup) -> bool:
    """Whether all segments are one call of a variable-length kernel."""
    return setup.device == "cuda" and setup.width == 2 and shape.shares_prompts


def _attention_bytes(shape: ModelShape, setup: Setup, stream: Stream) -> float:
    q, k, tokens = shape.query, shape.key, stream.tokens
    # Queries, repeated keys and values; each score under tanh, as float32 weight, as weight of b bytes.
    if shape.capped:
        scores = shape.heads * stream.squares * (2 * setup.width + (4 if setup.width < 4 else 0))
        return 3 * setup.width * q * tokens + scores
    log_sums = 4 * shape.heads * tokens
    if not shape.shares_prompts:
        return setup.width * (4 * q * tokens + stream.squares) + log_sums
    if setup.in_blocks:  # queries, keys, values, the softmax
        return setup.width * ((q + 2 * k) * tokens + shape.heads * stream.kept_scores)
    if _is_flash(shape, setup):  # queries, gathered keys and values, the result
        return setup.width * (2 * q * tokens + 2 * k * (stream.prompts + stream.branch_keys)) + log_sums
    # Segment by segment: queries, repeated keys and values, the result; a copy of keys and values for each branch.
    slides = shape.window is not None and stream.longest_prompt > shape.window
    masks = stream.masked + (stream.prompt_squares if slides else 0)
    return _stretch_width(setup) * (4 * q * tokens + 2 * q * stream.branch_keys + masks) + log_sums


def _stretch_width(setup: Setup) -> int:
    """Segment by segment a CPU attends in float32."""
    return 4 if setup.device == "cpu" else setup.width


def live_bytes(shape: ModelShape, setup: Setup, stream: Stream, checkpointed: int) -> int:
    """Gradients inside the widest layer, less what the backward pass has freed on its way there.

    Layers that aren't recomputed are the last ones, so their activations are gone when the first recomputed layer has
    its own again: that one counts only where all layers are recomputed.
    """
    inner = max(linear.inputs for linear in shape.linears) * stream.tokens
    # Inside the MLP either an input's gradient beside a dense weight, or both factors' gradients beside their
    # product's, whose own input is gone; under dropout four numbers for one of the input.
    numbers = max(4 * inner if setup.dropout else 2 * inner, inner + dense_numbers(shape))
    total: float = setup.width * (numbers + shape.hidden * stream.tokens)
    if setup.in_blocks and shape.shares_prompts and not shape.capped:
        total = max(total, _block_bytes(shape, setup, stream))
    if checkpointed == shape.num_layers:
        total += max(_layer_bytes(layer, shape, setup, stream) for layer in shape.layers)
    freed = _norm_bytes((shape.hidden, 1)) * stream.tokens + setup.width * shape.hidden * stream.scored
    return max(0, int(total - freed))


def _block_bytes(shape: ModelShape, setup: Setup, stream: Stream) -> float:
    """While attention's backward pass is in the widest block, beyond what its layer keeps from its MLP on."""
    keys, again = stream.longest_keys, stream.longest_keys > KEPT_KEYS
    scores = shape.heads * min(QUERY_BLOCK, keys) * keys
    # Two matrices of scores: float32 where the softmax is computed again. Keys and values, their gradients in float32.
    block: float = scores * (2 * 4 if again else 2 * setup.width) + 2 * shape.key * keys * (setup.width + 4)
    # [T, Q]: queries, gradients of the result and of queries; [T, K]: keys and values, their gradients in float32.
    numbers = 3 * shape.query + 2 * shape.key + shape.hidden
    block += stream.tokens * (setup.width * numbers + 2 * 4 * shape.key)
    mlp = min(_mlp_numbers([each for each in layer.linears if not each.in_attention]) for layer in shape.layers)
    return block + (4 * shape.key * keys if again else 0) - setup.width * mlp * stream.tokens


def dense_numbers(shape: ModelShape) -> int:
    """Weights of the largest linear layer, which is dense while it takes part in a product."""
    return max(linear.numel for linear in shape.linears)


def head_bytes(shape: ModelShape, setup: Setup, stream: Stream) -> int:
    """A tile of logits, its softmax and its slope; the head's slice; the rows' slopes, in float32 and once more."""
    rows = max(1, min(TILE_ROWS, math.ceil(stream.scored)))
    columns = max(1, min(shape.vocabulary, TILE_ELEMENTS // rows))
    tile = rows * columns * (4 + 4 + setup.width)
    slice_copy = 4 * columns * shape.hidden if setup.device == "cpu" and setup.width < 4 else 0
    sums = 4 * 4 * rows * shape.hidden
    slopes = stream.scored * shape.hidden * (4 + 4 + setup.width)
    return int(tile + slice_copy + sums + slopes)
