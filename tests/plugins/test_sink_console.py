"""The console shows each row as a line, a bar on a terminal, and at the end what the held-out pairs say."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from qpref.hooks import SinkContext
from qpref.records import MetricRow
from qpref_plugins import sink_console
from qpref_plugins.sink_console import ConsoleOptions, qpref_metric_sinks


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sink_console, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture(autouse=True)
def _plain_console(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def opened(total_steps=4, first_step=0):
    [sink] = qpref_metric_sinks()
    context = SinkContext(run_folder=Path("unused"), first_step=first_step, total_steps=total_steps)
    return sink.open(ConsoleOptions(), context)


def train_row(step, seconds=0.0, **changes):
    values = {"loss": 0.69314, "rewards/margins": 0.0125, "rewards/accuracies": 0.75, "learning_rate": 1e-6}
    return MetricRow(step=step, split="train", values=values | changes, tokens=100, seconds=seconds)


def held_out_row(step, **values):
    named = {f"eval_{name.replace('__', '/')}": value for name, value in values.items()}
    return MetricRow(step=step, split="eval", values=named, tokens=100, seconds=1.0)


def printed(capsys, *rows, **context):
    writer = opened(**context)
    for row in rows:
        writer.write(row)
    writer.close()
    return capsys.readouterr().out.splitlines()


def test_a_training_row_is_one_line(capsys):
    assert printed(capsys, train_row(4, seconds=83.4)) == [
        "step 4/4  loss 0.6931  margin +0.013  accuracy 0.75  1:23  lr 1.00e-06"
    ]


def test_a_held_out_row_is_one_line(capsys):
    row = held_out_row(0, loss=0.5, rewards__margins=-2.0, rewards__accuracies=0.25)
    assert printed(capsys, row) == ["step 0/4  held-out  loss 0.5000  margin -2.000  accuracy 0.25"]


def test_what_a_row_lacks_is_left_out(capsys):
    row = MetricRow(step=4, split="train", values={"loss": math.inf}, tokens=0, seconds=0.0)
    assert printed(capsys, row) == ["step 4/4  loss inf  0:00  lr nan"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (600, "10:00"), (3599.6, "1:00:00"), (90_061, "25:01:01")]
)
def test_seconds_are_shown_as_a_clock(capsys, seconds, shown):
    [line] = printed(capsys, train_row(4, seconds=seconds))
    assert line.split("  ")[4] == shown


@pytest.mark.parametrize(
    ("first_step", "step", "shown"),
    [(0, 1, "0:30, about 1:30 left"), (0, 3, "0:30, about 0:10 left"), (2, 3, "0:30, about 0:30 left")],
)
def test_the_time_left_goes_by_the_steps_since_the_start(capsys, clock, first_step, step, shown):
    writer = opened(first_step=first_step)
    clock.now += 30
    writer.write(train_row(step, seconds=30))
    writer.close()
    assert capsys.readouterr().out.split("  ")[4] == shown


def test_a_line_is_not_broken_on_a_narrow_console(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert len(printed(capsys, train_row(4))) == 1


def test_the_held_out_table_compares_the_first_row_with_the_last(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    rows = [
        held_out_row(step, loss=0.7 - step / 10, rewards__margins=step / 2, rewards__chosen=math.nan)
        for step in (0, 2, 4)
    ]
    assert printed(capsys, *rows)[3:] == [
        "held-out pairs",
        "┏━━━━━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━┓",
        "┃               ┃ step 0 ┃ step 4 ┃",
        "┡━━━━━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━┩",
        "│ loss          │  0.700 │  0.300 │",
        "│ reward margin │  0.000 │  2.000 │",
        "└───────────────┴────────┴────────┘",
        "at step 0 all rewards are 0, so the accuracy by reward is the one by log-probability",
    ]


def test_one_held_out_row_makes_no_table(capsys):
    assert len(printed(capsys, held_out_row(0, loss=0.5))) == 1


def test_a_resumed_run_says_nothing_of_step_0(capsys):
    lines = printed(capsys, held_out_row(2, loss=0.5), held_out_row(4, loss=0.4), first_step=2)
    assert "at step 0" not in "\n".join(lines)


def test_a_value_that_only_one_row_has_leaves_the_other_blank(capsys):
    lines = printed(capsys, held_out_row(0, loss=math.nan), held_out_row(4, loss=0.4))
    [row] = [line for line in lines if line.startswith("│ loss")]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["loss", "-", "0.400"]


def test_a_terminal_has_a_bar_in_place_of_the_lines(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = "\n".join(printed(capsys, *(train_row(step) for step in range(1, 5))))
    assert ("step 4/4" in out, "lr 1.00e-06" in out) == (True, False)


def test_an_unfinished_bar_leaves_the_console_as_it_was(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = "\n".join(printed(capsys, train_row(1)))
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1  # the cursor is hidden once, and shown again
