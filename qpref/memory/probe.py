"""A probe: one measured forward and backward pass that corrects the prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qpref.memory.activations import largest_matrix
from qpref.memory.costs import peak_memory
from qpref.memory.demand import Demand
from qpref.memory.stream import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Measured memory of one forward and backward pass.

    Attributes:
        stream: the micro-batch.
        recomputed_layers: layers that were recomputed.
        measured_bytes: result of `measure_bytes`.
    """

    stream: Stream
    recomputed_layers: int
    measured_bytes: int


def measure_bytes(run_once: Callable[[], Any], device: torch.device) -> int:
    """Measure the bytes that a forward and backward pass adds to the memory in use, at its peak.

    A CPU keeps no account of its memory, so there it is the bytes that autograd keeps for the backward pass.
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


def corrected(demand: Demand, probe: Probe) -> Demand:
    """Scale the parts that grow with tokens by measured / predicted."""
    predicted = peak_memory(demand.shape, demand.setup, probe.stream, probe.recomputed_layers)
    expected, fixed = predicted.activations, 0
    if demand.setup.device == "cuda":
        expected += max(predicted.live, predicted.head_tile)
        fixed = demand.setup.dtype_bytes * largest_matrix(demand.shape)
    factor = max(1, probe.measured_bytes - fixed) / max(1, expected - fixed)
    return replace(demand, correction=factor)
