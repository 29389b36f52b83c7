"""Progress for people: a live panel on a terminal, plain lines in a pipe, a file or a dumb terminal."""

from __future__ import annotations

import math
import time
from collections import deque

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qpref.hooks import SinkContext
from qpref.records import MetricRow
from qpref_plugins.sink_console.numbers import duration, flowed, memory_texts, metric_texts, noise_of

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
RECENT_ROWS = 20
"""Rows that the noise of the margin and the speed are taken from."""
REFRESH_PER_SECOND = 2
NARROWEST_BAR = 10


class ConsoleWriter:
    """Prints the rows of one run to standard output."""

    def __init__(self, context: SinkContext) -> None:
        self._context = context
        self._console = Console(highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._held_out: list[MetricRow] = []
        self._row: MetricRow | None = None
        self._margins: deque[float] = deque(maxlen=RECENT_ROWS)
        self._speed: deque[tuple[float, int]] = deque(
            [(self._started, 0)] if not context.first_step else [], RECENT_ROWS
        )
        self._live: Live | None = None
        if self._console.is_interactive and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=REFRESH_PER_SECOND)
            self._live.start()

    def write(self, row: MetricRow) -> None:
        if row.split == "eval":
            self._write_held_out(row)
            return
        self._row = row
        self._margins.append(row.values.get("rewards/margins", math.nan))
        self._speed.append((time.monotonic(), row.tokens))
        if self._live is None:
            rate = row.values.get("learning_rate", math.nan)
            fields = [self._step(row), *self._numbers(row), self._clock(row), f"lr {rate:.2e}"]
            self._console.print("  ".join(filter(None, fields)))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        if len(self._held_out) > 1:
            self._console.print(_held_out_table(self._held_out[0], self._held_out[-1]))

    def _write_held_out(self, row: MetricRow) -> None:
        self._held_out.append(row)
        now = time.monotonic()
        if row.step == self._context.first_step:
            self._started = now  # time the steps alone, without the evaluation before them
        self._speed = deque([(now, row.tokens)], RECENT_ROWS)
        self._console.print("  ".join([self._step(row), "held-out", *metric_texts(row, "eval_")]))

    def _step(self, row: MetricRow) -> str:
        return f"step {row.step}/{self._context.total_steps}"

    def _numbers(self, row: MetricRow) -> list[str]:
        return [*metric_texts(row, noise=noise_of(list(self._margins))), self._tokens_per_second()]

    def _tokens_per_second(self) -> str:
        if not self._speed:
            return ""
        (first, before), (last, after) = self._speed[0], self._speed[-1]
        if last <= first or after <= before:
            return ""
        return f"{(after - before) / (last - first):,.0f} tokens/s"

    def _clock(self, row: MetricRow) -> str:
        """Format the time since the start, and an estimate of the time left."""
        done = row.step - self._context.first_step
        left = self._context.total_steps - row.step
        if not done or not left:
            return duration(row.seconds)
        estimate = (self._speed[-1][0] - self._started) / done * left
        return f"{duration(row.seconds)}, about {duration(estimate)} left"

    def _panel(self) -> RenderableType:
        """Draw the panel: a bar, and the newest numbers in as many lines as the terminal's width needs."""
        width = self._console.width - 1
        row, total = self._row, self._context.total_steps
        step, clock = (self._context.first_step, "") if row is None else (row.step, self._clock(row))
        count = f"step {step}/{total}"
        bar = Table.grid(padding=(0, 2, 0, 0))
        bar_width = min(40, width - len(count) - len(clock) - 4)
        if bar_width >= NARROWEST_BAR:
            bar.add_row(count, ProgressBar(total=total, completed=step, width=bar_width), clock)
            lines = []
        else:
            lines = flowed([count, clock], width)
        peak = self._context.peak_bytes()
        memory = memory_texts(peak, self._context.planned_bytes, self._context.limit_bytes)
        numbers = [] if row is None else self._numbers(row)
        texts = [Text(line) for line in [*lines, *flowed([*numbers, *memory], width)]]
        for text in texts:
            text.truncate(width, overflow="ellipsis")
        return Group(bar, *texts) if bar.row_count else Group(*texts)


def _held_out_table(before: MetricRow, after: MetricRow) -> Table:
    table = Table(title="held-out pairs", title_justify="left")
    table.add_column("")
    table.add_column(f"step {before.step}", justify="right")
    table.add_column(f"step {after.step}", justify="right")
    for name, label in HELD_OUT_ROWS.items():
        values = [row.values.get(name, math.nan) for row in (before, after)]
        if not all(math.isnan(value) for value in values):
            table.add_row(label, *("-" if math.isnan(value) else f"{value:z.3f}" for value in values))
    if before.step == 0 and before.values.get("eval_rewards/margins") == 0:
        table.caption = "at step 0 all rewards are 0, so the accuracy by reward is the one by log-probability"
        table.caption_justify = "left"
    return table
