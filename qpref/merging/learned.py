"""Learned change of each tensor of a base's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.merging.base import TrainedBase
from qpref.policy.delta import LoraDelta

Delta = Callable[[slice], Tensor]
"""Computes a range of rows of a tensor's delta, in float32."""


@dataclass(frozen=True, slots=True)
class LearnedTensors:
    """Deltas of the tensors of a base's files.

    Attributes:
        delta: of the model's weights.
        adapted: tensor name in the files -> names in `delta` of the weights that it is, is a part of, or has as parts.
    """

    delta: LoraDelta
    base: TrainedBase
    adapted: Mapping[str, tuple[str, ...]]

    @classmethod
    def find(cls, delta: LoraDelta, base: TrainedBase) -> LearnedTensors:
        """Find the adapted tensors."""
        found = {key: tuple(name for name in base.weights_of(key) if name in delta.matrices) for key in base.tensors}
        return cls(delta, base, {key: names for key, names in found.items() if names})

    def of_tensor(self, key: str) -> Delta | None:
        """Return the delta of a tensor of the files; None where it has none."""
        if key not in self.adapted:
            return None
        if key in self.base.conversions.groups:
            return lambda rows: self.base.conversions.learned(key, self._of_weight)[rows]
        (name,) = self.adapted[key]
        return lambda rows: self.delta.of(name, rows)

    def _of_weight(self, name: str) -> Tensor:
        own = self.base.weight_name(name)
        if own in self.delta.matrices:
            return self.delta.of(own)
        return torch.zeros(self.base.conversions.model.get_parameter(name).shape)
