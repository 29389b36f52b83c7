"""The experiment's picture: reward against KL, a line for each method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.frontier.points import METHODS, Point, by_setting, methods_of
from benchmarks.frontier.table import pooled
from qpref.evaluation.statistics import Estimate

COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#be185d", "#374151")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw(results: Mapping[Point, dict[str, Any]], base: Estimate, file: Path) -> None:
    """Draw the points with their 95 % intervals, and the base as a grey band; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    style: Any = {"svg.hashsalt": "qpref", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    with mpl.rc_context(style):
        figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        axis.axhspan(base.low, base.high, color="#9ca3af", alpha=0.25, linewidth=0)
        axis.axhline(base.value, color="#6b7280", linewidth=1, linestyle="--", label="base, KL 0")
        for method in methods_of(results):
            _draw_method(axis, method, results)
        axis.set_xlabel("KL(policy || reference) of a response (nats), held-out openings")
        axis.set_ylabel("reward: VADER's compound score")
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def _draw_method(axis: Any, method: str, results: Mapping[Point, dict[str, Any]]) -> None:
    number = list(METHODS).index(method)
    own = {value: runs for (name, _, value), runs in by_setting(results).items() if name == method}
    values = sorted(own)
    distances, rewards = ([pooled(own[value], name) for value in values] for name in ("log_ratios", "rewards"))
    axis.errorbar(
        [one.value for one in distances],
        [one.value for one in rewards],
        xerr=_bars(distances),
        yerr=_bars(rewards),
        color=COLOURS[number],
        marker=MARKS[number],
        markersize=5,
        linewidth=1.2,
        elinewidth=0.6,
        label=method,
    )
    for value, distance, reward in zip(values, distances, rewards, strict=True):
        axis.annotate(f"{value:g}", (distance.value, reward.value), (4, 4), textcoords="offset points", fontsize=7)


def _bars(found: list[Estimate]) -> list[list[float]]:
    """Return the lengths of error bars below and above; a rounded 0 isn't below 0."""
    return [[max(0.0, one.value - one.low) for one in found], [max(0.0, one.high - one.value) for one in found]]
