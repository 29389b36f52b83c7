"""The console shows each row as a line, a bar on a terminal, and at the end what the held-out pairs say."""

import fcntl
import json
import math
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest

from qpref.hooks import SinkContext
from qpref.records import MetricRow
from qpref_plugins.sink_console import ConsoleOptions, qpref_metric_sinks, writer
from qpref_plugins.sink_console.numbers import duration, flowed, noise_of


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture(autouse=True)
def _plain_console(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def opened(total_steps=4, first_step=0, **changes):
    [sink] = qpref_metric_sinks()
    context = SinkContext(run_folder=Path("unused"), first_step=first_step, total_steps=total_steps, **changes)
    return sink.open(ConsoleOptions(), context)


def train_row(step, seconds=0.0, tokens=100, **changes):
    values = {"loss": 0.69314, "rewards/margins": 0.0125, "rewards/accuracies": 0.75, "learning_rate": 1e-6}
    return MetricRow(step=step, split="train", values=values | changes, tokens=tokens, seconds=seconds)


def held_out_row(step, **values):
    named = {f"eval_{name.replace('__', '/')}": value for name, value in values.items()}
    return MetricRow(step=step, split="eval", values=named, tokens=100, seconds=1.0)


def printed(capsys, *rows, **context):
    writer = opened(**context)
    for row in rows:
        writer.write(row)
    writer.close()
    return capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("clock")
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
def test_seconds_are_shown_as_a_clock(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("first_step", "step", "shown"),
    [(0, 1, "0:30, about 1:30 left"), (0, 3, "0:30, about 0:10 left"), (2, 3, "0:30, about 0:30 left")],
)
def test_the_time_left_goes_by_the_steps_since_the_start(capsys, clock, first_step, step, shown):
    writer = opened(first_step=first_step)
    clock.now += 30
    writer.write(train_row(step, seconds=30))
    writer.close()
    assert shown in capsys.readouterr().out.split("  ")


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


def test_speed_is_that_of_the_recent_rows_without_evaluation(capsys, clock):
    writer = opened(total_steps=9)
    clock.now += 1000  # the evaluation before the first step
    writer.write(held_out_row(0, loss=0.5))
    for step in (1, 2):
        clock.now += 2
        writer.write(train_row(step, tokens=step * 3000))
    writer.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[4] for line in lines[1:3]] == [
        "1,450 tokens/s",  # 100 tokens at step 0, 3,000 after 2 s
        "1,475 tokens/s",  # 6,000 after 4 s
    ]


def test_noise_of_the_margin_is_that_around_its_trend():
    # Differences 1, 1, -2: half of their mean square is (1 + 1 + 4) / 3 / 2 = 1.
    assert noise_of([0.0, 1.0, 2.0, 0.0]) == pytest.approx(1.0)
    assert math.isnan(noise_of([0.0, 1.0]))
    assert math.isnan(noise_of([0.0, math.nan, 1.0]))


def test_margin_has_its_noise_after_some_rows(capsys):
    rows = [train_row(step, **{"rewards/margins": margin}) for step, margin in enumerate([0.0, 0.2, 0.0], 1)]
    lines = printed(capsys, *rows)
    assert "margin +0.200  accuracy" in lines[1]
    assert "margin +0.000 ± 0.141  accuracy" in lines[2]


def test_no_number_is_a_negative_zero(capsys):
    small = {"loss": -0.00001, "rewards/margins": -0.0001}
    lines = printed(capsys, train_row(1, **small), held_out_row(0, loss=-1e-5, rewards__margins=-1e-5),
                    held_out_row(4, loss=-1e-5, rewards__margins=-1e-5))  # fmt: skip
    assert "-0.0" not in "\n".join(lines)
    assert "margin +0.000" in lines[0]


