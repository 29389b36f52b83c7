"""Fits a run into a device's memory before any is spent: how many tokens at once, and how many layers recomputed.

The recipe's own numbers stand; what it leaves `auto` is chosen here, from `qpref.memory.costs`. A probe of one real
forward and backward pass may correct the figures.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpref.errors import RecipeError
from qpref.memory.costs import GIB, Memory, Setup, Stream, dense_numbers, memory
from qpref.memory.shape import Layer, ModelShape
from qpref.policy.load import recomputed_layers
from qpref.recipe.sections import Recipe

USEFUL_TOKENS = {"cuda": 4096, "cpu": 1024}
"""From here on a larger micro-batch is hardly faster than a smaller one, so memory goes to keeping activations."""
MOST_TOKENS = {"cuda": 16384, "cpu": 2048}
ROUND_TOKENS = 64
UNITS = {"MIB": 2**20, "GIB": 2**30, "MB": 10**6, "GB": 10**9}
CPU_SHARE = 0.5
"""Of a CPU's available memory: the rest is the system's, and other programs'."""

Lengths = tuple[int, Sequence[int]]
"""Tokens of a prompt, and of each of its responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The data as memory sees them.

    Attributes:
        lengths: of the longest example.
        longest: the stream of that example alone.
        typical: a stream of all examples.
        step_tokens: what an optimizer step feeds, on average.
    """

    lengths: Lengths
    longest: Stream
    typical: Stream
    step_tokens: int

    @classmethod
    def of(cls, examples: Iterable[Lengths], batch_size: int, shared: bool = True) -> Workload:
        """The workload of examples by their lengths, at least one."""
        examples = list(examples)
        lengths = max(examples, key=lambda example: Stream.of([example], shared).tokens)
        typical = Stream.of(examples, shared)
        return cls(
            lengths=lengths,
            longest=Stream.of([lengths], shared),
            typical=typical,
            step_tokens=math.ceil(typical.tokens / len(examples) * batch_size),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a choice is made under.

    Attributes:
        tokens: the recipe's tokens per micro-batch; None for `auto`.
        checkpointed: how many layers the recipe has recomputed; None for `auto`.
        correction: factor on all that grows with tokens, from a probe.
    """

    setup: Setup
    tokens: int | None = None
    checkpointed: int | None = None
    correction: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe, setup: Setup, shape: ModelShape) -> Settings:
        tokens, layers = recipe.train.tokens_per_microbatch, recipe.train.gradient_checkpointing
        return cls(
            setup=setup,
            tokens=None if isinstance(tokens, str) else tokens,
            checkpointed=None if isinstance(layers, str) else recomputed_layers(layers, shape.num_layers),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What was chosen, and what it needs.

    Attributes:
        memory: predicted, at the peak.
        fits: it is within the limit.
        advice: where it isn't: what to change, what helps most first.
    """

    tokens_per_microbatch: int
    recomputed_layers: int
    memory: Memory
    fits: bool
    advice: tuple[str, ...] = ()


def choose(shape: ModelShape, settings: Settings, limit_bytes: int, data: Workload) -> Fit:
    """As few recomputed layers as leave room for a useful micro-batch, and then the largest micro-batch.

    Where recomputing all that can be doesn't leave that room: the largest micro-batch that holds the longest example.
    """
    device, longest = settings.setup.device, math.ceil(data.longest.tokens)
    useful = settings.tokens or max(longest, min(USEFUL_TOKENS[device], data.step_tokens))
    most = settings.tokens or max(longest, min(MOST_TOKENS[device], data.step_tokens))

    def fits(tokens: int, layers: int) -> bool:
        return needed(shape, settings, data, tokens, layers).total <= limit_bytes

    def fit(least: int, layers: int) -> Fit:
        tokens = _largest(least, most, lambda tokens: fits(tokens, layers))
        return Fit(
            tokens_per_microbatch=tokens,
            recomputed_layers=layers,
            memory=needed(shape, settings, data, tokens, layers),
            fits=True,
        )

    for layers in _layer_counts(shape, settings):
        if fits(useful, layers):
            return fit(useful, layers)
    tokens, layers = _smallest(shape, settings, data)
    if fits(tokens, layers):
        return fit(tokens, layers)
    return Fit(
        tokens_per_microbatch=tokens,
        recomputed_layers=layers,
        memory=needed(shape, settings, data, tokens, layers),
        fits=False,
        advice=_advice(shape, settings, limit_bytes, data),
    )


def needed(shape: ModelShape, settings: Settings, data: Workload, tokens: int, layers: int) -> Memory:
    """Memory for micro-batches of so many tokens; an example that is longer has one of its own."""
    streams = [data.typical.of_tokens(tokens), data.longest]
    parts = [memory(shape, settings.setup, stream, layers) for stream in streams]
    return _corrected(max(parts, key=lambda part: part.total), settings.correction)


def _corrected(part: Memory, factor: float) -> Memory:
    return replace(
        part,
        activations=int(part.activations * factor),
        live=int(part.live * factor),
        head_tile=int(part.head_tile * factor),
    )


def _layer_counts(shape: ModelShape, settings: Settings) -> Sequence[int]:
    return range(shape.num_layers + 1) if settings.checkpointed is None else [settings.checkpointed]


def _smallest(shape: ModelShape, settings: Settings, data: Workload) -> tuple[int, int]:
    """The micro-batch and the recomputed layers that need least. The last layer's activations are needed at once
    anyway, so to recompute it too saves nothing."""
    tokens = settings.tokens or math.ceil(data.longest.tokens)
    counts = _layer_counts(shape, settings)
    return tokens, min(counts, key=lambda layers: needed(shape, settings, data, tokens, layers).total)


def _largest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits, from `least`, which does, to `most`; rounded down where that leaves it in range."""
    low, high = least, max(least, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    if low >= most:
        return low
    return max(least, low // ROUND_TOKENS * ROUND_TOKENS)


def _advice(shape: ModelShape, settings: Settings, limit: int, data: Workload) -> tuple[str, ...]:
    """What to change, each with what it saves where it is the only change, and last how small a base would fit."""

    def least(shape: ModelShape = shape, settings: Settings = settings, data: Workload = data) -> int:
        return needed(shape, settings, data, *_smallest(shape, settings, data)).total

    before, setup = least(), settings.setup
    changes = {}
    if settings.tokens is not None:
        changes['[train] tokens_per_microbatch = "auto"'] = least(settings=replace(settings, tokens=None))
    if settings.checkpointed is not None:
        changes['[train] gradient_checkpointing = "auto"'] = least(settings=replace(settings, checkpointed=None))
    packs = setup.device == "cuda"  # a CPU holds scales unpacked
    if setup.double_quantization is None:
        quantized = replace(settings, setup=replace(setup, double_quantization=packs))
        changes['[model] quantization = "nf4"'] = least(settings=quantized)
    elif packs and not setup.double_quantization:
        doubled = replace(settings, setup=replace(setup, double_quantization=True))
        changes["[model] double_quantization = true"] = least(settings=doubled)
    if setup.width == 4:
        changes['[model] dtype = "bf16"'] = least(settings=replace(settings, setup=replace(setup, width=2)))
    optimizer = "paged_adamw_8bit" if setup.device == "cuda" else "adamw_8bit"
    if optimizer != setup.optimizer:
        other = replace(settings, setup=replace(setup, optimizer=optimizer))
        changes[f'[train] optimizer = "{optimizer}"'] = least(settings=other)
    rank = max(linear.rank for linear in shape.linears)
    if rank > 1 and not setup.has_start:
        changes[f"[adapter] rank {rank} -> {rank // 2}"] = least(shape=_with_rank(shape, rank // 2))
    length = data.lengths[0] + max(data.lengths[1])
    changes[f"[data] max_length {length} -> {length // 2}"] = least(data=_halved(data, shape.shares_prompts))
    saved = sorted(((before - after, change) for change, after in changes.items()), reverse=True)
    lines = [f"{change} saves {amount / GIB:.2f} GiB" for amount, change in saved if amount / GIB >= 0.005]
    return (*lines, f"or a base of about {shape.parameters * limit / before / 1e9:.1f} billion parameters")


def _halved(data: Workload, shared: bool) -> Workload:
    prompt, responses = data.lengths
    return Workload.of([(max(1, prompt // 2), [max(1, length // 2) for length in responses])], 1, shared)


def _with_rank(shape: ModelShape, rank: int) -> ModelShape:
    layers = [
        Layer(tuple(replace(linear, rank=min(linear.rank, rank)) for linear in layer.linears), layer.norms)
        for layer in shape.layers
    ]
    return replace(shape, layers=tuple(layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one forward and backward pass took.

    Attributes:
        stream: what was computed.
        checkpointed: how many layers were recomputed.
        measured: bytes, from `measure`.
    """

    stream: Stream
    checkpointed: int
    measured: int


def measure(run_once: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a forward and backward pass takes at its peak, beyond what is there before.

    On a CPU, which keeps no account of its memory: those that autograd keeps for the backward pass.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run_once()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        owner = tensor if tensor._base is None else tensor._base
        if not isinstance(owner, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        run_once()
    return sum(kept.values())


def corrected(shape: ModelShape, settings: Settings, limit_bytes: int, data: Workload, probe: Probe) -> Fit:
    """The choice once a probe has said how far off the prediction is."""
    predicted = memory(shape, settings.setup, probe.stream, probe.checkpointed)
    expected, fixed = predicted.activations, 0
    if settings.setup.device == "cuda":
        expected += max(predicted.live, predicted.head_tile)
        fixed = settings.setup.width * dense_numbers(shape)
    factor = max(1, probe.measured - fixed) / max(1, expected - fixed)
    return choose(shape, replace(settings, correction=factor), limit_bytes, data)


def memory_limit(recipe: Recipe, device: torch.device) -> int:
    """Bytes that a run may fill: what the recipe says, else what the device has free now; of a CPU's memory half.

    Raises:
        RecipeError: the recipe's figure cannot be read.
    """
    if recipe.model.memory is not None:
        return parse_bytes(recipe.model.memory)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(CPU_SHARE * _available_bytes())


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parse_bytes(text: str, origin: str = "[model] memory") -> int:
    """`24GiB`, `24 GB`, `512MiB`; a bare number is of GiB.

    Raises:
        RecipeError: it is none of these, or nothing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MiB|GiB|MB|GB)?", text.strip(), re.IGNORECASE)
    amount = 0 if match is None else int(float(match[1]) * UNITS[(match[2] or "GiB").upper()])
    if not amount:
        raise RecipeError(f"{origin}: expected a size such as 24GiB or 24GB, got '{text}'")
    return amount
