"""Lay out curves as SVG paths and ticks, for the page's template to render.

Hundreds of thousands of rows fall into a few hundred pixel columns. For each column the mean is drawn, and the range
of its values, so that no spike is lost. A row without a value (null in metrics.jsonl: not finite, or not defined for
that batch) breaks the line and is marked on the axis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qpref.report.points import Floats, Points, extremes, reduce
from qpref.report.read import Column
from qpref.report.text import count_text, log_ticks, number_text, tick_texts, ticks

WIDTH, HEIGHT = 640, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 32, 12, 34
PIXELS_PER_COLUMN = 2
NUM_COLUMNS = (WIDTH - LEFT - RIGHT) // PIXELS_PER_COLUMN
TABLE_ROWS = 24
"""Maximum rows per curve in the table below its chart."""
MAX_DOTS = 60
"""Maximum points of a curve that is drawn with dots."""
COLOURS = 8
"""Colours in the page's style; the ninth curve reuses the first."""
SMOOTHING = 0.9
"""Weight of the exponential moving average."""
SMOOTHED_FROM = 20
"""Fewest points of a curve that is smoothed too."""
LOG_RATIO = 2.0
"""Smallest ratio of highest to lowest value for which a log axis is drawn too."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve to draw.

    Attributes:
        colour: index into the page's palette, which repeats.
        is_heldout: dotted, with a dot for each row.
        share_of: number of examples that the values are shares of, for their intervals; None for other values.
        is_noisy: smoothed too, where it is of training rows.
    """

    label: str
    colour: int
    is_heldout: bool
    column: Column
    share_of: float | None = None
    is_noisy: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A drawn curve.

    Attributes:
        line, smooth, band: SVG path data; the smoothed line is empty where the points are few, the band where each is a
            single row without an interval.
        dots: coordinates of the points to mark.
        points: x, step and value text of each point, for the tooltip.
    """

    label: str
    colour: int
    is_heldout: bool
    line: str
    smooth: str
    band: str
    dots: list[tuple[float, float]]
    points: list[tuple[float, str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The traces over one value axis.

    Attributes:
        zero: y of the line at 0; None where 0 is out of range.
    """

    traces: list[Trace]
    y_ticks: list[tuple[float, str]]
    zero: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawn chart.

    Attributes:
        summary: text alternative for screen readers.
        linear, log: the traces over either axis; no log axis where a value isn't above 0, or all are close.
        gaps: x of rows without a value.
        hover: the traces' points as JSON.
        header, rows, table_note: the table below the chart, and a note on omitted rows.
        notes: captions on aggregated and missing values.
    """

    title: str
    summary: str
    linear: View
    log: View | None
    x_ticks: list[tuple[float, str]]
    gaps: list[float]
    hover: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    table_note: str

    @property
    def is_smoothed(self) -> bool:
        """True where a trace has a smoothed line."""
        return any(trace.smooth for trace in self.linear.traces)


@dataclass(frozen=True, slots=True)
class _Scale:
    """Mapping of steps and values to SVG coordinates; on a log axis, `low` and `high` are logarithms."""

    last_step: float
    low: float
    high: float
    is_log: bool = False

    def x(self, step: float) -> float:
        return round(float(LEFT + (WIDTH - LEFT - RIGHT) * (step / self.last_step)), 1)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.is_log else value
        return round(float(TOP + (HEIGHT - TOP - BOTTOM) * (self.high - value) / (self.high - self.low)), 1)


def draw(title: str, curves: Sequence[Curve], last_step: int) -> Chart:
    """Draw at least one curve over the steps from 0 to `last_step`."""
    last_step = max(1, last_step)
    reduced = [reduce(curve.column, last_step, NUM_COLUMNS, curve.share_of) for curve in curves]
    low, high = extremes(reduced)
    linear = _Scale(last_step, *_padded(low, high))
    drawn = _linear_view(curves, reduced, linear)
    has_log = low > 0 and high >= LOG_RATIO * low
    steps = ticks(0, last_step, 7, whole=True)
    header, rows = _table(curves)
    longest = max(len(curve.column) for curve in curves)
    return Chart(
        title=title,
        summary=f"{title}, by optimizer step. " + " ".join(map(_in_words, curves)),
        linear=drawn,
        log=_log_view(curves, reduced, last_step, (low, high)) if has_log else None,
        x_ticks=[(linear.x(step), text) for step, text in zip(steps, tick_texts(steps), strict=True)],
        gaps=sorted({linear.x(step) for points in reduced for step in points.gaps}),
        hover=json.dumps(
            [{"label": trace.label, "colour": trace.colour, "points": trace.points} for trace in drawn.traces]
        ),
        header=header,
        rows=rows,
        notes=_notes(curves, reduced),
        table_note=f"{TABLE_ROWS} of {longest:,} rows per curve, evenly spaced." if longest > TABLE_ROWS else "",
    )


def _linear_view(curves: Sequence[Curve], reduced: Sequence[Points], scale: _Scale) -> View:
    values = ticks(scale.low, scale.high, 5)
    return View(
        traces=[_trace(curve, points, scale) for curve, points in zip(curves, reduced, strict=True)],
        y_ticks=[(scale.y(value), text) for value, text in zip(values, tick_texts(values), strict=True)],
        zero=scale.y(0.0) if scale.low < 0 < scale.high else None,
    )


def _log_view(
    curves: Sequence[Curve], reduced: Sequence[Points], last_step: int, extremes: tuple[float, float]
) -> View:
    low, high = _padded(*map(math.log10, extremes))
    scale = _Scale(last_step, low, high, is_log=True)
    return View(
        traces=[_trace(curve, points, scale) for curve, points in zip(curves, reduced, strict=True)],
        y_ticks=[(scale.y(value), number_text(value)) for value in log_ticks(low, high)],
        zero=None,
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    """Add padding to an axis' range; a constant gets a range around it."""
    padding = 0.06 * (high - low)
    if padding <= 1e-12 * max(abs(low), abs(high)):
        padding = 0.1 * abs(low) or 1.0
    return low - padding, high + padding


