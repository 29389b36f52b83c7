"""Limit of a run's memory: the recipe's figure, or the share of free memory that the run may fill."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import torch

from qpref.distributed.environment import number
from qpref.errors import RecipeError
from qpref.linux import cgroup_memory, is_wsl
from qpref.memory.parts import GIB, LIBRARY_BYTES
from qpref.recipe.sections import Recipe

log = logging.getLogger("qpref")

UNITS = {"MIB": 2**20, "GIB": 2**30, "MB": 10**6, "GB": 10**9}
CPU_SHARE = 0.5
"""Share of the available memory that a run on a CPU may fill; the rest is left to the system and other programs."""


def memory_limit(recipe: Recipe, device: torch.device, held: int = 0) -> int:
    """Return the bytes that a run may fill: the recipe's figure, a GPU's free memory, or half of a CPU's.

    The processes of one run on one host share the CPU's half.

    Args:
        held: bytes on the device that count as free, since the run's own base has them.

    Raises:
        RecipeError: the recipe's figure is no size.
    """
    if recipe.model.memory is not None:
        return parse_bytes(recipe.model.memory)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return int(CPU_SHARE * (_available_bytes() + held)) // max(1, number("LOCAL_WORLD_SIZE", 1))


def enforced_limit(recipe: Recipe, device: torch.device, held: int = 0) -> int:
    """Return the bytes that a run may fill, and hold torch's allocator on a GPU to them.

    A figure in the recipe that exceeds the free memory is cut to it: other programs have the rest.

    Args:
        held: bytes on the device that this process holds already, and that are the run's own: those of its base.

    Raises:
        RecipeError: the recipe's figure is no size.
    """
    if device.type != "cuda":
        return memory_limit(recipe, device, held)
    torch.cuda.empty_cache()  # an earlier run's, in the same process
    free, total = torch.cuda.mem_get_info(device)
    free += held
    asked = memory_limit(recipe, device, held)
    limit = min(asked, free)
    if asked > free:
        log.warning("memory: [model] memory is %.2f GiB, and %.2f GiB are free", asked / GIB, free / GIB)
    share = allocator_share(limit, total) if recipe.model.memory or is_wsl() else 1.0
    torch.cuda.set_per_process_memory_fraction(share, device)
    return limit


def allocator_share(limit: int, total: int) -> float:
    """Return the share of a GPU's memory that torch's allocator may take of a run's limit.

    The allocator isn't all of it: lazily loaded kernels are outside, as in the forecast's reserve. What a driver that
    spills doesn't refuse is slow instead.
    """
    return min(1.0, max(0, limit - LIBRARY_BYTES["cuda"]) / total)


def _available_bytes() -> int:
    """Return what the machine has left, or a container's limit where that leaves less."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        available = int(found[1]) * 1024
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = cgroup_memory()
    return available if group is None else min(available, max(0, group[0] - group[1]))


def parse_bytes(text: str, origin: str = "[model] memory") -> int:
    """Parse a size: `24GiB`, `24 GB`, `512MiB`; a bare number is in GiB.

    Raises:
        RecipeError: it is no size, or 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MiB|GiB|MB|GB)?", text.strip(), re.IGNORECASE)
    amount = 0 if match is None else int(float(match[1]) * UNITS[(match[2] or "GiB").upper()])
    if not amount:
        raise RecipeError(f"{origin}: expected a size such as 24GiB or 24GB, got '{text}'")
    return amount
