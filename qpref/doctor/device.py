"""The GPU, its driver and its kernels, and 4-bit quantization on the device that a run would take."""

from __future__ import annotations

from collections.abc import Iterator

from qpref.doctor.finding import Finding

TOPIC = "device"
GIB = 2**30
MAX_NF4_ERROR = 0.12
"""Mean error of NF4 on normal numbers, relative to their mean size; the code's own is 0.09."""


def examine_device() -> Iterator[Finding]:
    """Look at the device that `device = "auto"` takes, and quantize a small matrix on it."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        fix = "pip install --force-reinstall torch"
        yield Finding(TOPIC, "problem", f"torch can't be imported: {_line(error)}", fix)
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield from _of_gpu(index)
    else:
        yield from _of_missing_gpu()
    yield from _quantization("cuda" if torch.cuda.is_available() else "cpu")
    yield from _collectives()


def _of_gpu(index: int) -> Iterator[Finding]:
    import torch

    from qpref.policy.device import driver_version, missing_kernels

    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    driver = driver_version()
    facts = (
        f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability {capability[0]}.{capability[1]}"
    )
    yield Finding(
        TOPIC,
        "ok",
        f"{facts}, CUDA {torch.version.cuda or torch.version.hip}" + (f", driver {driver}" if driver else ""),
    )
    if torch.version.hip is not None:
        yield Finding(TOPIC, "note", "this is an AMD GPU; nothing of qpref is tested on ROCm")
    elif reason := missing_kernels(name, capability, torch.cuda.get_arch_list()):
        yield Finding(TOPIC, "problem", reason, "install a torch built for a CUDA version that still has this GPU")
    if capability < (8, 0):
        yield Finding(TOPIC, "note", f"{name} computes no bf16", 'set [model] dtype = "fp16"')
    if free < total / 2:
        message = f"other programs have {(total - free) / GIB:.1f} GiB of {name}"
        yield Finding(TOPIC, "note", message, "nvidia-smi lists them; `qpref plan --vram` plans for what is left")


def _of_missing_gpu() -> Iterator[Finding]:
    from qpref.policy.device import Machine, why_no_gpu

    found = why_no_gpu(Machine.found())
    if found:
        yield Finding(TOPIC, "problem" if "NVIDIA GPU that torch can't use" in found[0] else "note", *found)
    else:
        message = "no GPU: qpref trains on the CPU, which is for small models and tests"
        yield Finding(TOPIC, "note", message)


def _quantization(device: str) -> Iterator[Finding]:
    """Quantize a matrix to NF4 and back, where a broken bitsandbytes shows."""
    try:
        import torch
        from bitsandbytes import functional

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            matrix = torch.randn(64, 64)
        packed, state = functional.quantize_4bit(matrix.to(device), quant_type="nf4")
        error = (functional.dequantize_4bit(packed, state).cpu() - matrix).abs().mean() / matrix.abs().mean()
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError) as caught:
        fix = "pip install --force-reinstall bitsandbytes; `python -m bitsandbytes` says what it misses"
        yield Finding(TOPIC, "problem", f"bitsandbytes can't quantize on {device}: {_line(caught)}", fix)
        return
    if not float(error) < MAX_NF4_ERROR:
        fix = 'reinstall bitsandbytes, or set [model] quantization = "none"'
        yield Finding(TOPIC, "problem", f"bitsandbytes' NF4 on {device} is off by {float(error):.0%}", fix)
    else:
        yield Finding(TOPIC, "ok", f"bitsandbytes quantizes to NF4 on {device} (mean error {float(error):.1%})")


def _collectives() -> Iterator[Finding]:
    """Backends of torch.distributed, which several GPUs need."""
    import torch
    import torch.distributed as dist

    if torch.cuda.device_count() < 2:
        return
    lacks = [name for name, is_there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
             if not is_there]  # fmt: skip
    if lacks:
        message = f"this torch lacks {' and '.join(lacks)}, which training on several GPUs needs"
        yield Finding(TOPIC, "problem", message, "pip install --force-reinstall torch")
    else:
        yield Finding(TOPIC, "ok", "gloo and NCCL, for training on several GPUs")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
