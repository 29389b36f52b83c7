"""A collective that ends just after a second of waiting for it has run out is done, or has failed by its own error."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from qpref.distributed.peers import Peers
from qpref.distributed.waiting import is_done_soon


@dataclass
class Work:
    """torch's handle of a collective that isn't done while one waits with a timeout.

    Attributes:
        is_late: True for one that is done right after that.
        fault: that it ends with.
    """

    is_late: bool
    fault: str = ""

    def wait(self, timeout: object = None) -> None:
        if timeout is not None:
            raise RuntimeError("Operation timed out!")
        if self.fault:
            raise RuntimeError(self.fault)

    def is_completed(self) -> bool:
        return self.is_late


def test_work_that_ends_as_the_wait_does_is_done():
    assert is_done_soon(Work(is_late=True), on_gpu=False)
    assert not is_done_soon(Work(is_late=False), on_gpu=False)


def test_work_that_fails_as_the_wait_ends_raises_its_own_error():
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        is_done_soon(Work(is_late=True, fault="Connection closed by peer"), on_gpu=False)


def test_memory_that_runs_out_at_a_collective_is_no_broken_connection():
    def begin() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    peers = Peers(store=None, rank=0, size=2, hosts=None, timeout=3, hosts_store=False)  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        peers.finish(begin, "the gradients")
