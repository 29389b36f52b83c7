"""Train a recipe in a process without a network; with `--die-after STEP` it kills itself once the trackers have that
step, which no checkpoint has."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

SLOW_WRITES = 2.0
"""Seconds within which trackers write what they got: TensorBoard takes one."""
NOTED_AT_ONCE = ("mlflow", "trackio")
"""Trackers whose record has each row as soon as they have it; the others' rows are noted at the end."""
LOCAL = {"localhost", "127.0.0.1", "::1", None}


def block_network(attempts: Path) -> None:
    """Refuse every connection that leaves this machine, and note it."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def refuse(host: object) -> None:
        with attempts.open("a") as file:
            file.write(f"{host}\n")
        raise OSError("no network")

    def connect_locally(self, address):
        if self.family != socket.AF_UNIX and address[0] not in LOCAL:
            refuse(address[0])
        return connect(self, address)

    def look_up_locally(host, *arguments, **options):
        if host not in LOCAL:
            refuse(host)
        return look_up(host, *arguments, **options)

    socket.socket.connect, socket.getaddrinfo = connect_locally, look_up_locally


def die_after(step: int, sinks: Path) -> None:
    from qpref.training import loop

    take_step = loop.Trainer.step

    def die(trainer):
        if trainer.state.step == step:
            wait_for_trackers(step, sinks)
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(trainer)

    loop.Trainer.step = die


def wait_for_trackers(step: int, sinks: Path) -> None:
    """Wait until all trackers are open, and those that have each row at once have the step's."""
    names = json.loads(os.environ["TRACKERS"])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        all((sinks / f"{name}.json").is_file() for name in names)
        and any((sinks / "tensorboard").glob("events.*"))
        and all(last_step(sinks / f"{name}.json") >= step for name in NOTED_AT_ONCE)
    ):
        time.sleep(0.1)
    time.sleep(SLOW_WRITES)


def last_step(record: Path) -> int:
    return json.loads(record.read_text())["last_steps"].get("train", 0)


if __name__ == "__main__":
    recipe, output, *options = sys.argv[1:]
    block_network(Path(output).parent / "attempts.txt")
    if options[:1] == ["--die-after"]:
        die_after(int(options[1]), Path(output) / "sinks")
        options = options[2:]
    from qpref.cli import main

    main(["train", recipe, "--output", output, *options], prog_name="qpref")
