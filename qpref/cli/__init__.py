"""The `qpref` command. Heavy imports stay inside the commands, so `--help` and `plugins` answer at once."""

from __future__ import annotations

import importlib
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

from qpref.cli.groups import SuggestingGroup
from qpref.cli.output import StderrHandler, echo, end_process, guard_streams, print_error
from qpref.distributed.environment import is_first, num_processes
from qpref.errors import DeviceMemoryError, FailedElsewhere, PeerError, QprefError, RecipeError, StoppedBySignal
from qpref.installed import as_install_error
from qpref.version import __version__

COMMANDS = {
    "init": "Write a first recipe for your data, model and card.",
    "convert": "Convert a file of TRL, Axolotl or LLaMA-Factory to a recipe.",
    "check": "Check preference data row by row.",
    "plan": "Predict the memory, work and steps of a recipe.",
    "train": "Train a LoRA adapter from a recipe.",
    "sweep": "Train a recipe at several values of its settings.",
    "rounds": "Train a recipe in rounds, each from the adapter of the one before.",
    "eval": "Compare models' preferences on held-out pairs.",
    "generate": "Print answers of base and trained model, side by side.",
    "sample": "Sample responses, score them, and write preferences.",
    "chat": "Talk to base and trained model, side by side.",
    "runs": "List runs with their verdicts.",
    "report": "Write an HTML report of one or several runs.",
    "merge": "Merge base and adapter into a plain safetensors model.",
    "export": "Export a merged model as GGUF with llama.cpp's converter.",
    "losses": "List, show and check the installed losses.",
    "plugins": "List and check the installed plugins.",
    "init-plugin": "Write the tree of a new plugin, with tests that pass.",
    "doctor": "Examine this machine: packages, GPU, memory, disk, plugins.",
    "cache": "List or clear the cache on this machine.",
    "schema": "Print the JSON Schema of a recipe, for editors.",
}


IN_SEVERAL_PROCESSES = ("train",)
"""Commands that the processes of one run work on together."""


class LazyGroup(SuggestingGroup):
    """Imports `qpref.cli.<command>` only when that command runs, and prints a user's error as one message."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        _refuse_several_processes(ctx, cmd_name)
        command: click.Command = importlib.import_module(f"qpref.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args: Any, **options: Any) -> Any:
        guard_streams()
        return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            echo("error: interrupted", err=True)
            ctx.exit(128 + signal.SIGINT)
        except (QprefError, ImportError, MemoryError) as caught:
            error = _as_error(caught)
            if not isinstance(error, FailedElsewhere):
                print_error(error)
            if isinstance(error, PeerError):
                end_process(error.exit_code)
            ctx.exit(error.exit_code)


def _refuse_several_processes(ctx: click.Context, name: str) -> None:
    """Refuse a command in several processes, which would each do all of its work.

    Raises:
        RecipeError: a launcher started this process, and others.
    """
    if name in IN_SEVERAL_PROCESSES or (count := num_processes()) == 1:
        return
    if not is_first():
        ctx.exit(RecipeError.exit_code)
    raise RecipeError(f"qpref {name} runs in one process, and this is one of {count}", "start it without torchrun")


def _as_error(caught: QprefError | ImportError | MemoryError) -> QprefError:
    if isinstance(caught, MemoryError):
        return DeviceMemoryError("this machine ran out of memory", "free the memory of other programs")
    return as_install_error(caught) if isinstance(caught, ImportError) else caught


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qpref")
def main() -> None:
    """Preference training (DPO and its kin) of 4-bit language models on one consumer GPU."""
    from qpref.linux import set_torch_variables

    set_torch_variables()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar draws over its line; in a file that is one endless line
    logger = logging.getLogger("qpref")
    logger.setLevel(logging.INFO)
    logger.handlers = [StderrHandler()]
    logger.propagate = False
    # Deprecations that libraries address to their own developers; errors still come through.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def quiet_transformers() -> None:
    """Keep transformers' progress bars and warnings off the console."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class _Ended(BaseException):
    """A BaseException, so that no library's `except Exception` catches it."""


@contextmanager
def ends_cleanly() -> Iterator[None]:
    """Unwind the stack on a terminating signal, so that nothing half-written stays behind.

    A signal that was ignored when the process started, as under nohup, stays ignored. Outside the main thread, where
    Python accepts no handlers, this does nothing.

    Raises:
        StoppedBySignal: a signal arrived.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def end(number: int, frame: object) -> None:
        if not received:  # a second signal must not interrupt the cleanup
            received.append(number)
            raise _Ended

    caught = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = [(number, signal.signal(number, end)) for number in caught]
    try:
        yield
    except _Ended:
        raise StoppedBySignal(f"ended by {signal.Signals(received[0]).name}", None, received[0]) from None
    finally:
        for number, handler in before:
            signal.signal(number, handler)
