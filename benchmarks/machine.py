"""The machine that is measured on: its description, and its peak FLOP rate and memory bandwidth."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate", "unsloth")
SECONDS_PER_PEAK = 4.0


def describe(threads: int) -> dict[str, Any]:
    """Describe the machine, without its host name."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    installed = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(models),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in VERSIONED if name in installed},
    }


def commit(folder: Path) -> str | None:
    """Name the commit that is checked out, and mark uncommitted changes; None outside a git repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.is_file() else []


def send_peaks(connection: Connection, device: str, threads: int) -> None:
    """Measure `peaks` and send them; the body of a process."""
    import torch

    torch.set_num_threads(threads)
    connection.send(peaks(device))


def peaks(device: str) -> dict[str, Any]:
    """Measure flops_per_second of bf16 matrix products and bytes_per_second of a copy, in CPU seconds on a CPU.

    The best of many repetitions of several sizes, since noise only slows a product down.
    """
    import torch

    sides = (512, 1024, 2048) if device == "cpu" else (2048, 4096, 8192)
    rates = []
    for side in sides:
        left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
        # Also a narrow right-hand side, like a layer's weights times a batch of tokens.
        for a, b in ((left, right), (left, right[:, : side // 2].contiguous())):
            out = a @ b
            seconds = _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, len(sides))
            rates.append(2 * a.shape[0] * a.shape[1] * b.shape[1] / seconds)
    source = torch.zeros(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    copied = _fastest(lambda: target.copy_(source), device, 1)
    found: dict[str, Any] = {
        "flops_per_second": max(rates),
        "bytes_per_second": 2 * source.numel() * source.element_size() / copied,
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def kept_peaks(file: Path, device: str) -> dict[str, Any]:
    """Read the peaks from a file, which is written by the first call."""
    if not file.exists():
        file.write_text(json.dumps(peaks(device)))
    return dict(json.loads(file.read_text()))


def _fastest(work: Callable[[], Any], device: str, shares: int) -> float:
    """Time repeated calls for a fixed duration; return the seconds of the fastest."""
    import torch

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    best, started = float("inf"), time.perf_counter()
    work()
    while time.perf_counter() - started < SECONDS_PER_PEAK / shares:
        before = clock()
        for _ in range(4):
            work()
        best = min(best, (clock() - before) / 4)
    return best
