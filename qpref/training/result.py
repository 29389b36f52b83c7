"""What a run measured of itself, in result.json at its end: steps, tokens, time, and the memory at its peak."""

from __future__ import annotations

import re
import resource
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from qpref import fsio
from qpref.training.loop import Progress


def reset_peak(device: torch.device) -> None:
    """Let a GPU's peak be that of training alone. A CPU's stays that of the whole process, loading included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def write_result(path: Path, progress: Progress, device: torch.device, first_step: int) -> None:
    """Write down a run that is at its end: its adapter is the best step's where the recipe asks for that.

    Args:
        first_step: where this process began; what it measured of memory holds from there on.
    """
    fsio.write_json(
        path,
        {
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "first_step": first_step,
            "steps": progress.step,
            "adapter_step": progress.step if progress.best is None else progress.best.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_microbatch": progress.budget,
            "peak_bytes": peak_bytes(device),
        },
    )


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The most that was in use at once: `resident` of the process, and of a GPU what was `allocated` and `reserved`."""
    peak = {"resident": _resident_bytes()}
    if device.type == "cuda":
        peak["allocated"] = torch.cuda.max_memory_allocated(device)
        peak["reserved"] = torch.cuda.max_memory_reserved(device)
    return peak


def _resident_bytes() -> int:
    # Linux's ru_maxrss starts at what the parent process held when it forked; VmHWM is this program's own.
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
