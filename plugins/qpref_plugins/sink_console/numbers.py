"""Numbers of a run as short texts; none is shown as -0.000."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from qpref.records import MetricRow

GIB = 2**30


def duration(seconds: float) -> str:
    """Format seconds as a clock: 1:23, or 2:00:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def metric_texts(row: MetricRow, prefix: str = "", noise: float = math.nan) -> list[str]:
    """Format a row's loss, and its margin and accuracy where the loss defines them.

    Args:
        prefix: of the metrics' names.
        noise: of the margin; NaN where it is unknown.
    """
    loss, margin, accuracy = (
        row.values.get(f"{prefix}{name}", math.nan) for name in ("loss", "rewards/margins", "rewards/accuracies")
    )
    texts = [f"loss {loss:z.4f}"]
    if not math.isnan(margin):
        texts.append(f"margin {margin:+z.3f}" + ("" if math.isnan(noise) else f" ± {noise:.3f}"))
    return texts if math.isnan(accuracy) else [*texts, f"accuracy {accuracy:.2f}"]


def noise_of(values: Sequence[float]) -> float:
    """Estimate the standard deviation of single values around their trend, from successive differences.

    After von Neumann et al. 1941, "The mean square successive difference": half the mean square of the differences. NaN
    for fewer than three values, and where one isn't finite.
    """
    if len(values) < 3 or not all(map(math.isfinite, values)):
        return math.nan
    squares = [(after - before) ** 2 for before, after in itertools.pairwise(values)]
    return math.sqrt(math.fsum(squares) / len(squares) / 2)


def memory_texts(peak: int, planned: int, limit: int) -> list[str]:
    """Format peak memory beside the plan's and as a share of the limit; sizes in bytes, 0 for an unknown one."""
    if not peak:
        return []
    beside = f" of {planned / GIB:.1f} GiB planned" if planned else " GiB"
    share = [f"{peak / limit:.0%} of the limit"] if limit else []
    return [f"memory {peak / GIB:.1f}{beside}", *share]


def flowed(fields: Iterable[str], width: int) -> list[str]:
    """Lay out fields, two spaces apart, in lines of at most `width` characters; a longer field has its own line."""
    lines: list[str] = []
    for text in filter(None, fields):
        if lines and len(lines[-1]) + 2 + len(text) <= width:
            lines[-1] += f"  {text}"
        else:
            lines.append(text)
    return lines
