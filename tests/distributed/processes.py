"""Runs a function in several processes that form one world over loopback, and returns what each of them returned."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qpref.distributed.join import joined


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(world, *args)`, of a module's top level, in `size` processes; arguments and result are JSON.

    Returns:
        Results in the order of ranks.

    Raises:
        AssertionError: a process failed, or all of them together took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = [
            _start(rank, size, port, function, args, Path(folder)) for port in [free_port()] for rank in range(size)
        ]
        deadline = time.monotonic() + timeout
        try:
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in started]
        except subprocess.TimeoutExpired:
            codes = [process.poll() for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        outputs = [(Path(folder) / f"{rank}.log").read_text() for rank in range(size)]
        assert codes == [0] * size, "\n".join(
            f"rank {rank}: {code}\n{text}" for rank, (code, text) in enumerate(zip(codes, outputs, strict=True))
        )
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _start(
    rank: int, size: int, port: int, function: Callable[..., Any], args: Any, folder: Path
) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [
        sys.executable,
        __file__,
        function.__module__,
        function.__name__,
        json.dumps(args),
        str(folder / f"{rank}.json"),
    ]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _main(module: str, name: str, args: str, output: str) -> None:
    with joined(torch.device("cpu"), timeout=60) as world:
        result = getattr(importlib.import_module(module), name)(world, *json.loads(args))
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
