"""Curves as drawn things: paths in the coordinates of one SVG, for the page's template to put down.

Hundreds of thousands of rows fall into a few hundred pixel columns. Of each column the range of its values is drawn, so
that no spike is lost, and their mean. A row without a value (null in metrics.jsonl: not finite, or not defined for that
batch) breaks the line and is marked on the axis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qpref.report.read import Column
from qpref.report.text import count_text, number_text, tick_texts, ticks

WIDTH, HEIGHT = 640, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 32, 12, 34
PIXELS_A_COLUMN = 2
NUM_COLUMNS = (WIDTH - LEFT - RIGHT) // PIXELS_A_COLUMN
TABLE_ROWS = 24
"""Most steps of a curve in the table beneath its chart."""
DOTS = 60
"""Most points that are marked with dots."""
COLOURS = 8
"""In the page's style; the ninth curve has the first's colour again."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """What is to be drawn.

    Attributes:
        colour: place in the page's palette, which repeats.
        is_dashed: held-out rows, which are few: dashed, with a dot for each.
    """

    label: str
    colour: int
    is_dashed: bool
    column: Column


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A drawn curve.

    Attributes:
        line, band: SVG path data; the band is empty where each point is a row.
        dots: places of points to mark.
        points: of each point its place along the axis, its step, and its text, for whoever points at it.
    """

    label: str
    colour: int
    is_dashed: bool
    line: str
    band: str
    dots: list[tuple[float, float]]
    points: list[tuple[float, str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawn chart.

    Attributes:
        summary: what it shows in words, for those who don't see it.
        gaps: places along the axis of rows without a value.
        zero: height of the line at 0; None where 0 is not in view.
        hover: the traces' points as JSON.
        header, rows, table_note: the table beneath, and what it leaves out.
        notes: what was left out or drawn together.
    """

    title: str
    summary: str
    traces: list[Trace]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    zero: float | None
    gaps: list[float]
    hover: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    table_note: str


@dataclass(frozen=True, slots=True)
class _Points:
    """A curve reduced to what the pixels can tell: mean, lowest and highest of each column, NaN where there is none."""

    steps: Floats
    means: Floats
    lowest: Floats
    highest: Floats
    gaps: Floats
    rows_a_point: float


@dataclass(frozen=True, slots=True)
class _Scale:
    """From steps and values to the SVG's coordinates."""

    last_step: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return round(float(LEFT + (WIDTH - LEFT - RIGHT) * (step / self.last_step)), 1)

    def y(self, value: float) -> float:
        return round(float(TOP + (HEIGHT - TOP - BOTTOM) * (self.high - value) / (self.high - self.low)), 1)


def draw(title: str, curves: Sequence[Curve], last_step: int) -> Chart:
    """A chart of at least one curve, over the steps from 0 to `last_step`."""
    last_step = max(1, last_step)
    reduced = [_reduce(curve.column, last_step) for curve in curves]
    scale = _Scale(last_step, *_value_range(reduced))
    traces = [_trace(curve, points, scale) for curve, points in zip(curves, reduced, strict=True)]
    values = ticks(scale.low, scale.high, 5)
    steps = ticks(0, last_step, 7, whole=True)
    header, rows = _table(curves)
    longest = max(len(curve.column) for curve in curves)
    return Chart(
        title=title,
        summary=f"{title}, by optimizer step. " + " ".join(map(_in_words, curves)),
        traces=traces,
        x_ticks=[(scale.x(step), text) for step, text in zip(steps, tick_texts(steps), strict=True)],
        y_ticks=[(scale.y(value), text) for value, text in zip(values, tick_texts(values), strict=True)],
        zero=scale.y(0.0) if scale.low < 0 < scale.high else None,
        gaps=sorted({scale.x(step) for points in reduced for step in points.gaps}),
        hover=json.dumps([{"label": trace.label, "colour": trace.colour, "points": trace.points} for trace in traces]),
        header=header,
        rows=rows,
        notes=_notes(curves, reduced),
        table_note=f"{TABLE_ROWS} of {longest:,} rows a curve, evenly chosen." if longest > TABLE_ROWS else "",
    )


def _reduce(column: Column, last_step: int) -> _Points:
    order = np.argsort(column.steps, kind="stable")
    steps, values = np.asarray(column.steps, float)[order], np.asarray(column.values, float)[order]
    known = np.isfinite(values)
    if len(steps) <= 2 * NUM_COLUMNS:
        return _Points(steps, values, values, values, steps[~known], 1.0)
    places = np.clip((steps / last_step * NUM_COLUMNS).astype(int), 0, NUM_COLUMNS - 1)
    occupied = np.unique(places)
    counts = np.bincount(places[known], minlength=NUM_COLUMNS)
    lowest, highest = np.full(NUM_COLUMNS, np.inf), np.full(NUM_COLUMNS, -np.inf)
    np.minimum.at(lowest, places[known], values[known])
    np.maximum.at(highest, places[known], values[known])
    sums = np.bincount(places[known], values[known], minlength=NUM_COLUMNS)
    all_steps = np.bincount(places, steps, minlength=NUM_COLUMNS) / np.maximum(
        1, np.bincount(places, minlength=NUM_COLUMNS)
    )
    empty = counts == 0
    means = np.where(empty, np.nan, sums / np.maximum(1, counts))
    lowest, highest = np.where(empty, np.nan, lowest), np.where(empty, np.nan, highest)
    return _Points(
        all_steps[occupied],
        means[occupied],
        lowest[occupied],
        highest[occupied],
        all_steps[np.unique(places[~known])],
        len(steps) / len(occupied),
    )


def _value_range(reduced: Sequence[_Points]) -> tuple[float, float]:
    """The least and the greatest value, with room around; a range of its own for a constant."""
    lows = np.concatenate([points.lowest for points in reduced])
    highs = np.concatenate([points.highest for points in reduced])
    if not np.isfinite(lows).any():
        return 0.0, 1.0
    low, high = float(np.nanmin(lows)), float(np.nanmax(highs))
    room = 0.06 * (high - low)
    if room <= 1e-12 * max(abs(low), abs(high)):
        room = 0.1 * abs(low) or 1.0
    return low - room, high + room


def _trace(curve: Curve, points: _Points, scale: _Scale) -> Trace:
    runs = list(_unbroken(points))
    together = points.rows_a_point > 1
    places = [place for run in runs for place in run]
    dotted = len(places) <= DOTS
    return Trace(
        label=curve.label,
        colour=curve.colour % COLOURS,
        is_dashed=curve.is_dashed,
        line="".join(_path(points.steps, points.means, run, scale) for run in runs),
        band="".join(_band(points, run, scale) for run in runs) if together else "",
        dots=[(scale.x(points.steps[place]), scale.y(points.means[place])) for place in places] if dotted else [],
        points=[
            (scale.x(points.steps[place]), count_text(points.steps[place]), _point_text(points, place))
            for place in places
        ],
    )


def _unbroken(points: _Points) -> Iterable[list[int]]:
    """Places of points that follow each other without one that has no value between them."""
    run: list[int] = []
    for place, value in enumerate(points.means):
        if math.isfinite(value):
            run.append(place)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _path(steps: Floats, values: Floats, run: Sequence[int], scale: _Scale) -> str:
    """A line through some points; of a single one, a line of no length, which round ends make a dot."""
    pairs = [f"{scale.x(steps[place])} {scale.y(values[place])}" for place in run]
    return "M" + "L".join(pairs if len(pairs) > 1 else pairs * 2)


def _band(points: _Points, run: Sequence[int], scale: _Scale) -> str:
    upper = [f"{scale.x(points.steps[place])} {scale.y(points.highest[place])}" for place in run]
    lower = [f"{scale.x(points.steps[place])} {scale.y(points.lowest[place])}" for place in reversed(run)]
    return "M" + "L".join(upper + lower) + "Z"


def _point_text(points: _Points, place: int) -> str:
    mean, low, high = (number_text(values[place]) for values in (points.means, points.lowest, points.highest))
    return mean if low == high else f"{mean} ({low} to {high})"


def _table(curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
    """Values of rows, evenly chosen, the first and the last among them; empty where a curve has no row at a step."""
    chosen: set[float] = set()
    for curve in curves:
        steps = curve.column.steps
        picks = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), TABLE_ROWS)).astype(int))
        chosen |= {steps[pick] for pick in picks}
    found = [
        {step: value for step, value in zip(curve.column.steps, curve.column.values, strict=True) if step in chosen}
        for curve in curves
    ]
    rows = [
        [count_text(step), *(number_text(values[step]) if step in values else "" for values in found)]
        for step in sorted(chosen)
    ]
    return ["step", *(curve.label for curve in curves)], rows


def _in_words(curve: Curve) -> str:
    column = curve.column
    known = [place for place, value in enumerate(column.values) if math.isfinite(value)]
    if not known:
        return f"{curve.label}: no value."
    first, last = known[0], known[-1]
    start = f"{curve.label}: {number_text(column.values[first])} at step {count_text(column.steps[first])}"
    end = f", {number_text(column.values[last])} at step {count_text(column.steps[last])}" if last != first else ""
    return f"{start}{end}."


def _notes(curves: Sequence[Curve], reduced: Sequence[_Points]) -> list[str]:
    notes = []
    most = max(points.rows_a_point for points in reduced)
    if most > 1:
        rows = max(len(curve.column) for curve in curves)
        notes.append(
            f"{rows:,} rows: each column of pixels stands for about {most:,.0f} of them, the line for their mean, "
            "the band for their range."
        )
    missing = sum(not math.isfinite(value) for curve in curves for value in curve.column.values)
    if missing:
        rows_are = "1 row has" if missing == 1 else f"{missing:,} rows have"
        notes.append(f"{rows_are} no value (not finite, or not defined there); marked on the axis.")
    return notes
