"""Waiting for a collective: a second at a time, with a look at the processes that are missing in between.

Nothing compares clocks of different machines: a sign of life is a number that has grown since the last look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

SLICE_SECONDS = 1
"""Seconds between two looks at the other processes while one waits."""
POLL_SECONDS = 0.0005
DEAD_SECONDS = 5.0
"""Seconds without a sign of life after which a process counts as dead; it gives two a second."""


@dataclass(frozen=True, slots=True)
class Sign:
    """A process's last sign of life.

    Attributes:
        count: signs that it has given.
        collectives: that it has come to.
        note: where it is.
    """

    count: int
    collectives: int
    note: str


@dataclass(slots=True, kw_only=True)
class Silence:
    """Time for which the processes that are missing at a collective have shown no progress.

    Attributes:
        read: reads the last sign of life of every process, by rank.
        name: of the collective.
        collective: its number.
        timeout: seconds without progress after which a process is lost.
        period: seconds between two looks, so that many processes don't keep the store busy.
    """

    read: Callable[[], Sequence[Sign]]
    name: str
    collective: int
    timeout: float
    period: float
    _began: float = field(default_factory=time.monotonic)
    _looked: float = 0.0
    _progress: dict[int, tuple[tuple[int, str], float]] = field(default_factory=dict)
    _alive: dict[int, tuple[int, float]] = field(default_factory=dict)

    def too_long(self) -> str | None:
        """Look at the signs of life; explains which ranks are lost, None while they make progress."""
        now = time.monotonic()
        if now - self._looked < self.period:
            return None
        self._looked = now
        try:
            signs = self.read()
        except RuntimeError:
            return f"rank 0, or the launcher's process beside it, is gone; {self.name} waited for it"
        for rank, sign in enumerate(signs):
            self._see(rank, sign, now)
        missing = [rank for rank, sign in enumerate(signs) if sign.collectives < self.collective]
        late = [rank for rank in missing if now - self._progress[rank][1] > self.timeout]
        if late:
            return "; ".join(self._sentence(rank, signs[rank], now) for rank in late)
        if not missing and now - self._began > self.timeout:
            return f"all ranks came to {self.name}, and it isn't done after {self.timeout:.0f} s"
        return None

    def _see(self, rank: int, sign: Sign, now: float) -> None:
        where, before = (sign.collectives, sign.note), self._progress.get(rank)
        if before is None or before[0] != where:
            self._progress[rank] = (where, now if before else self._began)
        alive = self._alive.get(rank)
        if alive is None or alive[0] != sign.count:
            self._alive[rank] = (sign.count, now)

    def _sentence(self, rank: int, sign: Sign, now: float) -> str:
        silent = now - self._alive[rank][1]
        life = "it is alive" if silent < DEAD_SECONDS else f"its last sign of life was {silent:.0f} s ago"
        return f"rank {rank} didn't come to {self.name} within {self.timeout:.0f} s; {life}, at {sign.note}"


def is_of_connection(error: Exception) -> bool:
    """Return whether an error is torch.distributed's, or its backends', which raise plain RuntimeErrors."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def is_done_soon(work: Any, on_gpu: bool) -> bool:
    """Wait up to a second for a collective; returns whether it is done.

    Args:
        work: torch's handle.

    Raises:
        RuntimeError: it failed.
    """
    if on_gpu:  # NCCL's own wait is one of the stream, and with a timeout it ends the group
        deadline = time.monotonic() + SLICE_SECONDS
        while not work.is_completed():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        work.wait()
        return True
    try:
        work.wait(timedelta(seconds=SLICE_SECONDS))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # done between the timeout and the question; or it failed, and raises that
    return True
