"""The device that a model runs on: its name for the log, and reasons why a GPU of this machine isn't used or can't be.

Facts are gathered in one place (`Machine.found`), and everything said about them follows from the facts alone.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qpref.errors import PolicyError

log = logging.getLogger("qpref")

GIB = 2**30
WSL_DRIVER = "/usr/lib/wsl/lib/libcuda.so.1"
TRACES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg", WSL_DRIVER, "/dev/davinci0",
          "/dev/kfd")  # fmt: skip
"""Files that drivers make: NVIDIA's (nvhost-gpu and nvgpu on Jetson), Windows's in WSL2, Huawei's and AMD's."""
PCI, NVIDIA_VENDOR, DISPLAY_CLASS = Path("/sys/bus/pci/devices"), "0x10de", "0x03"
REINSTALL = (
    "pip install --force-reinstall torch, from an index whose torch is built for CUDA (the default one's is, on x86)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts about this machine and its torch by which an unused GPU is explained.

    Attributes:
        torch_version: of the installed torch.
        cuda, hip: versions of CUDA and of ROCm that torch was built for; None without.
        is_available: torch can use a CUDA (or ROCm) device.
        init_error: what torch says when CUDA starts; empty without an error.
        traces: those of `TRACES` that exist.
        unreadable: those of them that this user may not open.
        has_smi: `nvidia-smi` is on PATH.
        has_card: an NVIDIA display controller is on the PCI bus.
        environment: variables by which devices are hidden.
        other: other accelerators that torch sees: "xpu", "mps".
    """

    torch_version: str
    cuda: str | None = None
    hip: str | None = None
    is_available: bool = False
    init_error: str = ""
    traces: frozenset[str] = frozenset()
    unreadable: frozenset[str] = frozenset()
    has_smi: bool = False
    has_card: bool = False
    environment: Mapping[str, str]
    other: frozenset[str] = frozenset()

    @classmethod
    def found(cls) -> Machine:
        """Gather the facts of this machine."""
        traces = frozenset(path for path in TRACES if os.path.exists(path))  # noqa: PTH110  device nodes, as text
        available = torch.cuda.is_available()
        names = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
        return cls(
            torch_version=torch.__version__,
            cuda=torch.version.cuda,
            hip=torch.version.hip,
            is_available=available,
            init_error="" if available else _init_error(),
            traces=traces,
            unreadable=frozenset(path for path in traces if not os.access(path, os.R_OK)),
            has_smi=shutil.which("nvidia-smi") is not None,
            has_card=_has_card(),
            environment={name: os.environ[name] for name in names if name in os.environ},
            other=_others(),
        )

    @property
    def is_jetson(self) -> bool:
        return bool(self.traces & {"/dev/nvhost-gpu", "/dev/nvgpu"})

    @property
    def has_nvidia(self) -> bool:
        """True where something on this machine says that it has an NVIDIA GPU."""
        driver = {"/dev/nvidia0", "/dev/nvidiactl", WSL_DRIVER}
        return self.has_smi or self.has_card or self.is_jetson or bool(self.traces & driver)


def _init_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0]
    return ""


def _has_card(pci: Path = PCI) -> bool:
    """Look for an NVIDIA display controller, which is there before any driver is."""
    try:
        return any(
            (device / "vendor").read_text().strip() == NVIDIA_VENDOR
            and (device / "class").read_text().startswith(DISPLAY_CLASS)
            for device in pci.iterdir()
        )
    except OSError:
        return False


def _others() -> frozenset[str]:
    found = {"xpu": torch.xpu.is_available(), "mps": torch.backends.mps.is_available()}
    return frozenset(name for name, is_there in found.items() if is_there)


def why_no_gpu(machine: Machine) -> tuple[str, str] | None:
    """Explain why a GPU of this machine isn't used, and what to do about it; None where there is none to use."""
    if machine.is_available:
        return None
    if machine.has_nvidia:
        reason, remedy = _why_no_nvidia(machine)
        return f"this machine has an NVIDIA GPU that torch can't use: {reason}", remedy
    if "/dev/dxg" in machine.traces:
        return (
            "Windows shares a GPU with WSL2, but no CUDA driver",
            "if it is an NVIDIA GPU, install NVIDIA's driver on Windows",
        )
    return _why_no_other(machine)


