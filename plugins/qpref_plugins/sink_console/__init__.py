"""Console output of a run: a progress bar on a terminal, plain lines elsewhere, and the held-out table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from qpref.hooks import MetricSink, Options, SinkContext, hookimpl
from qpref.records import MetricRow

HELD_OUT_ROWS = {
    "eval_loss": "loss",
    "eval_rewards/margins": "reward margin",
    "eval_rewards/accuracies": "accuracy by reward margin",
    "eval_logps/accuracies": "accuracy by log-probability",
    "eval_rewards/chosen": "rewards/chosen",
    "eval_rewards/rejected": "rewards/rejected",
    "eval_logps/chosen": "logps/chosen (nats)",
    "eval_logps/rejected": "logps/rejected (nats)",
}


class ConsoleOptions(Options):
    """The sink `console` has no options."""


class ConsoleWriter:
    """Prints the rows of one run to standard output."""

    def __init__(self, context: SinkContext) -> None:
        self._context = context
        self._console = Console(highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._held_out: list[MetricRow] = []
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train", total=context.total_steps, completed=context.first_step, status=""
        )
        self._progress.start()

    def write(self, row: MetricRow) -> None:
        if row.split == "eval":
            self._held_out.append(row)
            if row.step == self._context.first_step:
                self._started = time.monotonic()  # time the steps alone, without the evaluation before them
            self._console.print(f"step {row.step}/{self._context.total_steps}  held-out  {_status(row, 'eval_')}")
            return
        status = f"{_status(row, '')}  {_duration(row.seconds)}{self._time_left(row.step)}"
        self._progress.update(self._task, completed=row.step, status=status)
        if not self._console.is_terminal:
            rate = row.values.get("learning_rate", math.nan)
            self._console.print(f"step {row.step}/{self._context.total_steps}  {status}  lr {rate:.2e}")

    def close(self) -> None:
        self._progress.stop()
        if len(self._held_out) > 1:
            self._console.print(_held_out_table(self._held_out[0], self._held_out[-1]))

    def _time_left(self, step: int) -> str:
        done = step - self._context.first_step
        left = self._context.total_steps - step
        if not done or not left:
            return ""
        return f", about {_duration((time.monotonic() - self._started) / done * left)} left"


def _status(row: MetricRow, prefix: str) -> str:
    """Format the row's loss, and its margin and accuracy where the loss defines them."""
    parts = {"loss": "loss {:.4f}", "rewards/margins": "margin {:+.3f}", "rewards/accuracies": "accuracy {:.2f}"}
    values = {name: row.values.get(prefix + name, math.nan) for name in parts}
    known = [name for name, value in values.items() if name == "loss" or not math.isnan(value)]
    return "  ".join(parts[name].format(values[name]) for name in known)


def _held_out_table(before: MetricRow, after: MetricRow) -> Table:
    table = Table(title="held-out pairs", title_justify="left")
    table.add_column("")
    table.add_column(f"step {before.step}", justify="right")
    table.add_column(f"step {after.step}", justify="right")
    for name, label in HELD_OUT_ROWS.items():
        values = [row.values.get(name, math.nan) for row in (before, after)]
        if not all(math.isnan(value) for value in values):
            table.add_row(label, *("-" if math.isnan(value) else f"{value:.3f}" for value in values))
    if before.step == 0 and before.values.get("eval_rewards/margins") == 0:
        table.caption = "at step 0 all rewards are 0, so the accuracy by reward is the one by log-probability"
        table.caption_justify = "left"
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@hookimpl
def qpref_metric_sinks() -> Iterator[MetricSink]:
    yield MetricSink(
        name="console",
        summary="progress and held-out table on standard output",
        options=ConsoleOptions,
        open=lambda options, context: ConsoleWriter(context),
    )
