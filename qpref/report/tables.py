"""The report's numbers: what runs came to, where recipes differ, held-out rows, memory and speed against the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpref.memory.parts import CAPTIONS
from qpref.report.curves import TITLES
from qpref.report.facts import Table, cell_text
from qpref.report.read import RunRecord, flat, leaf, number
from qpref.report.text import count_text, number_text, share_text, size_text, time_text

HELDOUT_STEPS = 8
"""Most held-out rows of a single run's table."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One number of a run's summary, with what it was before, or what it is out of."""

    title: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A length among others.

    Attributes:
        parts: lengths that follow each other, as shares of the longest bar, each with its colour and its words.
    """

    title: str
    value: str
    parts: list[tuple[float, int, str]]


def state(run: RunRecord) -> str:
    steps = run.facts.get("steps")
    total = f" of {count_text(number(steps))}" if not math.isnan(number(steps)) else ""
    step = f"step {run.metrics.last_step:,}{total}"
    if adapter_step(run) != run.metrics.last_step:
        step += f", adapter of step {adapter_step(run):,}"
    return f"finished, {step}" if run.is_finished else f"not finished, {step}"


def adapter_step(run: RunRecord) -> int:
    """The step that the adapter is of: the last, or the best where the recipe asked for it."""
    step = number(leaf(run.result, "adapter_step"))
    return run.metrics.last_step if math.isnan(step) else int(step)


def _outcome(run: RunRecord, name: str) -> float:
    """The held-out mean of the step that the adapter is of; the newest where that step has none."""
    column = run.metrics.column("eval", name)
    values = dict(zip(column.steps, column.values, strict=True)) if column else {}
    return values.get(adapter_step(run), run.metrics.last("eval", name))


def tiles(run: RunRecord) -> list[Tile]:
    """A single run at a glance."""
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
    """Several runs side by side, one a row."""
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
    """The recipes' settings that aren't the same in all runs."""
    recipes = [dict(flat(run.recipe)) for run in runs]
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
    """Held-out means: of a single run at several steps, of several runs before and after; None without any."""
    names = [name for run in runs for name in run.metrics.columns["eval"] if name not in ("tokens", "seconds")]
    ordered = [name for name in TITLES if name in names] + sorted(set(names) - set(TITLES))
    if not ordered:
        return None
    header, columns = [""], []
    for run in runs:
        steps = _heldout_steps(run, HELDOUT_STEPS if len(runs) == 1 else 2)
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        header += [f"{prefix}step {count_text(step)}" for step in steps]
        columns += [(run, step) for step in steps]
    rows = []
    for name in ordered:
        cells = []
        for run, step in columns:
            column = run.metrics.column("eval", name)
            values = dict(zip(column.steps, column.values, strict=True)) if column else {}
            cells.append(number_text(values[step]) if step in values else "")
        rows.append([TITLES.get(name, name), *cells])
    return Table(header, rows)


def starts_at_no_reward(runs: Sequence[RunRecord]) -> bool:
    """Whether some run's rewards are all 0 at step 0: it has a reference, and starts there."""
    margins = [run.metrics.column("eval", "rewards/margins") for run in runs]
    return any(column is not None and column.steps[0] == 0 and column.values[0] == 0 for column in margins)


def _heldout_steps(run: RunRecord, most: int) -> list[float]:
    """The first and the last, the adapter's, and others evenly between."""
    steps = sorted({step for column in run.metrics.columns["eval"].values() for step in column.steps})
    if len(steps) <= most:
        return steps
    chosen = {steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)}
    return sorted(chosen | ({adapter_step(run)} & set(steps)))


def against_plan(run: RunRecord) -> Table:
    """What was planned and what was measured, one thing a row; empty cells where one of the two isn't known."""
    forecast, examples = leaf(run.facts, "forecast"), leaf(run.facts, "examples", "train")
    planned_total = number(leaf(forecast, "memory", "total"))
    peak, kind = measured_peak(run)
    tokens, seconds = _spent(run)
    step = run.metrics.last_step
    a_step = tokens / step if step else math.nan
    planned_step, flops = number(leaf(forecast, "tokens_per_step")), number(leaf(forecast, "flops_per_step"))
    speed = tokens / seconds if seconds > 0 else math.nan
    rate = flops * step / seconds / 1e12 if seconds > 0 else math.nan
    rows = [
        ["peak memory", _or_blank(planned_total, size_text), _or_blank(peak, size_text), _ratio(peak, planned_total)],
        ["", "", kind, ""],
        ["tokens a step", _or_blank(planned_step, count_text), _or_blank(a_step, count_text),
         _ratio(a_step, planned_step)],
        ["work a step", _or_blank(flops / 1e12, _tera), "", ""],
        ["speed", "", _or_blank(speed, lambda value: f"{number_text(value)} tokens a second"), ""],
        ["", "", _or_blank(rate, lambda value: f"{_tera(value)} a second"), ""],
        ["optimizer steps", _or_blank(number(run.facts.get("steps")), count_text), count_text(step), ""],
        ["tokens at once", _or_blank(number(run.facts.get("tokens_per_microbatch")), count_text),
         _or_blank(number(leaf(run.result, "tokens_per_microbatch")), count_text), ""],
        ["layers recomputed", _or_blank(number(run.facts.get("recomputed_layers")), count_text), "", ""],
        ["training examples", _or_blank(number(examples), count_text), "", ""],
    ]  # fmt: skip
    return Table(["", "planned", "measured", "measured / planned"], [row for row in rows if any(row[1:])])


def memory_bars(run: RunRecord) -> list[Bar]:
    """The forecast by its parts above what was measured; none without a forecast."""
    memory = leaf(run.facts, "forecast", "memory")
    total, peak = number(leaf(memory, "total")), measured_peak(run)[0]
    if math.isnan(total) or total <= 0:
        return []
    sizes = {part: number(leaf(memory, part)) for part in CAPTIONS}
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
    """Bytes at the peak, and of what; NaN where the run hasn't ended, or is older than result.json."""
    for name, kind in (("allocated", "allocated on the GPU"), ("resident", "resident, of the whole process")):
        size = number(leaf(run.result, "peak_bytes", name))
        if not math.isnan(size):
            resumed = number(leaf(run.result, "first_step"))
            since = f", since step {count_text(resumed)}, where it was resumed" if resumed > 0 else ""
            return size, f"{kind}{since}"
    return math.nan, ""


def _spent(run: RunRecord) -> tuple[float, float]:
    """Tokens fed and seconds passed."""
    return run.metrics.last("train", "tokens"), run.metrics.last("train", "seconds")


def _tera(value: float) -> str:
    return f"{number_text(value)} TFLOP"


def _or_blank(value: float, text: Any) -> str:
    return "" if math.isnan(value) else str(text(value))


def _ratio(measured: float, planned: float) -> str:
    return f"{measured / planned:.2f}" if planned > 0 and not math.isnan(measured) else ""
