"""All budgeted figures at once, as one JSON object with `--json`: about 95 CPU seconds.

python -m tests.fake_cuda --json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tests.fake_cuda import checks_peak, startup, step
from tests.fake_cuda.forked import forked
from tests.fake_cuda.job import Job, within

PAIRS = {"pairs": 4, "prompt": 180, "response": 300}
"""3,115 tokens in one micro-batch."""
SMALL: dict[str, Any] = {"shape": "1B", **PAIRS}
LARGE: dict[str, Any] = {"shape": "8B", **PAIRS}
QWEN_7B: dict[str, Any] = {"family": "qwen2", "shape": "7B", "prompt": 256, "response": 768, "dropout": 0.05}
LONG = QWEN_7B | {"pairs": 1, "recomputed": -1}
"""One pair of 1,790 tokens."""
RECIPE = QWEN_7B | {"pairs": 2, "recomputed": 12, "optimizer": "adamw_8bit"}
STARTUPS: tuple[dict[str, Any], ...] = (
    {},
    {"dtype": "fp16", "dropout": 0.1, "optimizer": "adamw_8bit"},
    {"family": "gemma3_text", "loss": "kto"},
    {"family": "qwen3", "recomputed": -1},
    {"family": "qwen2", "dropout": 0.1},
)


def figures() -> dict[str, float]:
    """The figures, with the stages of a few settings: `tests.fake_cuda.matrix` has all."""
    work: dict[str, Callable[[], Any]] = {
        "small": partial(within, Job(**SMALL), step.measure),
        "large": partial(within, Job(**LARGE), step.measure),
        "recipe": partial(within, Job(**RECIPE), step.measure),
        "peaks": partial(within, Job(**LONG), checks_peak.measure),
    }
    startups = {str(settings): partial(within, Job(**settings), startup.failures) for settings in STARTUPS}
    found = forked(work | startups)
    return figures_of(**{name: found[name] for name in work}, failed=[found[name] for name in startups])


def figures_of(
    small: dict[str, Any], large: dict[str, Any], recipe: dict[str, Any], peaks: dict[str, Any], failed: Iterable[Any]
) -> dict[str, float]:
    """The figures of three steps, of the startup checks at 7B, and of the stages that failed by job."""
    return {
        "syncs_per_microbatch": small["syncs"],
        "launches_per_step_1b": small["launches"],
        "bytes_per_token_8b": large["bytes_per_token"],
        "startup_peak_gib_7b": max(peaks[name]["peak_gib"] for name in ("layout check", "start check")),
        "probe_peak_gib_7b": peaks["probe"]["peak_gib"],
        "planner_error_percent": max(abs(each["planner_error_percent"]) for each in (small, large, recipe)),
        "device_mismatches": sum(map(len, failed)),
    }


if __name__ == "__main__":
    found = figures()
    print(json.dumps({name: round(value, 3) for name, value in found.items()}) if "--json" in sys.argv else found)
