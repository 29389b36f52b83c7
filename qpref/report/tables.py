"""The report's tables: outcomes of the runs, differing settings, held-out rows, memory and speed against the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpref.memory.parts import CAPTIONS
from qpref.report.cells import MAX_LABEL, MAX_ROWS, Table, cell_text
from qpref.report.curves import TITLES
from qpref.report.read import RunRecord, flatten, nested, number
from qpref.report.text import bounded, count_text, number_text, share_text, size_text, time_text

HELDOUT_STEPS = 8
"""Maximum columns of a single run's held-out table."""


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


def state(run: RunRecord) -> str:
    """Describe the run's progress and its adapter's step."""
    steps = run.facts.get("steps")
    total = f" of {count_text(number(steps))}" if not math.isnan(number(steps)) else ""
    step = f"step {run.metrics.last_step:,}{total}"
    if adapter_step(run) != run.metrics.last_step:
        step += f", adapter of step {adapter_step(run):,}"
    return f"finished, {step}" if run.is_finished else f"not finished, {step}"


def adapter_step(run: RunRecord) -> int:
    """Return the adapter's step: the last one, or the best one with `best_by`."""
    step = number(nested(run.result, "adapter_step"))
    return run.metrics.last_step if math.isnan(step) else int(step)


def _outcome(run: RunRecord, name: str) -> float:
    """Return the held-out mean at the adapter's step; the newest where that step has none."""
    column = run.metrics.column("eval", name)
    values = dict(zip(column.steps, column.values, strict=True)) if column else {}
    return values.get(adapter_step(run), run.metrics.last("eval", name))


def tiles(run: RunRecord) -> list[Tile]:
    """Summarize a single run."""
    found = [Tile("state", "finished" if run.is_finished else "not finished", state(run).partition(", ")[2])]
    for name, title, text in (
        ("rewards/accuracies", "held-out accuracy", share_text),
        ("rewards/margins", "held-out reward margin", number_text),
        ("loss", "held-out loss", number_text),
    ):
        column = run.metrics.column("eval", name)
        if column:
            before = f"{text(column.values[0])} at step {count_text(column.steps[0])}" if len(column) > 1 else ""
            found.append(Tile(title, text(_outcome(run, name)), before))
    tokens, seconds = _spent(run)
    found.append(Tile("time", time_text(seconds), f"{count_text(tokens)} tokens"))
    peak, kind = measured_peak(run)
    if not math.isnan(peak):
        found.append(Tile("peak memory", size_text(peak), kind))
    return found


def overview(runs: Sequence[RunRecord]) -> Table:
    """Compare several runs, one per row."""
    rows = []
    for run in runs:
        tokens, seconds = _spent(run)
        loss, margin, accuracy = (_outcome(run, name) for name in ("loss", "rewards/margins", "rewards/accuracies"))
        rows.append(
            [
                run.name,
                state(run),
                number_text(loss),
                number_text(margin),
                share_text(accuracy),
                count_text(tokens),
                time_text(seconds),
                size_text(measured_peak(run)[0]),
            ]
        )
    header = ["run", "state", "held-out loss", "reward margin", "accuracy", "tokens", "time", "peak memory"]
    return Table(header, rows)


def differences(runs: Sequence[RunRecord]) -> Table:
    """Tabulate the settings in which the runs' recipes differ."""
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
            cells.append(number_text(values[step]) if step in values else "")
        rows.append([TITLES.get(name) or bounded(name, MAX_LABEL), *cells])
    return Table(header, rows, left_out)


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
    tokens, seconds = _spent(run)
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


def _spent(run: RunRecord) -> tuple[float, float]:
    """Return tokens fed and seconds passed."""
    return run.metrics.last("train", "tokens"), run.metrics.last("train", "seconds")


def _tera(value: float) -> str:
    return f"{number_text(value)} TFLOP"


def _or_blank(value: float, text: Any) -> str:
    return "" if math.isnan(value) else str(text(value))


def _ratio(measured: float, planned: float) -> str:
    return f"{measured / planned:.2f}" if planned > 0 and not math.isnan(measured) else ""
