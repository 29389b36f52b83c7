"""DPO by qpref: on pairs that the base sampled once, and in rounds on samples of the policy as it then is."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import qpref
from benchmarks.frontier import task
from benchmarks.rlhf.meter import Meter
from benchmarks.rlhf.settings import NUM_ROUNDS, Job


def sample_pairs(job: Job, meter: Meter) -> None:
    """Sample the base on all training openings and draw preferences between the samples."""
    rows = draw(job, meter, task.BASE, job.openings)
    (Path(job.folder) / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def offline(job: Job, meter: Meter) -> None:
    """Train on the shared pairs."""
    rows = read_pairs(Path(job.pairs))
    meter.labels += len(rows)
    train(job, meter, rows, Path(job.folder) / "run", None, job.sizes.checkpoints)


def rounds(job: Job, meter: Meter) -> None:
    """Sample, label and train three times, each time on another third of the openings.

    So there are as many samples and optimizer steps as offline, and about as many labels. A round's reference is the
    adapter that it starts from.
    """
    adapter: Path | None = None
    for number in range(NUM_ROUNDS):
        model = task.BASE if adapter is None else str(adapter)
        rows = draw(job, meter, model, job.openings[number::NUM_ROUNDS])
        adapter = train(job, meter, rows, Path(job.folder) / f"round-{number + 1}", adapter, 1)


def draw(job: Job, meter: Meter, name: str, openings: Sequence[str]) -> list[dict[str, Any]]:
    """Sample a model on openings; return the rows of the preferences, which are labels."""
    model = task.load(name)
    sampled = task.continue_openings(model, openings, job.sizes.k, job.seed)
    meter.count_models()
    del model
    gc.collect()
    rows = [pair.row() for pair in task.draw_pairs(sampled, task.SCALE, job.seed)]
    meter.labels += len(rows)
    return rows


def train(
    job: Job, meter: Meter, rows: Sequence[dict[str, Any]], folder: Path, start: Path | None, checkpoints: int
) -> Path:
    """Train on pairs and record the checkpoints; return the adapter."""
    before = meter.saved[-1]["step"] if meter.saved else 0
    steps = job.sizes.epochs * -(-len(rows) // job.sizes.pairs_per_step)
    every = -(-steps // checkpoints)
    seconds: dict[int, float] = {}

    def note(row: Any) -> None:
        if row.split == "train":
            seconds[row.step] = meter.cpu_seconds
            if row.step == 1:
                meter.count_models()

    made = recipe(job, start)
    made["train"] |= {"save_every": every, "keep": checkpoints + 1}
    run = qpref.train(made, rows=rows, output=folder, overwrite=True, on_metrics=note)
    for checkpoint in sorted((folder / "checkpoints").glob("step-*")):
        if (step := int(checkpoint.name.removeprefix("step-"))) < max(seconds):
            meter.note_saved(before + step, checkpoint, seconds[step])
    # A copy is an adapter of the base; in its run's folder it is one of the run, whose reference is the start adapter.
    adapter = Path(job.folder) / "adapters" / folder.name
    shutil.copytree(run.adapter, adapter, dirs_exist_ok=True)
    meter.note_saved(before + max(seconds), adapter)
    return adapter


def recipe(job: Job, start: Path | None) -> dict[str, Any]:
    """Return what a user writes; the other settings are qpref's defaults."""
    sizes = job.sizes
    changes = {"learning_rate": sizes.learning_rate, "epochs": sizes.epochs, "batch_size": sizes.pairs_per_step}
    made = task.recipe({"name": "dpo", "beta": sizes.beta}, seed=job.seed, schedule="constant", **changes)
    return made if start is None else made | {"adapter": made["adapter"] | {"start": str(start)}}


def read_pairs(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
