"""The process of the `qpref` command: an interrupt ends it with 130, whenever it comes."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

EXIT_CODE = 128 + signal.SIGINT


def run() -> None:
    """Run the command line of this process.

    While the command is imported, and after it is done, an interrupt ends the process at once; in between it raises
    KeyboardInterrupt. Native code and libraries turn that into errors of their own, so an error after an interrupt
    counts as the interrupt. A process that ignores interrupts from its start, as under nohup, keeps ignoring them.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)
        _run_interruptible()
    from qpref.cli import main

    main()


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


def _quit(number: int, frame: object) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(EXIT_CODE)


if __name__ == "__main__":
    run()
