"""Reduction of a curve of any length to a few hundred points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qpref.report.read import Column
from qpref.report.shares import Share

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Points:
    """A curve reduced to one point per pixel column: mean, lowest and highest value, NaN where there is none.

    Of a share, lowest and highest are the ends of its interval.
    """

    steps: Floats
    means: Floats
    lowest: Floats
    highest: Floats
    gaps: Floats
    rows_per_point: float


def reduce(column: Column, last_step: int, num_columns: int, share_of: float | None) -> Points:
    """Reduce a curve of more than two rows per pixel column to one point for each of `num_columns`.

    Args:
        share_of: number of examples that the values are shares of; None where they are no shares.
    """
    order = np.argsort(column.steps, kind="stable")
    steps, values = np.asarray(column.steps, float)[order], np.asarray(column.values, float)[order]
    known = np.isfinite(values)
    if len(steps) <= 2 * num_columns:
        lowest, highest = values, values
        if share_of is not None:
            ends = np.array([Share(value, share_of).interval for value in values]).reshape(-1, 2)
            lowest, highest = (np.where(np.isnan(end), values, end) for end in ends.T)
        return Points(steps, values, lowest, highest, steps[~known], 1.0)
    columns = np.clip((steps / last_step * num_columns).astype(int), 0, num_columns - 1)
    occupied = np.unique(columns)
    counts = np.bincount(columns[known], minlength=num_columns)
    lowest, highest = np.full(num_columns, np.inf), np.full(num_columns, -np.inf)
    np.minimum.at(lowest, columns[known], values[known])
    np.maximum.at(highest, columns[known], values[known])
    sums = np.bincount(columns[known], values[known], minlength=num_columns)
    mean_steps = np.bincount(columns, steps, minlength=num_columns) / np.maximum(
        1, np.bincount(columns, minlength=num_columns)
    )
    empty = counts == 0
    means = np.where(empty, np.nan, sums / np.maximum(1, counts))
    lowest, highest = np.where(empty, np.nan, lowest), np.where(empty, np.nan, highest)
    return Points(
        mean_steps[occupied],
        means[occupied],
        lowest[occupied],
        highest[occupied],
        mean_steps[np.unique(columns[~known])],
        len(steps) / len(occupied),
    )


def extremes(reduced: Sequence[Points]) -> tuple[float, float]:
    """Find the lowest and the highest value; 0 and 1 without any."""
    lows = np.concatenate([points.lowest for points in reduced])
    highs = np.concatenate([points.highest for points in reduced])
    if not np.isfinite(lows).any():
        return 0.0, 1.0
    return float(np.nanmin(lows)), float(np.nanmax(highs))