def panel(capsys, monkeypatch, columns, **environment):
    """The last panel of a run on a terminal, as lines without control sequences."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sizes = {"planned_bytes": 8 * 2**30, "limit_bytes": 10 * 2**30, "peak_bytes": lambda: 7 * 2**30}
    writer = opened(total_steps=50, **sizes)
    for step in range(1, 4):
        writer.write(train_row(step))
    writer.close()
    out = capsys.readouterr().out
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out[out.rindex("step 3/50") :]).splitlines(), out


def test_panel_shows_memory_beside_the_plan_and_its_share_of_the_limit(capsys, monkeypatch):
    lines, _ = panel(capsys, monkeypatch, 80)
    assert "memory 7.0 of 8.0 GiB planned  70% of the limit" in lines[-1]


@pytest.mark.parametrize("columns", [120, 80, 40, 24])
def test_no_line_of_the_panel_is_wider_than_the_terminal(capsys, monkeypatch, columns):
    lines, _ = panel(capsys, monkeypatch, columns)
    assert all(len(line) < columns for line in lines)
    assert "loss 0.6931" in " ".join(lines)


def test_panel_without_colours_has_none(capsys, monkeypatch):
    assert "\x1b[9" in panel(capsys, monkeypatch, 80)[1]
    assert not re.search(r"\x1b\[[0-9;]*m", panel(capsys, monkeypatch, 80, NO_COLOR="1")[1])


def test_dumb_terminal_has_plain_lines(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    out = capsys.readouterr().out + "\n".join(printed(capsys, train_row(1), train_row(2)))
    assert out.count("lr 1.00e-06") == 2
    assert "\x1b" not in out


def test_warning_between_rows_stands_above_the_panel(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    writer = opened()
    writer.write(train_row(1))
    print("warning: in between", file=sys.stderr)
    writer.write(train_row(2))
    writer.close()
    out = capsys.readouterr().out
    assert out.index("warning: in between") < out.rindex("step 2/4")


def test_fields_flow_into_lines():
    assert flowed(["a" * 5, "", "b" * 5, "c" * 20, "d"], 12) == ["aaaaa  bbbbb", "c" * 20, "d"]


def test_rows_are_json_objects_where_the_log_is_json(capsys):
    rows = [held_out_row(0, loss=math.nan), train_row(1)]
    events = [json.loads(line) for line in printed(capsys, *rows, printing="json", peak_bytes=lambda: 5)]
    assert events[0] == {
        "event": "metrics", "step": 0, "total_steps": 4, "split": "eval", "eval_loss": None, "tokens": 100,
        "seconds": 1.0, "peak_bytes": 5,
    }  # fmt: skip
    assert (events[1]["loss"], len(events)) == (0.69314, 2)


def test_nothing_is_printed_for_a_quiet_run(capsys):
    assert printed(capsys, held_out_row(0, loss=0.5), train_row(1), held_out_row(4, loss=0.5), printing="nothing") == []


def test_an_unfinished_bar_leaves_the_console_as_it_was(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = "\n".join(printed(capsys, train_row(1)))
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1  # the cursor is hidden once, and shown again


ON_A_TERMINAL = """
import sys
import termios
from pathlib import Path
from qpref.cli.output import guard_streams
from qpref.hooks import SinkContext
from qpref.records import MetricRow
from qpref_plugins.sink_console import ConsoleOptions, open_console

guard_streams()
writer = open_console(ConsoleOptions(), SinkContext(run_folder=Path("unused"), first_step=0, total_steps=9))
for step in (1, 2):
    values = {"loss": 0.5, "rewards/margins": 0.1, "rewards/accuracies": 0.75}
    writer.write(MetricRow(step=step, split="train", values=values, tokens=1000 * step, seconds=1.0))
    writer._live.refresh()
    if step == 1:
        print("warning: one line", file=sys.stderr)
        sys.stdin.readline()  # until the test has resized the terminal
writer.close()
"""


def test_panel_follows_the_width_of_a_real_terminal():
    """100 columns, then 30: the panel after that has no line that the terminal would break."""
    main, terminal = os.openpty()
    size = struct.pack("HHHH", 24, 100, 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [sys.executable, "-c", ON_A_TERMINAL]
    streams = {"stdin": subprocess.PIPE, "stdout": terminal, "stderr": terminal}
    with subprocess.Popen(command, env=environment | {"TERM": "xterm"}, **streams) as process:
        wide = read_until(main, "one line")
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
        process.stdin.write(b"\n")
        process.stdin.close()
        os.close(terminal)
        narrow = read_until(main, None)
    os.close(main)
    assert process.returncode == 0
    assert "accuracy 0.75" in next(line for line in plain_lines(wide) if "loss 0.5" in line)  # one line is enough
    last = plain_lines(narrow[narrow.rindex("step 2/9") :])
    assert "loss 0.5000" in "\n".join(last)
    assert max(map(len, last)) < 30


def plain_lines(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text).splitlines()


def read_until(descriptor, text):
    """What a terminal is sent until it has some text, or has been closed."""
    found = ""
    while text is None or text not in found:
        try:
            found += os.read(descriptor, 65536).decode()
        except OSError:  # the process has ended
            break
    return found
