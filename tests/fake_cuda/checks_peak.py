"""What the startup checks take at most, beside what training's own probe takes on the same pair, all layers recomputed.

    python -m tests.fake_cuda.checks_peak --family qwen2 --shape 7B --start 1
    python -m tests.fake_cuda.checks_peak --quick      # JSON of three shapes: excess of the checks in GiB

Training's checks and evaluation's are the same, and see a first pair of 410 and one of 1,790 tokens. A check that takes
more than the probe ends a run on a card where training would fit. Exits with 1 then.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from tests.fake_cuda import fake_cuda, names
from tests.fake_cuda.job import Job, Run, within

LENGTHS = {"short": (90, 160), "long": (256, 767)}
"""Tokens of the prompt and of each response: 410 and 1,790 together."""
QUICK: tuple[dict[str, Any], ...] = (
    {"shape": "1B"},
    {"family": "qwen2", "shape": "7B", "start": 1},
    {"shape": "8B", "dropout": 0.05},
)


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


def measure_lengths(run: Run, meters: fake_cuda.Meters) -> dict[str, dict[str, Any]]:
    """`measure` for a short and a long first pair, and the layout check as evaluation calls it."""
    found = {}
    for length, (prompt, response) in LENGTHS.items():
        run.examples = replace(run.job, pairs=1, prompt=prompt, response=response).examples()
        found[length] = measure(run, meters)
    run.policy.model.eval()
    meters.device.reset_peak()
    names.check_layout(run.policy, run.examples[0])
    found["long"]["evaluation's check"] = {"peak_gib": meters.device.peak / fake_cuda.GIB, "at": ""}
    return found


def excess(found: dict[str, Any]) -> float:
    """GiB by which the largest check is above the probe."""
    peaks = {name: each["peak_gib"] for name, each in found.items()}
    probe: float = peaks.pop("probe")
    return max(peaks.values()) - probe


def quick() -> dict[str, float]:
    """Excess by job and length; 1B, 7B and 8B, with and without a start adapter."""
    excesses = {}
    for settings in QUICK:
        found = within(Job(recomputed=-1, pairs=1, **settings), measure_lengths)
        excesses |= {f"{settings['shape']} {length}": excess(each) for length, each in found.items()}
    return excesses


def main() -> None:
    if "--quick" in sys.argv:
        excesses = quick()
        print(json.dumps(excesses))
        sys.exit(max(excesses.values()) > 0)
    job, _ = Job.parse(__doc__ or "", recomputed=-1, dropout=0.05, pairs=1)
    found = within(job, measure_lengths)
    for length, stages in found.items():
        for name, each in stages.items():
            print(f"{length:6} {name:18} {each['peak_gib']:7.3f} GiB  {each['at']}")
    sys.exit(max(map(excess, found.values())) > 0)


if __name__ == "__main__":
    main()
