"""A base that stays in memory for several runs of one process, one after the other.

Adapters, fused layers, hooks and attention paths change a model's modules; nothing writes to its frozen tensors. So
each run gets a copy of the modules over the same tensors, and the modules that are copied stay as they were loaded.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qpref.policy.source import BaseFolder
from qpref.recipe.sections import ModelSection


@dataclass(slots=True)
class KeptBase:
    """The base loaded last.

    Attributes:
        loaded_as: folder, weights and settings that it was loaded with.
        model: without adapters, ready to be wrapped; None before the first one.
    """

    loaded_as: object = None
    model: Any = None

    def copied(self, section: ModelSection, base: BaseFolder, device: torch.device, load: Callable[[], Any]) -> Any:
        """Return a copy of the base for one run, loaded first where another one is kept, which is freed before.

        Args:
            load: loads the base with these settings on this device.
        """
        wanted = str(base.path), base.weights, section.quantization, section.double_quantization, section.dtype, device
        if self.loaded_as != wanted:
            self.free()
            self.model, self.loaded_as = load(), wanted
        return over_same_tensors(self.model)

    def num_bytes_on(self, device: torch.device) -> int:
        """Count the bytes of the tensors that are kept on a device."""
        tensors = {} if self.model is None else _tensors(self.model)
        return sum(tensor.nbytes for tensor in tensors.values() if tensor.device.type == device.type)

    def free(self) -> None:
        """Give the base's memory back."""
        self.model = self.loaded_as = None
        free_unreachable()


def over_same_tensors(model: Any) -> Any:
    """Copy a model's modules, but share its parameters, its buffers and its 4-bit weights' constants."""
    shared: dict[int, Any] = dict(_tensors(model))
    for module in model.modules():
        constants = getattr(module, "quant_state", None)
        if constants is not None:
            shared[id(constants)] = constants
    return copy.deepcopy(model, shared)


def free_unreachable() -> None:
    """Free the memory of what nothing refers to any more; modules and their hooks refer to each other."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _tensors(model: Any) -> dict[int, Any]:
    """List a model's parameters and buffers, and the constants of its 4-bit weights, each once, by id."""
    found = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for parameter in list(found.values()):
        constants = getattr(parameter, "quant_state", None)
        parts = () if constants is None else _constants(constants)
        found |= {id(part): part for part in parts}
    return found


def _constants(quant_state: Any) -> list[torch.Tensor]:
    """List the tensors of a 4-bit weight's quantization: scales, code, and the second quantization's."""
    inner = getattr(quant_state, "state2", None)
    own = [value for value in vars(quant_state).values() if isinstance(value, torch.Tensor)]
    return own + ([] if inner is None else _constants(inner))
