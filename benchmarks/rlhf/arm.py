"""One arm in a process of its own: `python -m benchmarks.rlhf.arm FOLDER` reads job.json there and writes arm.json."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.rlhf import qpref_arms, trl_arms
from benchmarks.rlhf.meter import Meter, peak_bytes
from benchmarks.rlhf.settings import LEARNED, OFFLINE, PAIRS, ROUNDS, TRUE, Job

Run = Callable[[Job, Meter], None]
RUNS: Mapping[str, Run] = {
    PAIRS: qpref_arms.sample_pairs,
    OFFLINE: qpref_arms.offline,
    ROUNDS: qpref_arms.rounds,
    TRUE: trl_arms.with_the_true_reward,
    LEARNED: trl_arms.with_a_learned_reward,
}


def main() -> None:
    folder = Path(sys.argv[1])
    job = Job.from_json(json.loads((folder / "job.json").read_text()))
    libraries = imported(job.arm)
    meter = Meter()
    RUNS[job.arm](job, meter)
    result = {
        "job": asdict(job),
        "cpu_seconds": meter.cpu_seconds,
        "labels": meter.labels,
        "models": meter.models,
        "library_bytes": libraries,
        "peak_bytes": peak_bytes(),
        "settings": settings_given(job),
        "saved": meter.saved,
    }
    (folder / "arm.json").write_text(json.dumps(result, indent=2))


def imported(arm: str) -> int:
    """Import the arm's libraries, which isn't timed; return the peak of the memory until then."""
    for library in ("peft", "torch", "transformers"):
        importlib.import_module(library)
    if arm in (TRUE, LEARNED):
        import trl

        _ = trl.RLOOTrainer, trl.RewardTrainer
    return peak_bytes()


def settings_given(job: Job) -> int:
    """Count the settings that a user of the arm writes, one a line: a recipe's keys, or arguments of TRL's objects."""
    if job.arm in (TRUE, LEARNED):
        policy = [trl_arms.quantization_settings(), trl_arms.lora_settings("CAUSAL_LM"), trl_arms.rloo_settings(job)]
        reward = [trl_arms.quantization_settings(), trl_arms.lora_settings("SEQ_CLS"), trl_arms.reward_settings(job)]
        return sum(map(len, policy + (reward if job.arm == LEARNED else [])))
    recipe: dict[str, Any] = qpref_arms.recipe(job, None)
    return sum(map(len, recipe.values())) if job.arm != PAIRS else 0


if __name__ == "__main__":
    main()
