"""A CUDA device without a GPU: fake tensors on "cuda:0", with meters for memory, launches and synchronizations.

Import this before torch. It changes torch for good, so it wants a process of its own.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import numpy
import torch
import transformers
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import moe

from tests.fake_cuda import GUARD, kernels, names

GIB = 2**30
KERNELS = torch.library.Library("aten", "IMPL")
ALLOCATION = 512
"""Bytes that torch's allocator rounds up to."""

NO_KERNEL = frozenset((
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "contiguous", "detach",
    "detach_", "device", "dim", "empty", "empty_like", "empty_permuted", "empty_strided", "expand", "is_contiguous",
    "is_pinned", "is_same_size", "layout", "lift_fresh", "narrow", "new_empty", "new_empty_strided", "numel",
    "permute", "prim", "reshape", "resize_", "select", "slice", "split", "split_with_sizes", "squeeze",
    "storage_offset", "stride", "sym_size", "t", "transpose", "unbind", "unsafe_split", "unsqueeze", "view",
    "view_as", "dtype",
))  # fmt: skip
"""Operators that launch nothing: views, and memory without values."""
READS = frozenset(("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"))
"""Methods that read values back."""


def site() -> str:
    """file:line and function of the innermost caller in one of `names.PACKAGES`; autograd's own backward has none."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        if module.startswith(names.PACKAGES):
            place = module.replace(".", "/") + ("/__init__.py" if "__path__" in frame.f_globals else ".py")
            return f"{place}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"


class Device(TorchDispatchMode):
    """What is alive on the device, and what was launched.

    Attributes:
        live, peak: bytes of storages, each rounded up as the allocator does.
        peak_site: where the peak was reached.
        launches: by operator; a real GPU takes one kernel for the most part.
        launch_sites: the same by (site, operator); counted where `by_site` is set, which is slow.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.peak_site = ""
        self.by_site = False
        self.launches: collections.Counter[str] = collections.Counter()
        self.launch_sites: collections.Counter[tuple[str, str]] = collections.Counter()
        self.capability = capability
        self._sizes: dict[int, int] = {}

    def reset_peak(self) -> None:
        self.peak, self.peak_site = self.live, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not _on_device(args[0]):
            return 0  # a seed drawn on the host, which waits for nothing
        kernels.refuse(_name(func), args, kwargs or {}, self.capability)
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if _on_device(leaf)]
        for tensor in made:
            self._book(tensor)
        name = func._schema.name.split("::")[1]
        if name not in NO_KERNEL and (made or any(map(_on_device, tree_leaves((args, kwargs))))):
            self.launches[name] += 1
            if self.by_site:
                self.launch_sites[site(), name] += 1
        return out

    def _book(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_site = self.live, site()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


class Syncs(TorchFunctionMode):
    """Where the host waits for the device: values read back, and memory copied from pageable host memory.

    Fake tensors have no values, so every number read back is `answer` (floats) or 0, a boolean is False but for
    `isfinite`, and a boolean index selects some rows. Reading a fake tensor on the CPU is answered too, and is no wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answer = 0.5
        self._pinned: set[int] = set()
        self.at: collections.Counter[tuple[str, str]] = collections.Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        others = [*args[1:], *kwargs.values()]
        if isinstance(first, FakeTensor) and name in READS:
            return self._read(name, first)
        if isinstance(first, FakeTensor) and name in ("__getitem__", "__setitem__"):
            args = (first, self._without_mask(first, args[1]), *args[2:])
        elif _on_device(first):
            if name in ("cpu", "nonzero", "masked_select") or (name == "to" and any(str(x) == "cpu" for x in others)):
                self._note(f"read {name}")
            if name == "new_tensor":
                self._note("write new_tensor")
        elif isinstance(first, torch.Tensor) and name == "to":
            targets = [str(x) for x in others if isinstance(x, str | torch.device)]
            is_pinned = first.untyped_storage()._cdata in self._pinned
            if any("cuda" in target for target in targets) and not (is_pinned and kwargs.get("non_blocking")):
                self._note("write to")
        elif name in ("empty", "tensor") and kwargs.get("pin_memory"):  # a build without CUDA can't pin
            return self._remember(func(*args, **kwargs | {"pin_memory": False}))
        elif name in ("tensor", "as_tensor") and "cuda" in str(kwargs.get("device", "")):
            self._note(f"write {name}")
        out = func(*args, **kwargs)
        if name == "isfinite" or (name == "all" and getattr(first, "is_true", False)):
            out.is_true = True
        return out

    def _remember(self, pinned: torch.Tensor) -> torch.Tensor:
        storage = pinned.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        return pinned

    def _note(self, what: str) -> None:
        self.at[what, site()] += 1

    def _read(self, name: str, tensor: FakeTensor) -> Any:
        """What a read gives; a constant of a few elements that the CPU made knows its values."""
        if _on_device(tensor):
            self._note(f"read {name}")
        values = tensor.constant
        if values is None:
            truth = getattr(tensor, "is_true", False)
            fill = truth if tensor.dtype == torch.bool else self._number() if tensor.dtype.is_floating_point else 0
            shape, dtype = tensor.shape, str(tensor.dtype).removeprefix("torch.").replace("bfloat16", "float32")
            values = numpy.full(shape, fill, dtype)
        elif name in ("numpy", "tolist"):
            values = values.numpy()
        if name == "numpy":
            return values
        if name == "tolist":
            return values.tolist()
        number = values.item()
        return {"__bool__": bool, "__float__": float, "__int__": int, "__index__": int}.get(name, lambda x: x)(number)

    def _number(self) -> float:
        """`answer`, and 0 for torch.amp, which asks how many gradients overflowed."""
        return 0.0 if site().startswith("torch/amp/") else self.answer

    def _without_mask(self, tensor: torch.Tensor, index: Any) -> Any:
        """An index without boolean masks, whose true values a GPU counts first; any number of them will do."""
        parts = index if isinstance(index, tuple) else (index,)
        masks = [isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts]
        if not any(masks):
            return index
        if _on_device(tensor):
            self._note("read boolean index")
        rows = torch.arange(min(len(tensor), 4), device=tensor.device)
        return tuple(rows if mask else part for part, mask in zip(parts, masks, strict=True))


@dataclass(frozen=True)
class Meters:
    device: Device
    syncs: Syncs

    def clear(self) -> None:
        """Forget counts; the peak starts at what is alive."""
        self.device.launches.clear()
        self.device.launch_sites.clear()
        self.device.reset_peak()
        self.syncs.at.clear()


@contextlib.contextmanager
def fake_cuda(capability: tuple[int, int] = (8, 9), total: int = 24 * GIB) -> Iterator[Meters]:
    """torch as on a machine with one GPU; no tensor made inside has values.

    Args:
        capability: (8, 9) for a card with bf16 and flash attention, (7, 5) for one without.
        total: bytes that the card says it has. Nothing enforces them.
    """
    meters = Meters(Device(capability), Syncs())
    _become_cuda(meters.device, capability, total)
    _settle_libraries()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    type(mode).avoid_device_init = property(lambda self: True)  # type: ignore[assignment]
    fake_tensor.init_gpu_context = lambda device: None  # a CUDA build would start the driver
    GUARD.use_fake_guard()
    torch._C._set_only_lift_cpu_tensors(True)
    with mode, meters.device, meters.syncs:
        yield meters


def fake_model(config: Any, dtype: torch.dtype, quantized: bool = True) -> Any:
    """A transformers model on the fake device, its linear layers but the head in NF4 with double quantization.

    A 4-bit weight is a plain Parameter that carries `quant_state`: bitsandbytes' own class can't wrap a fake tensor.
    """
    with torch.device("cuda:0"):
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if quantized and type(module) is torch.nn.Linear and module is not head:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _linear_4bit(module, dtype))
    return model.requires_grad_(False)


def plain_model(config: Any, dtype: torch.dtype) -> Any:
    """A transformers model on the CPU, as it is read from its files for a merge."""
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return model.eval().requires_grad_(False)


def _linear_4bit(plain: torch.nn.Linear, dtype: torch.dtype) -> Any:
    layer = bnb.nn.Linear4bit.__new__(bnb.nn.Linear4bit)
    torch.nn.Module.__init__(layer)
    layer.in_features, layer.out_features = plain.in_features, plain.out_features
    layer.compute_dtype, layer.compute_type_is_set, layer.quant_storage = dtype, True, torch.uint8
    layer.support_avx512bf16_for_cpu = False
    weight = torch.empty(plain.out_features, plain.in_features, dtype=dtype, device="cuda:0")
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    layer.weight.quant_state = layer.quant_state = state
    layer.bias = None if plain.bias is None else torch.nn.Parameter(torch.empty_like(plain.bias), requires_grad=False)
    return layer


@functools.cache
def _name(operator: Any) -> str:
    """An operator's name with its overload, the default one's left out: "aten::mm.dtype"."""
    return str(operator._schema.name) + (f".{overload}" if (overload := operator._schema.overload_name) else "")


def _on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def _become_cuda(device: Device, capability: tuple[int, int], total: int) -> None:
    """Answer what libraries ask of torch.cuda."""
    major, minor = capability
    properties = SimpleNamespace(total_memory=total, major=major, minor=minor, name="fake", multi_processor_count=128)
    answers = {
        "is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "_lazy_init": None, "current_device": 0,
        "device_count": 1, "get_device_properties": properties, "get_device_capability": capability,
        "get_device_name": "fake", "mem_get_info": (total - GIB, total), "synchronize": None, "empty_cache": None,
        "manual_seed": None, "manual_seed_all": None, "set_rng_state": None, "is_current_stream_capturing": False,
        "get_arch_list": [f"sm_{major}{minor}"],
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *a, answer=answer, **k: answer)
    real = torch.Generator
    torch.Generator = lambda device="cpu": real()  # type: ignore[misc,assignment]
    torch.cuda.is_bf16_supported = lambda including_emulation=True: major >= 8
    now = names.TorchState.now
    names.TorchState.now = lambda *, random=False: now()  # type: ignore[method-assign]  # no answer whether states are equal
    torch.cuda.get_rng_state = lambda device=None: torch.empty(16, dtype=torch.uint8)
    torch.cuda.reset_peak_memory_stats = lambda d=None: device.reset_peak()
    torch.cuda.memory_allocated = torch.cuda.memory_reserved = lambda d=None: device.live
    torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda d=None: device.peak


def _settle_libraries() -> None:
    """What reads values, or swaps a tensor's memory in place, on the way to a model on the device."""
    maps = {signed: bnb.functional.create_dynamic_map(signed) for signed in (True, False)}
    bnb.functional.create_dynamic_map = lambda signed=True, *a, **k: maps[signed].clone()
    torch.nn.Module._apply = _apply
    # One kernel on a GPU, which fake tensors take apart into seven where torch was built without CUDA.
    KERNELS.impl("silu_backward", lambda gradient, states: torch.empty_like(gradient), "CUDA")
    usable = moe._can_use_grouped_mm
    # The fake `_grouped_mm` knows bf16 alone (torch 2.13); transformers' own fallback takes the other dtypes.
    moe._can_use_grouped_mm = lambda x, weight, offs: weight.dtype == torch.bfloat16 and usable(x, weight, offs)


def _apply(self: Any, function: Any, recurse: bool = True) -> Any:
    for child in self.children() if recurse else ():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = function(parameter)
            if moved is not parameter:
                self._parameters[name] = torch.nn.Parameter(moved.detach(), parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self
