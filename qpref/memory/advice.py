"""Advice for a run that doesn't fit: settings to change, with the memory that each saves."""

from __future__ import annotations

from dataclasses import replace

from qpref.memory.demand import Demand, Workload
from qpref.memory.parts import GIB, count_text
from qpref.memory.shape import ModelShape


def advice(demand: Demand, limit_bytes: int) -> tuple[str, ...]:
    """List changes with what each saves as the only change, largest first, and last the size of a base that fits."""
    before = _least(demand)
    saved = sorted(((before - _least(changed), change) for change, changed in _changes(demand).items()), reverse=True)
    lines = [f"{change} saves {amount / GIB:.2f} GiB" for amount, change in saved if amount / GIB >= 0.005]
    return (
        *lines,
        f"or a base of about {count_text(demand.shape.parameters * limit_bytes / before, digits=2)} parameters",
    )


def _least(demand: Demand) -> int:
    return demand.peak(*demand.smallest()).total


def _changes(demand: Demand) -> dict[str, Demand]:
    """Map each change, as the recipe spells it, to the demand with it."""
    shape, setup, workload = demand.shape, demand.setup, demand.workload
    changes = _setup_changes(demand)
    if demand.fixed_tokens is not None:
        changes['[train] tokens_per_microbatch = "auto"'] = replace(demand, fixed_tokens=None)
    if demand.fixed_layers is not None:
        changes['[train] gradient_checkpointing = "auto"'] = replace(demand, fixed_layers=None)
    rank = max(linear.rank for linear in shape.linears)
    if rank > 1 and not setup.has_start:
        changes[f"[adapter] rank {rank} -> {rank // 2}"] = replace(demand, shape=_with_rank(shape, rank // 2))
    if shape.expert_adapter_parameters and not setup.has_start:
        changes["[adapter] experts = false"] = replace(demand, shape=_with_rank(shape, rank, of_experts=0))
    length = workload.longest_lengths[0] + max(workload.longest_lengths[1])
    halved = _halved(workload, shape.shares_prompts)
    changes[f"[data] max_length {length} -> {length // 2}"] = replace(demand, workload=halved)
    return changes


def _setup_changes(demand: Demand) -> dict[str, Demand]:
    """Map changes of precision and optimizer to the demand with them."""
    setup = demand.setup
    setups = {}
    packs_scales = setup.device == "cuda"  # a CPU holds scales unpacked
    if setup.double_quantization is None:
        setups['[model] quantization = "nf4"'] = replace(setup, double_quantization=packs_scales)
    elif packs_scales and not setup.double_quantization:
        setups["[model] double_quantization = true"] = replace(setup, double_quantization=True)
    if setup.dtype_bytes == 4:
        half = "bf16" if setup.has_flash or setup.device == "cpu" else "fp16"  # both need compute capability 8.0
        setups[f'[model] dtype = "{half}"'] = replace(setup, dtype_bytes=2)
    optimizer = "paged_adamw_8bit" if setup.device == "cuda" else "adamw_8bit"
    if optimizer != setup.optimizer:
        setups[f'[train] optimizer = "{optimizer}"'] = replace(setup, optimizer=optimizer)
    return {change: replace(demand, setup=changed) for change, changed in setups.items()}


def _halved(workload: Workload, shared: bool) -> Workload:
    """Cut the longest example to half its length."""
    prompt, responses = workload.longest_lengths
    return Workload.of([(max(1, prompt // 2), [max(1, length // 2) for length in responses])], 1, shared)


def _with_rank(shape: ModelShape, rank: int, of_experts: int | None = None) -> ModelShape:
    """Lower every adapter to `rank` at most, or those of experts to another."""
    limit = rank if of_experts is None else of_experts
    layers = []
    for layer in shape.layers:
        linears = tuple(replace(linear, rank=min(linear.rank, rank)) for linear in layer.linears)
        experts = layer.experts and layer.experts.with_rank(limit)
        layers.append(replace(layer, linears=linears, experts=experts))
    return replace(shape, layers=tuple(layers))
