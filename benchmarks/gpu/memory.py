"""Memory: the libraries' share, a real model's run, and large models under the limits of smaller cards."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.device import GIB
from benchmarks.gpu.runs import longest_first, qpref_command, write_recipe, write_rows
from benchmarks.pairs import WORKLOADS, make_pairs

ROOT = Path(__file__).parents[2]
SHAPES = ("1B", "7B", "8B")
LIMITS_GIB = (8, 12, 16, 24)
STEPS, BATCH = 6, 4
CASE_SECONDS = 150
AT_ONCE = 6
"""Processes that share the GPU: the allocator of each has its own limit, and nothing here is timed."""


def contexts(context: Context) -> None:
    """Measure the process's bytes outside the allocator, as CUDA and the libraries start."""
    taken = context.device.allocate_contexts()
    context.report(**{name: size / GIB for name, size in taken.items()})
    first, most = next(iter(taken.values()), 0), max(taken.values(), default=0)
    (context.scratch / "contexts.json").write_text(json.dumps([first, most - first]))


def bases(context: Context) -> None:
    """Make the NF4 bases that the next stages and scripts share."""
    for name in SHAPES:
        before = time.perf_counter()
        folder = context.base(context.shape(name))
        size = sum(path.stat().st_size for path in folder.iterdir())
        context.report(base=name, gib=size / GIB, seconds=time.perf_counter() - before)


def real(context: Context) -> None:
    """Train, evaluate and merge the quickstart's model, or the one of --model."""
    run, out = context.scratch / "real", context.scratch / "merged"
    recipe = context.pick(lambda: ROOT / "recipes/quickstart.toml", lambda: _tiny_recipe(context))()
    model = ["--set", f"model.base={context.model}"] if context.model else []
    device = ["--set", f"model.device={context.device.name}"]
    commands = {
        "train": qpref_command("train", recipe, *model, *device, "--output", run),
        "eval": qpref_command("eval", run),
        "merge": qpref_command("merge", run, out),
    }
    for name, command in commands.items():
        before = time.perf_counter()
        done = command.run()
        row: dict[str, Any] = {"command": name, "seconds": time.perf_counter() - before, "status": done.returncode}
        if done.returncode:
            context.report(**row, ok=False, error=done.stderr[-2000:])
            return
        if name == "train":
            row |= {"result": _read(run / "result.json"), "heldout": _last_heldout(run)}
        context.report(**row, ok=True, output=done.stdout.splitlines()[-12:])


def _tiny_recipe(context: Context) -> Path:
    shape = context.shape("1B")
    pairs = make_pairs(WORKLOADS["tiny"], 12, shape.vocab_size)
    rows, heldout = (
        write_rows(context.scratch / f"{name}.jsonl", part)
        for name, part in (("train", pairs[:8]), ("held", pairs[8:]))
    )
    path, train = context.scratch / "real.toml", {"batch_size": 4, "learning_rate": 1e-3}
    return write_recipe(path, context.base(shape), rows, context.device.name, train=train, heldout=heldout)


def _last_heldout(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held = [row for row in rows if row.get("split") == "eval"]
    return {
        key: held[-1][key] for key in ("eval_rewards/accuracies", "eval_rewards/margins") if held and key in held[-1]
    }


@dataclass(frozen=True, slots=True)
class _Outside:
    """Bytes of the process that the allocator doesn't know."""

    context: int
    libraries: int


@dataclass(frozen=True, slots=True)
class _Case:
    """A model under a card's limit."""

    shape: str
    gib: int
    expandable: bool

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.gib}-{'expandable' if self.expandable else 'fixed'}"


