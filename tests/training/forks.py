"""Processes forked from one that has torch loaded, which cost their work alone and may be killed at any moment."""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qpref.errors import QprefError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BUG = 99
"""Exit code of a process that ends with another error than qpref's."""
MOST_WAITING = 100
"""Processes that may wait at a gate."""
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
LIBC = ctypes.CDLL(None, use_errno=True)


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a fork of this process, in which signals have their default effect; returns its id.

    It exits with 0, with the code of qpref's error or of a command, or as an interrupt does.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # pytest's handlers are not the child's
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return child
    code = BUG
    try:
        logging.disable()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        work()
        code = 0
    except QprefError as error:
        code = error.exit_code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as ending:
        code = int(ending.code or 0)
    except BaseException:  # noqa: BLE001 - pytest shows what the child prints
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a child; returns its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended(children: Sequence[int], count: int, seconds: float) -> list[int]:
    """Wait until so many of the children have ended, at most some seconds; returns those, which aren't reaped."""
    poll, names = select.poll(), {}
    try:
        for child in children:
            names[os.pidfd_open(child)] = child
        for descriptor in names:
            poll.register(descriptor, select.POLLIN)
        done: list[int] = []
        while len(done) < count and (ready := poll.poll(1000 * seconds)):
            for descriptor, _ in ready:
                poll.unregister(descriptor)
                done.append(names[descriptor])
        return done
    finally:
        for descriptor in names:
            os.close(descriptor)


def signalled(child: int, number: int, after: float) -> int:
    """Send a child a signal after some seconds, unless it has ended by then; returns its exit code."""
    if not ended([child], 1, after):
        os.kill(child, number)  # a child that ends here stays until it is waited for
    return exit_code(child)


@contextmanager
def gate() -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Yield `wait`, which holds up forked processes, and `open_gate`, which lets all of them go on."""
    reading, writing = os.pipe()

    def wait() -> None:
        os.read(reading, 1)

    def open_gate() -> None:
        os.write(writing, bytes(MOST_WAITING))

    try:
        yield wait, open_gate
    finally:
        open_gate()  # nobody waits for ever if a test fails
        os.close(reading)
        os.close(writing)


def enter_namespaces(kinds: int) -> bool:
    """Move this process, which has one thread, into namespaces of its own; False where the machine allows none.

    A new pid namespace holds the processes that are forked next; the first one has the id 1 in it.
    """
    user, group = os.getuid(), os.getgid()
    if LIBC.unshare(CLONE_NEWUSER | kinds):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return True
