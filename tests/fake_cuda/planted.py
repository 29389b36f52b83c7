"""Faults that the harness and the product's own asserts have to catch; exits with the number of stages that caught one.

python -m tests.fake_cuda.planted layout-on-cpu      # stops at the first stage that catches it
python -m tests.fake_cuda.planted all                # JSON: fault -> stage -> error
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tests.fake_cuda import fake_cuda, names, startup
from tests.fake_cuda.job import Job, Run, within

PLANTED_IN = ("layout check", "start check", "a step in one")
"""Stages that run, the shortest ones that use all kernels."""


def of_layout(change: Any) -> Any:
    """A fault in the layout of keys."""
    key_layout = names.varlen.key_layout
    return names.varlen, "key_layout", lambda groups, device: change(key_layout, groups, device)


def layout_on_cpu() -> Any:
    return of_layout(lambda make, groups, device: make(groups, torch.device("cpu")))


def ends_in_int64() -> Any:
    def wide(make: Any, groups: Any, device: torch.device) -> Any:
        layout = make(groups, device)
        return replace(layout, query_ends=layout.query_ends.long())

    return of_layout(wide)


def layout_of_others() -> Any:
    """The keys of a stream with one token less."""

    def shorter(make: Any, groups: Any, device: torch.device) -> Any:
        last = groups[-1]
        return make((*groups[:-1], replace(last, prompt=last.prompt - 1)), device)

    return of_layout(shorter)


def weight_on_cpu() -> Any:
    pack = names.scoring.pack
    return names.scoring, "pack", lambda rows, device: replace(pack(rows, device), weight=torch.ones(len(rows)))


def strided_keys() -> Any:
    """Gathered keys and values in another order of memory."""
    gather = names.varlen._Gather.apply

    def strided(states: torch.Tensor, layout: Any) -> torch.Tensor:
        return gather(states, layout).transpose(0, 1).contiguous().transpose(0, 1)  # type: ignore[no-untyped-call]

    return names.varlen._Gather, "apply", strided


def float32_by_16_bit() -> Any:
    """A product of float32 and 16 bits through the product's own function, which asserts."""
    return names.head, "float32_matmul", lambda left, right: names.float32_mm(left.float(), right)


def float32_by_16_bit_unchecked() -> Any:
    """The same past that function, which only the kernel refuses."""
    product = torch.mm
    return names.head, "float32_matmul", lambda left, right: product(left.float(), right, out_dtype=torch.float32)


def gradient_in_16_bit() -> Any:
    """A sum of gradients whose dtypes differ."""
    add = torch.Tensor.index_add_
    return torch.Tensor, "index_add_", lambda total, dim, at, rows: add(total, dim, at, rows.bfloat16())


FAULTS = {
    "layout-on-cpu": layout_on_cpu,
    "ends-in-int64": ends_in_int64,
    "layout-of-others": layout_of_others,
    "weight-on-cpu": weight_on_cpu,
    "strided-keys": strided_keys,
    "float32-by-16-bit": float32_by_16_bit,
    "float32-by-16-bit-unchecked": float32_by_16_bit_unchecked,
    "gradient-in-16-bit": gradient_in_16_bit,
}


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    owner, name, wrong = FAULTS[fault]()
    right = getattr(owner, name)
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, right)


def caught(run: Run, meters: fake_cuda.Meters, fault: str) -> dict[str, str]:
    """What the first stage says that fails under the fault."""
    for name, stage in startup.stages(run, meters):
        if name in PLANTED_IN:
            with planted(fault):
                found = startup.attempted([(name, stage)], meters)
            if found:
                return found
    return {}


def all_caught(run: Run, meters: fake_cuda.Meters) -> dict[str, dict[str, str]]:
    """Each fault by itself, on one policy: what fails changes nothing of it."""
    return {fault: caught(run, meters, fault) for fault in FAULTS}


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in {*FAULTS, "all"}:
        sys.exit(__doc__)
    if sys.argv[1] == "all":
        print(json.dumps(within(Job(), all_caught)))
        sys.exit(0)
    sys.exit(len(within(Job(), lambda run, meters: caught(run, meters, sys.argv[1]))))
