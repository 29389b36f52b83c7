"""Console output of a run: a live panel on a terminal, plain lines elsewhere, and the held-out table at the end."""

from __future__ import annotations

from collections.abc import Iterator

from qpref.hooks import MetricSink, Options, SinkContext, SinkWriter, hookimpl
from qpref.records import MetricRow
from qpref_plugins.sink_console.json_lines import JsonWriter
from qpref_plugins.sink_console.writer import ConsoleWriter


class ConsoleOptions(Options):
    """The sink `console` has no options."""


class SilentWriter:
    """Prints nothing, for `qpref train --quiet`."""

    def write(self, row: MetricRow) -> None:
        """Take a row and drop it."""

    def close(self) -> None:
        """Have nothing to close."""


def open_console(options: ConsoleOptions, context: SinkContext) -> SinkWriter:
    if context.printing == "nothing":
        return SilentWriter()
    return JsonWriter(context) if context.printing == "json" else ConsoleWriter(context)


@hookimpl
def qpref_metric_sinks() -> Iterator[MetricSink]:
    yield MetricSink(
        name="console",
        summary="progress and held-out table on standard output",
        options=ConsoleOptions,
        open=open_console,
    )
