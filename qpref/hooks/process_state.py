"""Settings of the process that a plugin's code must leave as they are: torch's, and Python's own.

A changed working directory moves relative paths, a disabled logger hides the next warning, a replaced handler makes
Ctrl+C lose the run: each would show much later, and as a fault of the core's.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qpref.hooks.torch_state import TorchState

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_PROF)
LOGGER = "qpref"


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of the process: how it is read, and how it is set back."""

    get: Callable[[], Any]
    put: Callable[[Any], object]


def _folder() -> str | None:
    with suppress(OSError):  # it has been removed
        return os.getcwd()  # noqa: PTH109 - the text alone, at each call of a loss
    return None


def _enter(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _umask() -> int:
    mask = os.umask(0o077)  # for a moment another thread's files are nobody else's
    os.umask(mask)
    return mask


def _handle(handlers: Sequence[Any]) -> None:
    for number, handler in zip(SIGNALS, handlers, strict=True):
        if handler is not None:  # one that Python hasn't installed
            signal.signal(number, handler)


def _stop_timers(running: Sequence[bool]) -> None:
    for timer, was_running in zip(TIMERS, running, strict=True):
        if not was_running:
            signal.setitimer(timer, 0)


def _streams() -> tuple[Any, Any]:
    return sys.stdout, sys.stderr


def _put_streams(streams: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = streams


def _logging() -> tuple[Any, ...]:
    logger = logging.getLogger(LOGGER)
    return logger.level, tuple(logger.handlers), logger.propagate, logger.disabled, logging.root.manager.disable


def _put_logging(values: tuple[Any, ...]) -> None:
    logger = logging.getLogger(LOGGER)
    level, handlers, logger.propagate, logger.disabled, disabled = values
    logger.handlers = list(handlers)
    logger.setLevel(level)
    logging.disable(disabled)


def _errors() -> list[Any]:
    """List the filters that make an error of a warning; others, which libraries add when imported, only show less."""
    return [entry for entry in warnings.filters if entry[0] == "error"]


def _drop_errors(kept: list[Any]) -> None:
    left = [entry for entry in warnings.filters if entry[0] != "error" or entry in kept]
    warnings.filters[:] = left  # type: ignore[index]


SETTINGS: dict[str, Setting] = {
    "the working directory": Setting(_folder, _enter),
    "the umask": Setting(_umask, os.umask),
    "standard output or error": Setting(_streams, _put_streams),
    "the recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
    "garbage collection": Setting(gc.isenabled, lambda was: gc.enable() if was else gc.disable()),
    "the logger of qpref": Setting(_logging, _put_logging),
    "warnings that are errors": Setting(_errors, _drop_errors),
}
SHARED = frozenset(SETTINGS) - {"standard output or error"}
"""Settings that code of another thread must leave alone too; a progress bar replaces the streams while it is shown."""
OF_MAIN_THREAD: dict[str, Setting] = {
    "signal handlers": Setting(lambda: [signal.getsignal(number) for number in SIGNALS], _handle),
    "a timer": Setting(lambda: [signal.getitimer(timer)[0] > 0 for timer in TIMERS], _stop_timers),
}
"""Settings that no other thread can change; a signal that ends the process comes from a timer that runs on."""


@dataclass(frozen=True, slots=True)
class ProcessState:
    """Settings of torch and of Python, as they were.

    Attributes:
        values: of Python's, by name.
        random_state: of Python's generator, where it is compared.
    """

    torch: TorchState
    values: Mapping[str, Any]
    random_state: object = None

    @classmethod
    def now(cls, *, random_numbers: bool = False) -> ProcessState:
        """Read the settings.

        Args:
            random_numbers: the random numbers' state too.
        """
        values = {name: setting.get() for name, setting in _settings().items()}
        return cls(TorchState.now(random=random_numbers), values, random.getstate() if random_numbers else None)

    def shared(self) -> ProcessState:
        """Return the settings that all threads share, and that training itself doesn't change."""
        values = {name: value for name, value in self.values.items() if name in SHARED}
        return ProcessState(self.torch.shared(), values)

    def restore(self) -> list[str]:
        """Set what has changed since back as it was, and return the names of it."""
        changed = [f"torch's {name}" for name in self.torch.restore()]
        for name, setting in _settings().items():
            if name in self.values and setting.get() != self.values[name]:
                setting.put(self.values[name])
                changed.append(name)
        if self.random_state is not None and random.getstate() != self.random_state:
            random.setstate(self.random_state)  # type: ignore[arg-type]
            changed.append("Python's random number state")
        return changed


def _settings() -> dict[str, Setting]:
    is_main = threading.current_thread() is threading.main_thread()
    return SETTINGS | OF_MAIN_THREAD if is_main else SETTINGS
