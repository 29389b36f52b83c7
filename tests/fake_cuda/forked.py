"""Work in child processes, two at a time: fake CUDA changes torch for good, and a child costs no second import."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WORKERS = 2


def forked(work: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run each piece of work in a child of its own, and collect the results, which have to be JSON.

    Raises:
        RuntimeError: a child died; its name and how are in the message.
    """
    found, running, waiting = {}, {}, list(work.items())
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < WORKERS:
                name, piece = waiting.pop(0)
                result = Path(folder, f"{len(waiting)}.json")
                running[_start(piece, result)] = name, result
            child, status = os.wait()
            name, result = running.pop(child)
            if status:
                for other in running:
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
                raise RuntimeError(f"{name}: its process ended with {os.waitstatus_to_exitcode(status)}")
            found[name] = json.loads(result.read_text())
    return {name: found[name] for name in work}


def _start(piece: Callable[[], Any], result: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        result.write_text(json.dumps(piece()))
        code = 0
    except Exception:  # noqa: BLE001  the parent says which child it was
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
