"""Runs a function in several processes that form one world over loopback, and returns what each of them returned."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpref.cli.output import StderrHandler, end_process
from qpref.distributed.join import joined
from qpref.errors import FailedElsewhere, QprefError


@dataclass(frozen=True)
class Outcome:
    """How one process ended: its exit code, all that it printed, and what its function returned."""

    rank: int
    code: int
    output: str
    result: Any


def fork_ranks(size: int, function: Callable[..., Any], *args: Any, limit: float = 240) -> list[Any]:
    """Call `function(world, *args)` in `size` forks of this process: torch is loaded in them.

    Args:
        args: whatever the function takes; what it returns is JSON.
        limit: seconds after which the processes are killed.

    Returns:
        Results in the order of ranks.

    Raises:
        AssertionError: a process failed.
    """
    outcomes = start_forks(size, function, *args, limit=limit)
    assert [each.code for each in outcomes] == [0] * size, "\n".join(
        f"rank {each.rank}: {each.code}\n{each.output}" for each in outcomes
    )
    return [each.result for each in outcomes]


def start_forks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: int = 60,
    limit: float = 120,
    abandoned: Sequence[int] = (),
) -> list[Outcome]:
    """Call a function as `fork_ranks` does, whatever becomes of the processes.

    Args:
        timeout: of the world, in seconds.
        limit: seconds after which the processes are killed.
        abandoned: ranks that are not waited for, and killed once the others have ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        children = {}
        for rank in range(size):
            child = os.fork()
            if child == 0:
                _run_fork(rank, environment(rank, size, port), function, args, Path(folder), timeout)
            children[rank] = child
        codes, deadline = {}, time.monotonic() + limit
        while children.keys() - abandoned and time.monotonic() < deadline:
            _collect(children, codes, os.WNOHANG)
            time.sleep(0.02)
        for child in children.values():
            os.kill(child, signal.SIGKILL)
        _collect(children, codes, 0)
        return [_outcome(rank, codes[rank], Path(folder)) for rank in range(size)]


def _collect(children: dict[int, int], codes: dict[int, int], options: int) -> None:
    """Move the children that have ended to their exit codes."""
    for rank, child in list(children.items()):
        found, status = os.waitpid(child, options)
        if found:
            codes[rank] = os.waitstatus_to_exitcode(status)
            del children[rank]


def _run_fork(
    rank: int, variables: dict[str, str], function: Callable[..., Any], args: Any, folder: Path, timeout: int
) -> None:
    code = 1
    try:
        os.environ.update(variables)
        descriptor = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
        _call(function, args, folder / f"{rank}.json", timeout)
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        end_process(code)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables by which a launcher tells a process of the others."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _outcome(rank: int, code: int, folder: Path) -> Outcome:
    result = folder / f"{rank}.json"
    return Outcome(
        rank=rank,
        code=code,
        output=(folder / f"{rank}.log").read_text(),
        result=json.loads(result.read_text()) if result.exists() else None,
    )


def _call(function: Callable[..., Any], args: Any, output: Path, timeout: float) -> None:
    """Call the function; an error ends the process as it ends the command line."""
    log = logging.getLogger("qpref")
    log.handlers, log.propagate = [StderrHandler()], False
    log.setLevel(logging.INFO)
    try:
        with joined(torch.device("cpu"), timeout=60) as world:  # a busy machine takes its time to start them
            if world.peers is not None:
                world.peers.timeout = float(timeout)
            result = function(world, *args)
    except QprefError as error:
        if not isinstance(error, FailedElsewhere):
            print(f"error: {error}", flush=True)
        end_process(error.exit_code)
    output.write_text(json.dumps(result))
