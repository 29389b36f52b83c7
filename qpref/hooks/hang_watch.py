"""A thread that names a plugin whose code doesn't return.

It can't end that code, and it sees nothing while native code holds Python's lock; the message says how to interrupt.
"""

from __future__ import annotations

import logging
import os
import threading
import time

log = logging.getLogger("qpref")

SECONDS = 60.0
"""Time after which a call into a plugin is named, once."""
CHECKS = 12
"""Looks at the current call in that time."""


class HangWatch:
    """Watches the current call of one thread. Entering a call costs two assignments: there is one for each row."""

    def __init__(self) -> None:
        self._who: object = None
        self._number = 0
        self._thread: threading.Thread | None = None

    def enter(self, who: object) -> None:
        """Note that a call of `who` begins, or the next one of an iterator."""
        self._number += 1
        self._who = who
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="qpref hang watch")
            self._thread.start()

    def leave(self) -> None:
        """Note that the call has returned."""
        self._who = None

    def _run(self) -> None:
        seen, since, named = 0, time.monotonic(), 0
        while True:
            time.sleep(SECONDS / CHECKS)
            number, who, now = self._number, self._who, time.monotonic()
            if who is None or number != seen:
                seen, since = number, now
            elif now - since >= SECONDS and named != number:
                named = number
                log.warning(
                    "%s has not returned for %.0f s; Ctrl+C stops it (during training: twice), and where that doesn't "
                    "help, `kill -9 %d`; a run continues with --resume", who, now - since, os.getpid(),
                )  # fmt: skip


watch = HangWatch()
"""Of the thread that trains."""
