"""The operating system that qpref needs: its modules, an error where they are missing, and variables that torch reads.

Imported before torch. `from qpref.linux import fcntl` is the import of a module that native Windows doesn't have.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from qpref.errors import InstallError


def require_linux() -> None:
    """Refuse native Windows, where file locks and signals differ: `os.kill(pid, 0)` is a Ctrl+C there.

    Raises:
        InstallError: this is Windows.
    """
    if sys.platform == "win32":
        raise InstallError(
            "qpref runs on Linux, or in WSL2 on Windows", "install WSL2 (`wsl --install`) and qpref there"
        )


require_linux()

import fcntl  # noqa: E402  after the check, so that Windows gets one sentence
import resource  # noqa: E402

__all__ = ["cgroup_memory", "fcntl", "is_wsl", "require_linux", "resource", "set_torch_variables"]

OS_RELEASE = Path("/proc/sys/kernel/osrelease")
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
NO_LIMIT = 2**60
"""Version 1 has a number a little below 2**63 where there is no limit."""
ALLOCATOR = "PYTORCH_ALLOC_CONF"
ALLOCATOR_ALIASES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Other names that torch 2.11 to 2.13 reads first; what the user says under any of them stays."""


def is_wsl(os_release: Path = OS_RELEASE) -> bool:
    """Return whether this Linux runs in Windows, whose driver moves a GPU's memory to the host without an error."""
    return os_release.is_file() and "microsoft" in os_release.read_text().lower()


def cgroup_memory(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> tuple[int, int] | None:
    """Return the bytes that this process's control group may have and has, at the level with the least left.

    Both versions of control groups; the group's parents limit it too. Files that the kernel only caches don't count,
    since it drops them first. None where there is no limit. /proc/meminfo is the machine's, in containers as well.
    """
    limits = []
    for folder, most, used, cached in _cgroup_levels(root, own):
        limit, usage = _number(folder / most), _number(folder / used)
        if limit is not None and usage is not None and limit < NO_LIMIT:
            limits.append((limit, max(0, usage - _cached_bytes(folder / "memory.stat", cached))))
    return min(limits, key=lambda one: one[0] - one[1], default=None)


def _cgroup_levels(root: Path, own: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield the folders of this process's group and of its parents, with the names of limit, use and cached files."""
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / name.lstrip("/")
        yield from ((level, *names) for level in (folder, *folder.parents) if level.is_relative_to(top))


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached_bytes(stat: Path, name: str) -> int:
    try:
        pairs = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(pairs.get(name, 0))


def set_torch_variables(environment: MutableMapping[str, str] = os.environ, *, wsl: bool | None = None) -> None:
    """Set the variables that torch reads when it is imported, unless the user has set them.

    Expandable segments keep memory in one piece although every packed batch has a length of its own. WSL2's driver
    refuses some of their calls (pytorch#192330); drop the exception when torch no longer makes those there.
    """
    # Threads that spin while waiting take cores from each other and from other programs.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    named = any(name in environment for name in (ALLOCATOR, *ALLOCATOR_ALIASES))
    if sys.platform == "linux" and not named and not (is_wsl() if wsl is None else wsl):
        environment[ALLOCATOR] = "expandable_segments:True"
