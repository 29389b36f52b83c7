"""One training step: launches, synchronizations, peak memory, bytes per token, and the planner's prediction.

    python -m tests.fake_cuda.step --shape 1B --pairs 4 --prompt 180 --response 300 [--recomputed -1] [--sites 20]

The second step is what counts: the first also fills the optimizer's state and checks the gradients.
"""

from __future__ import annotations

import time
from typing import Any

from tests.fake_cuda import fake_cuda
from tests.fake_cuda.job import Job, Run, within


def measure(run: Run, meters: fake_cuda.Meters, by_site: bool = False) -> dict[str, Any]:
    trainer = run.trainer()
    for step in range(2):
        meters.clear()
        meters.device.by_site = by_site and step == 1
        trainer.state.step = step
        before, start = meters.device.live, time.perf_counter()
        trainer.step()
        seconds = time.perf_counter() - start
    tokens, memory = run.predicted()
    planned, peak = memory.total - memory.reserve, meters.device.peak
    return {
        "attention": run.policy.attention,
        "microbatches": len(run.parts()),
        "tokens": tokens,
        "recomputed_layers": run.policy.recomputed_layers,
        "launches": sum(meters.device.launches.values()),
        "syncs": sum(meters.syncs.at.values()),
        "peak_gib": peak / fake_cuda.GIB,
        "peak_at": meters.device.peak_site,
        "bytes_per_token": (peak - before) // tokens,
        "planned_gib": planned / fake_cuda.GIB,
        "planner_error_percent": 100 * (planned - peak) / peak,
        "host_seconds": seconds,
    }


def main() -> None:
    job, options = Job.parse(__doc__ or "", sites=0)

    def work(run: Run, meters: fake_cuda.Meters) -> None:
        for name, value in measure(run, meters, by_site=options.sites > 0).items():
            print(f"{name:22}", f"{value:.3f}" if isinstance(value, float) else value)
        print("synchronizations:")
        for (what, place), count in meters.syncs.at.most_common():
            print(f"  {count:5}  {what:20} {place}")
        print("launches:", dict(meters.device.launches.most_common(12)))
        for (place, operator), count in meters.device.launch_sites.most_common(options.sites):
            print(f"  {count:5}  {operator:20} {place}")

    within(job, work)


if __name__ == "__main__":
    main()
