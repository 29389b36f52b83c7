"""Finished arms on the disk: found, checked against what was asked for, and read as curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rlhf.curves import Curve, Point
from benchmarks.rlhf.settings import BASE, NEEDS_PAIRS, PAIRS, Job

Work = Callable[[Path], None]
"""Does a step of the job in the folder, such as a process that trains; leaves the step's file there."""
ARM, MEASURED = "arm.json", "measured.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """An arm with a seed, finished and measured.

    Attributes:
        arm: what `benchmarks.rlhf.arm` recorded.
        measured: `rewards` and `kls` of each saved adapter, a number for each opening.
    """

    arm: dict[str, Any]
    measured: list[dict[str, list[float]]]


def finish(job: Job, train: Work, measure: Work) -> bool:
    """Train and measure what isn't there yet; return whether anything had to be done.

    A folder with the results of other settings is an error, not a result: the command names another folder then.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    asked = json.dumps(asdict(job), indent=2)
    file = folder / "job.json"
    if file.exists() and file.read_text() != asked:
        raise SystemExit(f"{file}: a run with other settings lies here; name another --output, or remove the folder")
    file.write_text(asked)
    steps = [(name, work) for name, work in ((ARM, train), (MEASURED, measure)) if has(job.arm, name)]
    left = [(name, work) for name, work in steps if not (folder / name).exists()]
    for name, work in left:
        work(folder)
        assert (folder / name).exists(), f"{folder}: no {name} was written"
    return bool(left)


def has(arm: str, file: str) -> bool:
    """Return whether an arm has the file: the base isn't trained, the pairs aren't measured."""
    return arm != (BASE if file == ARM else PAIRS)


def read(job: Job) -> Arm:
    """Read a finished job's files; those that it doesn't have are empty."""
    arm, measured = (
        json.loads((Path(job.folder) / file).read_text()) if has(job.arm, file) else None for file in (ARM, MEASURED)
    )
    return Arm(arm=arm or {}, measured=measured or [])


def curve(arm: Arm, base: Point, before: float) -> Curve:
    """Make the curve of an arm, whose process had `before` CPU seconds of sampling pairs before it."""
    points = [
        point(before + saved["cpu_seconds"], values)
        for saved, values in zip(arm.arm["saved"], arm.measured, strict=True)
    ]
    return [base, *points]


def point(cpu_seconds: float, values: dict[str, list[float]]) -> Point:
    return Point(cpu_seconds=cpu_seconds, rewards=np.array(values["rewards"]), kls=np.array(values["kls"]))


def by_arm(jobs: Sequence[Job]) -> dict[str, list[Arm]]:
    """Read finished jobs, grouped by arm, in the order in which they come."""
    groups: dict[str, list[Arm]] = {}
    for job in jobs:
        groups.setdefault(job.arm, []).append(read(job))
    return groups


def all_curves(groups: Mapping[str, Sequence[Arm]]) -> dict[str, list[Curve]]:
    """Make the curves of all arms, one for each seed."""
    base = point(0.0, groups[BASE][0].measured[0])
    seconds = {one.arm["job"]["seed"]: one.arm["cpu_seconds"] for one in groups.get(PAIRS, ())}
    return {
        name: [
            curve(one, base, seconds.get(one.arm["job"]["seed"], 0.0) if name in NEEDS_PAIRS else 0.0) for one in arms
        ]
        for name, arms in groups.items()
        if name not in (BASE, PAIRS)
    }


COSTS = ("cpu_seconds", "labels", "models", "library_bytes", "peak_bytes", "settings")


def cost(arm: Arm) -> dict[str, Any]:
    """Return what an arm took, without the folders of this machine."""
    return {name: arm.arm[name] for name in COSTS}


def curves_to_json(drawn: Mapping[str, Sequence[Curve]]) -> dict[str, Any]:
    """Make JSON of the curves, from which the tables and the picture can be made again."""
    return {
        name: [
            [
                {
                    "cpu_seconds": round(one.cpu_seconds, 1),
                    "rewards": [round(float(value), 4) for value in one.rewards],
                    "kls": [round(float(value), 3) for value in one.kls],
                }
                for one in curve
            ]
            for curve in seeds
        ]
        for name, seeds in drawn.items()
    }


def curves_from_json(data: Mapping[str, Any]) -> dict[str, list[Curve]]:
    return {
        name: [[point(one["cpu_seconds"], one) for one in curve] for curve in seeds] for name, seeds in data.items()
    }
