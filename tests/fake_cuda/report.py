"""All that the tests look at, as one JSON object: one import, and a child process for each job.

python -m tests.fake_cuda.report
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.fake_cuda import checks_peak, matrix, planted, step
from tests.fake_cuda.__main__ import LARGE, LONG, RECIPE, SMALL, figures_of
from tests.fake_cuda.forked import forked
from tests.fake_cuda.job import Job, within

PEAKS = ("1B, short first pair", "8B, short first pair, start adapter")
"""Beside the long first pair at 7B, which is one of the figures; the others: `checks_peak --all`."""
WIDTHS = {"20": Job(width=20), "264": Job(width=264), "80": Job(width=80)}


def report() -> dict[str, Any]:
    """Figures as in `python -m tests.fake_cuda`, the matrix's designs and failures, the faults that were caught, the
    excess of the startup checks, and the attention of heads of unusual widths."""
    peaks = checks_peak.jobs()
    steps = {"small": SMALL, "large": LARGE, "recipe": RECIPE}
    groups: dict[str, dict[str, Callable[[], Any]]] = {
        "steps": {name: partial(within, Job(**job), step.measure) for name, job in steps.items()},
        "peaks": {"7B": partial(within, Job(**LONG), checks_peak.measure)},
        "excess": {name: partial(checks_peak.excess_of, peaks[name]) for name in PEAKS},
        "matrix": matrix.work(matrix.covering()),
        "planted": {"planted": partial(within, Job(), planted.all_caught)},
        "widths": {name: partial(within, job, checks_peak.layout) for name, job in WIDTHS.items()},
    }
    flat = {f"{group}/{name}": work for group, each in groups.items() for name, work in each.items()}
    results = forked(flat)
    found = {group: {name: results[f"{group}/{name}"] for name in each} for group, each in groups.items()}
    failed = {name: stages for name, stages in found["matrix"].items() if stages}
    return {
        "figures": figures_of(**found["steps"], peaks=found["peaks"]["7B"], failed=list(failed.values())),
        "design": list(matrix.design()),
        "paired": list(matrix.paired()),
        "matrix": failed,
        "planted": found["planted"]["planted"],
        "excess": found["excess"],
        "widths": found["widths"],
    }


if __name__ == "__main__":
    print(json.dumps(report()))
