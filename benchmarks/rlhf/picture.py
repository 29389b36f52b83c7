"""Draw reward against KL and against CPU seconds: `python -m benchmarks.rlhf.picture RESULTS.json PICTURE.svg`.

Needs matplotlib (`pip install -e ".[docs]"`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rlhf import curves
from benchmarks.rlhf.curves import Curve
from benchmarks.rlhf.settings import LEARNED, OFFLINE, ROUNDS, TITLES, TRUE

COLOURS = {OFFLINE: "#3b82f6", ROUNDS: "#0d9488", TRUE: "#ea580c", LEARNED: "#a855f7"}
MARKS = {OFFLINE: "o", ROUNDS: "s", TRUE: "^", LEARNED: "D"}
GREY = "#808080"
"""Of axes and text: readable on a white and on a dark page."""


def draw(drawn: Mapping[str, Sequence[Curve]], file: Path) -> None:
    """Draw the curves of each arm's seeds; bars are 95% bootstrap intervals over openings."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    style: Any = {
        "svg.hashsalt": "qpref", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    }  # fmt: skip
    with mpl.rc_context(style):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
        for axis, label in zip(axes, ("KL from the base (nats)", "CPU seconds"), strict=True):
            for name, seeds in drawn.items():
                for number, curve in enumerate(seeds):
                    xs = [float(one.kls.mean()) if axis is axes[0] else one.cpu_seconds for one in curve]
                    means = [float(one.rewards.mean()) for one in curve]
                    ends = [curves.mean_interval(one.rewards) for one in curve]
                    bars = [[mean - low for mean, (low, _) in zip(means, ends, strict=True)],
                            [high - mean for mean, (_, high) in zip(means, ends, strict=True)]]  # fmt: skip
                    axis.errorbar(xs, means, yerr=bars, color=COLOURS[name], marker=MARKS[name], markersize=4,
                                  linewidth=1.2, elinewidth=0.6, label=None if number else TITLES[name])  # fmt: skip
            axis.set_xlabel(label)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("held-out reward")
        figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
        figure.savefig(file, metadata={"Date": None}, transparent=True)
        pyplot.close(figure)


def main() -> None:
    from benchmarks.rlhf.results import curves_from_json

    draw(curves_from_json(json.loads(Path(sys.argv[1]).read_text())["curves"]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
