"""DPO beside RLHF on one task: `python -m benchmarks.rlhf [--quick] [--seeds N] --output FOLDER [--publish]`.

The same 4-bit base, LoRA rank, openings and reward: offline DPO and DPO in three rounds by qpref, RLHF with the true
reward and with a learned one by TRL. Each arm trains in a process of its own, and is measured in another one. What is
finished in the folder is kept, and a killed command continues with the arm that it was at.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import machine
from benchmarks.frontier.task import SCALE
from benchmarks.rlhf import results, table
from benchmarks.rlhf.qpref_arms import read_pairs
from benchmarks.rlhf.settings import ARMS, BASE, FULL, NEEDS_PAIRS, PAIRS, QUICK, RANK, Job, Sizes

ROOT = Path(__file__).parents[2]
RESULTS, PICTURES = ROOT / "benchmarks/results", ROOT / "docs/pictures"
THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small size, one seed")
    parser.add_argument("--seeds", type=int, help="number of seeds; default 1 with --quick, else 3")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs, kept")
    parser.add_argument("--publish", action="store_true", help="write page, data and picture into the repository")
    options = parser.parse_args()
    sizes, seeds = (QUICK, options.seeds or 1) if options.quick else (FULL, options.seeds or 3)
    jobs = make_jobs(options.output.resolve(), sizes, options.arms, seeds, base_folder())
    for job in jobs:
        print(f"{job.arm}, seed {job.seed}", flush=True)
        results.finish(job, lambda folder: process("arm", folder), lambda folder: process("measure", folder))
    name, pictures = options.output / "rlhf", options.output
    if options.publish:
        name, pictures = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-rlhf", PICTURES
    report(jobs, name, pictures / "rlhf.svg", head(options, sizes))


def make_jobs(output: Path, sizes: Sizes, arms: list[str], seeds: int, base: str) -> list[Job]:
    """List the jobs in the order in which they are done: each seed's pairs before the arms that need them."""
    needed = [*([PAIRS] if set(arms) & set(NEEDS_PAIRS) else []), *arms]
    named = [(BASE, 0), *((arm, seed) for seed in range(seeds) for arm in needed)]
    return [
        Job(
            arm=arm,
            seed=seed,
            folder=str(output / f"seed-{seed}" / arm),
            base=base,
            pairs=str(output / f"seed-{seed}" / PAIRS / "pairs.jsonl") if arm in NEEDS_PAIRS else "",
            sizes=sizes,
        )
        for arm, seed in named
    ]


def base_folder() -> str:
    """Convert the base if it isn't in the cache, so that no arm pays for it."""
    from benchmarks.frontier.task import BASE as NAMED
    from qpref.evaluation.subjects import identify

    return str(identify(NAMED, quantization="nf4").base.path)


def process(module: str, folder: Path) -> None:
    settings = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"benchmarks.rlhf.{module}", str(folder)]
    with (folder / f"{module}.log").open("w") as log:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(f"{folder}: {module} failed; see {module}.log there")


def head(options: argparse.Namespace, sizes: Sizes) -> list[str]:
    command = "python -m benchmarks.rlhf" + (" --quick" if options.quick else "")
    command += f" --seeds {options.seeds}" if options.seeds else ""
    described = machine.describe(THREADS)
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    return [
        f"# DPO beside RLHF, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`{command}`; {described['cpu']}, {described['cores']} cores, {described['threads']} threads; {versions}; "
        f"commit {machine.commit(ROOT)}.",
        "",
        setup(sizes),
    ]


def setup(sizes: Sizes) -> str:
    """Describe the experiment's size in a sentence or two."""
    return (
        f"{sizes.openings} training openings with {sizes.k} samples each, {sizes.heldout} held-out ones with "
        f"{sizes.samples}. LoRA of rank {RANK}, learning rate {sizes.learning_rate:g} in all arms. DPO and the reward "
        f"model: {sizes.epochs} epochs, {sizes.pairs_per_step} pairs a step, DPO's beta {sizes.beta:g}. RLOO: "
        f"{sizes.rl_steps} steps of {sizes.completions_per_step} completions, beta {sizes.beta / SCALE:g} with the "
        f"true reward and {sizes.beta:g} with the learned one. Labels are scores by the true reward, or preferences "
        f"drawn from it by Bradley-Terry of scale {SCALE:g}. Intervals: 95 %, bootstrap over the held-out openings."
    )


def report(jobs: list[Job], file: Path, picture: Path, top: list[str]) -> None:
    """Write the page, its data and its picture."""
    from benchmarks.rlhf.picture import draw

    groups = results.by_arm(jobs)
    drawn = results.all_curves(groups)
    sampled = [one.arm["cpu_seconds"] for one in groups.get(PAIRS, ())]
    trained = {name: arms for name, arms in groups.items() if name not in (BASE, PAIRS)}
    page = table.page([*top, *noise(jobs)], trained, drawn, sum(sampled) / max(1, len(sampled)))
    file.with_suffix(".md").write_text(page)
    data = {
        "sizes": asdict(jobs[0].sizes),
        "costs": {name: [results.cost(one) for one in arms] for name, arms in trained.items()},
        "curves": results.curves_to_json(drawn),
    }
    file.with_suffix(".json").write_text(json.dumps(data) + "\n")
    draw(drawn, picture)
    print(page)


def noise(jobs: list[Job]) -> list[str]:
    """Say how many of the shared pairs prefer the response with the lower reward."""
    rows = [row for job in jobs if job.arm == PAIRS for row in read_pairs(Path(job.folder) / "pairs.jsonl")]
    flipped = sum(row["score_chosen"] < row["score_rejected"] for row in rows)
    return [f"{flipped} of the {len(rows)} shared pairs prefer the response with the lower reward."] if rows else []


if __name__ == "__main__":
    main()
