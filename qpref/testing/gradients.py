"""Finite differences of a loss, with its detached values held fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qpref.testing.calls import Built, LossInputs

STEP = 1e-6
"""Step of the central differences; in float64 they keep about nine digits."""


def central_differences(function: Callable[[], Tensor], leaf: Tensor) -> Tensor:
    estimate = torch.empty_like(leaf, requires_grad=False)
    for index, value in enumerate(leaf.tolist()):
        ends = []
        for end in (value + STEP, value - STEP):
            _set(leaf, index, end)
            ends.append(function())
        _set(leaf, index, value)
        estimate[index] = (ends[0] - ends[1]) / (2 * STEP)
    return estimate


def _set(leaf: Tensor, index: int, value: float) -> None:
    with torch.no_grad():
        leaf[index] = value


class FrozenDetached:
    """The weighted sum of a loss, with its detached values frozen at construction."""

    def __init__(self, built: Built, given: LossInputs, weights: Tensor, detaches: bool) -> None:
        self._built, self._given, self._weights = built, given, weights
        self._detached: list[Any] | None = None
        if detaches:
            with _DetachedValues() as recorded:
                self()
            self._detached = recorded.values

    def __call__(self) -> Tensor:
        if self._detached is None:
            return (self._built(self._given).losses * self._weights).sum().detach()
        with _DetachedValues(self._detached):
            losses = self._built(self._given).losses
        return (losses * self._weights).sum().detach()


class _DetachedValues(TorchFunctionMode):
    """Record the values computed without gradient, or replay the recorded ones in the same order."""

    DETACHING = frozenset((Tensor.detach, Tensor.item, Tensor.tolist, Tensor.data.__get__))  # type: ignore[attr-defined]

    def __init__(self, recorded: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.values: list[Any] = []
        self._recorded = None if recorded is None else iter(recorded)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() and func not in self.DETACHING:
            return value
        if self._recorded is not None:
            value = next(self._recorded, value)
        # Copied: the value may be a view of a tensor that the finite differences modify.
        self.values.append(value.detach().clone() if isinstance(value, Tensor) else value)
        return value.clone() if isinstance(value, Tensor) else value
