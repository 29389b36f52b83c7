"""Deterministic algorithms on a GPU, where attention's backward pass adds in any order by default.

The flag is torch's own and holds for the whole process, so it reaches recomputed layers and autograd's threads. It is
strict: under `warn_only` the flash and memory-efficient backward passes stay as they are, with a warning (torch 2.13's
`_flash_attention_backward`, which `varlen_attn` calls too).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger("qpref")

OFF, STRICT = 0, 2
"""Values of `torch.set_deterministic_debug_mode`."""
NO_DETERMINISTIC_WAY = (" does not have a deterministic implementation", "operation is not deterministic because")
"""What torch's errors say in strict mode: of an operator, and of cuBLAS without a fixed workspace."""


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """Choose deterministic algorithms on a GPU inside; on a CPU nothing changes, its sums have a fixed order.

    Enter it before the process's first matrix product on the GPU: cuBLAS reads its workspace's size once.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode(STRICT)
    memory.fill_uninitialized_memory = False  # one kernel for each new tensor, and nothing here reads unwritten memory
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        memory.fill_uninitialized_memory = before[1]


def is_deterministic() -> bool:
    """Return whether kernels outside of torch should be deterministic too."""
    return torch.get_deterministic_debug_mode() == STRICT


@contextmanager
def distinct_indices() -> Iterator[None]:
    """Let torch scatter as usual inside, where no index occurs twice: the order of the sums can't matter then.

    In strict mode it sorts the indices first, about ten kernels for each scatter.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(OFF)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def needs_nondeterminism(error: BaseException) -> bool:
    """Return whether an operator raised this because it has no deterministic implementation."""
    return is_deterministic() and any(words in str(error) for words in NO_DETERMINISTIC_WAY)


def gave_up_determinism(error: BaseException) -> bool:
    """Switch determinism off for the rest of the run, with one warning, if the error is about an operator without it.

    Returns:
        True where it was switched off and the work can be repeated.
    """
    if not needs_nondeterminism(error):
        return False
    text = str(error)
    torch.set_deterministic_debug_mode(OFF)
    operator = text.partition(NO_DETERMINISTIC_WAY[0])[0] if NO_DETERMINISTIC_WAY[0] in text else None
    reason = f"{operator.split()[-1]} is not deterministic on this GPU" if operator else (
        "cuBLAS needs CUBLAS_WORKSPACE_CONFIG=:4096:8 before the process's first matrix product"
    )  # fmt: skip
    log.warning("[train] deterministic: %s; from here on, repeating the run may give other bits", reason)
    return True
