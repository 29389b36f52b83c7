"""Base weight + delta, rounded to a stored type, and how much of the delta that leaves.

A preference delta is small. A dequantized weight is itself a number of the run's 16-bit type, so adding less than half
a step of that type and rounding gives the same number back: nearest rounding loses most of what was learned where the
delta is far below the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.errors import MergeError
from qpref.policy.delta import LoraDelta

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
"""What a merged model may be stored in, the first to try first."""
BLOCK_ELEMENTS = 2**23
"""Elements of a weight that are worked on at a time, so that memory doesn't grow with a vocabulary."""
LARGEST_FP16 = torch.finfo(torch.float16).max


@dataclass(slots=True)
class Retention:
    """How much of a delta survives rounding: sums of <stored change, delta> and <delta, delta> over layers."""

    survived: float = 0.0
    learned: float = 0.0

    def add(self, weight: Tensor, delta: Tensor, stored: Tensor) -> None:
        change = stored.to(torch.float64) - weight.to(torch.float64)
        self.survived += float((change * delta).sum())
        self.learned += float(delta.to(torch.float64).square().sum())

    @property
    def kept(self) -> float:
        return self.survived / self.learned if self.learned else math.nan


@dataclass(slots=True)
class Survey:
    """What each type would keep of the delta, by the weights alone.

    Attributes:
        largest: of all merged values, in absolute value.
        where: the tensor that holds it.
    """

    retention: dict[str, Retention]
    largest: float = 0.0
    where: str = ""

    @property
    def kept(self) -> dict[str, float]:
        return {name: retention.kept for name, retention in self.retention.items()}

    def add(self, key: str, weight: Tensor, delta: LoraDelta, module: str | None) -> None:
        """Take one more weight into account; `module` is None for one that the adapter leaves alone."""
        for rows in row_blocks(weight):
            exact = weight[rows].float()
            if module is not None:
                change = delta.of(module, rows)
                exact = exact + change
                for name, retention in self.retention.items():
                    retention.add(weight[rows], change, exact.to(STORED[name]))
            largest = float(exact.abs().max())
            if not largest <= self.largest:  # NaN too
                self.largest, self.where = largest, key

    def refuse_overflow(self, dtype: torch.dtype) -> None:
        """Stop where a merged value is too large for a stored type.

        Raises:
            MergeError: names the tensor.
        """
        if not self.largest <= torch.finfo(dtype).max:
            name = str(dtype).removeprefix("torch.")
            raise MergeError(f"{self.where} doesn't fit {name}", "choose --dtype bf16 or float32")


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices of the first dimension, `BLOCK_ELEMENTS` elements each."""
    if not weight.dim():
        yield slice(None)
        return
    size = max(1, BLOCK_ELEMENTS // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], size):
        yield slice(start, start + size)


def rounded(weight: Tensor, delta: LoraDelta, module: str | None, dtype: torch.dtype) -> Tensor:
    """The merged weight, added in float32 and rounded once, to the nearest number of `dtype`."""
    if module is None:
        return weight.to(dtype)
    stored = torch.empty_like(weight, dtype=dtype)
    for rows in row_blocks(weight):
        stored[rows] = (weight[rows].float() + delta.of(module, rows)).to(dtype)
    return stored
