"""Every stage of a run for families and settings: a covering design, or larger sets of combinations.

    python -m tests.fake_cuda.matrix                          # `design`, 14 runs
    python -m tests.fake_cuda.matrix --pairs [--family qwen2] # any two settings in all ways in each family, 38 runs
    python -m tests.fake_cuda.matrix --all [--family qwen2]   # every combination, 386 runs

The last line is JSON: job -> stage -> error, of the jobs that failed. Exits with 1 where one did.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

from tests.fake_cuda import afterwards, startup
from tests.fake_cuda.forked import forked
from tests.fake_cuda.job import Job, within

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "mixtral")
"""Plain, biases, query norms, a window, windows in some layers, experts."""
SETTINGS: dict[str, dict[str, Any]] = {
    "turing": {"dtype": "fp16", "capability": "7.5"},
    "dropout": {"dropout": 0.1},
    "recomputed": {"recomputed": -1},
    "8-bit": {"optimizer": "adamw_8bit"},
    "kto": {"loss": "kto"},
    "start": {"start": 1},
}
PATTERNS = {"turing": 0b001011, "dropout": 0b010110, "recomputed": 0b011001, "8-bit": 0b000111, "kto": 0b001101,
            "start": 0b010011}  # fmt: skip
"""By setting, a bit for each family: on in the family's first run or in its second one. No two patterns are equal or
each other's complement, so each pair of settings occurs on-on, on-off, off-on and off-off."""
OTHERS: tuple[dict[str, Any], ...] = (
    {"family": "qwen3_moe", "recomputed": 1},
    {"family": "qwen2", "dtype": "fp16", "optimizer": "paged_adamw", "loss": "orpo"},
)
"""More experts, one layer recomputed; flash attention in fp16, a loss without a reference."""


def design() -> Iterator[tuple[str, list[str]]]:
    """Family and settings of each run: each family with each setting and without it, each two settings in all ways."""
    for bit, family in enumerate(FAMILIES):
        for first in (True, False):
            yield family, [name for name, pattern in PATTERNS.items() if bool(pattern >> bit & 1) == first]


def paired() -> Iterator[list[str]]:
    """Settings of each of six runs in which any two settings occur on-on, on-off, off-on and off-off.

    Off-off is the first run. In the others each setting has three of five runs to itself: two different threes of five
    share one, and neither holds the other.
    """
    threes = dict(zip(SETTINGS, itertools.combinations(range(1, 6), 3), strict=False))
    for number in range(6):
        yield [name for name, runs in threes.items() if number in runs]


def covering() -> Iterator[Job]:
    """The design's runs, and a few beside."""
    yield from (_job(family, settings) for family, settings in design())
    yield from (Job(**other) for other in OTHERS)


def each_pair(families: Iterable[str]) -> Iterator[Job]:
    """Each family with any two settings in all ways."""
    yield from itertools.starmap(_job, itertools.product(families, list(paired())))
    yield from (Job(**other) for other in OTHERS)


def crossed(families: Iterable[str]) -> Iterator[Job]:
    """Each family with every combination of the settings."""
    for family, *chosen in itertools.product(families, *((name, "") for name in SETTINGS)):
        yield _job(family, [name for name in chosen if name])
    yield from (Job(**other) for other in OTHERS)


def _job(family: str, settings: Iterable[str]) -> Job:
    changes: dict[str, Any] = {"family": family}
    for name in settings:
        changes |= SETTINGS[name]
    return Job(**changes)


def label(job: Job) -> str:
    """The job by what isn't the default."""
    changes = {each.name: getattr(job, each.name) for each in fields(Job) if getattr(job, each.name) != each.default}
    return " ".join(f"--{name} {value}" for name, value in changes.items()) or "llama"


def work(jobs: Iterable[Job]) -> dict[str, Callable[[], dict[str, str]]]:
    """What to do for each job: training's stages, and once for each family those after it."""
    evaluated: set[str] = set()
    found: dict[str, Callable[[], dict[str, str]]] = {}
    for job in jobs:
        found[label(job)] = partial(_failures, job, job.family not in evaluated)
        evaluated.add(job.family)
    return found


def _failures(job: Job, with_evaluation: bool) -> dict[str, str]:
    print(f"== {label(job)}", file=sys.stderr, flush=True)
    failed: dict[str, str] = within(job, startup.failures)
    return failed | within(job, afterwards.failures) if with_evaluation else failed


def failures(jobs: Iterable[Job]) -> dict[str, dict[str, str]]:
    """Job -> stage -> error, of the jobs in which a stage fails."""
    return {name: failed for name, failed in forked(work(jobs)).items() if failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", dest="jobs", action="store_const", const=each_pair)
    parser.add_argument("--all", dest="jobs", action="store_const", const=crossed)
    parser.add_argument("--family", choices=FAMILIES)
    options = parser.parse_args()
    families = [options.family] if options.family else FAMILIES
    found = failures(options.jobs(families) if options.jobs else covering())
    print(json.dumps(found))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
