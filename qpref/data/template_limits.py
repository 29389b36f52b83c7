"""Limits on the CPU time, memory and output of a chat template, which is a program that comes with the model.

transformers runs it in jinja2's sandbox, which denies access to the machine, but doesn't stop endless loops or
unlimited memory.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpref.errors import PolicyError
from qpref.linux import resource

SECONDS = 2.0
"""Maximum CPU time inside `limited`; 64 rows take about 10 ms."""
AGAIN = 0.2
"""CPU time after which it is stopped again: an exception within a callback of the garbage collector is ignored."""
BYTES = 1 << 30
"""Maximum memory that the code inside `limited` may add."""
CHARACTERS_PER_CHARACTER = 20
CHARACTERS_AT_LEAST = 1_000_000
"""Maximum length of a rendered conversation: this many times its texts, or this many characters if that is more."""
HINT = 'the chat_template comes with the model; fix it, or set [data] template = "none"'


class _OutOfTimeError(BaseException):
    """Not an Exception: jinja2 continues after any Exception in an expression that it evaluates at compile time."""


@contextmanager
def limited() -> Iterator[None]:
    """Stop the code inside if it takes more than SECONDS of CPU time or BYTES of added memory.

    Time is limited only in the main thread, where Python delivers signals and the command line runs.

    Raises:
        PolicyError: a limit was exceeded.
    """
    memory = resource.getrlimit(resource.RLIMIT_AS)
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, _too_slow) if is_main else None
    try:
        _limit_memory(memory)
        if is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, AGAIN)
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


def check_output_size(rendered: str, num_characters: int) -> None:
    """Check that a rendered conversation isn't far longer than its texts.

    Args:
        num_characters: characters of its texts.

    Raises:
        PolicyError: it is.
    """
    if len(rendered) > max(CHARACTERS_AT_LEAST, CHARACTERS_PER_CHARACTER * num_characters):
        raise PolicyError(f"the chat template renders {num_characters} characters as {len(rendered)}", HINT)


def _limit_memory(memory: tuple[int, int]) -> None:
    """Limit the address space to its current size plus BYTES; no limit where /proc isn't available."""
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        allowed = int(sizes.read_text().split()[0]) * resource.getpagesize() + BYTES
        if memory[0] == resource.RLIM_INFINITY or allowed < memory[0]:
            resource.setrlimit(resource.RLIMIT_AS, (allowed, memory[1]))


def _too_slow(*_: Any) -> None:
    raise _OutOfTimeError
