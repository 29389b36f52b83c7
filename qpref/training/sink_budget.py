"""A limit on the processor time of metric sinks, which share Python's lock with training.

A sink that waits, for a network or a disk, costs training nothing. One that computes takes the lock away from it: a
busy loop makes every step several times as long.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

OPEN_SECONDS = 10.0
"""Processor time that a sink may take to open: trackers import their clients then."""
WRITE_SECONDS = 1.0
WRITE_SHARE = 0.02
"""Processor time that a sink may take for its rows: so much, and this share of the time since the first."""
CHECK_EVERY = 0.2
"""Seconds."""


class SinkStopped(BaseException):
    """Raised inside a sink that computes on and on; no handler of `Exception` catches it."""


class SinkBudget:
    """Processor time of the sink whose thread makes this object."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        # Taken here, since another thread could ask for it when this one has ended.
        self._clock = time.pthread_getcpuclockid(self._thread)
        self._used_before, self._since, self._is_open = self._used(), time.monotonic(), False

    def start_writing(self) -> None:
        """Note that the sink is open."""
        self._used_before, self._since, self._is_open = self._used(), time.monotonic(), True

    def excess(self) -> str | None:
        """Say what the sink has taken beyond its limit; None within it, and where its thread has ended."""
        try:
            used = self._used() - self._used_before
        except OSError:
            return None
        elapsed = time.monotonic() - self._since
        allowed = WRITE_SECONDS + WRITE_SHARE * elapsed if self._is_open else OPEN_SECONDS
        if used <= allowed:
            return None
        return f"took {used:.1f} s of processor time within {elapsed:.0f} s, which slows training down"

    def stop(self) -> None:
        """Raise SinkStopped at the thread's next Python instruction; it can't interrupt native code."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(SinkStopped))

    def _used(self) -> float:
        return time.clock_gettime(self._clock)


class SinkWatch:
    """A thread that looks at the sinks' budgets until it is closed.

    Args:
        checks: of each sink, called from that thread.
    """

    def __init__(self, checks: list[Callable[[], None]]) -> None:
        self._checks, self._closed = checks, threading.Event()
        if checks:
            threading.Thread(target=self._run, daemon=True, name="qpref sink watch").start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(CHECK_EVERY):
            for check in self._checks:
                check()
