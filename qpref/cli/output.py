"""The way of every message to the terminal: printable, and without passwords or tokens."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from qpref.errors import QprefError, RecipeError
from qpref.printable import PrintableStream, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 250
"""Columns of a report in a file or pipe, which doesn't wrap."""


def echo(text: str = "", err: bool = False) -> None:
    """Print a line to standard output, or to standard error."""
    click.echo(printable(text), err=err)


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Refuse a file that is there, unless it may be replaced, and one in a folder that isn't.

    Raises:
        RecipeError: says which.
    """
    if output.exists() and not overwrite:
        raise RecipeError(f"{output} exists", "choose another name with --output, or replace it with --overwrite")
    if not output.parent.is_dir():
        raise RecipeError(f"{output.parent}: no such folder")


def guard_streams() -> None:
    """Put a `PrintableStream` before standard output and standard error, once."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, PrintableStream):
            continue
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # data may hold text that the terminal can't encode
        setattr(sys, name, PrintableStream(stream))


def end_process(code: int) -> NoReturn:
    """End this process at once, after what it has printed.

    Python would wait for torch's threads, and these for a process that hangs.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class JsonHandler(logging.Handler):
    """Prints each record as a JSON object on a line of standard output; `rule` names a warning that is given once."""

    def emit(self, record: logging.LogRecord) -> None:
        rule = getattr(record, "rule", None)
        echo_event(
            "log", level=record.levelname.lower(), **({"rule": rule} if rule else {}), message=self.format(record)
        )


def echo_event(event: str, **values: Any) -> None:
    """Print an event of a run as a JSON object on a line of standard output."""
    echo(json.dumps({"event": event} | values, ensure_ascii=False, allow_nan=False))


def print_error(error: QprefError) -> None:
    """Print a user's error on standard error; where the log is JSON, as its last event."""
    if any(isinstance(handler, JsonHandler) for handler in logging.getLogger("qpref").handlers):
        echo_event("error", exit_code=error.exit_code, message=error.what, hint=error.hint)
    else:
        echo(f"error: {error}", err=True)


class StderrHandler(logging.Handler):
    """Looks up standard error at every record, since a live progress bar replaces it while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        print(printable(f"{prefix}{self.format(record)}"), file=sys.stderr, flush=True)  # noqa: T201


def make_console(soft_wrap: bool = False) -> Console:
    """Make a console for tables, whose cells and titles are made printable before they are laid out."""
    from rich.console import Console
    from rich.text import Text

    class PrintableConsole(Console):
        def render_str(self, text: str, **styles: Any) -> Text:
            return super().render_str(printable(text), **styles)

    return PrintableConsole(highlight=False, markup=False, emoji=False, soft_wrap=soft_wrap)


def make_report_console() -> Console:
    """Make a console for a report of tables and sentences."""
    console = make_console(soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDE
    return console


def numbers_table(title: str, columns: Sequence[str]) -> Table:
    """Make a table with a column of names and columns of numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")  # the ends of a sweep's names tell its runs apart
    return table
