"""Runs of one recipe in several processes, forked from one that has loaded the model, so that a start costs little."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import preference_rows, write_jsonl
from processes import Outcome, environment, free_port

from qpref.cli.output import StderrHandler
from qpref.data.load import load_rows
from qpref.errors import FailedElsewhere, QprefError
from qpref.recipe.resolve import make_plan
from qpref.training import run
from qpref.training.prepare import Prepared, prepare

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BUG = 99
LIMIT_SECONDS = 240


class Team:
    """The processes of one run that is in progress."""

    def __init__(self, children: Sequence[int], logs: Sequence[Path]) -> None:
        self.children, self._logs = list(children), logs
        self._codes: dict[int, int] = {}

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a process, which may be done by then."""
        os.kill(self.children[rank], number)  # a child that has ended stays until it is waited for

    def is_done(self) -> bool:
        """True once every process has ended."""
        for rank, child in enumerate(self.children):
            if rank not in self._codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self._codes) == len(self.children)

    def outcomes(self) -> list[Outcome]:
        """Wait for all processes; those that outlast the limit are killed."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not self.is_done() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.kill()
        return [
            Outcome(rank=rank, code=self._codes[rank], output=log.read_text(), result=None)
            for rank, log in enumerate(self._logs)
        ]

    def codes(self) -> list[int]:
        """Wait for all processes; their exit codes by rank."""
        return [each.code for each in self.outcomes()]

    def kill(self) -> None:
        """End what still runs."""
        for rank, child in enumerate(self.children):
            if rank not in self._codes:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        while not self.is_done():
            time.sleep(0.02)


class Trainings:
    """Starts runs of one recipe, which this process has prepared, in teams of processes."""

    def __init__(self, folder: Path, recipe: dict[str, dict[str, Any]]) -> None:
        self._folder, self._count = folder, 0
        self.plan = make_plan(recipe, output=folder / "none")
        self._prepared = prepare(self.plan, load_rows(self.plan))

    def start(
        self,
        size: int,
        output: Path,
        *,
        resume: bool = False,
        variables: dict[str, str] | None = None,
        change: Callable[[int, Any, Prepared], tuple[Any, Prepared]] | None = None,
    ) -> Team:
        """Fork the processes of a run.

        Args:
            variables: of the environment, beside those of the launcher.
            change: given a rank, its plan and its prepared parts, returns others for them.
        """
        self._count += 1
        port = free_port()
        logs = [self._folder / f"{self._count}-{rank}.log" for rank in range(size)]
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # pytest's handlers are not the child's
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                set_variables = environment(rank, size, port) | (variables or {})
                self._train(rank, set_variables, logs[rank], output, resume, change)
            children.append(child)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return Team(children, logs)

    def _train(self, rank, variables, log, output, resume, change) -> None:
        """Train in a child, which ends here."""
        code = BUG
        try:
            os.environ.update(variables)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            logger = logging.getLogger("qpref")
            logger.handlers, logger.propagate = [StderrHandlerOf(descriptor)], False
            logger.setLevel(logging.INFO)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            plan, prepared = replace(self.plan, output=output), self._prepared
            if change is not None:
                plan, prepared = change(rank, plan, prepared)
            run.prepare = lambda plan, checked, world, kept: replace(prepared, world=world)
            run.train_plan(plan, resume=resume)
            code = 0
        except QprefError as error:
            if not isinstance(error, FailedElsewhere):
                os.write(1, f"error: {error}\n".encode())
            code = error.exit_code
        except BaseException as error:
            os.write(1, f"bug: {type(error).__name__}: {error}\n".encode())
            raise
        finally:
            os._exit(code)


class StderrHandlerOf(StderrHandler):
    """Writes to a descriptor, since pytest has replaced standard error."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        os.write(self._descriptor, f"{prefix}{self.format(record)}\n".encode())


def errors(outcomes: Sequence[Outcome]) -> list[str]:
    """The error messages of a run's processes."""
    return [line for each in outcomes for line in each.output.splitlines() if line.startswith(("error: ", "bug: "))]


def small_recipe(folder: Path, base: Path, **train: Any) -> dict[str, dict[str, Any]]:
    """A recipe on a tiny NF4 model: 12 pairs, four a step, three steps an epoch."""
    return {
        "model": {"base": str(base), "quantization": "nf4", "dtype": "float32", "device": "cpu"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", preference_rows(12))),
            "heldout": str(write_jsonl(folder / "heldout.jsonl", preference_rows(4, start=100))),
        },
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {
            "learning_rate": 1e-3,
            "batch_size": 4,
            "epochs": 2,
            "log_every": 1,
            "eval_every": 3,
            "save_every": 2,
            "tokens_per_microbatch": 250,
            "gradient_checkpointing": False,
        }
        | train,
        "distributed": {"timeout": 60},
        "sinks": [],
    }
