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
from benchmarks.frontier.task import Model, load_with_adapter, put_adapter
from benchmarks.rlhf.results import ARM, MEASURED
from benchmarks.rlhf.settings import BASE, Job
from qpref.policy import adapter_folder
from qpref.training import checkpoint
from qpref.training.snapshot import restore_adapter

SEED = 10_000
"""Of the samples that are measured; no training samples have it."""


def main() -> None:
    folder = Path(sys.argv[1])
    job = Job.from_json(json.loads((folder / "job.json").read_text()))
    adapters: list[Path | None] = [None]
    if job.arm != BASE:
        adapters = [Path(row["adapter"]) for row in json.loads((folder / ARM).read_text())["saved"]]
    (folder / MEASURED).write_text(json.dumps(measured(job, adapters)))


def measured(job: Job, adapters: Sequence[Path | None]) -> list[dict[str, Any]]:
    """Measure each adapter on the base; None is the base itself."""
    model, found = load_with_adapter(), []
    for adapter in adapters:
        if adapter is not None:
            put(model, adapter)
        measures = measure(model, job.heldout, job.sizes.samples, SEED)
        found.append({"rewards": list(map(fmean, measures.rewards)), "kls": list(map(fmean, measures.log_ratios))})
    return found


def put(model: Model, adapter: Path) -> None:
    """Put in a folder of PEFT, or the adapter of a checkpoint of qpref."""
    if (adapter / adapter_folder.SETTINGS).is_file():
        put_adapter(model, adapter)
    else:
        restore_adapter(checkpoint.read(adapter), model.policy)


if __name__ == "__main__":
    main()
