"""Finite differences of a loss, with what it detaches held still."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qpref.testing.calls import Built, Given

STEP = 1e-6
"""Of the central differences: float64 leaves them nine digits or so."""


def central_differences(function: Callable[[], Tensor], leaf: Tensor) -> Tensor:
    estimate = torch.empty_like(leaf, requires_grad=False)
    for place, value in enumerate(leaf.tolist()):
        ends = []
        for end in (value + STEP, value - STEP):
            _put(leaf, place, end)
            ends.append(function())
        _put(leaf, place, value)
        estimate[place] = (ends[0] - ends[1]) / (2 * STEP)
    return estimate


def _put(leaf: Tensor, place: int, value: float) -> None:
    with torch.no_grad():
        leaf[place] = value


class Replayed:
    """The weighted sum of a loss's values, with what it detaches held as it was when this was made."""

    def __init__(self, built: Built, given: Given, weights: Tensor, detaches: bool) -> None:
        self._built, self._given, self._weights = built, given, weights
        self._detached: list[Any] | None = None
        if detaches:
            with _Detached() as recorded:
                self()
            self._detached = recorded.values

    def __call__(self) -> Tensor:
        if self._detached is None:
            return (self._built(self._given).losses * self._weights).sum().detach()
        with _Detached(self._detached):
            losses = self._built(self._given).losses
        return (losses * self._weights).sum().detach()


class _Detached(TorchFunctionMode):
    """Records what is computed without a gradient, or gives back what was recorded, in the same order."""

    WAYS = frozenset((Tensor.detach, Tensor.item, Tensor.tolist, Tensor.data.__get__))  # type: ignore[attr-defined]

    def __init__(self, recorded: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.values: list[Any] = []
        self._recorded = None if recorded is None else iter(recorded)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() and func not in self.WAYS:
            return value
        if self._recorded is not None:
            value = next(self._recorded, value)
        # A copy: what was recorded may be a view of a tensor that moves on.
        self.values.append(value.detach().clone() if isinstance(value, Tensor) else value)
        return value.clone() if isinstance(value, Tensor) else value
