"""Start the processes of a run on this machine by torchrun's own launcher, and end as they end.

torchrun itself ends with 1 whatever happened, under a traceback; this returns the exit code of the process that failed
first, and adds nothing to its message.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qpref.errors import PeerError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(module: str, arguments: Sequence[str], count: int, seconds_to_stop: int) -> int:
    """Run `python -m module arguments` in `count` processes; returns the exit code of the first one that failed, or 0.

    Signals reach all processes, which have `seconds_to_stop` to save and leave before they are killed.

    Raises:
        PeerError: a process was killed, and no other one is left that says so.
    """
    _quiet_launcher()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    with tempfile.TemporaryDirectory(prefix="qpref-") as folder, _one_signal() as received:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="",  # `_one_signal` handles them
            shutdown_timeout=seconds_to_stop,
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as failed:
            if received:
                return 128 + received[0]
            return _exit_code(failed.failures, Path(folder))
        except SignalException:
            return 128 + received[0]
    return 0


def _quiet_launcher() -> None:
    """Keep the launcher's log off the console; the processes say themselves what happened."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _exit_code(failures: Mapping[int, Any], folder: Path) -> int:
    """Return the exit code of the first process that failed by itself.

    Raises:
        PeerError: all of them were killed, and no process that is left has said so.
    """
    by_time = sorted(failures.items(), key=lambda each: each[1].timestamp)
    for _, failure in by_time:
        if failure.exitcode > 0:
            return int(failure.exitcode)
    if not any(folder.rglob("error.json")):
        rank, failure = by_time[0]
        name = signal.Signals(-failure.exitcode).name
        raise PeerError(f"rank {rank} was ended by {name}", "continue with --resume where checkpoints exist")
    return PeerError.exit_code


@contextmanager
def _one_signal() -> Iterator[list[int]]:
    """Let the first signal end the launcher, which passes it on and waits; pass later ones on and keep waiting."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if len(received) == 1:
            raise SignalException(f"got signal {number}", sigval=signal.Signals(number))
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, number)

    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    """List the processes that this one has started."""
    listed = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    return [int(child) for child in listed.split()]
