"""The device that is measured: everything that differs between a GPU and the CPU of a rehearsal."""

from __future__ import annotations

import os
import resource
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

GIB = 2**30
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Interval = tuple[str, float, float]
"""An operation's name, and its start and end in seconds."""


class Device(Protocol):
    """Attributes: `name` as in recipes; `dtypes` in which qpref trains there."""

    name: str
    dtypes: tuple[str, ...]

    def describe(self) -> dict[str, Any]: ...

    def synchronize(self) -> None: ...

    def cap(self, gib: float) -> None:
        """Limit the memory that this process's allocator may take."""

    def allow_reduced_sums(self, allowed: bool) -> None:
        """Let products of 16-bit matrices add their parts in 16 bits, or not."""

    def allocate_contexts(self) -> dict[str, int]:
        """Measure the bytes that the process takes beside its tensors, step by step as libraries start."""

    def memory(self) -> dict[str, int]:
        """Return the allocator's peaks in bytes, and how often it ran out or had to free its cache."""

    def waits(self) -> Any:
        """Count, in a context, where the host waits for the device: a Counter of file:line."""

    def activities(self) -> list[Any]:
        """List what a torch profiler records."""

    def work(self, profile: Any) -> list[Interval]:
        """List what the device did in a profile."""

    def totals(self, profile: Any) -> dict[str, float]:
        """Sum the device's seconds inside each autograd function of Python in a profile."""


class Cuda:
    name = "cuda"

    def __init__(self) -> None:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtypes: tuple[str, ...] = ("bf16", "fp16") if has_bf16 else ("fp16",)

    def describe(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(0)
        return {
            "gpu": found.name,
            "gpu_bytes": found.total_memory,
            "compute_capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "driver": _nvidia_smi("driver_version"),
            "clocks_mhz": _nvidia_smi("clocks.sm,clocks.mem"),
            "power_limit": _nvidia_smi("power.limit"),
            "cuda": torch.version.cuda,
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def cap(self, gib: float) -> None:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / whole))

    def allow_reduced_sums(self, allowed: bool) -> None:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = allowed

    def allocate_contexts(self) -> dict[str, int]:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        def taken() -> int:
            torch.cuda.synchronize()
            free, whole = torch.cuda.mem_get_info()
            return int(whole - free - torch.cuda.memory_reserved())

        torch.cuda.init()
        found = {"with a CUDA context": taken()}
        square = torch.randn(1024, 1024, dtype=torch.bfloat16, device="cuda")
        (square @ square).sum().item()
        found["with cuBLAS"] = taken()
        dequantize_4bit(*quantize_4bit(square, quant_type="nf4", compress_statistics=True))
        found["with bitsandbytes"] = taken()
        return found

    def memory(self) -> dict[str, int]:
        stats = torch.cuda.memory_stats()
        return {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "out_of_memory": stats.get("num_ooms", 0),
            "cache_flushes": stats.get("num_alloc_retries", 0),
            "limit": int(torch.cuda.get_per_process_memory_fraction() * torch.cuda.mem_get_info()[1]),
        }

    @contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        found: Counter[str] = Counter()
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for each in caught:
            if "synchronizing" in str(each.message):
                found[f"{each.filename}:{each.lineno}"] += 1

    def activities(self) -> list[Any]:
        return [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]

    def work(self, profile: Any) -> list[Interval]:
        on_device = torch.autograd.DeviceType.CUDA
        # An annotation, such as the optimizer's step, spans kernels that have events of their own.
        return [
            _interval(event)
            for event in profile.events()
            if event.device_type == on_device and not event.is_user_annotation
        ]

    def totals(self, profile: Any) -> dict[str, float]:
        return _functions(profile, "device_time_total")


class Cpu:
    """The stand-in of a rehearsal. It limits nothing, and waits for nothing."""

    name = "cpu"
    dtypes = ("bf16",)

    def describe(self) -> dict[str, Any]:
        return {"gpu": None}

    def synchronize(self) -> None:
        return

    def cap(self, gib: float) -> None:
        return

    def allow_reduced_sums(self, allowed: bool) -> None:
        return

    def allocate_contexts(self) -> dict[str, int]:
        return {}

    def memory(self) -> dict[str, int]:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"allocated": resident, "reserved": resident, "out_of_memory": 0, "cache_flushes": 0}

    @contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        yield Counter()

    def activities(self) -> list[Any]:
        return [torch.profiler.ProfilerActivity.CPU]

    def work(self, profile: Any) -> list[Interval]:
        """List the operations that no other operation called."""
        aten = [event for event in profile.events() if event.name.startswith(("aten::", "bitsandbytes::"))]
        return [_interval(event) for event in aten if not getattr(event.cpu_parent, "name", "").startswith("aten::")]

    def totals(self, profile: Any) -> dict[str, float]:
        return _functions(profile, "cpu_time_total")


def open_device(rehearse: bool) -> Device:
    """Return the GPU, or a rehearsal's CPU.

    Raises:
        SystemExit: torch sees no GPU.
    """
    if rehearse:
        return Cpu()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU on this machine; --rehearse runs everything on the CPU, at tiny sizes")
    return Cuda()


def seconds(device: Device, work: Callable[[], Any]) -> float:
    """Time one call, the device's work included."""
    device.synchronize()
    before = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - before


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Divide the Euclidean norm of the difference by the exact value's."""
    size = exact.double().norm().item()
    return (found.double() - exact.double()).norm().item() / size if size else found.double().norm().item()


def _interval(event: Any) -> Interval:
    return event.name, event.time_range.start / 1e6, event.time_range.end / 1e6


def _functions(profile: Any, total: str) -> dict[str, float]:
    """Sum by name; Python's autograd functions are the events without a namespace that begin with an underscore."""
    return {
        event.key: getattr(event, total) / 1e6
        for event in profile.key_averages()
        if event.key.startswith("_") and "::" not in event.key and getattr(event, total)
    }


def _nvidia_smi(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
