"""Signals that ask a run to stop between two steps, with its state saved."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("qpref")


@contextmanager
def stop_request(announce: bool = True) -> Iterator[Sequence[int]]:
    """Collect the numbers of the signals that asked to stop; a second interrupt stops at once.

    A signal that is ignored stays so, as SIGHUP under nohup, whose run outlives its terminal.

    Args:
        announce: log the first signal; one of several processes does.

    Outside the main thread Python installs no handlers, and the list stays empty.
    """
    requested: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def note(number: int, frame: object) -> None:
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested.append(number)
        if announce:
            log.warning("stopping after this step; interrupt again to stop at once")

    before: dict[int, Callable[..., Any] | int | None] = {}
    for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(caught) != signal.SIG_IGN:
            before[caught] = signal.signal(caught, note)
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
