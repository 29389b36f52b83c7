"""What the startup checks take at most, beside what training's own probe takes on the same pair, all layers recomputed.

    python -m tests.fake_cuda.checks_peak --family qwen2 --shape 7B --pairs 1 --prompt 256 --response 768

A check that takes more than the probe ends a run on a card where training would fit. Exits with 1 then.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.fake_cuda import fake_cuda, names
from tests.fake_cuda.job import Job, Run, within


def measure(run: Run, meters: fake_cuda.Meters) -> dict[str, Any]:
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


def main() -> None:
    job, _ = Job.parse(__doc__ or "", recomputed=-1, dropout=0.05, pairs=1)
    found = within(job, measure)
    for name, each in found.items():
        print(f"{name:14} {each['peak_gib']:7.3f} GiB  {each['at']}")
    sys.exit(max(found["layout check"]["peak_gib"], found["start check"]["peak_gib"]) > found["probe"]["peak_gib"])


if __name__ == "__main__":
    main()