def _trace(curve: Curve, points: Points, scale: _Scale) -> Trace:
    segments = list(_segments(points))
    indices = [index for segment in segments for index in segment]
    dotted = len(indices) <= MAX_DOTS
    return Trace(
        label=curve.label,
        colour=curve.colour % COLOURS,
        is_heldout=curve.is_heldout,
        line="".join(_path(points.steps, points.means, segment, scale) for segment in segments),
        smooth=_smooth_path(points, indices, scale) if curve.is_noisy and not curve.is_heldout else "",
        band="".join(_band(points, segment, scale) for segment in segments) if _has_band(curve, points) else "",
        dots=[(scale.x(points.steps[index]), scale.y(points.means[index])) for index in indices] if dotted else [],
        points=[
            (scale.x(points.steps[index]), count_text(points.steps[index]), _point_text(points, index))
            for index in indices
        ],
    )


def _has_band(curve: Curve, points: Points) -> bool:
    return points.rows_per_point > 1 or curve.share_of is not None


def _smooth_path(points: Points, indices: Sequence[int], scale: _Scale) -> str:
    """Draw the exponential moving average of the points with a value, divided by the weights' sum so that it starts at
    the first one; nothing where the points are few."""
    if len(indices) < SMOOTHED_FROM:
        return ""
    means, total, weights = points.means.copy(), 0.0, 0.0
    for index in indices:
        total = SMOOTHING * total + (1 - SMOOTHING) * points.means[index]
        weights = SMOOTHING * weights + 1 - SMOOTHING
        means[index] = total / weights
    return _path(points.steps, means, indices, scale)


def _segments(points: Points) -> Iterable[list[int]]:
    """Yield the indices of consecutive points, split where a value is missing."""
    segment: list[int] = []
    for index, value in enumerate(points.means):
        if math.isfinite(value):
            segment.append(index)
        elif segment:
            yield segment
            segment = []
    if segment:
        yield segment


def _path(steps: Floats, values: Floats, segment: Sequence[int], scale: _Scale) -> str:
    """Draw a line through points; a single point becomes a zero-length line, which round caps show as a dot."""
    pairs = [f"{scale.x(steps[index])} {scale.y(values[index])}" for index in segment]
    return "M" + "L".join(pairs if len(pairs) > 1 else pairs * 2)


def _band(points: Points, segment: Sequence[int], scale: _Scale) -> str:
    upper = [f"{scale.x(points.steps[index])} {scale.y(points.highest[index])}" for index in segment]
    lower = [f"{scale.x(points.steps[index])} {scale.y(points.lowest[index])}" for index in reversed(segment)]
    return "M" + "L".join(upper + lower) + "Z"


def _point_text(points: Points, index: int) -> str:
    mean, low, high = (number_text(values[index]) for values in (points.means, points.lowest, points.highest))
    return mean if low == high else f"{mean} ({low} to {high})"


def _table(curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
    """Tabulate evenly spaced rows, first and last included; a cell is empty where a curve has no row at a step."""
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
    known = [index for index, value in enumerate(column.values) if math.isfinite(value)]
    if not known:
        return f"{curve.label}: no value."
    first, last = known[0], known[-1]
    start = f"{curve.label}: {number_text(column.values[first])} at step {count_text(column.steps[first])}"
    end = f", {number_text(column.values[last])} at step {count_text(column.steps[last])}" if last != first else ""
    return f"{start}{end}."


def _notes(curves: Sequence[Curve], reduced: Sequence[Points]) -> list[str]:
    notes = []
    if counts := sorted({curve.share_of for curve in curves if curve.share_of}):
        of = " or ".join(map(count_text, counts))
        notes.append(f"The band of held-out rows is the 95 % interval (Wilson) of a share of {of} examples.")
    most = max(points.rows_per_point for points in reduced)
    if most > 1:
        rows = max(len(curve.column) for curve in curves)
        notes.append(
            f"{rows:,} rows: each pixel column combines about {most:,.0f} of them; the line is their mean, the band "
            "their range."
        )
    missing = sum(not math.isfinite(value) for curve in curves for value in curve.column.values)
    if missing:
        rows_have = "1 row has" if missing == 1 else f"{missing:,} rows have"
        notes.append(f"{rows_have} no value (not finite, or undefined for the batch); marked on the axis.")
    return notes
