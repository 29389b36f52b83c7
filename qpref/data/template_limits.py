"""Limits on what a chat template may take: it comes with the model, and is a program.

transformers runs it in jinja2's sandbox, which keeps it from the machine, but not from looping or filling the memory.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpref.errors import PolicyError

SECONDS = 2.0
"""CPU time that one guarded stretch may take; 64 rows take some 10 ms."""
BYTES = 1 << 30
"""Memory that a guarded stretch may add."""
CHARACTERS_PER_CHARACTER = 20
CHARACTERS_AT_LEAST = 1_000_000
"""A rendered conversation may be so many times as long as its texts, and at least so long."""
HINT = 'its program (chat_template) comes with the model; mend it, or set [data] template = "none"'


class _OutOfTimeError(BaseException):
    """No Exception, since jinja2 goes on after any Exception in an expression that it computes ahead."""


@contextmanager
def bounded() -> Iterator[None]:
    """Stop what takes over SECONDS of CPU time or BYTES more of memory.

    Time is watched in the main thread alone, where Python delivers signals; the command line runs there.

    Raises:
        PolicyError: a limit was met.
    """
    memory = resource.getrlimit(resource.RLIMIT_AS)
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, _too_slow) if is_main else None
    try:
        _limit_memory(memory)
        if is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    except _OutOfTimeError:
        raise PolicyError(f"the chat template takes over {SECONDS:g} s", HINT) from None
    except MemoryError:
        raise PolicyError(f"the chat template takes over {BYTES >> 20} MiB of memory", HINT) from None
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, memory)


def refuse_flood(rendered: str, num_characters: int) -> None:
    """Refuse a rendering that is far longer than what it renders.

    Raises:
        PolicyError: it is.
    """
    if len(rendered) > max(CHARACTERS_AT_LEAST, CHARACTERS_PER_CHARACTER * num_characters):
        raise PolicyError(f"the chat template makes {len(rendered)} characters of {num_characters}", HINT)


def _limit_memory(memory: tuple[int, int]) -> None:
    """Let the address space grow by BYTES; left alone where the system doesn't tell its size."""
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        allowed = int(sizes.read_text().split()[0]) * resource.getpagesize() + BYTES
        if memory[0] == resource.RLIM_INFINITY or allowed < memory[0]:
            resource.setrlimit(resource.RLIMIT_AS, (allowed, memory[1]))


def _too_slow(*_: Any) -> None:
    raise _OutOfTimeError
