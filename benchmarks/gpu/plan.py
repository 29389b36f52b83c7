"""The scripts, their stages in order, and the seconds that each may take. Needs no torch.

A stage is the function of its name in the module of its script. To add one, write the function and a line here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """Attributes: `seconds` until it is stopped, at most; what it has reported by then is kept."""

    script: str
    name: str
    seconds: int


SCRIPTS: dict[str, str] = {
    "correct": "kernels, adapters, head and NF4 against float64; kill and resume; waits for the device",
    "memory": "a real model trained, evaluated and merged; 1B, 7B and 8B under the limits of smaller cards",
    "timing": "peaks of the device; the seconds of a step by class of kernel, for 1B and 8B",
    "race": "qpref against TRL best tuned, and Unsloth where it is installed, for 1B and 8B",
}
MINUTES = {"correct": 7, "memory": 7, "timing": 7, "race": 6}
"""Budget of each script: a stage that is running when it ends is stopped, and none begins after it."""

STAGES = (
    Stage("correct", "kernels", 120),
    Stage("correct", "adapters", 60),
    Stage("correct", "head", 60),
    Stage("correct", "nf4", 40),
    Stage("correct", "resume", 240),
    Stage("correct", "waits", 120),
    Stage("memory", "contexts", 30),
    Stage("memory", "bases", 120),
    Stage("memory", "real", 150),
    Stage("memory", "caps", 330),
    Stage("timing", "peaks", 40),
    Stage("timing", "heads", 60),
    Stage("timing", "steps_1b", 120),
    Stage("timing", "steps_8b", 240),
    Stage("race", "race_1b", 150),
    Stage("race", "race_8b", 300),
)


def chosen(scripts: list[str], only: str | None) -> list[Stage]:
    """Select stages by script and by a part of their names, in order."""
    return [stage for stage in STAGES if stage.script in scripts and (only is None or only in stage.name)]
