"""The rule that a loss works on the device of its inputs, checked without a GPU.

PyTorch lets a mode see each call of its functions. A tensor made without a device is on the CPU wherever the inputs
are, and so is one moved there by name. Constructors such as `torch.Tensor(...)` are no such functions;
another mode sees the operators beneath.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qpref.hooks.types import Loss
from qpref.testing.calls import BrokenRule, Built
from qpref.testing.examples import Draws

MAKERS = (
    "arange asarray as_tensor bartlett_window blackman_window empty empty_permuted empty_strided eye frombuffer "
    "full hamming_window hann_window kaiser_window linspace logspace normal ones rand randint randn "
    "randperm range scalar_tensor sparse_coo_tensor tensor tril_indices triu_indices zeros"
)
MAKING: dict[Any, str] = {getattr(torch, name): f"torch.{name}" for name in MAKERS.split()}
MOVING: dict[Any, str] = {Tensor.cpu: "cpu", Tensor.cuda: "cuda", Tensor.numpy: "numpy", Tensor.__array__: "numpy"}
CONSTRUCTING = frozenset({torch.ops.aten.lift_fresh.default, torch.ops.aten.empty.memory_format})
"""Operators that put a constructor's numbers into a tensor, or make an empty one."""
ON_TENSORS = frozenset({torch.as_tensor, torch.asarray, torch.normal})
"""Functions that keep the device of a tensor that they are given."""


def check_device(record: Loss, options: Any) -> None:
    """Refuse tensors made without a device, and moves to a device by its name."""
    with _Watch() as watch, _ConstructorWatch(watch):
        built = Built(record, options)
        for count in (1, 4):
            built(built.given(Draws().examples(count)))
    if watch.found:
        raise BrokenRule(watch.found[0])
    _refuse_mixed_devices(built)


def _refuse_mixed_devices(built: Built) -> None:
    """Call the loss on the device "meta", which has shapes and no values: a tensor of the CPU doesn't go with it.

    That shows what the loss doesn't make when it is called: constants of its module.
    """
    given = built.laid_out(built.given(Draws().examples(4)))
    try:
        built(replace(given, inputs=_on_meta(given.inputs)))
    except BrokenRule as error:
        # Other errors come from code that looks at values, which says nothing about devices.
        if "is not on the expected device" in str(error.__cause__):
            raise BrokenRule("it computes with a tensor that stays on the CPU when the inputs are on a GPU") from None


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("meta").requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {name: _on_meta(one) for name, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _on_meta(getattr(value, each.name)) for each in fields(value)})
    return value


class _Watch(TorchFunctionMode):
    """Notes calls of a plugin's code that put a tensor on a device of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.depth = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (problem := _problem(func, args, kwargs)) and not _is_of_core(sys._getframe(1)):
            self.found.append(problem)
        self.depth += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.depth -= 1


class _ConstructorWatch(TorchDispatchMode):
    """Notes tensors that the plugin's code makes by no function that `_Watch` sees."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONSTRUCTING and not self._watch.depth and not _is_of_core(sys._getframe(1)):
            self._watch.found.append(
                "makes a tensor by a constructor, such as torch.Tensor(...), torch.FloatTensor(...) or "
                "torch.from_numpy(...): on a GPU the tensor stays on the CPU"
            )
        return func(*args, **(kwargs or {}))


def _problem(func: Callable[..., Any], args: Any, kwargs: Any) -> str | None:
    if func in MOVING:
        return f"calls {MOVING[func]}() on a tensor, which leaves the device of the inputs"
    device = kwargs.get("device")
    if func is Tensor.to:
        device = next((each for each in (*args[1:], device) if isinstance(each, str)), None)
    if isinstance(device, str):
        return f"names the device '{device}': on a GPU the inputs are elsewhere"
    if func in MAKING and device is None and not (func in ON_TENSORS and isinstance(args[0], Tensor)):
        return f"calls {MAKING[func]} without a device: on a GPU the tensor stays on the CPU"
    return None


def _is_of_core(frame: FrameType | None) -> bool:
    """Return whether the nearest code outside of torch is qpref's own."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith("torch."):
            return name.startswith("qpref.")
        frame = frame.f_back
    return False
