"""The sum of a step's gradients over the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from qpref.distributed.world import World


def sum_gradients(world: World, parameters: Sequence[Parameter], nonfinite: Tensor) -> Tensor:
    """Sum the gradients of all processes, in place and in one message.

    A parameter that has no gradient in any process has none afterwards, so the optimizer passes it over as it does in a
    run of one process.

    Args:
        parameters: float32, in the same order in every process.
        nonfinite: [losses] bool of this process.

    Returns:
        [losses] bool, true where it is in any process.
    """
    if world.size == 1:
        return nonfinite
    are_missing = [parameter.grad is None for parameter in parameters]
    gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
    counts = torch.tensor([not missing for missing in are_missing], dtype=torch.float32).to(nonfinite.device)
    faults = nonfinite.float()
    world.add([*gradients, counts, faults], "the gradients")
    if any(are_missing):
        are_missing = [count == 0 for count in counts.tolist()]
    for parameter, gradient, is_missing in zip(parameters, gradients, are_missing, strict=True):
        parameter.grad = None if is_missing else gradient
    return faults > 0
