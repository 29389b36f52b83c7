"""Runs a function in several processes that form one world over loopback, and returns what each of them returned."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import socket
import subprocess
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


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(world, *args)`, of a module's top level, in `size` processes; arguments and result are JSON.

    Returns:
        Results in the order of ranks.

    Raises:
        AssertionError: a process failed, or all of them together took longer than `timeout` seconds.
    """
    outcomes = start_ranks(size, function, *args, limit=timeout)
    assert [each.code for each in outcomes] == [0] * size, "\n".join(
        f"rank {each.rank}: {each.code}\n{each.output}" for each in outcomes
    )
    return [each.result for each in outcomes]


def start_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: int = 60,
    limit: float = 120,
    abandoned: Sequence[int] = (),
) -> list[Outcome]:
    """Call a function as `run_ranks` does, whatever becomes of the processes.

    Args:
        timeout: of the world, in seconds.
        limit: seconds after which the processes are killed.
        abandoned: ranks that are not waited for, and killed once the others have ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        started = [_start(rank, size, port, function, args, Path(folder), timeout) for rank in range(size)]
        deadline = time.monotonic() + limit
        try:
            for rank, process in enumerate(started):
                if rank not in abandoned:
                    process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in started:
                process.kill()
                process.wait()
        return [_outcome(rank, process.returncode, Path(folder)) for rank, process in enumerate(started)]


def fork_ranks(size: int, function: Callable[..., Any], *args: Any, limit: float = 240) -> list[Any]:
    """Do what `run_ranks` does in forks of this process, which has loaded torch: they cost their work alone."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        waiting = {_fork(rank, size, port, function, args, Path(folder)): rank for rank in range(size)}
        codes, deadline = dict.fromkeys(range(size), -signal.SIGKILL), time.monotonic() + limit
        while waiting and time.monotonic() < deadline:
            for child, rank in list(waiting.items()):
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    del waiting[child]
            time.sleep(0.01)
        for child in waiting:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        outcomes = [_outcome(rank, code, Path(folder)) for rank, code in codes.items()]
    assert not any(codes.values()), "\n".join(f"rank {each.rank}: {each.code}\n{each.output}" for each in outcomes)
    return [each.result for each in outcomes]


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


def _fork(rank: int, size: int, port: int, function: Callable[..., Any], args: Any, folder: Path) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        with (folder / f"{rank}.log").open("w") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            try:
                os.environ |= environment(rank, size, port)
                with joined(torch.device("cpu"), timeout=60) as world:
                    result = function(world, *args)
                (folder / f"{rank}.json").write_text(json.dumps(result))
                code = 0
            except BaseException:  # noqa: BLE001 - the test shows it
                traceback.print_exc(file=log)
    finally:
        os._exit(code)


def _start(
    rank: int, size: int, port: int, function: Callable[..., Any], args: Any, folder: Path, timeout: int
) -> subprocess.Popen[bytes]:
    variables = os.environ | environment(rank, size, port) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        __file__,
        function.__module__,
        function.__name__,
        json.dumps(args),
        str(folder / f"{rank}.json"),
        str(timeout),
    ]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)


def _outcome(rank: int, code: int, folder: Path) -> Outcome:
    result = folder / f"{rank}.json"
    return Outcome(
        rank=rank,
        code=code,
        output=(folder / f"{rank}.log").read_text(),
        result=json.loads(result.read_text()) if result.exists() else None,
    )


def _main(module: str, name: str, args: str, output: str, timeout: str) -> None:
    """Call the function; an error ends the process as it ends the command line."""
    log = logging.getLogger("qpref")
    log.handlers, log.propagate = [StderrHandler()], False
    log.setLevel(logging.INFO)
    try:
        with joined(torch.device("cpu"), timeout=60) as world:  # a busy machine takes its time to start them
            assert world.peers is not None
            world.peers.timeout = float(timeout)
            result = getattr(importlib.import_module(module), name)(world, *json.loads(args))
    except QprefError as error:
        if not isinstance(error, FailedElsewhere):
            print(f"error: {error}", flush=True)
        end_process(error.exit_code)
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
