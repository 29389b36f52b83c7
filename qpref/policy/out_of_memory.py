"""Out-of-memory errors, of which every library raises a kind of its own, and work that may meet one."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from qpref.attention.determinism import gave_up_determinism
from qpref.errors import DeviceMemoryError

T = TypeVar("T")

KINDS = (RuntimeError, MemoryError, OSError)
"""Types among which out-of-memory errors are; torch.OutOfMemoryError and torch.AcceleratorError are RuntimeErrors."""
TEXTS = (
    "out of memory",  # torch's allocators, the driver ("CUDA error: out of memory"), Triton, bitsandbytes
    "cudaerrormemoryallocation",
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSPARSE, cuSOLVER
    "allocation_failed",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "can't allocate memory",  # torch's CPU allocator
    "cannot allocate memory",  # the operating system
    "not enough memory",
    "bad_alloc",
)

ONEDNN = ("could not create a primitive", "could not create a memory object")
"""All that oneDNN says on a CPU without memory for its code (measured under `ulimit -v`); longer messages of that form
are about arguments."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or the one that it was raised from, says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and says_out_of_memory(str(error)):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def says_out_of_memory(text: str) -> bool:
    """Return whether a library's message is about memory that ran out."""
    lower = text.lower()
    return lower.strip() in ONEDNN or any(words in lower for words in TEXTS)


def attempt(work: Callable[[], T]) -> T | None:
    """Return the result of work on the device; None if memory runs out, after the failed try's memory is free again.

    The work is repeated where it meets an operator that isn't deterministic (see `qpref.attention.determinism`), so it
    must be one that can be.
    """
    try:
        return work()
    except KINDS as error:
        is_repeated = gave_up_determinism(error)
        if not is_repeated and not is_out_of_memory(error):
            raise
    # Outside the except block, where the traceback no longer holds the failed try's tensors.
    if is_repeated:
        return attempt(work)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def fits(work: Callable[[], object]) -> bool:
    """Do the work as `attempt` does; returns whether memory sufficed."""
    return attempt(lambda: (work(),)) is not None


@contextmanager
def out_of_memory_as(what: str, hint: str) -> Iterator[None]:
    """Raise a DeviceMemoryError for every kind of out-of-memory inside."""
    try:
        yield
    except KINDS as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(what, hint) from error
