"""The report's tables: outcomes of the runs, differing settings, held-out rows, memory and speed against the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpref.memory.parts import CAPTIONS
from qpref.report.cells import MAX_LABEL, MAX_ROWS, Table, cell_text
from qpref.report.curves import TITLES
from qpref.report.outcome import (
    accuracy,
    accuracy_column,
    accuracy_name,
    adapter_step,
    heldout_count,
    heldout_value,
    state,
    tokens_and_seconds,
)
from qpref.report.read import RunRecord, flatten, nested, number
from qpref.report.shares import Share, is_share
from qpref.report.text import bounded, count_text, number_text, share_text, size_text, time_text

HELDOUT_STEPS = 8
"""Maximum columns of a single run's held-out table."""
MAX_VARIED = 6
"""Most differing settings that are columns of the comparison; more have a table of their own."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One number of a run's summary, with a note such as its value at the start."""

    title: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar of a bar chart.

    Attributes:
        parts: stacked segments: length as a share of the longest bar, colour, and caption.
    """

    title: str
    value: str
    parts: list[tuple[float, int, str]]


def tiles(run: RunRecord) -> list[Tile]:
    """Summarize a single run."""
    found = [Tile("state", "finished" if run.is_finished else "not finished", state(run).partition(", ")[2])]
    for name, title in (
        (accuracy_name(run), f"held-out {TITLES[accuracy_name(run)]}"),
        ("rewards/margins", "held-out reward margin"),
        ("loss", "held-out loss"),
    ):
        column = run.metrics.column("eval", name)
        if column:
            text = share_text if is_share(name) else number_text
            before = f"{text(column.values[0])} at step {count_text(column.steps[0])}" if len(column) > 1 else ""
            if before and name == "rewards/accuracies" and starts_at_no_reward([run]):
                before += ", by log-probability"
            interval = accuracy(run).interval_text if is_share(name) else ""
            note = "; ".join(part for part in (interval and f"95 % interval {interval}", before) if part)
            found.append(Tile(title, text(heldout_value(run, name)), note))
    tokens, seconds = tokens_and_seconds(run)
    found.append(Tile("time", time_text(seconds), f"{count_text(tokens)} tokens"))
    peak, kind = measured_peak(run)
    if not math.isnan(peak):
        found.append(Tile("peak memory", size_text(peak), kind))
    return found


def comparison(runs: Sequence[RunRecord]) -> Table:
    """Compare several runs, one per row: the settings that differ, if they are few, and the outcomes."""
    varied = differences(runs).rows
    varied = varied if len(varied) <= MAX_VARIED else []
    rows = []
    measure, accuracies = accuracy_column(runs)
    for index, run in enumerate(runs):
        tokens, seconds = tokens_and_seconds(run)
        rows.append(
            [
                run.name,
                *(setting[index + 1] for setting in varied),
                accuracies[index],
                number_text(heldout_value(run, "rewards/margins")),
                number_text(heldout_value(run, "loss")),
                state(run),
                count_text(tokens),
                time_text(seconds),
                size_text(measured_peak(run)[0]),
            ]
        )
    share = f"held-out accuracy {measure}".rstrip()
    outcomes = [share, "reward margin", "held-out loss", "state", "tokens", "time", "peak memory"]
    return Table(["run", *(setting[0] for setting in varied), *outcomes], rows)


def differences(runs: Sequence[RunRecord]) -> Table:
    """Tabulate the settings in which the runs' recipes differ, one per row."""
    recipes = [dict(flatten(run.recipe)) for run in runs]
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    missing = object()
    rows = []
    for name in names:
        values = [recipe.get(name, missing) for recipe in recipes]
        if any(value != values[0] for value in values):
            rows.append([name, *("" if value is missing else _setting(value) for value in values)])
    return Table(["setting", *(run.name for run in runs)], rows)


def _setting(value: Any) -> str:
    return ", ".join(map(cell_text, value)) if isinstance(value, list) else cell_text(value)


def heldout(runs: Sequence[RunRecord]) -> Table | None:
    """Tabulate held-out means: of a single run at several steps, of several runs before and after; None without any."""
    names = [name for run in runs for name in run.metrics.columns["eval"] if name not in ("tokens", "seconds")]
    known = set(names)
    ordered = [name for name in TITLES if name in known] + sorted(known - set(TITLES))
    if not ordered:
        return None
    left_out = max(0, len(ordered) - MAX_ROWS)
    header, columns = [""], []
    for run in runs:
        steps = _heldout_steps(run, HELDOUT_STEPS if len(runs) == 1 else 2)
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        header += [f"{prefix}step {count_text(step)}" for step in steps]
        columns += [(run, step) for step in steps]
    rows = []
    for name in ordered[:MAX_ROWS]:
        cells = []
        for run, step in columns:
            column = run.metrics.column("eval", name)
            values = dict(zip(column.steps, column.values, strict=True)) if column else {}
            cells.append(_mean_text(name, values[step], run) if step in values else "")
        rows.append([TITLES.get(name) or bounded(name, MAX_LABEL), *cells])
    return Table(header, rows, left_out)


