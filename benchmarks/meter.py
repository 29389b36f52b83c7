"""Measure a step's cost: CPU seconds of all threads, wall time, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch


class Meter(Protocol):
    def note_loaded(self) -> None:
        """Take the current memory as the baseline."""

    def start(self) -> None: ...

    def stop(self) -> dict[str, float]:
        """Return cpu_seconds, wall_seconds and peak_bytes since `start`."""


@dataclass(slots=True)
class CpuMeter:
    """Meter by the process's clocks and Linux's resettable high-water mark of resident memory."""

    loaded: int = 0
    cpu: float = 0.0
    wall: float = 0.0

    def note_loaded(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.loaded = _status_bytes("VmRSS")

    def start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def stop(self) -> dict[str, float]:
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        return {"cpu_seconds": cpu, "wall_seconds": wall, "peak_bytes": _status_bytes("VmHWM") - self.loaded}


@dataclass(slots=True)
class CudaMeter:
    """Meter by the allocator's peak and the wall clock, synchronized with the GPU."""

    loaded: int = 0
    cpu: float = 0.0
    wall: float = 0.0

    def note_loaded(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.loaded = torch.cuda.memory_allocated()

    def start(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def stop(self) -> dict[str, float]:
        torch.cuda.synchronize()
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        peak = torch.cuda.max_memory_allocated()
        return {
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "peak_bytes": peak - self.loaded,
            "peak_bytes_in_all": peak,
        }


def meter_for(device: str) -> Meter:
    return CudaMeter() if device == "cuda" else CpuMeter()


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"this system's /proc/self/status has no {name}"
    return int(found[1]) * 1024


@dataclass(slots=True)
class Gate:
    """Synchronization point between a contestant's steps: reports the last step's cost, and waits for its next turn.

    A trainer calls `wait` before its first step and after each. If the other end has closed, the process exits.
    """

    meter: Meter
    connection: Connection
    digest: str = ""
    loss: float = 0.0
    started: bool = False

    def wait(self) -> None:
        message: dict[str, Any] = {"digest": self.digest}
        if self.started:
            message = self.meter.stop() | {"loss": self.loss}
        self.connection.send(message)
        try:
            self.connection.recv()
        except EOFError:
            raise SystemExit(0) from None
        self.started = True
        self.meter.start()
