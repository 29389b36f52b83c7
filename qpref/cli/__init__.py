"""The `qpref` command. Heavy imports wait inside the commands, so `--help` and `plugins` answer at once."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from qpref import __version__
from qpref.errors import QprefError, StoppedBySignal
from qpref.installed import as_install_error

COMMANDS = {
    "plan": "Predict a recipe's memory, work and steps before any is spent.",
    "check": "Look at preference data: what is wrong with which row.",
    "train": "Train an adapter by a recipe.",
    "eval": "Compare what models prefer on held-out pairs.",
    "generate": "Print what base and trained model answer, side by side.",
    "merge": "Write base and adapter as one plain safetensors model.",
    "report": "Write one or several runs as one HTML page.",
    "export": "Write a merged model as GGUF, by llama.cpp's converter.",
    "plugins": "List the installed plugins.",
    "cache": "List or clear what is kept on this machine.",
    "losses": "List, show and check the installed losses.",
}


class LazyGroup(click.Group):
    """Imports `qpref.cli.<command>` when that command is asked for; errors of a user's end as one message."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"qpref.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (QprefError, ImportError) as caught:
            error = as_install_error(caught) if isinstance(caught, ImportError) else caught
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)


class _StderrHandler(logging.Handler):
    """Writes to whatever standard error is at the moment: a live progress bar replaces it while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        print(f"{prefix}{self.format(record)}", file=sys.stderr, flush=True)  # noqa: T201


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qpref")
def main() -> None:
    """Preference training (DPO and its kin) of 4-bit language models on one consumer GPU."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # texts of data, on a terminal of whatever encoding
    # Read when torch is imported. Threads that spin while they wait take the cores from each other, and from others.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logger = logging.getLogger("qpref")
    logger.setLevel(logging.INFO)
    logger.handlers = [_StderrHandler()]
    logger.propagate = False
    # Notes of the libraries to their own developers; errors still come through.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def quiet_transformers() -> None:
    """Keep transformers' progress bars and remarks off the console."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class _Ended(BaseException):
    """No Exception, which a library on the way up might catch."""


@contextmanager
def ends_cleanly() -> Iterator[None]:
    """Let a signal that ends the process unwind it first, so that nothing half-written stays behind.

    A signal that the process was started to ignore, as nohup has it, stays ignored. Outside the main thread Python
    takes no handlers.

    Raises:
        StoppedBySignal: one came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def end(number: int, frame: object) -> None:
        if not came:  # another one would end the clearing up
            came.append(number)
            raise _Ended

    caught = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = [(number, signal.signal(number, end)) for number in caught]
    try:
        yield
    except _Ended:
        raise StoppedBySignal(f"ended by {signal.Signals(came[0]).name}", None, came[0]) from None
    finally:
        for number, handler in before:
            signal.signal(number, handler)
