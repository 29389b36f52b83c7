"""The process of the `qpref` command: an interrupt ends it with 130, whenever it comes."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from contextlib import suppress

EXIT_CODE = 128 + signal.SIGINT
THREAD_SECONDS = 2.0
"""Time that threads have to end after the command, before they are named."""


def run() -> None:
    """Run the command line of this process.

    While the command is imported, and after it is done, an interrupt ends the process at once; in between it raises
    KeyboardInterrupt. Native code and libraries turn that into errors of their own, so an error after an interrupt
    counts as the interrupt. A process that ignores interrupts from its start, as under nohup, keeps ignoring them.
    """
    with suppress(OSError, RuntimeError, ValueError, AttributeError):  # standard error is no file
        faulthandler.enable()  # a crash in native code, or os.abort, names the line of Python that it came from
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _quit)
            _run_interruptible()
        from qpref.cli import main

        main()
    finally:
        _name_threads_left()


def _run_interruptible() -> None:
    from qpref.cli import main

    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGINT, interrupt)
        main()
    except SystemExit as done:
        if not (interrupts and done.code):
            raise
        sys.exit(EXIT_CODE)
    except BaseException:
        if not interrupts:
            raise
        sys.stderr.write("error: interrupted\n")
        sys.exit(EXIT_CODE)
    finally:
        signal.signal(signal.SIGINT, _quit)


def _name_threads_left() -> None:
    """Name the threads that Python waits for at its end: a plugin's that never returns would look like a hang."""
    left = [each for each in threading.enumerate() if each is not threading.main_thread() and not each.daemon]
    deadline = time.monotonic() + THREAD_SECONDS
    for each in left:
        each.join(max(0.0, deadline - time.monotonic()))
    if alive := [each.name for each in left if each.is_alive()]:
        sys.stderr.write(
            f"warning: the command is done, and waits for threads that a plugin or a library has started: "
            f"{', '.join(alive)}; Ctrl+C ends it\n"
        )


def _quit(number: int, frame: object) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(EXIT_CODE)


if __name__ == "__main__":
    run()
