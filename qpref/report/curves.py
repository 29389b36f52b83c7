"""Choose the report's curves, and which of them share a chart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from qpref.report.cells import MAX_LABEL
from qpref.report.charts import Chart, Curve, draw
from qpref.report.outcome import heldout_count
from qpref.report.read import Column, RunRecord
from qpref.report.shares import is_share
from qpref.report.text import bounded, visible

TITLES = {
    "loss": "loss",
    "rewards/margins": "reward margin, chosen - rejected",
    "rewards/accuracies": "accuracy by reward margin",
    "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected",
    "logps/accuracies": "accuracy by log-probability",
    "logps/chosen": "log-probability of chosen (nats)",
    "logps/rejected": "log-probability of rejected (nats)",
    "logps/length_bias": "new preference for longer answers",
    "grad_norm": "gradient norm, before clipping",
    "learning_rate": "learning rate",
}
"""Titles of the metrics that most losses share, in the order of their charts."""
TOGETHER = {
    "rewards of chosen and rejected": ("rewards/chosen", "rewards/rejected"),
    "log-probability of chosen and rejected (nats)": ("logps/chosen", "logps/rejected"),
}
"""Metrics of a single run that share a chart; with several runs, each metric has its own."""
COUNTERS = ("tokens", "seconds")
EXACT = ("learning_rate", "option/")
"""Values without noise, which are not smoothed, by the starts of their names."""
MAX_BANDS = 2
"""Most runs whose intervals are drawn; more would cover each other, and are in the tables."""
MAX_CHARTS = 60
"""Most charts of a page; a loss of ours has 16 metrics."""
SPLIT_NAMES = {"train": "training", "eval": "held-out"}


def all_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Draw the first MAX_CHARTS metrics of the runs, the common ones first."""
    found = metric_names(runs)
    names = found[:MAX_CHARTS]
    last_step = max(run.metrics.last_step for run in runs)
    charts = []
    shown: set[str] = set()
    for name in names:
        if name in shown:
            continue
        title, group = TITLES.get(name) or bounded(name, MAX_LABEL), [name]
        for together, members in TOGETHER.items():
            if len(runs) == 1 and name in members:
                title, group = together, [member for member in members if member in found]
        shown |= set(group)
        charts.append(draw(title, list(_curves(runs, group)), last_step))
    return charts


def metric_names(runs: Sequence[RunRecord]) -> list[str]:
    """List the metrics that have a chart each, the common ones first."""
    found = dict.fromkeys(name for run in runs for name in run.metrics.names if name not in COUNTERS)
    return [name for name in TITLES if name in found] + sorted(name for name in found if name not in TITLES)


def _curves(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Curve]:
    """Yield the curves of one chart, coloured by run, or by metric where a single run's chart has two."""
    for index, run in enumerate(runs):
        for colour, name in enumerate(names, index):
            for split, split_name in SPLIT_NAMES.items():
                column = run.metrics.column(split, name)
                if column:
                    parts = [run.name] if len(runs) > 1 else []
                    parts += [name.rpartition("/")[2]] if len(names) > 1 else []
                    is_heldout = split == "eval"
                    has_band = is_heldout and is_share(name) and len(runs) <= MAX_BANDS
                    share_of = heldout_count(run) if has_band else math.nan
                    # The page's script shows it too, past the template.
                    label = visible(", ".join([*parts, split_name]))
                    yield Curve(
                        label=label,
                        colour=colour,
                        is_heldout=is_heldout,
                        column=column,
                        share_of=share_of if share_of > 0 else None,
                        is_noisy=not name.startswith(EXACT),
                    )


def speed_chart(runs: Sequence[RunRecord]) -> Chart | None:
    """Draw training speed in tokens per second; None where no run has two rows."""
    curves = [
        Curve(visible(run.name) if len(runs) > 1 else "tokens per second", index, False, speed)
        for index, run in enumerate(runs)
        if (speed := speeds(run))
    ]
    last_step = max(run.metrics.last_step for run in runs)
    return draw("training speed (tokens per second)", curves, last_step) if curves else None


def speeds(run: RunRecord) -> Column:
    """Compute tokens per second between consecutive training rows."""
    tokens, seconds = (run.metrics.column("train", name) or Column() for name in COUNTERS)
    speed = Column()
    rows = zip(tokens.steps, tokens.values, seconds.values, strict=False)
    for (_, before, started), (step, after, ended) in pairwise(rows):
        speed.add(step, (after - before) / (ended - started) if ended > started else math.nan)
    return speed
