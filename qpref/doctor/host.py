"""Memory, processors, disks and environment of this machine, with the traps that are known of them."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from qpref.disk_space import free_bytes, shown_bytes
from qpref.doctor.finding import Finding
from qpref.errors import QprefError
from qpref.fsio import cache_folder
from qpref.linux import cgroup_memory, is_wsl
from qpref.locks import excludes, take
from qpref.opening import open_plain

MEMORY, PROCESSOR, DISK, ENVIRONMENT = "memory", "processor", "disk and cache", "environment"
GIB = 2**30
LITTLE_DISK = 10 * GIB
LITTLE_SHM = 64 * 2**20
"""Docker's default for /dev/shm, too little for NCCL between GPUs of one host."""
SHM = Path("/dev/shm")  # noqa: S108  its size is read, nothing is written


def examine_host() -> Iterator[Finding]:
    """Look at everything but packages, device and plugins."""
    yield from memory_findings(Path("/proc/meminfo"), cgroup_memory())
    yield from processor_findings(Path("/proc/cpuinfo"), len(os.sched_getaffinity(0)), os.environ)
    yield from _disk(cache_folder())
    yield from environment_findings(os.environ, free_shm(), is_wsl())


def memory_findings(meminfo: Path, limit: tuple[int, int] | None) -> Iterator[Finding]:
    """Report the memory, and a container's limit where it is below the machine's.

    Args:
        limit: bytes that the control group may have, and that it has.
    """
    text = meminfo.read_text() if meminfo.is_file() else ""
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total, free = sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)
    if total:
        yield Finding(MEMORY, "ok", f"{shown_bytes(free)} of {shown_bytes(total)} are available")
    if limit is not None and limit[0] < (total or limit[0] + 1):
        most, used = limit
        message = (
            f"this container may have {shown_bytes(most)}, and has {shown_bytes(used)}; beyond it the kernel kills"
        )
        yield Finding(MEMORY, "note", message, "`auto` settings keep to it; give the container more for larger models")


def processor_findings(cpuinfo: Path, num_cores: int, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Report what matters to training on a CPU, and to tokenizing before training on a GPU."""
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    flags = set((re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE) or ["", ""])[1].split())
    name = (re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE) or ["", "an unnamed processor"])[1].strip()
    units = [title for flag, title in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if flag in flags]
    yield Finding(PROCESSOR, "ok", f"{num_cores} cores of {name}" + (f", with {' and '.join(units)}" if units else ""))
    if "avx512_bf16" in flags:
        message = (
            "bitsandbytes repacks 4-bit weights on AVX512-BF16, and other trainers' LoRA gradients are wrong then "
            "(bitsandbytes#1804); qpref switches that off"
        )
        yield Finding(PROCESSOR, "ok", message)
    elif text and not units:
        message = "this processor has no units for bf16"
        yield Finding(PROCESSOR, "note", message, 'on the CPU, compare the speed of [model] dtype = "float32"')
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) < num_cores:
        yield Finding(
            PROCESSOR,
            "note",
            f"OMP_NUM_THREADS is {threads}, so training on the CPU uses that many of {num_cores} cores",
            "unset it, unless other programs need them",
        )


def _disk(cache: Path) -> Iterator[Finding]:
    """Free space of the cache and of the current folder, and whether they can be written and locked."""
    for folder, what, fix in (
        (cache, "cache", "QPREF_CACHE names another folder; `qpref cache clear` frees its space"),
        (Path.cwd(), "current folder", "runs are written to --output"),
    ):
        free = free_bytes(folder)
        space = "" if free is None else f", {shown_bytes(free)} free"
        yield Finding(DISK, "ok", f"{what}: {folder}{space}")
        if free is not None and free < LITTLE_DISK:
            message = f"{shown_bytes(free)} are free for the {what}; models take from 1 to 40 GiB"
            yield Finding(DISK, "note", message, fix)
        yield from lock_findings(folder, what)


def lock_findings(folder: Path, what: str) -> Iterator[Finding]:
    """Write a file in the folder and lock it, as a run does; the file is gone afterwards."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".qpref-doctor-{secrets.token_hex(8)}"
        descriptor = open_plain(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except (OSError, QprefError) as error:
        reason = getattr(error, "strerror", None) or error
        fix = "choose a folder that you may write: QPREF_CACHE for the cache, --output for runs"
        yield Finding(DISK, "problem" if what == "cache" else "note", f"{folder} can't be written: {reason}", fix)
        return
    try:
        holds = take(descriptor) and excludes(path)
    except OSError:
        holds = False
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
    if not holds:
        message = f"locks don't hold in {folder}; two processes could write one run"
        yield Finding(DISK, "note", message, "start no second process in one run folder, or use a local disk")


def free_shm() -> int | None:
    """Return the bytes of shared memory, None where there is none."""
    try:
        status = os.statvfs(SHM)
    except OSError:
        return None
    return status.f_blocks * status.f_frsize


def environment_findings(environment: Mapping[str, str], shm: int | None, wsl: bool) -> Iterator[Finding]:
    """Report variables and mounts that change what a run can do."""
    found = list(_of_environment(environment, shm, wsl))
    yield from found or [Finding(ENVIRONMENT, "ok", "no variable or mount that is known to matter")]


def _of_environment(environment: Mapping[str, str], shm: int | None, wsl: bool) -> Iterator[Finding]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if environment.get(name, "").strip().lower() in ("1", "true", "yes", "on"):
            message = f"{name} is set: models and data come from the local cache alone"
            yield Finding(ENVIRONMENT, "note", message, f"unset {name} to download")
    if disabled := environment.get("QPREF_DISABLE"):
        yield Finding(ENVIRONMENT, "note", f"QPREF_DISABLE leaves out {disabled}", "unset it to have them")
    if wsl:
        message = "WSL2: Windows moves GPU memory to the host instead of refusing it"
        fix = "qpref holds its allocator to the free memory; close other GPU programs"
        yield Finding(ENVIRONMENT, "note", message, fix)
    if shm is not None and shm <= LITTLE_SHM:
        message = f"{SHM} has {shown_bytes(shm)}, too little for several GPUs"
        yield Finding(ENVIRONMENT, "note", message, "docker run --shm-size=8g, or --ipc=host")
