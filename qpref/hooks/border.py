"""The border to plugins' code: whatever it raises, and whatever it changes for the whole process, is named.

A loss that leaves gradients off, or a check that raises KeyboardInterrupt, would otherwise end or change a run, and
nothing would say where it came from.
"""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

from qpref.errors import DeviceMemoryError, PluginError
from qpref.hooks.hang_watch import watch
from qpref.hooks.process_state import ProcessState

T = TypeVar("T")
Failure = Callable[[str], PluginError]
"""Makes the error of a plugin from what it did, such as "TypeError: ..." or "changed torch's grad mode"."""

_CORE = "qpref"
_plugin_packages: set[str] = set()
_real_exit = os._exit


@contextmanager
def guarded(
    who: object, raised: Failure, changed: Failure, *, passes: Callable[[BaseException], bool] = lambda _: False,
    random: bool = False,
) -> Iterator[None]:  # fmt: skip
    """Run a plugin's code; the settings of the process are as before afterwards, also where it raises.

    Args:
        who: the plugin, for messages about a call that doesn't return or has no memory.
        raised: makes the error of an exception.
        changed: makes the error of changed settings.
        passes: True for exceptions that the caller handles.
        random: the code must draw no random numbers either.

    Raises:
        PluginError: of `raised` or `changed`.
        DeviceMemoryError: the code ran out of memory.
        KeyboardInterrupt: the user's.
    """
    before = ProcessState.now(random_numbers=random)
    watch.enter(who)
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - the plugin border
        before.restore()
        raise_named(error, who, raised, passes)
    finally:
        watch.leave()
    if settings := before.restore():
        raise changed(_change(settings))


def guarded_items(
    who: object, make: Callable[[], Iterable[T]], raised: Failure, passes: Callable[[BaseException], bool]
) -> Iterator[T]:
    """Yield what a plugin yields; the plugin's own code is guarded, and not its consumer's between two items.

    Costs half a microsecond an item, so it doesn't look at settings: `unchanged` does, once around all items.

    Args:
        who, raised, passes: as for `guarded`.
        make: the plugin's function without its arguments.
    """
    items: Iterator[T] | None = None
    while True:
        watch.enter(who)
        try:
            items = iter(make()) if items is None else items
            item = next(items)
        except StopIteration:
            return
        except BaseException as error:  # noqa: BLE001 - the plugin border
            raise_named(error, who, raised, passes)
        finally:
            watch.leave()
        yield item


def raise_named(
    error: BaseException, who: object, raised: Failure, passes: Callable[[BaseException], bool]
) -> NoReturn:
    """Raise the error that names a plugin for an exception of its code; arguments as for `guarded`."""
    if passes(error) or is_interrupt(error):
        raise error
    if isinstance(error, MemoryError):
        raise DeviceMemoryError(f"{who} ran out of memory", "free the memory of other programs") from error
    raise raised(described(error)) from error


@contextmanager
def unchanged(changed: Failure) -> Iterator[None]:
    """Run code in which plugins take turns; the settings of the process are as before afterwards.

    Raises:
        PluginError: of `changed`.
    """
    before = ProcessState.now()
    try:
        yield
    finally:
        settings = before.restore()
    if settings:
        raise changed(_change(settings))


def described(error: BaseException) -> str:
    """Return an exception's type and text."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _change(settings: Sequence[str]) -> str:
    return f"changed {', '.join(settings)}, which would change the whole run"


def is_interrupt(error: BaseException) -> bool:
    """Return whether an exception is the user's interrupt, and none that some code has raised itself.

    A signal raises KeyboardInterrupt in a handler of the core's, or from outside of any `raise` statement.
    """
    if not isinstance(error, KeyboardInterrupt) or error.__traceback__ is None:
        return False
    innermost = error.__traceback__
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    code = innermost.tb_frame.f_code.co_code
    is_raised = dis.opname[code[innermost.tb_lasti]] == "RAISE_VARARGS"
    return not is_raised or _package(innermost.tb_frame) == _CORE


def note_plugin(module: str) -> None:
    """Name the exits of this plugin's module from here on: its `os._exit` would end the process without a word.

    Within its code `os._exit` raises SystemExit, as `sys.exit` does. In child processes and in everybody else's code it
    is unchanged. This is the one function of another module that qpref replaces, because nothing else does: Python
    has no audit event for it (PEP 578), runs no handler at such an exit, and a supervising process, which could see
    it, would have to stand between the shell's signals and the run for the sake of this case alone. Without it, a
    check that exits with 0 looks like data without a finding.
    """
    _plugin_packages.add(module.partition(".")[0])
    os._exit = _exit


def _exit(status: int) -> NoReturn:
    if os.getpid() == _OWN_PROCESS and _innermost_owner(sys._getframe(1)) in _plugin_packages:
        raise SystemExit(f"os._exit({status})")
    _real_exit(status)


_OWN_PROCESS = os.getpid()


def _innermost_owner(frame: FrameType | None) -> str | None:
    """Return the package, the core's or a plugin's, whose code is executed; None for neither's."""
    while frame is not None:
        package = _package(frame)
        if package == _CORE or package in _plugin_packages:
            return package
        frame = frame.f_back
    return None


def _package(frame: FrameType) -> str:
    # Under `python -m qpref` the core's first module is called __main__; its spec has the real name.
    spec: Any = frame.f_globals.get("__spec__")
    name = getattr(spec, "name", None) or frame.f_globals.get("__name__", "")
    return str(name).partition(".")[0]
