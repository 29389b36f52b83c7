"""What the startup checks take at most, beside what training's own probe takes on the same pair, all layers recomputed.

    python -m tests.fake_cuda.checks_peak --family qwen2 --shape 7B --prompt 256 --response 767 [--start 1]
    python -m tests.fake_cuda.checks_peak --all      # JSON: by how many GiB the checks are above the probe; 1B, 7B, 8B

A check that takes more than the probe ends a run on a card where training would fit. Exits with 1 then.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

from tests.fake_cuda import fake_cuda, names
from tests.fake_cuda.forked import forked
from tests.fake_cuda.job import Job, Run, within

ALONE: dict[str, Any] = {"recomputed": -1, "pairs": 1}
LENGTHS = {"short": (90, 160), "long": (256, 767)}
"""Tokens of the prompt and of each response: 410 and 1,790 together."""
SHAPES = {"1B": "llama", "7B": "qwen2", "8B": "llama"}
"""Shape -> family."""


def jobs(starts: tuple[int, ...] = (0, 1)) -> dict[str, Job]:
    """Each shape with each first pair, from a fresh adapter and from a start adapter."""
    return {
        f"{shape}, {length} first pair{', start adapter' * start}": Job(
            family=family, shape=shape, prompt=prompt, response=response, start=start, dropout=0.05, **ALONE
        )
        for shape, family in SHAPES.items()
        for length, (prompt, response) in LENGTHS.items()
        for start in starts
    }


def measure(run: Run, meters: fake_cuda.Meters) -> dict[str, Any]:
    """Peaks of the checks and of the probe on the run's own first pair."""
    meters.syncs.answer = 0.0
    policy, pair = run.policy, run.examples[:1]
    work = {
        "layout check": lambda: names.check_layout(policy, pair[0]),
        "start check": lambda: names.check_start(policy, run.objective, names.first_batch(pair, policy)),
        "probe": lambda: names.probe(policy, pair),
    }
    found: dict[str, Any] = {}
    for name, stage in work.items():
        meters.device.reset_peak()
        stage()
        found[name] = {"peak_gib": meters.device.peak / fake_cuda.GIB, "at": meters.device.peak_site}
    return found


def measure_evaluation(run: Run, meters: fake_cuda.Meters) -> dict[str, Any]:
    """The same, and the layout check as evaluation calls it."""
    found = measure(run, meters)
    run.policy.model.eval()
    meters.device.reset_peak()
    names.check_layout(run.policy, run.examples[0])
    return found | {"evaluation": {"peak_gib": meters.device.peak / fake_cuda.GIB, "at": meters.device.peak_site}}


def excess(found: dict[str, Any]) -> float:
    """GiB by which the largest check is above the probe."""
    peaks = {name: each["peak_gib"] for name, each in found.items()}
    probe: float = peaks.pop("probe")
    return max(peaks.values()) - probe


def layout(run: Run, meters: fake_cuda.Meters) -> str:
    """The attention that the layout check chooses."""
    meters.syncs.answer = 0.0
    names.check_layout(run.policy, run.examples[0])
    return str(run.policy.attention)


def excess_of(job: Job) -> float:
    return excess(within(job, measure_evaluation))


def main() -> None:
    if "--all" in sys.argv:
        excesses = forked({name: partial(excess_of, job) for name, job in jobs().items()})
        print(json.dumps(excesses))
        sys.exit(max(excesses.values()) > 0)
    job, _ = Job.parse(__doc__ or "", **ALONE, dropout=0.05)
    found = within(job, measure_evaluation)
    for name, each in found.items():
        print(f"{name:14} {each['peak_gib']:7.3f} GiB  {each['at']}")
    sys.exit(excess(found) > 0)


if __name__ == "__main__":
    main()
