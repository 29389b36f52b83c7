"""Reward against KL for preference losses, on sentences whose reward a program computes.

    python -m benchmarks.frontier --quick            3 methods, 2 values of their dial, 1 seed
    python -m benchmarks.frontier                    8 methods, 3 values, 3 seeds
    python -m benchmarks.frontier --methods dpo,rpo --seeds 1

Killed or not, the same command continues after its last finished point. `--publish` writes the dated table and the
picture beside the others of the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.frontier.picture import draw
from benchmarks.frontier.points import METHODS, QUICK_METHODS, Point, finish, make_points
from benchmarks.frontier.processes import in_processes
from benchmarks.frontier.runs import HELDOUT_K, Bench, Sampled, sample_base
from benchmarks.frontier.table import base_reward, spread, summaries, table, task_in_words
from benchmarks.frontier.task import NEW_TOKENS

EXPLAINED = (
    "Each run takes {steps} steps. Reward and KL are means over {k} sampled responses to each held-out opening, with "
    "95 % bootstrap intervals over openings. Chosen and rejected: mean change of held-out pairs' log-probability, "
    "in nats. Ended: share of sentences that ended within {new} tokens. Memory: of the process, with two copies of the "
    "base."
)
ROOT = Path(__file__).parents[2]
RESULTS, PICTURES = ROOT / "benchmarks/results", ROOT / "docs/pictures"


def main() -> None:
    options = _options()
    if unknown := set(options.methods) - set(METHODS):
        raise SystemExit(f"--methods: {', '.join(sorted(unknown))}: not among {', '.join(METHODS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    sampled = sample_base(options.output)
    bench = Bench(folder=options.output, sampled=sampled)
    points = make_points(options.methods, options.seeds, options.quick)
    for seed in range(options.seeds):
        bench.write_pairs(seed)

    def work(left: Sequence[Point]) -> Iterator[tuple[Point, dict[str, Any]]]:
        return in_processes(bench.train_and_measure, [] if options.finished else left, options.processes)

    results = finish(points, bench.settings, options.output / "points", work)
    taken = f"{time.perf_counter() - started:.0f} s, {sum(os.times()[:4]):.0f} CPU s in {options.processes} processes"
    text = "\n".join(report(results, sampled, taken)) + "\n"
    print(text)
    name = "frontier-quick" if options.quick else "frontier"
    draw(results, base_reward(sampled), options.output / f"{name}.svg")
    (options.output / f"{name}.md").write_text(text)
    if options.publish:
        draw(results, base_reward(sampled), PICTURES / f"{name}.svg")
        dated = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{name}"
        dated.with_suffix(".md").write_text(text)
        rows = [asdict(one) for one in summaries(results)]
        dated.with_suffix(".json").write_text(json.dumps({"command": command(), "rows": rows}, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few methods and values, one seed")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="default: all; dpo,ipo,kto if quick")
    parser.add_argument("--seeds", type=int, help="default: 3; 1 if quick")
    parser.add_argument("--output", type=Path, default=Path("out/frontier"), help="folder of the finished points")
    parser.add_argument("--processes", type=int, default=2, help="points at a time, 2 GiB each; default: 2")
    parser.add_argument("--finished", action="store_true", help="train nothing, and tabulate the finished points alone")
    parser.add_argument("--publish", action="store_true", help="write the table and the picture into the repository")
    options = parser.parse_args()
    options.methods = options.methods or list(QUICK_METHODS if options.quick else METHODS)
    options.seeds = options.seeds or (1 if options.quick else 3)
    return options


def command() -> str:
    """Return the command line, without the folder that `--output` names, which decides no result."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if not word.startswith("--output") or ("=" not in word and not next(words))]
    return " ".join(["python -m benchmarks.frontier", *kept])


def report(results: Mapping[Point, dict[str, Any]], sampled: Sampled, taken: str) -> list[str]:
    """Write the result: command, machine, data, tables."""
    described = machine.describe(torch.get_num_threads())
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    seeds = sorted({point.seed for point in results})
    steps = sorted({result["steps"] for result in results.values()})
    return [
        f"# Reward against KL, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`{command()}`, commit {machine.commit(ROOT)}; this call took {taken}; {len(results)} points",
        "",
        f"{described['cpu']}, {described['cores']} cores, {described['threads']} threads; Python "
        f"{described['python']}, {versions}; load average {os.getloadavg()[2]:.0f} over the last quarter of an hour",
        "",
        *(line for each in task_in_words(sampled, seeds) for line in (each, "")),
        EXPLAINED.format(steps=" or ".join(map(str, steps)), k=HELDOUT_K, new=NEW_TOKENS),
        "",
        *table(summaries(results)),
        "",
        *spread(results),
    ]


if __name__ == "__main__":
    main()
