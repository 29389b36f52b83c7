"""The operating system that qpref needs: its modules, an error where they are missing, and variables that torch reads.

Imported before torch. `from qpref.linux import fcntl` is the import of a module that native Windows doesn't have.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
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

__all__ = ["fcntl", "is_wsl", "require_linux", "resource", "set_torch_variables"]

OS_RELEASE = Path("/proc/sys/kernel/osrelease")
ALLOCATOR = "PYTORCH_ALLOC_CONF"
ALLOCATOR_ALIASES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Other names that torch 2.11 to 2.13 reads first; what the user says under any of them stays."""


def is_wsl(os_release: Path = OS_RELEASE) -> bool:
    """Return whether this Linux runs in Windows, whose driver moves a GPU's memory to the host without an error."""
    return os_release.is_file() and "microsoft" in os_release.read_text().lower()


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