def _why_no_nvidia(machine: Machine) -> tuple[str, str]:
    """The cause nearest to the user first: a variable, torch's build, permissions, the driver."""
    for name, value in machine.environment.items():
        if name != "HIP_VISIBLE_DEVICES" and value.strip().lower() in ("", "-1", "none", "void", "nodevfiles"):
            return f"{name} is '{value}', which hides it", f'unset {name}, or set [model] device = "cpu"'
    if machine.cuda is None:
        build = f"torch {machine.torch_version} is built for {'ROCm' if machine.hip else 'the CPU alone'}"
        return build, "install NVIDIA's torch wheel for your JetPack" if machine.is_jetson else REINSTALL
    if denied := sorted(machine.unreadable):
        return (
            f"no permission to open {denied[0]}",
            "add yourself to the group that owns it (often video or render), or give the container the GPU",
        )
    if "driver" in machine.init_error and "old" in machine.init_error:
        return machine.init_error, "update NVIDIA's driver, or install a torch built for an older CUDA"
    if not machine.is_jetson and not machine.traces & {"/dev/nvidia0", WSL_DRIVER}:
        return (
            "there is no /dev/nvidia0",
            "install or load NVIDIA's driver (`nvidia-smi` must list the GPU); a container needs `--gpus all`",
        )
    return (
        machine.init_error or "torch doesn't say why",
        "see whether `nvidia-smi` lists it; restart after a driver update",
    )


def _why_no_other(machine: Machine) -> tuple[str, str] | None:
    """One sentence for accelerators that aren't NVIDIA's."""
    remedy = "train on an NVIDIA GPU for speed"
    if "xpu" in machine.other:
        return "torch sees an Intel GPU (XPU); qpref computes on NVIDIA GPUs and CPUs", remedy
    if "mps" in machine.other:
        return "torch sees an Apple GPU (MPS); qpref computes on NVIDIA GPUs and CPUs", remedy
    if "/dev/davinci0" in machine.traces:
        return "this machine has an Ascend NPU; qpref computes on NVIDIA GPUs and CPUs", remedy
    if "/dev/kfd" in machine.traces:
        return "this machine has an AMD GPU; qpref is written for NVIDIA GPUs, and nothing is tested on ROCm", remedy
    return None


def missing_kernels(name: str, capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """Describe a GPU that the torch build has no kernels for; None where it has some.

    A kernel runs on its own major version from its minor version on (`sm_86` on 8.9 too), an architecture-specific one
    on exactly its own (`sm_90a`); PTX (`compute_80`) is compiled for everything later.

    Args:
        architectures: of `torch.cuda.get_arch_list`; empty where torch can't say.
    """
    if not architectures or any(_runs_on(each, capability) for each in architectures):
        return None
    listed = ", ".join(architectures)
    return (
        f"{name} has compute capability {capability[0]}.{capability[1]}, and this torch has kernels for {listed} alone"
    )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
    if match is None:
        return True  # a notation of another torch: no reason to refuse
    built = int(match[2]), int(match[3])
    if match[4] == "a":
        return built == capability
    if match[1] == "compute":
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]


def refuse_missing_kernels(device: torch.device) -> None:
    """Stop before the first kernel fails with "no kernel image is available".

    Raises:
        PolicyError: torch has no kernels for this GPU.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if reason := missing_kernels(name, capability, torch.cuda.get_arch_list()):
        raise PolicyError(
            reason, 'install a torch built for a CUDA version that still has this GPU, or set [model] device = "cpu"'
        )


def announce(device: torch.device, setting: str) -> None:
    """Log the device, and warn where a GPU of this machine stays unused.

    Args:
        setting: [model] device; a CPU that was asked for is no surprise.
    """
    log.info("device: %s", _gpu(device) if device.type == "cuda" else _cpu())
    if device.type == "cuda" and torch.version.hip is not None:
        log.warning("this is an AMD GPU; qpref is written for NVIDIA GPUs, and nothing is tested on ROCm")
    if device.type == "cpu" and setting == "auto" and (found := why_no_gpu(Machine.found())):
        log.warning("%s; this runs on the CPU, which takes hours where a GPU takes minutes\nhint: %s", *found)


def _gpu(device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    driver = driver_version()
    parts = [
        torch.cuda.get_device_name(device),
        f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
        f"compute capability {major}.{minor}",
        *([f"driver {driver}"] if driver else []),
        f"torch {torch.__version__}" + (f" (CUDA {torch.version.cuda})" if torch.version.cuda else ""),
    ]
    return ", ".join(parts)


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Read the processor's name; its architecture where the kernel doesn't say."""
    if cpuinfo.is_file() and (found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return found[1].strip()
    return platform.processor() or platform.machine()


def driver_version(version_file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Read the version of NVIDIA's driver from the kernel, or from `nvidia-smi` (in WSL2); None where neither says."""
    if version_file.is_file() and (found := re.search(r"\s(\d+\.[\d.]+\d)\s", version_file.read_text())):
        return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split()[0] if answer.split() else None
