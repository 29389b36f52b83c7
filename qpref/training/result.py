"""A finished run's result.json: steps, tokens, time, peak memory and the verdict."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qpref import sealed
from qpref.data.order import total_steps
from qpref.linux import resource
from qpref.training.adapter_change import better_rate
from qpref.training.snapshot import Session
from qpref.training.verdict import Verdict, judge

RESET_PEAK = Path("/proc/self/clear_refs")
"""Linux sets the peak of the resident memory to what is resident where 5 is written to it (proc_pid_clear_refs(5))."""


def reset_peak(device: torch.device) -> None:
    """Begin a new peak, that of training alone; on a CPU without Linux it stays the process's, loading included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # no such file off Linux, or a container that forbids it
            RESET_PEAK.write_text("5")


def write_result(path: Path, session: Session, first_step: int, adapter_files: Mapping[str, Any]) -> None:
    """Write the result of a finished run, sealed: its adapter is believed by the manifest in it.

    Args:
        first_step: step that this process began after; its peak memory is measured from there.
        adapter_files: manifest of the adapter's folder.
    """
    state, device = session.state, session.prepared.policy.device
    step = state.step if state.best is None else state.best.step
    hashes = {"adapter_files": dict(adapter_files), "metrics_sha256": session.metrics_sha256}
    if first_step == state.step and (before := _read(path)):
        sealed.write_sealed(path, before | hashes)  # exported again, and nothing trained
        return
    sealed.write_sealed(
        path,
        hashes
        | {
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "first_step": first_step,
            "steps": state.step,
            "adapter_step": step,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "tokens_per_microbatch": state.budget,
            "peak_bytes": peak_bytes(device),
            "verdict": verdict_of(session, step).as_json(),
            "warnings": [] if session.symptoms is None else session.symptoms.found,
        },
    )


def summary_of(path: Path) -> dict[str, Any]:
    """Return a finished run's result without its hashes, for metric sinks."""
    result = _read(path)
    hashes = {"adapter_files", "metrics_sha256"}
    return {name: value for name, value in result.items() if name not in hashes}


def verdict_of(session: Session, step: int) -> Verdict:
    """Judge a run by its held-out examples.

    Args:
        step: of the adapter that is the result.
    """
    prepared, state = session.prepared, session.state
    recipe = prepared.plan.recipe
    rate = better_rate(recipe, total_steps(recipe.train, len(prepared.examples)))
    advice = f"raise [train] learning_rate ({recipe.train.learning_rate:g})"
    advice += ", or train for more steps" if rate is None else f", to about {rate:g}"
    return judge(prepared.heldout, state.first_scores, state.last_scores, step, advice)


def _read(path: Path) -> dict[str, Any]:
    try:
        return sealed.read_sealed(path)
    except (OSError, ValueError):
        return {}


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Return the peak bytes: `resident` of the process, `allocated` and `reserved` of a GPU."""
    peak = {"resident": _resident_bytes()}
    if device.type == "cuda":
        peak["allocated"] = torch.cuda.max_memory_allocated(device)
        peak["reserved"] = torch.cuda.max_memory_reserved(device)
    return peak


def peak_of_device(device: torch.device) -> int:
    """Return the peak bytes of the memory that a run's plan is about: a GPU's reserved, a CPU's resident ones."""
    peak = peak_bytes(device)
    return peak["reserved"] if device.type == "cuda" else peak["resident"]


def _resident_bytes() -> int:
    # Linux's ru_maxrss starts at what the parent process held when it forked; VmHWM is this program's own.
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
