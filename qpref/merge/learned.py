"""What a run has learned, for each tensor of its base's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from qpref.merge.experts import FusedExperts
from qpref.policy.delta import LoraDelta

Delta = Callable[[slice], Tensor]
"""Computes a range of rows of a tensor's delta, in float32."""


@dataclass(frozen=True, slots=True)
class LearnedTensors:
    """Deltas of the tensors of a base's files.

    Attributes:
        delta: of the model's weights.
        adapted: tensor name in the files -> name in `delta` of the weight that it is, or is a part of.
        experts: take the fused weights apart.
    """

    delta: LoraDelta
    adapted: Mapping[str, str]
    experts: FusedExperts

    def of(self, key: str) -> Delta | None:
        """Return the delta of a tensor of the files; None where it has none."""
        name = self.adapted.get(key)
        if name is None:
            return None
        if name in self.delta.modules:
            return lambda rows: self.delta.of(name, rows)
        return lambda rows: self.experts.learned(key, self.delta.of)[rows]