def caps(context: Context) -> None:
    """Train six steps, the longest rows first, under each limit: what was planned, allocated and reserved.

    The run is given the card's memory less a CUDA context, as free memory is, and the allocator that less the bytes of
    the libraries. `reserve_needed` is what the plan's reserve would have had to be: the allocator's reserved memory and
    the libraries, less the plan without its reserve. A model that doesn't fit has to say so, with exit code 5.
    """
    outside = _Outside(*(_read(context.scratch / "contexts.json") or (0, 0)))
    shapes, limits = context.pick(SHAPES, SHAPES[:1]), context.pick(LIMITS_GIB, LIMITS_GIB[:1])
    # A stage may be stopped: the setting that qpref chooses comes first.
    cases = [_Case(shape, gib, expandable) for expandable, shape, gib in product((True, False), shapes, limits)]
    folder = context.folder("caps")
    for shape in shapes:
        context.base(context.shape(shape))
        _rows(context, shape, folder)
    needed = []
    with ThreadPoolExecutor(max_workers=context.pick(AT_ONCE, 2)) as pool:
        for row in _finished(pool, context, cases, folder, outside):
            context.report(**row)
            needed.append(row.get("reserve_needed_gib"))
    known = [each for each in needed if each is not None]
    context.report(reserve_that_sufficed_everywhere_gib=max(known, default=None))


def _finished(
    pool: ThreadPoolExecutor, context: Context, cases: list[_Case], folder: Path, outside: _Outside
) -> Iterator[dict[str, Any]]:
    from concurrent.futures import as_completed

    futures = {pool.submit(_run_case, context, case, folder, outside): case for case in cases}
    for future in as_completed(futures):
        case = futures[future]
        yield {"shape": case.shape, "limit_gib": case.gib, "expandable": case.expandable} | future.result()


def _rows(context: Context, shape: str, folder: Path) -> Path:
    path = folder / f"{shape}.jsonl"
    if not path.exists():
        workload = context.pick(WORKLOADS["2k pairs"], WORKLOADS["tiny"])
        pairs = make_pairs(workload, STEPS * BATCH, context.shape(shape).vocab_size)
        write_rows(path, longest_first(pairs, BATCH))
    return path


def _run_case(context: Context, case: _Case, folder: Path, outside: _Outside) -> dict[str, Any]:
    run, report = folder / case.name, folder / f"{case.name}.json"
    limit = case.gib * GIB - outside.context
    recipe = write_recipe(
        folder / f"{case.name}.toml", context.base(context.shape(case.shape)), _rows(context, case.shape, folder),
        context.device.name, memory=f"{limit // 2**20}MiB", train={"batch_size": BATCH, "learning_rate": 1e-5},
    )  # fmt: skip
    command = qpref_command(
        "train", recipe, "--output", run, cap=f"{(limit - outside.libraries) / GIB:.3f}", report=report
    )
    # torch before 2.10 knows the second name alone.
    setting = f"expandable_segments:{case.expandable}"
    try:
        done = command.run(CASE_SECONDS, {"PYTORCH_ALLOC_CONF": setting, "PYTORCH_CUDA_ALLOC_CONF": setting})
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"no end after {CASE_SECONDS} s"}
    return {"free_gib": limit / GIB} | _outcome(done, run, report, outside.libraries)


def _outcome(done: subprocess.CompletedProcess[str], run: Path, report: Path, libraries: int) -> dict[str, Any]:
    warnings = [line for line in done.stderr.splitlines() if "out of memory" in line]
    row: dict[str, Any] = {"status": done.returncode, "ok": done.returncode in (0, 5), "repeats": len(warnings)}
    row |= {f"process_{name}": value for name, value in (_read(report) or {}).items() if "reserved" not in name}
    found = re.search(r"([\d.]+) GiB predicted, ([\d.]+) GiB available", done.stderr)
    row["fits_by_plan"] = found is None
    if done.returncode:
        return row | {"error": done.stderr.strip().splitlines()[-4:]}
    described, result = _read(run / "run.json"), _read(run / "result.json")
    row |= {name: described[name] for name in ("recomputed_layers", "attention")}
    row |= {name: result[name] for name in ("tokens_per_microbatch", "steps", "tokens", "seconds")}
    planned, peak = (described["forecast"] or {}).get("memory"), result["peak_bytes"]
    allocated, reserved = (peak.get(name, peak["resident"]) for name in ("allocated", "reserved"))
    row |= {"allocated_gib": allocated / GIB, "reserved_gib": reserved / GIB}
    if planned:
        used = planned["total"] - planned["reserve"]
        row |= {
            "planned_gib": planned["total"] / GIB,
            "planned_without_reserve_gib": used / GIB,
            "allocated_over_plan_percent": 100 * (allocated / used - 1),
            "reserve_needed_gib": (reserved + libraries - used) / GIB,
        }
    return row


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