def _mean_text(name: str, value: float, run: RunRecord) -> str:
    return str(Share(value, heldout_count(run))) if is_share(name) else number_text(value)


def starts_at_no_reward(runs: Sequence[RunRecord]) -> bool:
    """Return whether a run's rewards are all 0 at step 0, since it starts at its reference."""
    margins = [run.metrics.column("eval", "rewards/margins") for run in runs]
    return any(column is not None and column.steps[0] == 0 and column.values[0] == 0 for column in margins)


def _heldout_steps(run: RunRecord, most: int) -> list[float]:
    """Choose the first and last step, the adapter's, and evenly spaced ones between."""
    steps = sorted({step for column in run.metrics.columns["eval"].values() for step in column.steps})
    if len(steps) <= most:
        return steps
    chosen = {steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)}
    return sorted(chosen | ({adapter_step(run)} & set(steps)))


def against_plan(run: RunRecord) -> Table:
    """Tabulate planned and measured values, one quantity per row; a cell is empty where its value is unknown."""
    forecast, examples = nested(run.facts, "forecast"), nested(run.facts, "examples", "train")
    planned_total = number(nested(forecast, "memory", "total"))
    peak, kind = measured_peak(run)
    tokens, seconds = tokens_and_seconds(run)
    step = run.metrics.last_step
    tokens_per_step = tokens / step if step else math.nan
    planned_step, flops = number(nested(forecast, "tokens_per_step")), number(nested(forecast, "flops_per_step"))
    speed = tokens / seconds if seconds > 0 else math.nan
    rate = flops * step / seconds / 1e12 if seconds > 0 else math.nan
    rows = [
        ["peak memory", _or_blank(planned_total, size_text), _or_blank(peak, size_text), _ratio(peak, planned_total)],
        ["", "", kind, ""],
        ["tokens per step", _or_blank(planned_step, count_text), _or_blank(tokens_per_step, count_text),
         _ratio(tokens_per_step, planned_step)],
        ["compute per step", _or_blank(flops / 1e12, _tera), "", ""],
        ["speed", "", _or_blank(speed, lambda value: f"{number_text(value)} tokens per second"), ""],
        ["", "", _or_blank(rate, lambda value: f"{_tera(value)} per second"), ""],
        ["optimizer steps", _or_blank(number(run.facts.get("steps")), count_text), count_text(step), ""],
        ["tokens per micro-batch", _or_blank(number(run.facts.get("tokens_per_microbatch")), count_text),
         _or_blank(number(nested(run.result, "tokens_per_microbatch")), count_text), ""],
        ["recomputed layers", _or_blank(number(run.facts.get("recomputed_layers")), count_text), "", ""],
        ["training examples", _or_blank(number(examples), count_text), "", ""],
    ]  # fmt: skip
    return Table(["", "planned", "measured", "measured / planned"], [row for row in rows if any(row[1:])])


def memory_bars(run: RunRecord) -> list[Bar]:
    """Draw the forecast by its parts, and the measured peak below; no bars without a forecast."""
    memory = nested(run.facts, "forecast", "memory")
    total, peak = number(nested(memory, "total")), measured_peak(run)[0]
    if math.isnan(total) or total <= 0:
        return []
    sizes = {part: number(nested(memory, part)) for part in CAPTIONS}
    sizes.pop("live" if not sizes["live"] >= sizes["head_tile"] else "head_tile")
    longest = max(total, peak) if not math.isnan(peak) else total
    parts = [
        (max(0.0, size / longest), colour, f"{CAPTIONS[part]}: {size_text(size)}")
        for colour, (part, size) in enumerate(sizes.items())
        if not math.isnan(size)
    ]
    bars = [Bar(title="planned", value=size_text(total), parts=parts)]
    if not math.isnan(peak):
        whole = [(peak / longest, len(CAPTIONS), f"measured: {size_text(peak)}")]
        bars.append(Bar(title="measured", value=size_text(peak), parts=whole))
    return bars


def measured_peak(run: RunRecord) -> tuple[float, str]:
    """Return the peak in bytes and its kind; NaN where the run hasn't ended, or is older than result.json."""
    for name, kind in (("allocated", "allocated on the GPU"), ("resident", "resident memory of the whole process")):
        size = number(nested(run.result, "peak_bytes", name))
        if not math.isnan(size):
            resumed = number(nested(run.result, "first_step"))
            since = f", since the run was resumed at step {count_text(resumed)}" if resumed > 0 else ""
            return size, f"{kind}{since}"
    return math.nan, ""


def _tera(value: float) -> str:
    return f"{number_text(value)} TFLOP"


def _or_blank(value: float, text: Any) -> str:
    return "" if math.isnan(value) else str(text(value))


def _ratio(measured: float, planned: float) -> str:
    return f"{measured / planned:.2f}" if planned > 0 and not math.isnan(measured) else ""
