"""One run on several processes: measured on the cores of this machine, computed for 1 to 1,000 GPUs.

    python -m benchmarks.scaling_out                     both: some minutes on two cores
    python -m benchmarks.scaling_out --computed          the computed tables alone
    python -m benchmarks.scaling_out --steps 4 --output out/

Measured: `qpref train` of a random model of the 135M shape with 6 of its 30 layers, once as one process with as many
threads as there are cores, once as that many processes with one thread each, over gloo; alternating. Wall and CPU
seconds are those of all processes from the first step's row in metrics.jsonl to the last one's; the loss of each step
is compared. On a busy machine wall seconds are others' too: compare pairs per CPU second.

Computed: `qpref.memory.scaling`, what `qpref plan --gpus` prints, for pairs of chat-like lengths that are drawn from a
seed. Each figure rests on the assumed bandwidths and speeds that the plan names.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import tomli_w

from benchmarks import machine
from benchmarks.pairs import Workload, make_pairs, text
from benchmarks.shapes import SHAPES, make_base
from qpref.memory.cards import find_card
from qpref.memory.flops import forward_flops
from qpref.memory.forecast import Forecast, Target
from qpref.memory.planned_data import PlannedData
from qpref.memory.scaling import plan_gpus
from qpref.recipe.resolve import make_plan

RESULTS = Path(__file__).parent / "results"
BATCH, PAIRS_PER_GPU, EXAMPLES = 1024, 16, 62_000
"""Pairs of a step of fixed size, and of one that grows with the GPUs; pairs of an epoch, as in UltraFeedback."""
PROMPT, RESPONSE, SPREAD, LONGEST = 167, 300, 0.6, 1024
"""Medians in tokens and sigma of log-normal lengths; the longest prompt with its response."""
GPUS = (1, 2, 8, 16, 64, 256, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--computed", action="store_true", help="only compute")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a measured run")
    parser.add_argument("--rounds", type=int, default=2, help="measured runs of each kind")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the table")
    options = parser.parse_args()
    lines = [f"# One run on several processes, {datetime.now(UTC):%Y-%m-%d}", ""]
    flags = " --computed" if options.computed else f" --steps {options.steps} --rounds {options.rounds}"
    lines += [f"`python -m benchmarks.scaling_out{flags}`", ""]
    if not options.computed:
        lines += [*measured(options.steps, options.rounds), ""]
    lines += computed()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{datetime.now(UTC):%Y-%m-%d}-scaling-out.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def chat_lengths(count: int = 512) -> list[tuple[int, list[int]]]:
    """Draw (prompt, responses) lengths in tokens."""
    draw = random.Random(0)

    def length(median: int) -> int:
        return max(2, round(median * math.exp(draw.gauss(0, SPREAD))))

    lengths = []
    for _ in range(count):
        prompt = min(length(PROMPT), LONGEST // 2)
        lengths.append((prompt, [min(length(RESPONSE), LONGEST - prompt) for _ in range(2)]))
    return lengths


def computed() -> Iterator[str]:
    """Tables of step time and of what bounds it, for a base on each GPU and for one that is shared."""
    yield "## Computed"
    yield ""
    yield (
        f"By `qpref.memory.scaling`; prompts of {PROMPT} and responses of {RESPONSE} tokens in the median (log-normal, "
        f"sigma {SPREAD}), at most {LONGEST}. Efficiency: an even division of the computation over the time of a step. "
        "Waiting: time in which the link works and the GPU doesn't. Idle: the mean GPU's time after it is done and "
        "before the fullest one is. Fill: reference scores of 62,000 pairs, divided between the GPUs, once."
    )
    for name, card, links, batches in (
        ("Llama-3.1-8B", "RTX 4090", ("pcie4", "ethernet-10g"), (BATCH, PAIRS_PER_GPU)),
        ("Llama-3.1-8B", "H100 80GB", ("nvlink-h100", "infiniband-400g"), (BATCH,)),
        ("Llama-3.1-70B", "RTX 3090", ("pcie4", "ethernet-100g"), (BATCH,)),
        ("Llama-3.1-70B", "H100 80GB", ("nvlink-h100", "infiniband-400g"), (BATCH,)),
    ):
        for batch in batches:
            size = "1,024 pairs a step" if batch == BATCH else "16 pairs a step and GPU"
            yield from (
                "",
                f"### {name}, {card.removesuffix(' 80GB')}s, 8 in a host, {' and '.join(links)}, {size}",
                "",
            )
            yield from _table(name, card, links, batch)


def _table(name: str, card: str, links: Sequence[str], batch: int) -> Iterator[str]:
    yield "| GPUs | base | each sends a step, GiB | step, s | waiting | idle | efficiency | fill, h | bound by |"
    yield "|---|---|---|---|---|---|---|---|---|"
    forecast = _forecast(name, card, batch)
    for gpus in GPUS:
        if batch != BATCH and gpus > 1:
            forecast = _forecast(name, card, batch * gpus)
        yield _row(forecast, links, gpus)


def _forecast(name: str, card: str, batch: int) -> Forecast:
    recipe = {"model": {"base": name}, "adapter": {"rank": 8}, "data": {"train": "none.jsonl"}, "loss": {"name": "dpo"},
              "train": {"optimizer": "adamw_8bit", "batch_size": batch}}  # fmt: skip
    data = PlannedData(origin="drawn", lengths=chat_lengths(), longest=[], num_examples=None)
    return Forecast.of(make_plan(recipe), Target.of_card(find_card(card)), data=data)


def _row(forecast: Forecast, links: Sequence[str], gpus: int) -> str:
    """Plan a number of GPUs; those of one host have the first link alone."""
    hosts = math.ceil(gpus / 8)
    used = [] if gpus == 1 else list(links) if hosts > 1 else [links[0]]
    scaling = plan_gpus(forecast, gpus // hosts, hosts, used)
    best = scaling.replicated if gpus == 1 and scaling.replicated.fit.fits else scaling.best
    if best is None:
        least = scaling.sharded.fit.memory.total / 2**30
        return f"| {gpus:,} | doesn't fit: {least:.1f} GiB | | | | | | | |"
    step, idle = best.step_seconds, best.compute_seconds - best.even_seconds
    parts = {"computing": best.even_seconds, "the link": best.waiting_seconds, "tokens dealt unevenly": idle}
    cells = (
        f"{gpus:,}",
        best.name,
        f"{(best.gradient_bytes + best.base_bytes) / 2**30:.2f}",
        f"{step:.2f}",
        f"{best.waiting_seconds / step:.0%}",
        f"{idle / step:.0%}",
        f"{best.efficiency:.0%}",
        f"{_fill_hours(forecast, scaling.speed.tflops, gpus):.2f}",
        max(parts, key=lambda part: parts[part]),
    )
    return f"| {' | '.join(cells)} |"


def _fill_hours(forecast: Forecast, tflops: float, gpus: int) -> float:
    workload = forecast.demand.workload
    step = workload.typical.scaled_to(workload.step_tokens)
    each = forward_flops(forecast.demand.shape, step, adapted=False) / forecast.plan.recipe.train.batch_size
    return float(each * EXAMPLES / gpus / (tflops * 1e12) / 3600)


def measured(steps: int, rounds: int) -> Iterator[str]:
    """Train the same run as one process and as one process a core, in turns."""
    cores = len(os.sched_getaffinity(0))
    kinds = {f"1 process, {cores} threads": (1, cores), f"{cores} processes, 1 thread each": (cores, 1)}
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="qpref-scaling-out-") as scratch:
        recipe = _recipe(Path(scratch), steps)
        for number in range(rounds):
            for kind, (processes, threads) in kinds.items():
                run, losses[kind] = _train(recipe, Path(scratch) / f"{number}-{processes}", processes, threads)
                runs[kind].append(run)
    yield from ("## Measured", "")
    yield f"{_machine()}, load {os.getloadavg()[0]:.1f} at the end; {rounds} runs of {steps} steps each, the best."
    yield from ("", "| | pairs / s | pairs / CPU s | peak MiB of a process |", "|---|---|---|---|")
    for kind, found in runs.items():
        speed, work = max(run["speed"] for run in found), max(run["work"] for run in found)
        yield f"| {kind} | {speed:.2f} | {work:.2f} | {statistics.median(run['mib'] for run in found):.0f} |"
    one, many = ({key: max(run[key] for run in found) for key in ("speed", "work")} for found in runs.values())
    first, second = losses.values()
    apart = max(abs(a - b) for a, b in zip(first, second, strict=True))
    yield ""
    wall, cpu = (many[key] / one[key] for key in ("speed", "work"))
    yield f"{wall:.2f} times the pairs per second, {cpu:.2f} times those per CPU second."
    yield f"The losses of the steps differ by {apart:.1e} at most."


def _recipe(scratch: Path, steps: int) -> Path:
    shape = replace(SHAPES["135M"], num_hidden_layers=6)
    base = make_base(shape, scratch / "base")
    with (scratch / "pairs.jsonl").open("w") as file:
        for pair in make_pairs(Workload(name="short", prompt=80, response=120), 16 * steps, shape.vocab_size):
            sides = {"prompt": pair.prompt, "chosen": pair.chosen[:-1], "rejected": pair.rejected[:-1]}
            file.write(json.dumps({side: text(tokens) for side, tokens in sides.items()}) + "\n")
    recipe = {
        "model": {"base": str(base), "device": "cpu"},
        "data": {"train": str(scratch / "pairs.jsonl")},
        "loss": {"name": "dpo"},
        "reference": {"cache": False},
        "train": {"learning_rate": 1e-4, "tokens_per_microbatch": 1024, "gradient_checkpointing": False},
        "sinks": [],
    }
    path = scratch / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    return path


def _train(recipe: Path, output: Path, processes: int, threads: int) -> tuple[dict[str, float], list[float]]:
    """Run `qpref train` in processes of its own; returns its speed, and the loss of each step."""
    launch = [sys.executable, "-m", "qpref"]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m",
                  "qpref"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    with (output.with_suffix(".log")).open("w+") as log:
        command = [*launch, "train", str(recipe), "--output", str(output)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        seen = _watch(process, output / "metrics.jsonl")
        if process.wait():
            log.seek(0)
            raise RuntimeError(f"{' '.join(launch)}: {process.returncode}\n{log.read()[-3000:]}")
    losses = [row["loss"] for row in _rows(output / "metrics.jsonl")]
    first, last = seen[min(seen)], seen[max(seen)]
    pairs = 16 * (max(seen) - min(seen))
    result = json.loads((output / "result.json").read_text())
    run = {"speed": pairs / (last[0] - first[0]), "work": pairs / (last[1] - first[1]),
           "mib": result["peak_bytes"]["resident"] / 2**20}  # fmt: skip
    return run, losses


def _watch(process: subprocess.Popen[bytes], metrics: Path) -> dict[int, tuple[float, float]]:
    """Note wall and CPU seconds of a process and its descendants when each step's row appears."""
    seen: dict[int, tuple[float, float]] = {}
    while process.poll() is None:
        steps = len(_rows(metrics))
        if steps and steps not in seen:
            seen[steps] = time.perf_counter(), _cpu_seconds(process.pid)
        time.sleep(0.02)
    return seen


def _rows(metrics: Path) -> list[dict[str, float]]:
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["split"] == "train"]


def _cpu_seconds(root: int) -> float:
    """Sum the CPU seconds of a living process and its descendants, by /proc/PID/stat (proc(5): fields 4, 14 and 15).

    torchrun's workers have sessions of their own, so a session wouldn't hold all.
    """
    parents, seconds = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
            seconds[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return sum(seconds[each] for each in parents if _descends(each, root, parents))


def _descends(process: int | None, root: int, parents: Mapping[int, int]) -> bool:
    while process is not None and process != root:
        process = parents.get(process)
    return process == root


def _machine() -> str:
    found = machine.describe(len(os.sched_getaffinity(0)))
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "bitsandbytes"))
    return f"{found['cpu']}, {found['cores']} cores; {versions}"


if __name__ == "__main__":
    main()
