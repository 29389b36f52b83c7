"""Round base weight + delta to a stored dtype, and measure how much of the delta survives.

A preference delta is small. A dequantized weight already is a number of the run's 16-bit dtype, so adding less than
half a step of that dtype and rounding gives the same number back: rounding to nearest loses most of what was learned
where the delta is far below the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.errors import MergeError
from qpref.merging.learned import Delta

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
"""Dtypes that a merged model may be stored in, in the order of trying."""
BLOCK_ELEMENTS = 2**23
"""Elements of a weight processed at a time, so that memory doesn't grow with the vocabulary."""
LARGEST_FP16 = torch.finfo(torch.float16).max


@dataclass(slots=True)
class Retention:
    """Share of a delta that survives rounding: sums of <stored change, delta> and <delta, delta> over layers."""

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
    """Statistics of the merged weights: the share of the delta that each dtype retains, and the largest value.

    Attributes:
        retention: by dtype.
        largest: largest absolute value.
        largest_in: name of the tensor that holds it.
    """

    retention: dict[str, Retention]
    largest: float = 0.0
    largest_in: str = ""

    @property
    def kept(self) -> dict[str, float]:
        return {name: retention.kept for name, retention in self.retention.items()}

    def add(self, key: str, weight: Tensor, delta: Delta | None) -> None:
        """Add one weight and its delta, if any."""
        weight = torch.atleast_1d(weight)
        for rows in row_blocks(weight):
            exact = weight[rows].float()
            if delta is not None:
                change = delta(rows)
                exact = exact + change
                for name, retention in self.retention.items():
                    retention.add(weight[rows], change, exact.to(STORED[name]))
            largest = float(exact.abs().max())
            if not largest <= self.largest:  # NaN too
                self.largest, self.largest_in = largest, key

    def refuse_overflow(self, dtype: torch.dtype) -> None:
        """Refuse a stored dtype that is too small for a merged value.

        Raises:
            MergeError: with the tensor's name.
        """
        if not self.largest <= torch.finfo(dtype).max:
            name = str(dtype).removeprefix("torch.")
            raise MergeError(f"{self.largest_in} doesn't fit {name}", "choose --dtype bf16 or float32")


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Yield slices of the first dimension, `BLOCK_ELEMENTS` elements each."""
    size = max(1, BLOCK_ELEMENTS // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], size):
        yield slice(start, start + size)


def rounded(weight: Tensor, delta: Delta | None, dtype: torch.dtype) -> Tensor:
    """Add weight and delta in float32, and round once to the nearest number of `dtype`."""
    if delta is None:
        return weight.to(dtype)
    stored = torch.empty_like(weight, dtype=dtype)
    for rows in row_blocks(weight):
        stored[rows] = (weight[rows].float() + delta(rows)).to(dtype)
    return stored
