"""Settings and waits on the device that no value shows: float32 sums, and host access to managed memory.

    python -m tests.fake_cuda.numerics

Exits with the number of failures.
"""

from __future__ import annotations

import os
from typing import Any

import bitsandbytes
import torch

from tests.fake_cuda import fake_cuda, names
from tests.fake_cuda.job import Job, Run, within


def failures(run: Run, meters: fake_cuda.Meters) -> list[str]:
    found = []
    matmul = torch.backends.cuda.matmul
    for dtype in ("bf16", "fp16"):
        if getattr(matmul, f"allow_{dtype}_reduced_precision_reduction"):
            found.append(f"a loaded policy adds partial sums in {dtype}")
        if not getattr(matmul, f"allow_{dtype}_reduced_precision_reduction_split_k"):
            found.append(f"a loaded policy forbids split {dtype} products")
    return found + _waits()


def _waits() -> list[str]:
    """Save and restore paged state, noting the accesses to managed memory and the waits in their order."""
    events: list[str] = []

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Any:
        buffer: Any = torch.empty(shape, dtype=dtype)  # as bitsandbytes: a host tensor
        buffer.is_paged = True
        return buffer

    bitsandbytes.functional.get_paged = get_paged  # type: ignore[assignment]
    bitsandbytes.functional.fill = lambda buffer, value: events.append("device writes")  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: events.append("wait")  # type: ignore[assignment]
    parameter = torch.nn.Parameter(torch.empty(400, 300, device="cuda"))
    train = names.TrainSection(optimizer="paged_adamw_8bit", learning_rate=1e-3)
    optimizer = names.optim.make_optimizer(train, [parameter], parameter.device)
    saved = {f"0.{name}": torch.zeros(400, 300, dtype=torch.uint8) for name in ("state1", "state2")}
    names.optim.restore_optimizer(optimizer, saved, {"0.step": 1})
    found = [] if events == ["device writes", "wait"] * 2 else [f"restoring paged state: {events}"]
    events.clear()
    names.optim.optimizer_tensors(optimizer)
    return found if events[:1] == ["wait"] else [*found, "a snapshot reads managed memory without waiting"]


def main() -> None:
    job, _ = Job.parse(__doc__ or "")
    found = within(job, failures)
    print("\n".join(found) or "ok", flush=True)
    os._exit(len(found))  # the interpreter frees what torch has made of fake managed memory in any order


if __name__ == "__main__":
    main()
