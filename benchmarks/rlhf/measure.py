"""Reward and KL of saved adapters on held-out openings: `python -m benchmarks.rlhf.measure FOLDER`.

Writes measured.json. In a process apart, so that it is no part of an arm's cost; all arms are measured by the same
code, on the same openings, with the same random numbers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.frontier.measures import measure
from benchmarks.frontier.task import continue_openings, load
from benchmarks.rlhf.results import ARM, MEASURED
from benchmarks.rlhf.settings import BASE, Job
from qpref.policy import adapter_folder
from qpref.policy.adapter import TRAINED, load_adapter_tensors
from qpref.policy.adapter_names import LayerNames
from qpref.policy.policy import Policy
from qpref.training import checkpoint
from qpref.training.snapshot import restore_adapter

SEED = 10_000
"""Of the samples that are measured; no training samples have it."""


def main() -> None:
    folder = Path(sys.argv[1])
    job = Job.from_json(json.loads((folder / "job.json").read_text()))
    saved = [] if job.arm == BASE else json.loads((folder / ARM).read_text())["saved"]
    adapters = [Path(row["adapter"]) for row in saved]
    (folder / MEASURED).write_text(json.dumps(measured(job, adapters)))


def measured(job: Job, adapters: Sequence[Path]) -> list[dict[str, Any]]:
    """Measure each adapter on the base, the base itself where there is none."""
    if not adapters:
        sampled = continue_openings(load(), job.heldout, job.sizes.samples, SEED)
        return [{"rewards": [fmean(one.rewards) for one in sampled], "kls": [0.0] * len(sampled)}]
    model, found = load(str(adapters[-1])), []
    for adapter in adapters:
        put(model.policy, adapter)
        measures = measure(model, job.heldout, job.sizes.samples, SEED)
        found.append({"rewards": list(map(fmean, measures.rewards)), "kls": list(map(fmean, measures.log_ratios))})
    return found


def put(policy: Policy, adapter: Path) -> None:
    """Load an adapter folder of PEFT, or a checkpoint of qpref, in place of the adapter that is there."""
    if (adapter / adapter_folder.SETTINGS).is_file():
        tensors = LayerNames.of(policy.plain_model).translated_keys(adapter_folder.read_tensors(adapter))
        load_adapter_tensors(policy.model, tensors, TRAINED, str(adapter))
    else:
        restore_adapter(checkpoint.read(adapter), policy)


if __name__ == "__main__":
    main()
